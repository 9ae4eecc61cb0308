"""What runs the steps of a plan: PyTorch (the reference), the C++ kernels, the Triton and CUDA kernels."""

from __future__ import annotations

import importlib.util

import torch

from twins_fast.attacks.engine.executors.cpu import CpuExecutor
from twins_fast.attacks.engine.executors.torch import TorchExecutor
from twins_fast.ops import native


def executor_for(dtype: torch.dtype, device: torch.device) -> TorchExecutor:
    if device.type == "cuda" and importlib.util.find_spec("triton"):
        from twins_fast.attacks.engine.executors.cuda import CudaExecutor  # imports Triton

        return CudaExecutor(dtype, device)
    has_kernels = device.type == "cpu" and native._C is not None
    return (CpuExecutor if has_kernels else TorchExecutor)(dtype, device)
