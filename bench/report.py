"""Writes the tables and the plot of the documents from the measurements: ``python -m bench.report``."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

from bench import attack as bench_attack
from bench import coverage as bench_coverage
from bench import drop_in as bench_drop_in
from bench import dynamics as bench_dynamics
from bench import host as bench_host
from bench import imports as bench_imports
from bench import kernels as bench_kernels
from bench import libraries as bench_libraries
from bench import sources as bench_sources
from bench import transfer as bench_transfer
from bench import twin_bn as bench_twin_bn
from bench.harness import RESULTS
from bench.header import ROOT
from bench.mini import RESULT as MINI
from bench.zoos import ZOOS
from twins_fast.train.assets import NETWORK
from twins_fast.train.tables import result_table
from twins_fast.verdicts import PASSED, SHIPPED

README = ROOT / "README.md"
DOCUMENTS = (README, *sorted((ROOT / "docs").glob("**/*.md")))
SCALING_PLOT = ROOT / "docs" / "results" / "attack-scaling.png"
NOT_MEASURED = "Not measured yet."
VERSIONS = RESULTS / "cpu_versions.json"  # measured with earlier versions of the kernel


def mini() -> str:
    """What ``make train`` reaches."""
    record = json.loads(MINI.read_text())
    where = record["header"]
    return (
        f"{result_table(record['results'])}\n\n"
        f"`{record['command']}`, seed {record['results'][0]['seed']}: {record['seconds']:.0f} s in all "
        f"on {where['machine']} ({where['threads']} threads, {where['instructions']}), torch {where['torch']}."
    )


def pretrain() -> str:
    """What the embedded network reached on its own classes."""
    record = json.loads(NETWORK.with_suffix(".json").read_text())
    rows = [
        f"| {name} ({record[name]['epochs']} epochs) | {100 * record[name]['clean']:.1f} % "
        f"| {100 * record[name]['robust']:.1f} % | {record[name]['minutes']:.0f} min |"
        for name in ("robust", "standard")
    ]
    images, steps = record["robust"]["images"], record["recipe"]["evaluation"]["steps"]
    return "\n".join(
        [
            f"| {images} source test images | clean | PGD-{steps} | training |",
            "|---|---|---|---|",
            *rows,
            "",
            f"`{record['command']}`, seed {record['recipe']['run']['seed']}, {record['threads']} threads, "
            f"torch {record['torch']}.",
        ]
    )


def twin_bn() -> str:
    """Two-wing batch norm against its peers, over a whole ResNet-50: one part per device."""
    return parts(
        bench_twin_bn.NAME,
        lambda record: f"{bench_twin_bn.summary_table(record['workloads'], record['options'])}\n\n{source(record)}",
    )


def twin_bn_layers() -> str:
    """The same layer by layer, forward and backward: one table per device."""
    return parts(bench_twin_bn.NAME, lambda record: bench_twin_bn.layer_table(record["workloads"]))


def cpu_versions() -> str:
    """The C++ kernel and earlier versions of it."""
    record = json.loads(VERSIONS.read_text())
    where, versions = record["header"], record["versions"]
    columns = [name for name in versions[0] if name != "version"]
    lines = [
        "| " + " | ".join(["version", *columns]) + " |",
        "|---|" + "---|" * len(columns),
        *(f"| {row['version']} | " + " | ".join(f"{row[name]:.1f} ms" for name in columns) + " |" for row in versions),
    ]
    return "\n".join([*lines, "", f"{record['what']}; {where['machine']}, torch {where['torch']}."])


def kernels() -> str:
    """Resources of the compiled GPU kernels."""
    record = json.loads(bench_kernels.RESULT.read_text())
    where = record["header"]
    return f"{bench_kernels.table(record['kernels'])}\n\nnvcc {record['nvcc']}, Triton {where['triton']}."


def speed() -> str:
    """One attack step of the published code, of the fastest ``torch.compile``, and of this package."""
    names = ("resnet50-224", "resnet18-32")

    def table(record: dict) -> str:
        rows = [row for row in record["workloads"] if row["name"] in names]
        lines = [["ms per step", *(f"{row['name']}, batch {row['batch']}" for row in rows)]]
        for title, own in (
            ("published code", lambda peer: peer == "published"),
            ("best `torch.compile`, bfloat16", lambda peer: peer.startswith("compile")),
            ("this package, bfloat16", lambda peer: peer == "plan-bf16"),
        ):
            lines.append([title])
            for row in rows:
                fastest = min(filter(None, (_milliseconds(row, peer) for peer in row["peers"] if own(peer))))
                lines[-1].append(f"{fastest:.0f} ({_milliseconds(row, 'published') / fastest:.1f} x)")
        return f"{markdown(lines)}\n\n{source(record)}"

    return parts(bench_attack.ATTACK, table)


def imports() -> str:
    """What importing the package adds to importing PyTorch."""
    record = _read(bench_imports.RESULT)
    return f"{bench_imports.table(record['times'])}\n\n{source(record)}"


def dynamics() -> str:
    """What watching a run costs."""
    record = _read(bench_dynamics.RESULT)
    return f"{bench_dynamics.table(record['workloads'])}\n\n{source(record)}"


def devices() -> str:
    """The GPUs whose verdicts come with the package."""
    lines = [["device", "sm", "driver", "passed", "not"]]
    for path in sorted(SHIPPED.glob("*.json")):
        content = _read(path)
        key, found = content["key"], content["verdicts"]
        passed = [subject for subject, (outcome, *_) in found.items() if outcome == PASSED]
        others = [f"{subject} ({outcome})" for subject, (outcome, *_) in found.items() if outcome != PASSED]
        capability = "".join(map(str, key["capability"]))
        lines.append([key["device"], capability, key["driver"], ", ".join(passed), ", ".join(others)])
    return markdown(lines) if len(lines) > 1 else "No GPU has been measured yet: none of these kernels has run on one."


def host() -> str:
    """What an attack call takes beside its kernels."""
    record = _read(bench_host.RESULT)
    return f"{bench_host.table(record['milliseconds'])}\n\n{source(record)}"


def attack() -> str:
    """One attack step of each peer, and how much faster than the published code it is."""
    return parts(bench_attack.ATTACK, lambda record: f"{_against_first(record, 'ms per step')}\n\n{source(record)}")


def attack_training() -> str:
    """The whole training step."""
    title = "TWINS-AT step, ms"
    return parts(bench_attack.TRAINING, lambda record: f"{_against_first(record, title)}\n\n{source(record)}")


def _against_first(record: dict, title: str) -> str:
    """Milliseconds of each peer, and in brackets how much faster than the first one; a column per workload."""
    rows = record["workloads"]
    lines = [[title, *(f"{row['name']}, batch {row['batch']}" for row in rows)]]
    for name in rows[0]["peers"]:
        lines.append([name])
        for row in rows:
            first, own = (_milliseconds(row, peer) for peer in (next(iter(row["peers"])), name))
            speed_up = f" ({first / own:.1f} x)" if first and own else ""
            lines[-1].append(f"{own:.1f}{speed_up}" if own else row["peers"][name]["status"])
    return markdown(lines)


def _milliseconds(row: dict, name: str) -> float | None:
    """Median of one attack step, or of the whole training step; None for a peer that was not timed."""
    for stage, timing in row["peers"][name].get("times", {}).items():
        return 1e3 * timing["median"] / (row["steps"] if stage == "attack" else 1)
    return None


def attack_details() -> str:
    """Each workload's peers beside the floor, with what they cost besides time."""
    return parts(bench_attack.ATTACK, lambda record: "\n\n".join(map(_details, record["workloads"])))


