"""Whether robust networks transfer better, in miniature: ``python -m bench.sources CIFAR10.npz`` (arXiv 2007.08489).

Networks of two widths are pre-trained on the source classes of CIFAR-10 with attacks of several radii, without an
attack, and on noise, all with one seed and as many steps. Each is transferred to 500 clean images of each target class,
as fixed features (the head alone is trained) and as a full network, and tested on all clean target images: as they are,
and shrunk to 16 x 16 and enlarged again, as a control for how fine the images are.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from bench.harness import RESULTS, keep
from bench.header import ROOT
from bench.transfer import AMP, subset
from twins_fast.evaluation.results import markdown
from twins_fast.models import CifarResNet, register
from twins_fast.train.pictures import pyplot, save
from twins_fast.train.recipe import Recipe
from twins_fast.train.recipes import TARGET_CLASSES, get_recipe
from twins_fast.train.run import run_recipe
from twins_fast.train.run_folder import RunFolder

NAME = "sources"
FOLDER = ROOT / "runs" / NAME
RESULT = RESULTS / f"{NAME}.json"
PICTURE = ROOT / "docs" / "results" / "sources.png"
RADII = {16: (0, 1, 2, 4, 8), 8: (0, 2, 8)}  # width -> eps * 255
NOISE = 8  # eps * 255 of uniform noise
PRETRAINING, TRANSFER, SHRUNK = 8, 10, 16  # epochs; epochs; pixels
WAYS = {"fixed features": "linear-probe", "full network": "standard"}


def pretrained(width: int, name: str, data: Path) -> Path:
    """The run folder of a source network; ``name`` is its eps * 255, or noise."""
    recipe = get_recipe("mini-pretrain", network={"arch": architecture(width)}, optimizer={"epochs": PRETRAINING})
    eps = (NOISE if name == "noise" else int(name)) / 255
    recipe = recipe.replaced(
        method="noise" if name == "noise" else "at" if eps else "standard",
        attack={"eps": eps or 1 / 255, "alpha": eps / 2},
    )
    return trained(recipe, FOLDER / f"w{width}" / name, data)


def architecture(width: int) -> str:
    return f"cifar-resnet18-w{width}"


def transferred(source: Path, way: str, data: Path, folder: Path) -> float:
    """Clean accuracy on the target."""
    arch = RunFolder(source).load_config()[0].network.arch
    recipe = get_recipe(
        "mini",
        method=WAYS[way],
        data={"dataset": "npz", "classes": list(TARGET_CLASSES)},
        network={"arch": arch, "checkpoint": str(source / "best.safetensors")},
        optimizer={"epochs": TRANSFER, "milestones": [TRANSFER // 2, 4 * TRANSFER // 5]},
        evaluation={"before": False, "every": TRANSFER, "steps": 0},
        run={"baselines": [], "amp": AMP},
    )
    trained(recipe, folder, data)
    return RunFolder(folder).read_result()["after"]["clean"]


def trained(recipe: Recipe, folder: Path, data: Path) -> Path:
    """Whatever an earlier call has done is not done again."""
    run_recipe(recipe, RunFolder(folder), str(data), "cpu", resume=True)
    return folder


def shrunk(data: Path) -> Path:
    """The same images without what 16 x 16 pixels cannot hold."""
    path = data.with_name(f"{data.stem}-shrunk.npz")
    if not path.exists():
        with np.load(data) as file:
            arrays = dict(file)
        for part in ("train", "test"):
            images = torch.from_numpy(arrays[part]).permute(0, 3, 1, 2).float()
            small = F.interpolate(images, (SHRUNK, SHRUNK), mode="bilinear", antialias=True)
            large = F.interpolate(small, images.shape[2:], mode="bilinear")
            arrays[part] = large.round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
        np.savez(path, **arrays)
    return path


def measure(source_data: Path) -> dict:
    small = subset(source_data, 500)
    rows: list[dict] = []
    for width, radii in RADII.items():
        if width != 16:
            register(architecture(width), partial(CifarResNet, width=width))
        for name in (*map(str, radii), *(["noise"] if width == 16 else [])):
            source = pretrained(width, name, source_data)
            accuracy = RunFolder(source).read_result()["best"]
            row = {"width": width, "source": name, "clean": accuracy["clean"], "robust": accuracy["robust"]}
            for pixels, data in (("whole", small), ("shrunk", shrunk(small))):
                for way in WAYS:
                    folder = FOLDER / f"w{width}" / f"{name}-{way.split()[0]}-{pixels}"
                    row[f"{way}, {pixels}"] = transferred(source, way, data, folder)
            rows.append(row)
            record = keep(RESULT, NAME, rows=rows)
    return record


def table(record: dict) -> str:
    columns = [name for name in record["rows"][0] if name not in ("width", "source")]
    lines = [["width", "eps of the source", *columns]]
    for row in record["rows"]:
        eps = row["source"] if row["source"] == "noise" else f"{row['source']}/255"
        lines.append([str(row["width"]), eps, *(f"{100 * row[name]:.1f} %" for name in columns)])
    return markdown(lines)


def draw(record: dict) -> None:
    """Accuracy on the target over eps of the source, for each way and width."""
    figure, axes = pyplot().subplots(1, 2, figsize=(9, 3.6), sharex=True)
    for axis, way in zip(axes, WAYS, strict=True):
        for width in RADII:
            rows = [row for row in record["rows"] if row["width"] == width and row["source"] != "noise"]
            for pixels, style in (("whole", "-o"), ("shrunk", "--s")):
                points = [100 * row[f"{way}, {pixels}"] for row in rows]
                axis.plot([int(row["source"]) for row in rows], points, style, label=f"width {width}, {pixels}")
        axis.set(title=way, xlabel="eps of the source, 1/255", ylabel="clean accuracy on the target, %")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    save(figure, PICTURE)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m bench.sources", description=__doc__)
    parser.add_argument("source", type=Path, help="CIFAR-10 as an .npz file")
    record = measure(parser.parse_args(arguments).source.resolve())
    draw(record)
    print(table(record))


if __name__ == "__main__":
    main()
