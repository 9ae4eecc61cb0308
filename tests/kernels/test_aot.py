"""The Triton kernels compiled ahead of time, for architectures that need not be here."""

import re

import pytest

from bench import kernels
from tests.kernels.interpreter import RELEASES, compiles_ahead, host
from twins_fast.kernels import aot

pytestmark = [
    host,
    compiles_ahead,
    pytest.mark.parametrize(
        "architecture", [pytest.param(arch, marks=[pytest.mark.slow] * (arch != 90)) for arch in aot.ARCHS]
    ),
]


def test_kernels_spill_nothing_and_move_16_bytes(architecture):
    rows = kernels.triton_kernels((architecture,))
    attack = {"pointwise", "convolution", "pool", "pool_backward", "pixels"}
    assert {row.name for row in rows} == {"moments", "apply", "sums", "apply_backward", *attack}
    spilling = [row for row in rows if row.spilled_bytes]
    if RELEASES["triton"] == (3, 5) and architecture == 90:
        assert len(spilling) == 3 and all(row.spilled_bytes <= 16 for row in spilling)
    else:
        assert spilling == []
    aligned = [row for row in rows if " aligned" in row.variant and row.name != "pixels"]  # of three channels
    assert aligned and all(row.load_bits == 128 for row in aligned)
    reductions = [row for row in aligned if row.name == "moments" or (row.name == "sums" and "both" in row.variant)]
    assert all(row.store_bits == 128 for row in aligned if row not in reductions)  # which write [slabs, 2 or 4, C] only


def test_convolutions_of_images_and_of_large_tensors_spill_nothing(architecture):
    first = [step for step in aot.ATTACK_STEPS if step.startswith("first convolution")]
    large = ["convolution 128x128x64", "convolution backward 128x256x64", "first convolution backward 128x64x64"]
    steps = [("bfloat16", "aligned", step) for step in first] + [("float16", "aligned 64-bit", step) for step in large]
    rows = aot.table([aot.AttackVariant(*step) for step in steps], (architecture,))
    assert rows and [row["variant"] for row in rows if row["spills"]] == []
    for row in rows:
        image = row["variant"].startswith("first convolution") and "backward" not in row["variant"]
        copies = set(re.findall(r"cp\.async\.c[ag]\.shared\.global .*?, (0x\d+|\d+), ", row["ptx"]))
        assert {int(size, 0) for size in copies} == ({4, 16} if image else {16})
