"""Resources of the compiled GPU kernels, measured without a GPU: ``python -m bench.kernels``.

Every CUDA and Triton kernel is compiled ahead of time for each architecture. A row says how many registers a thread
uses, how many bytes of them spill to memory, the shared memory of a block, and the widest access to global memory.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.header import ROOT, header

RESULT = ROOT / "bench" / "results" / "kernels.json"
ARCHITECTURES = (80, 90, 100)


@dataclass(frozen=True)
class Kernel:
    language: str
    name: str
    variant: str
    architecture: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    load_bits: int  # widest load from global memory
    store_bits: int


def cuda_kernels(architectures: tuple[int, ...] = ARCHITECTURES, sources: str = "*.cu") -> list[Kernel]:
    """One row per entry point of ``csrc/cuda`` and architecture; needs nvcc."""
    return [row for architecture in architectures for row in _cuda_kernels(architecture, sources)]


def _cuda_kernels(architecture: int, sources: str) -> list[Kernel]:
    rows = []
    for source in sorted((ROOT / "csrc" / "cuda").glob(sources)):
        with tempfile.TemporaryDirectory() as folder:
            command = ["nvcc", "-O3", "-std=c++17", "-Xptxas", "-v", "-keep", "-keep-dir", folder, "-cubin"]
            command += [f"-arch=sm_{architecture}", f"-I{ROOT}/csrc", f"-I{ROOT}/csrc/include", str(source)]
            compiled = subprocess.run(
                [*command, "-o", str(Path(folder, "kernels.cubin"))], capture_output=True, text=True, check=True
            )
            (ptx,) = Path(folder).glob("*.ptx")
            bodies = re.split(r"\.entry\s+", ptx.read_text())[1:]
            widths = {re.match(r"\w+", body)[0]: _widths(body) for body in bodies}
        report = re.finditer(
            r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?"
            r"Used (\d+) registers(?:.*?(\d+) bytes smem)?",
            compiled.stderr,
            re.DOTALL,
        )
        for mangled, stores, loads, registers, shared in (match.groups() for match in report):
            name, variant = _readable(mangled)
            spilled = int(stores) + int(loads)
            rows.append(
                Kernel("CUDA", name, variant, architecture, int(registers), spilled, int(shared or 0), *widths[mangled])
            )
    return rows


def _widths(ptx: str) -> tuple[int, int]:
    """Widest load from (or copy to shared memory) and store to global memory of one thread, in bits."""
    widest = []
    for access in ("ld", "st"):
        accesses = re.findall(rf"\b{access}\.global(?:\.[a-zA-Z_0-9:]+)*?(?:\.v(\d))?\.[bufs](\d+)\s", ptx)
        widest.append(max((int(count or 1) * int(bits) for count, bits in accesses), default=0))
    ahead = re.findall(r"\bcp\.async\.c[ag]\.shared\.global.*?\], (\w+)[,;]", ptx)  # bytes, to shared memory
    return max([widest[0], *(8 * int(size, 0) for size in ahead)]), widest[1]


def _readable(mangled: str) -> tuple[str, str]:
    """Name and template arguments of a kernel: ('forward_kernel', 'bfloat16, channels last, aligned')."""
    plain = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout
    name, dtype, rest = re.search(r"(\w+)<(\w+), ([^>]*)>", plain).groups()
    dtype = {"__nv_bfloat16": "bfloat16", "__half": "float16", "float": "float32"}[dtype]
    if name == "pixels_kernel":
        return name, f"{dtype}, {('prepare', 'gradient', 'step')[int(rest[-1])]}"
    last, whole, both = (argument == "true" for argument in rest.split(", "))
    layout = "channels last" if last else "contiguous"
    return name, ", ".join([dtype, layout, "aligned" if whole else "any size", *["both adaptive"] * both])


def triton_kernels(architectures: tuple[int, ...] = ARCHITECTURES) -> list[Kernel]:
    """One row per launch of two-wing batch norm with residual and ReLU, and per step of an attack; needs Triton."""
    from twins_fast.kernels import aot

    return [
        Kernel(
            "Triton",
            row["kernel"],
            f"{row['dtype']}, {row['variant']}",
            row["arch"],
            row["registers"],
            row["spills"],
            row["shared"],
            *_widths(row["ptx"]),
        )
        for row in aot.table([*aot.variants(brief=True), *aot.attack_variants(brief=True)], architectures)
    ]


def table(kernels: list[dict]) -> str:
    """Markdown; one line per kernel and variant, one column per architecture."""
    architectures = sorted({kernel["architecture"] for kernel in kernels})
    lines = [
        "| kernel | variant | load / store | shared |" + "".join(f" sm_{a} registers |" for a in architectures),
        "|---|---|---|---|" + "---|" * len(architectures),
    ]
    groups: dict[tuple, dict[int, dict]] = {}
    for kernel in kernels:
        groups.setdefault((kernel["language"], kernel["name"], kernel["variant"]), {})[kernel["architecture"]] = kernel
    for (language, name, variant), by_architecture in groups.items():
        each = list(by_architecture.values())
        access = f"{min(k['load_bits'] for k in each)} / {min(k['store_bits'] for k in each)} bit"
        shared = f"{max(k['shared_bytes'] for k in each) / 1024:.0f} KiB"
        registers = [f" {_registers(by_architecture.get(a))} " for a in architectures]
        lines.append(
            "|".join([f"| {language} `{name}` ", f" {variant} ", f" {access} ", f" {shared} ", *registers, ""])
        )
    return "\n".join(lines)


def _registers(kernel: dict | None) -> str:
    if kernel is None:
        return "not for it"  # a size of blocks that such devices do not choose
    spilled = f" ({kernel['spilled_bytes']} bytes spilled)" if kernel["spilled_bytes"] else ""
    return f"{kernel['registers']}{spilled}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.parse_args()
    if shutil.which("nvcc") is None:
        raise SystemExit("nvcc is needed and was not found")
    rows = [asdict(kernel) for kernel in cuda_kernels() + triton_kernels()]
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    nvcc = re.search(r"release ([\d.]+)", version)[1]
    content = {"header": header(), "nvcc": nvcc, "kernels": rows}
    RESULT.write_text(json.dumps(content, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
