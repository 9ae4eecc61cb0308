"""What an installed package has to do where there is no compiler: ``python smoke.py``, by itself."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch

import twins_fast
from twins_fast import PGD
from twins_fast.ops import native
from twins_fast.ops.backend import use_backend
from twins_fast.qualify.checks import AGREEING, TwinCase, network

assert Path(twins_fast.__file__).is_relative_to(sysconfig.get_path("purelib")), twins_fast.__file__
assert not any(map(shutil.which, ("g++", "c++", "gcc", "cc", "clang", "nvcc", "ninja"))), "there is a compiler"
assert native._C is not None, "no compiled module"
images, labels = torch.rand(5, 3, 36, 36), torch.arange(5)
for isa in native._C.cpu_isas:
    native.cpu_isa = isa
    for dtype in (torch.float32, torch.bfloat16):
        with use_backend("cpp"):
            errors = TwinCase((5, 31, 7, 3), dtype, torch.channels_last, 3, True, True, "cpu", 0).errors()
        assert all(error <= 1 for error in errors.values()), (isa, dtype, errors)
        amp = None if dtype == torch.float32 else dtype
        planned, eager = (
            PGD(network(), steps=1, random_start=False, engine=engine, amp_dtype=amp)(images, labels)
            for engine in ("plan", "eager")
        )
        same = (planned == eager).float().mean().item()
        assert same > AGREEING[dtype], (isa, dtype, same)
print("instruction sets:", ", ".join(native._C.cpu_isas), flush=True)
TRAINING = "train --recipe mini --epochs 1 --attack.steps 1 --evaluation.images 64 --run.baselines= --run run"
for words in ("info", TRAINING):
    subprocess.run([sys.executable, "-m", "twins_fast", *words.split()], check=True)