def _details(row: dict) -> str:
    title = f"{row['name']}, batch {row['batch']} ({row['peak']['operations'] / 1e9:.0f} GFLOP/s at most)"
    lines = [[title, "step", "times the floor", "GFLOP/s", "memory", "first call", "pixels after one step"]]
    for name, peer in row["peers"].items():
        if "times" not in peer:
            lines.append([name, f"{peer['status']}: {peer['reason']}", "", "", "", "", ""])
            continue
        timed = peer["times"]["attack"]
        more = max(0.0, peer["first_seconds"] - timed["median"])
        cells = [f"{_milliseconds(row, name):.1f} ms", f"{timed['times_floor']:.1f}"]
        peak = peer["memory"]["peak"]
        cells += [f"{timed['operations'] / 1e9:.0f}", "not measured" if peak is None else f"{peak / 1e6:.0f} MB"]
        cells += [f"{more:.1f} s more"]
        lines.append([name, *cells, f"{100 * peer['agreement']:.2f} % as published"])
    return markdown(lines)


def attack_precision() -> str:
    """What half precision costs the attack."""

    def table(record: dict) -> str:
        rows = record["workloads"]
        lines = [[f"{rows[0]['images']} real images", "robust accuracy", "loss", "pixels after one step as published"]]
        for row in rows:
            lines.append([row["name"], f"{100 * row['robust']:.1f} %", f"{row['loss']:.4f}"])
            lines[-1].append(f"{100 * row['agreement']:.2f} %")
        return f"{markdown(lines)}\n\n{source(record)}"

    return parts(bench_attack.PRECISION, table)


