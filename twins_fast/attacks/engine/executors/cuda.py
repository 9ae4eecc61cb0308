"""The executor of the Triton and CUDA kernels, convolutions by cuDNN or by Triton.

In Triton's interpreter they also run on CPU tensors, for tests.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from twins_fast.attacks.engine.convolution import Convolution
from twins_fast.attacks.engine.executors.pixels import Input, sources_of
from twins_fast.attacks.engine.executors.product import directions
from twins_fast.attacks.engine.executors.torch import (
    Run,
    State,
    Tensors,
    TorchConvolution,
    TorchExecutor,
    bytes_of_bits,
    dense,
    plain_mean,
    rows_of,
    window_of,
)
from twins_fast.attacks.engine.plan import Value
from twins_fast.devices import capturing
from twins_fast.kernels import attack, tiles, tuning
from twins_fast.ops import native
from twins_fast.ops.native import check_status, dtype_name, pointer_of

Algorithm = attack.ConvolutionConfig | None  # the block sizes of our kernel; None: the library

# (device name, geometry, dtype, direction, images as a power of two) -> the fastest, as measured
_algorithms: dict[tuple, Algorithm] = {}


class CudaConvolution(TorchConvolution):
    """A convolution by cuDNN or, if that is faster, by our kernel with all around it fused."""

    def __init__(self, geometry: Convolution, dtype: torch.dtype, device: torch.device):
        super().__init__(geometry, dtype, device)
        self.device = device
        # Float32 would not use tensor cores.
        self.directions = (None, None) if dtype == torch.float32 else directions(geometry, device)
        self._algorithm: list[Algorithm] = [None, None]

    def fold(self, weight: Tensor, scale: Tensor | None) -> None:
        super().fold(weight, scale)
        for direction in self.directions:
            if direction is not None:
                direction.pack(self.weight)

    @property
    def runs(self) -> str:
        library = "cuDNN" if self.device.type == "cuda" else "PyTorch"
        return ", ".join(dict.fromkeys("Triton" if algorithm else library for algorithm in self._algorithm))

    def algorithm(self, backward: bool, launch: Callable[..., object], tensors: list[Tensor | None]) -> Algorithm:
        """The fastest one, measured with ``launch(algorithm, *tensors)`` if it is not known and may be measured now."""
        if self.device.type == "cuda" and not torch.are_deterministic_algorithms_enabled():
            name = torch.cuda.get_device_name(self.device)
            key = (name, self.geometry, self.dtype, backward, tiles.power_of_2(len(tensors[0])))
            if key not in _algorithms and not capturing(self.device):
                with torch.cuda.device(self.device):
                    _algorithms[key] = tuning.fastest(self.candidates(backward), launch, tensors)
            self._algorithm[backward] = _algorithms.get(key)
        return self._algorithm[backward]

    def candidates(self, backward: bool) -> list[Algorithm]:
        configs = attack.convolution_configs(torch.cuda.get_device_capability(self.device))
        fitted = (attack.fitted(config, self.directions[backward].product) for config in configs)
        return [None, *dict.fromkeys(fitted)]


class CudaExecutor(TorchExecutor):
    """Every step but convolutions in Triton or CUDA, ReLU masks of one bit."""

    name = "Triton"
    argmax_bytes = 1

    def __init__(self, dtype: torch.dtype, device: torch.device):
        super().__init__(dtype, device)
        self._tables: dict[tuple, attack.Tables] = {}

    def mask_bytes(self, value: Value) -> int:
        return bytes_of_bits(value)

    def convolution(self, geometry: Convolution) -> CudaConvolution:
        return CudaConvolution(geometry, self.dtype, self.device)

    def input(self, steps: list[tuple], shape: tuple[int, ...], resized: tuple[int, int] | None) -> Input:
        if len(steps) > attack.MOST_STEPS or shape[0] > attack.MOST_CHANNELS:
            return Input(steps, shape, resized)
        tables = None
        if resized is not None:
            key = (shape, resized)
            if key not in self._tables:  # never while a graph is captured: a warm-up comes first
                sources = (sources_of(small, big) for small, big in zip(shape[1:], resized, strict=True))
                self._tables[key] = attack.Tables.of(*sources, shape[1:], self.device)
            tables = self._tables[key]
        return KernelInput(steps, shape, resized, tables, self.device)

    def conv(self, state: State, t: Tensors) -> Run:
        def library(x: Tensor, y: Tensor, other: Tensor | None, mask: Tensor | None) -> None:
            super(CudaExecutor, self).conv(state, dict(x=x, y=y, other=other, mask=mask))()

        def kernel(x: Tensor, y: Tensor, other: Tensor | None, mask: Tensor | None, *how: Any) -> None:
            attack.convolution(x, y, *how, shift=state.shift, other=other, bits=mask)

        return self._convolve(state.convolution, False, library, kernel, t["x"], t["y"], t["other"], t["mask"])

    def conv_backward(self, state: State, t: Tensors) -> Run:
        def library(g: Tensor, dx: Tensor, other: Tensor | None, mask: Tensor | None) -> None:
            super(CudaExecutor, self).conv_backward(state, dict(g=g, dx=dx, other=other, mask=mask))()

        def kernel(g: Tensor, dx: Tensor, other: Tensor | None, mask: Tensor | None, *how: Any) -> None:
            attack.convolution(g, dx, *how, other=other, mask=mask)

        direction, tensors = state.convolution.directions[True], (t["g"], t["dx"], t["other"], t["mask"])
        if direction is not None and direction.product.block_row and any(t is not None for t in tensors[2:]):
            return partial(library, *tensors)  # blocks of pixels have no place for another gradient or a mask
        return self._convolve(state.convolution, True, library, kernel, *tensors)

    def _convolve(
        self,
        convolution: CudaConvolution,
        backward: bool,
        library: Callable[..., None],
        kernel: Callable[..., None],
        *tensors: Tensor | None,
    ) -> Run:
        """The library or, where that is faster, our kernel."""
        direction = convolution.directions[backward]
        if direction is None:
            return partial(library, *tensors)

        def launch(algorithm: Algorithm, *tensors: Tensor | None) -> None:
            if algorithm is None:
                library(*tensors)
            else:
                kernel(*tensors, direction.product, algorithm)

        return partial(launch, convolution.algorithm(backward, launch, tensors), *tensors)

    def affine(self, state: State, t: Tensors) -> Run:
        options = dict(scale=state.scale, shift=state.shift, other=t["other"], bits=t["mask"])
        return partial(attack.pointwise, t["x"], t["y"], rows_of(t["y"]), **options)

    def affine_backward(self, state: State, t: Tensors) -> Run:
        options = dict(scale=state.scale, other=t["other"], mask=t["mask"])
        return partial(attack.pointwise, t["g"], t["dx"], rows_of(t["dx"]), **options)

    def max_pool(self, state: State, t: Tensors) -> Run:
        return partial(attack.pool, t["x"], t["y"], window_of(state, t["x"], t["y"]), t["argmax"])

    def max_pool_backward(self, state: State, t: Tensors) -> Run:
        window = window_of(state, t["dx"], t["g"])
        return partial(attack.pool_backward, t["g"], t["dx"], window, t["argmax"], t["other"], t["mask"])

    def avg_pool(self, state: State, t: Tensors) -> Run:
        window = _mean_of(state, t["x"], t["y"])
        return super().avg_pool(state, t) if window is None else partial(attack.pool, t["x"], t["y"], window, None)

    def avg_pool_backward(self, state: State, t: Tensors) -> Run:
        window = _mean_of(state, t["dx"], t["g"])
        if window is None:
            return super().avg_pool_backward(state, t)
        return partial(attack.pool_backward, t["g"], t["dx"], window, None, t["other"], t["mask"])

    def _finish(self, v, bias, other, mask, relu_mask, y) -> None:
        attack.pointwise(dense(v), y, rows_of(y), shift=bias, other=other, mask=mask, bits=relu_mask)


def _mean_of(state: State, x: Tensor, y: Tensor) -> tuple[int, ...] | None:
    """As :func:`window_of`; None for other sums than plain means."""
    mean = plain_mean(state)
    return None if mean is None else (*x.shape, *y.shape[2:], *mean[0], *mean[1], 0, 0)


class KernelInput(Input):
    """The input's steps in one pass: by the CUDA kernel if it was built, else by Triton's."""

    def __init__(
        self,
        steps: list[tuple],
        shape: tuple[int, ...],
        resized: tuple[int, int] | None,
        tables: attack.Tables | None,
        device: torch.device,
    ):
        self._tables = tables
        self._values = torch.zeros(attack.MOST_STEPS, attack.MOST_CHANNELS, device=device)
        self._codes = [attack.KINDS.index(kind) + 8 * (kind == "clamp" and bool(other[2])) for kind, *other in steps]
        super().__init__(steps, shape, resized)
        self.bind(device.type == "cuda" and getattr(native._C, "has_cuda", False))

    def fill(self, steps: list[tuple]) -> None:
        super().fill(steps)
        for row, (kind, *arguments) in zip(self._values, steps, strict=False):
            if kind == "clamp":
                row[0].fill_(arguments[0]), row[1].fill_(arguments[1])
            elif isinstance(arguments[0], Tensor):
                row[: self.shape[0]].copy_(arguments[0].flatten())
            else:
                row.fill_(arguments[0])

    def bind(self, compiled: bool) -> None:
        """Use the CUDA kernel, or Triton's."""
        triton = partial(attack.pixels, values=self._values, codes=self._codes, tables=self._tables)
        self._launch = self._cuda if compiled else triton

    def prepare(self, x: Tensor, out: Tensor) -> None:
        self._launch(x, out=out)

    def gradient(self, x: Tensor, gradient: Tensor) -> Tensor:
        d = torch.empty_like(x)
        self._launch(x, gradient=gradient, result=d)
        return d

    def sign_step(
        self, x: Tensor, clean: Tensor, gradient: Tensor, alpha: float, eps: float, nan: Tensor, out: Tensor
    ) -> None:
        self._launch(x, gradient=gradient, clean=clean, alpha=alpha, eps=eps, nan=nan, result=x, out=out)

    def _cuda(self, x, gradient=None, clean=None, nan=None, result=None, out=None, alpha=0.0, eps=0.0) -> None:
        tables = self._tables
        with tiles.on_device_of(x):
            status = native._C.pixels_cuda(
                len(x), *self.shape, *(tables.size if tables else self.shape[1:]),
                pointer_of(tables and tables.row_start), pointer_of(tables and tables.column_start),
                self._codes, self._values.data_ptr(), dtype_name((out if gradient is None else gradient).dtype),
                x.data_ptr(), *(pointer_of(t) for t in (gradient, clean, nan, result, out)), alpha, eps,
                torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0,  # 0: the emulator of the tests
            )  # fmt: skip
        check_status("pixels", status)