def attack_layers() -> str:
    """The plan, layer by layer."""

    def tables(record: dict) -> str:
        layers = [
            f"{row['name']}, batch {row['batch']}, {row['engine']}:\n\n{bench_attack.layer_table(row['layers'])}"
            for row in record["workloads"]
        ]
        return "\n\n".join([*layers, source(record)])

    return parts(bench_attack.LAYERS, tables)


def attack_scaling() -> str:
    """One step against the size of the problem, in numbers."""

    def table(record: dict) -> str:
        names = list(record["workloads"][0]["peers"])
        lines = [["", *(f"{name}, {what}" for name in names for what in ("step", "memory"))]]
        for row in record["workloads"]:
            lines.append([f"{row['axis']} {row['value']}"])
            for name in names:
                own, peer = _milliseconds(row, name), row["peers"][name]
                lines[-1] += (
                    [f"{own:.1f} ms", f"{peer['memory']['peak'] / 1e6:.0f} MB"] if own else [peer["status"]] * 2
                )
        return f"{markdown(lines)}\n\n{source(record)}"

    return parts(bench_attack.SCALING, table)


def attack_few() -> str:
    """Where few steps on few images do not pay for a plan, and what ``engine="auto"`` takes."""

    def table(record: dict) -> str:
        pairs = bench_attack.FEW_PAIRS
        lines = [
            ["network, batch, steps", *(f"{name}: {c}" for name in pairs for c in ("eager", "plan", "auto takes"))]
        ]
        for row in record["workloads"]:
            lines.append([f"{row['name'].partition(':')[0]}, {row['batch']}, {row['steps']}"])
            for precision, pair in pairs.items():
                whole = [(_milliseconds(row, peer) or 0) * row["steps"] for peer in pair]
                chosen = row["auto"][precision]
                excess = whole[chosen == "plan"] / min(whole) - 1 if all(whole) else 0
                note = f", {100 * excess:.0f} % slower" if excess > 0.05 else ""
                lines[-1] += [
                    f"{ms:.1f} ms" if ms else row["peers"][p]["status"] for ms, p in zip(whole, pair, strict=True)
                ]
                lines[-1].append(chosen + note)
        return f"{markdown(lines)}\n\n{source(record)}"

    return parts(bench_attack.FEW, table)


def libraries() -> str:
    """An iteration of each library's attacks, one table per network."""

    def tables(record: dict) -> str:
        networks = dict.fromkeys(line["name"] for line in record["workloads"])
        lines = [[line for line in record["workloads"] if line["name"] == name] for name in networks]
        return "\n\n".join([*(markdown(bench_libraries.table(part)) for part in lines), source(record)])

    return parts(bench_libraries.NAME, tables)


def libraries_autoattack() -> str:
    """AutoAttack from beginning to end."""
    return parts(
        bench_libraries.AUTOATTACK,
        lambda record: f"{markdown(bench_libraries.auto_table(record['workloads']))}\n\n{source(record)}",
    )


def drop_in() -> str:
    """Loops of other codebases, and the same loops with our lines."""
    return parts(
        bench_drop_in.NAME,
        lambda record: f"{markdown(bench_drop_in.table(record['workloads']))}\n\n{source(record)}",
    )


def coverage() -> str:
    """What the engine makes of the networks of each zoo."""
    records = _zoos()
    if not records:
        return NOT_MEASURED
    sources = [f"{name} {record['options']['version']}: {_origins(record)}" for name, record in records.items()]
    lines = bench_coverage.summary({name: record["workloads"] for name, record in records.items()})
    return "\n\n".join([markdown(lines), *sources])


def _origins(record: dict) -> str:
    """What was run last, and where and from which commits the rows are that it kept."""
    kept = Counter(f"{row['machine']}, commit {row['commit']}" for row in record["workloads"])
    return f"{source(record)} Rows: {'; '.join(f'{count} on {place}' for place, count in kept.items())}."


def coverage_reasons() -> str:
    """Why networks are not planned."""
    return _of_networks(bench_coverage.reasons)


def coverage_segments() -> str:
    """What is left to PyTorch."""
    return _of_networks(bench_coverage.in_segments)


def coverage_time() -> str:
    """A step in the networks that were timed."""
    return _by_machine(bench_coverage.time_table)


def coverage_speed() -> str:
    """The networks that were timed, in two lines for each machine."""
    return _by_machine(bench_coverage.time_summary)


def coverage_refused() -> str:
    """Every network that is not planned."""
    return _of_networks(bench_coverage.not_planned)


def _of_networks(table: Callable[[list[dict]], list[list[str]]]) -> str:
    lines = table(_networks())
    return markdown(lines) if len(lines) > 1 else NOT_MEASURED


def _by_machine(table: Callable[[list[dict]], list[list[str]]]) -> str:
    rows = _networks()
    machines = dict.fromkeys(row["machine"] for row in rows)
    tables = {machine: table([row for row in rows if row["machine"] == machine]) for machine in machines}
    texts = [f"On {machine}:\n\n{markdown(lines)}" for machine, lines in tables.items() if len(lines) > 1]
    return "\n\n".join(texts) or NOT_MEASURED


def _networks() -> list[dict]:
    return [row for record in _zoos().values() for row in record["workloads"]]


def _zoos() -> dict[str, dict]:
    """What was measured of each zoo."""
    paths = [path for zoo in ZOOS for path in measurements(f"{bench_coverage.NAME}-{zoo}")]
    return {path.stem.split("-")[1]: _read(path) for path in paths}


def transfer() -> str:
    """What each method makes of the embedded network: one table per number of training images."""
    return _of_transfers(bench_transfer.table)


def transfer_brief() -> str:
    """The first columns of that."""
    return _of_transfers(partial(bench_transfer.table, brief=True))


def transfer_pairs() -> str:
    """The same seeds with and without two wings."""
    return _of_transfers(bench_transfer.pairs_table)


def transfer_ablations() -> str:
    """Lambda, the warm-up stage and the frozen statistics."""
    return _of_transfers(bench_transfer.ablations_table)


def _of_transfers(table: Callable[[dict], str]) -> str:
    records = [_read(path) for path in sorted(measurements(bench_transfer.NAME), key=lambda path: len(path.stem))]
    filled_in = [(text, record) for record in records if (text := table(record)).count("\n") > 1]  # more than its head
    return (
        "\n\n".join(f"{text}\n\n{source(record)} {bench_transfer.origins(record)}" for text, record in filled_in)
        or NOT_MEASURED
    )


def sources() -> str:
    """What networks of other radii are worth as a start."""
    if not bench_sources.RESULT.exists():
        return NOT_MEASURED
    record = _read(bench_sources.RESULT)
    return f"{bench_sources.table(record)}\n\n{source(record)}"


def draw_scaling(target: Path = SCALING_PLOT) -> None:
    """A column for each size: milliseconds per step above, memory below."""
    import matplotlib  # slow to import, and only needed here

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(2, 4, figsize=(14, 5.6), sharex="col", layout="constrained")
    for record in map(_read, measurements(bench_attack.SCALING)):
        axes = list(dict.fromkeys(row["axis"] for row in record["workloads"]))
        for axis, column in zip(axes, panels.T, strict=True):
            rows = [row for row in record["workloads"] if row["axis"] == axis]
            for name in rows[0]["peers"]:
                timed = [row for row in rows if "times" in row["peers"][name]]
                curves = (
                    [_milliseconds(row, name) for row in timed],
                    [max(row["peers"][name]["memory"]["peak"], 1) / 1e6 for row in timed],
                )
                label = f"{name}, {record['device']}"
                for panel, values in zip(column, curves, strict=True):
                    panel.loglog([row["value"] for row in timed], values, marker="o", label=label)
            values = [row["value"] for row in rows]
            for panel in column:
                panel.set_xticks(values, map(str, values))
                low, high = panel.get_ylim()
                ticks = [n * 10**e for e in range(-2, 6) for n in (1, 2, 5) if low <= n * 10**e <= high]
                panel.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
                panel.minorticks_off()
                panel.grid(alpha=0.3)
            column[0].set_title(f"{bench_attack.SCALED}, {bench_attack.AXES[axis][0].replace(':', ', ')}")
            column[1].set_xlabel({"side": "side of the images, pixels"}.get(axis, axis))
    panels[0][0].legend()
    panels[0][0].set_ylabel("ms per attack step")
    panels[1][0].set_ylabel("memory, MB")
    figure.savefig(target, dpi=100, metadata={"Software": None})
    plt.close(figure)


def markdown(lines: list[list[str]]) -> str:
    """A table whose first line is its head."""
    head, *rest = (f"| {' | '.join(cells)} |" for cells in lines)
    return "\n".join([head, "|---" * len(lines[0]) + "|", *rest])


def parts(benchmark: str, table: Callable[[dict], str]) -> str:
    """``table`` of what was measured on each kind of device."""
    return "\n\n".join(table(_read(path)) for path in measurements(benchmark)) or NOT_MEASURED


def source(record: dict) -> str:
    """What was run, where and with what."""
    where = record["header"]
    machine = f"{where['machine']} ({where['threads']} threads, {where['instructions']})"
    if record["device"] != "cpu":
        machine = f"{where['gpus'][0]} (driver {where['driver']}, CUDA {where['cuda']})"
    return f"`{record['command']}` on {machine}, torch {where['torch']}, commit {where['commit']}."


def _read(path: Path) -> dict:
    return json.loads(path.read_text())


def measurements(benchmark: str) -> list[Path]:
    """The result files, one per kind of device."""
    return sorted(RESULTS.glob(f"{benchmark}-*.json"))


TABLES = {"mini": mini, "pretrain": pretrain, "cpu_versions": cpu_versions, "kernels": kernels}
TABLES |= {"imports": imports, "host": host, "devices": devices, "dynamics": dynamics}
TABLES |= {"twin_bn": twin_bn, "twin_bn_layers": twin_bn_layers}
TABLES |= {"speed": speed, "attack": attack, "attack_details": attack_details, "attack_training": attack_training}
TABLES |= {"attack_few": attack_few, "libraries": libraries, "libraries_autoattack": libraries_autoattack}
TABLES |= {
    "drop_in": drop_in,
    "coverage": coverage,
    "coverage_reasons": coverage_reasons,
    "coverage_segments": coverage_segments,
}
TABLES |= {"coverage_speed": coverage_speed, "coverage_time": coverage_time, "coverage_refused": coverage_refused}
TABLES |= {
    "transfer": transfer,
    "transfer_brief": transfer_brief,
    "transfer_pairs": transfer_pairs,
    "transfer_ablations": transfer_ablations,
    "sources": sources,
}
TABLES |= {"attack_precision": attack_precision, "attack_layers": attack_layers, "attack_scaling": attack_scaling}


def filled(text: str) -> str:
    """``text`` with the part between each ``<!-- table NAME -->`` and ``<!-- end -->`` written anew."""
    return re.sub(
        r"(<!-- table (\w+) -->\n).*?(<!-- end -->)",
        lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[3]}",
        text,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    for document in DOCUMENTS:
        document.write_text(filled(document.read_text()))
    if measurements(bench_attack.SCALING):
        draw_scaling()
