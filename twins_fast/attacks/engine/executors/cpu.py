"""The executor of the C++ kernels: a convolution with all around it in one pass, ReLU masks of one bit."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby, product

import torch
from torch import Tensor

from twins_fast.attacks.engine.activations import KINDS
from twins_fast.attacks.engine.convolution import Convolution, axis_backward, axis_blocks, axis_forward
from twins_fast.attacks.engine.executors.pixels import Input, sources_of
from twins_fast.attacks.engine.executors.torch import (
    Run,
    State,
    Tensors,
    TorchConvolution,
    TorchExecutor,
    bytes_of_bits,
    dense,
    rows_of,
    scaled,
    window_of,
)
from twins_fast.attacks.engine.plan import Value
from twins_fast.ops import native
from twins_fast.ops.native import check_status, dtype_name, pointer_of

FEW_CHANNELS = 4  # of an image, whose gradient is computed block by block
LANES = 16
GATHERING = 0.8  # of the time of one vector's products, measured
SHARED = 80_000  # input times output channels from which on both directions share Winograd's weights
FEWEST_CHANNELS = 16  # for Winograd's transforms, or a matrix unit, to pay

_C = native._C


def _how() -> tuple[int, str]:
    """Threads and instruction set of a call."""
    return torch.get_num_threads(), native.cpu_isa


class Workspace:
    """Working memory of the convolutions of one plan, which run one after the other."""

    def __init__(self):
        self.memory = torch.empty(0, dtype=torch.uint8)

    def pointer(self, size: int) -> int:
        if self.memory.numel() < size:
            self.memory = torch.empty(size, dtype=torch.uint8)
        return self.memory.data_ptr()


class _Kernel:
    """One direction of a convolution: packed weights, or the ``other`` direction's, and the call that uses them."""

    def __init__(
        self,
        algorithm: str,
        dtype: torch.dtype,
        ends: tuple,
        phases: list,
        workspace: Workspace,
        other: _Kernel | None = None,
        groups: int = 1,
    ):
        self._conv = _C.Conv(algorithm, dtype_name(dtype), *ends, phases, native.cpu_isa, other is not None, groups)
        self._packed = torch.empty(self._conv.packed_bytes, dtype=torch.uint8) if other is None else other._packed
        self._workspace = workspace

    def pack(
        self, weight: Tensor, scale: Tensor | None, transposed: bool = False, gradient: _Kernel | None = None
    ) -> None:
        """Fold ``weight`` in, and into the ``gradient``, which is then this kernel's other direction."""
        pointers = (weight.data_ptr(), tuple(weight.shape), pointer_of(scale), transposed, self._packed.data_ptr())
        along = () if gradient is None else (gradient._conv, gradient._packed.data_ptr())
        check_status("pack", self._conv.pack(*pointers, torch.get_num_threads(), *along))

    def bind(
        self,
        x: Tensor,
        bias: Tensor | None,
        other: Tensor | None,
        mask: Tensor | None,
        y: Tensor,
        bits: Tensor | None,
    ) -> Run:
        conv, workspace = self._conv, self._workspace
        before = (len(x), x.data_ptr(), self._packed.data_ptr(), pointer_of(bias), pointer_of(other), pointer_of(mask))
        after = (y.data_ptr(), pointer_of(bits), bits is not None)

        def run():
            threads = torch.get_num_threads()
            pointer = workspace.pointer(conv.workspace_bytes(threads))
            check_status("convolution", conv.run(*before, *after, pointer, threads))

        return run


class _ImageGradient:
    """The gradient of an image of few channels, a block of pixels at a time, so that all lanes of a vector are used.

    The pixels of a block become channels of one convolution; where a pixel does not see a tap its weight is zero.
    """

    def __init__(self, geometry: Convolution, dtype: torch.dtype, workspace: Workspace):
        g = self._geometry = geometry
        axes = zip(g.kernel, g.stride, g.padding, g.dilation, strict=True)
        candidates = product(*([axis_blocks(n, *numbers) for n in (1, 2)] for numbers in axes))
        (by, my, tops, rows), (bx, mx, lefts, cols) = min(candidates, key=lambda axes: _time(axes, g.in_channels))
        self._block = by, bx
        self._size = tuple(-(-size // b) for size, b in zip(g.in_size, self._block, strict=True))
        taps = [(dy, dx, [(iy, ix)]) for (iy, dy), (ix, dx) in product(enumerate(tops), enumerate(lefts))]
        ends = (g.out_size, g.out_channels, self._size, by * bx * g.in_channels, (my, mx), (1, 1))
        self._kernel = _Kernel("gemm", dtype, ends, [(0, 0, taps)], workspace)
        # Kernel positions [pixels of a block, taps], one past the last where there is none.
        nowhere = g.kernel[0] * g.kernel[1]
        positions = [
            [nowhere if ky is None or kx is None else ky * g.kernel[1] + kx for ky, kx in product(row, col)]
            for row, col in product(rows, cols)
        ]
        self._positions = torch.tensor(positions)
        self._kernel_size = (len(tops), len(lefts))

    def pack(self, weight: Tensor, scale: Tensor | None) -> None:
        outputs, inputs = weight.shape[:2]
        padded = torch.cat([weight.flatten(2), weight.new_zeros(outputs, inputs, 1)], 2)
        blocked = padded[:, :, self._positions].transpose(1, 2)  # [O, pixels, I, taps]
        self._kernel.pack(blocked.reshape(outputs, -1, *self._kernel_size), scale, transposed=True)

    def bind(self, g: Tensor, bias: None, other: Tensor | None, mask: Tensor | None, dx: Tensor, bits: None) -> Run:
        channels = self._geometry.in_channels
        (height, width), (by, bx) = self._size, self._block
        blocks = torch.empty(len(g), height, width, by, bx, channels, dtype=g.dtype)
        run_blocks = self._kernel.bind(g, None, None, None, blocks, None)
        finish = None if other is None and mask is None else _bind_pointwise(dx, dx, other=other, mask=mask)
        exact = (height * by, width * bx) == self._geometry.in_size
        pixels = blocks.permute(0, 1, 3, 2, 4, 5)
        if exact:
            dx_blocks = dx.permute(0, 2, 3, 1).view(len(g), height, by, width, bx, channels)

        def run():
            run_blocks()
            if exact:
                dx_blocks.copy_(pixels)
            else:
                whole = pixels.reshape(len(g), height * by, width * bx, channels).permute(0, 3, 1, 2)
                dx.copy_(whole[:, :, : dx.shape[2], : dx.shape[3]])
            if finish is not None:
                finish()

        return run


def _time(axes: tuple[tuple, tuple], channels: int) -> float:
    """Relative time per pixel: every input of a block is gathered once and multiplied in some vectors of products."""
    (by, _, tops, _), (bx, _, lefts, _) = axes
    return len(tops) * len(lefts) * (GATHERING + -(-by * bx * channels // LANES)) / (by * bx)


class KernelConvolution:
    """A convolution by the C++ kernels, both directions; weights are packed by :meth:`fold`."""

    def __init__(self, geometry: Convolution, dtype: torch.dtype, workspace: Workspace, algorithm: str):
        g = geometry
        self.runs = f"C++ {algorithm}"
        axes = list(zip(g.kernel, g.apart, g.padding, g.dilation, g.upsample, strict=True))
        inner, outer = (g.in_size, g.in_channels), (g.out_size, g.out_channels)
        kind = algorithm, dtype, workspace, g.groups
        self._forward = _phased(axis_forward, axes, (*inner, *outer), *kind)
        if g.in_channels <= FEW_CHANNELS and g.upsample == (1, 1) and g.groups == 1 and g.out_size != (1, 1):
            self._backward, self._gradient = _ImageGradient(g, dtype, workspace), None
        else:
            other = self._forward if shares_weights(g, algorithm) else None
            self._backward = _phased(axis_backward, axes, (*outer, *inner), *kind, other)
            self._gradient = None if other else self._backward  # with weights of its own

    def fold(self, weight: Tensor, scale: Tensor | None) -> None:
        self._forward.pack(weight, scale, gradient=self._gradient)
        if isinstance(self._backward, _ImageGradient):
            self._backward.pack(weight, scale)

    def bind_forward(self, x: Tensor, bias: Tensor | None, other: Tensor | None, y: Tensor, bits: Tensor | None) -> Run:
        return self._forward.bind(x, bias, other, None, y, bits)

    def bind_backward(self, g: Tensor, other: Tensor | None, mask: Tensor | None, dx: Tensor) -> Run:
        return self._backward.bind(g, None, other, mask, dx, None)


def _phased(
    axis: Callable,
    axes: list[tuple],
    ends: tuple,
    algorithm: str,
    dtype: torch.dtype,
    workspace: Workspace,
    groups: int,
    other: _Kernel | None = None,
) -> _Kernel:
    (in_y, out_y, rows), (in_x, out_x, cols) = (axis(*numbers) for numbers in axes)
    phases = [
        (y, x, [(dy, dx, list(product(ky, kx))) for (dy, ky), (dx, kx) in product(rows[y], cols[x])])
        for y, x in product(range(out_y), range(out_x))
    ]
    return _Kernel(algorithm, dtype, (*ends, (in_y, in_x), (out_y, out_x)), phases, workspace, other, groups)


class LibraryConvolution(TorchConvolution):
    """A convolution by oneDNN, with the weights in its layout."""

    runs = "oneDNN"

    def __init__(self, geometry: Convolution, dtype: torch.dtype, device: torch.device):
        super().__init__(geometry, dtype, device)
        g = geometry
        self._flipped_padding = [d * (k - 1) - p for d, k, p in zip(g.dilation, g.kernel, g.padding, strict=True)]
        self._plain = g.stride == (1, 1) and min(self._flipped_padding) >= 0 and g.pads_alike

    def fold(self, weight: Tensor, scale: Tensor | None) -> None:
        g = self.geometry
        folded = scaled(weight, scale).to(self.dtype)  # in its own layout: to another one and back takes very long
        self._forward = self._reordered(folded, g.padding, (4, g.in_channels, *g.in_size))
        if not self._plain:
            super().fold(weight, scale)
        else:
            # The input gradient is a convolution with the weights flipped and transposed within each group.
            grouped = folded.view(g.groups, -1, *folded.shape[1:]).transpose(1, 2).flip(3, 4)
            self._backward = self._reordered(
                grouped.reshape(g.in_channels, -1, *g.kernel),
                self._flipped_padding,
                (4, g.out_channels, *g.out_size),
            )

    def forward(self, x: Tensor) -> Tensor:
        g = self.geometry
        if not g.pads_alike:
            return super().forward(x)
        return self._run(x, self._forward, g.padding)

    def backward(self, gradient: Tensor) -> Tensor:
        if not self._plain:
            return super().backward(gradient)
        return self._run(gradient, self._backward, self._flipped_padding)

    def _reordered(self, weight: Tensor, padding, shape) -> Tensor:
        g = self.geometry
        reorder = torch._C._nn.mkldnn_reorder_conv2d_weight
        return reorder(
            weight.contiguous().to_mkldnn(), list(padding), list(g.stride), list(g.dilation), g.groups, shape
        )

    def _run(self, x: Tensor, weight: Tensor, padding) -> Tensor:
        g = self.geometry
        return torch.ops.mkldnn._convolution_pointwise(
            x, weight, None, list(padding), list(g.stride), list(g.dilation), g.groups, "none", [], ""
        )


class CpuExecutor(TorchExecutor):
    """Every step in C++; by oneDNN convolutions in groups, and those for a matrix unit that C++ does not use."""

    name = "C++"
    argmax_bytes = 1

    def __init__(self, dtype: torch.dtype, device: torch.device):
        super().__init__(dtype, device)
        self._workspace = Workspace()
        self._name = dtype_name(dtype)
        if uses_matrix_unit(dtype):
            self.folding = 100

    def mask_bytes(self, value: Value) -> int:
        return bytes_of_bits(value)

    def convolution(self, geometry: Convolution) -> TorchConvolution | KernelConvolution:
        algorithm = algorithm_of(geometry, self.dtype)
        if algorithm == "library":
            return LibraryConvolution(geometry, self.dtype, self.device)
        return KernelConvolution(geometry, self.dtype, self._workspace, algorithm)

    def input(self, steps: list[tuple], shape: tuple[int, ...], resized: tuple[int, int] | None) -> Input:
        return (Input if shape[0] > _C.most_pixel_channels else KernelInput)(steps, shape, resized)

    def conv(self, state: State, t: Tensors) -> Run:
        if isinstance(state.convolution, TorchConvolution):
            return super().conv(state, t)
        return state.convolution.bind_forward(t["x"], state.shift, t["other"], t["y"], t["mask"])

    def conv_backward(self, state: State, t: Tensors) -> Run:
        if isinstance(state.convolution, TorchConvolution):
            return super().conv_backward(state, t)
        return state.convolution.bind_backward(t["g"], t["other"], t["mask"], t["dx"])

    def affine(self, state: State, t: Tensors) -> Run:
        return _bind_pointwise(t["x"], t["y"], scale=state.scale, shift=state.shift, other=t["other"], bits=t["mask"])

    def affine_backward(self, state: State, t: Tensors) -> Run:
        return _bind_pointwise(t["g"], t["dx"], scale=state.scale, other=t["other"], mask=t["mask"])

    def activation(self, state: State, t: Tensors) -> Run:
        kind, a, b = state.stage.options["activation"]
        sizes = (t["x"].numel(), self._name, list(KINDS).index(kind), a, b)
        return _bind("activation", *sizes, t["x"], t["y"], t["slope"])

    def activation_backward(self, state: State, t: Tensors) -> Run:
        return _bind_pointwise(t["g"], t["dx"], gate=t["slope"], other=t["other"], mask=t["mask"])

    def layer_norm(self, state: State, t: Tensors) -> Run:
        sizes = (*rows_of(t["x"]), self._name, state.stage.options["eps"])
        return _bind("layer_norm", *sizes, t["x"], state.scale, state.shift, t["y"], t["moments"])

    def layer_norm_backward(self, state: State, t: Tensors) -> Run:
        tensors = (t["g"], t["x"], state.scale, t["moments"], t["other"], t["mask"], t["dx"])
        return _bind("layer_norm_backward", *rows_of(t["x"]), self._name, *tensors)

    def max_pool(self, state: State, t: Tensors) -> Run:
        return _bind("max_pool", *window_of(state, t["x"], t["y"]), self._name, t["x"], t["y"], t["argmax"])

    def max_pool_backward(self, state: State, t: Tensors) -> Run:
        sizes = window_of(state, t["dx"], t["g"])
        return _bind("max_pool_backward", *sizes, self._name, t["g"], t["argmax"], t["other"], t["mask"], t["dx"])

    def avg_pool(self, state: State, t: Tensors) -> Run:
        return _bind("sum_pool", *_windows(state, t["x"], t["y"]), self._name, t["x"], t["y"])

    def avg_pool_backward(self, state: State, t: Tensors) -> Run:
        sizes = _windows(state, t["dx"], t["g"])
        return _bind("sum_pool_backward", *sizes, self._name, t["g"], t["other"], t["mask"], t["dx"])

    def gather(self, state: State, t: Tensors) -> Run:
        parts = [
            (t["parts"][part.input], part.first, part.step, part.channels, part.y_first, part.y_step)
            for part in state.stage.options["parts"]
            if part.output == t["part"]
        ]
        return _bind_gather(parts, t["y"], scale=state.scale, shift=state.shift, bits=t["mask"])

    def gather_backward(self, state: State, t: Tensors) -> Run:
        dx = t["dx"]
        mine = [part for part in state.stage.options["parts"] if part.input == t["part"]]
        parts = [
            (t["gradients"][part.output], part.y_first, part.y_step, part.channels, part.first, part.step)
            for part in mine
        ]
        scale = None if state.scale is None else state.scale[mine[0].y_first :][: dx.shape[1]]
        return _bind_gather([*parts, *_rest(parts, dx.shape[1])], dx, scale=scale, other=t["other"], mask=t["mask"])

    def product(self, state: State, t: Tensors) -> Run:
        x, gate, other, mask, y = (t[role] for role in ("x", "gate", "other", "mask", "y"))
        if x.shape == gate.shape:
            return _bind_pointwise(x, y, gate=gate, other=other, bits=mask)
        return _bind("product", *_gate(x, gate), self._name, x, gate, other, None, mask is not None, y, mask)

    def product_backward(self, state: State, t: Tensors) -> Run:
        g, factor, other, mask, dx = (t[role] for role in ("g", "factor", "other", "mask", "dx"))
        if g.shape == factor.shape == dx.shape:
            return _bind_pointwise(g, dx, gate=factor, other=other, mask=mask)
        if g.shape == dx.shape:
            return _bind("product", *_gate(g, factor), self._name, g, factor, other, mask, False, dx, None)
        return _bind("product_sum", *_gate(g, dx), self._name, g, factor, other, mask, dx)

    def pointwise(self, state: State, t: Tensors) -> Run:
        return _bind_pointwise(t["x"], t["y"], other=t["other"], bits=t["mask"])

    def finish(self, state: State, t: Tensors) -> Run:
        return _bind_pointwise(t["x"], t["y"], other=t.get("other"), mask=t["mask"])

    def _finish(self, v, bias, other, mask, relu_mask, y) -> None:
        _bind_pointwise(dense(v), y, shift=bias, other=other, mask=mask, bits=relu_mask)()


def _bind_pointwise(
    x: Tensor,
    y: Tensor,
    *,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    other: Tensor | None = None,
    mask: Tensor | None = None,
    bits: Tensor | None = None,
) -> Run:
    """``y = mask(relu(x * gate * scale + shift + other))``, each part where given; ReLU where its ``bits`` are."""
    sizes = (*rows_of(y), dtype_name(y.dtype))
    return _bind("pointwise", *sizes, x, gate, scale, shift, other, mask, bits is not None, y, bits)


Channels = tuple[Tensor | None, int, int, int, int, int]  # x or zeros, first, step, how many, first and step in y


def _bind_gather(parts: list[Channels], y: Tensor, **around: Tensor | None) -> Run:
    """Parts put together as ``y``, and around them what :func:`_bind_pointwise` does."""
    table = [
        (0 if x is None else x.data_ptr() + first * x.itemsize, y.shape[1] if x is None else x.shape[1], *places)
        for x, first, *places in parts
    ]
    scale, shift, other, mask, bits = (around.get(name) for name in ("scale", "shift", "other", "mask", "bits"))
    sizes = (*rows_of(y), dtype_name(y.dtype), torch.tensor(table), len(table))
    return _bind("gather", *sizes, scale, shift, other, mask, bits is not None, y, bits)


def _rest(parts: list[Channels], channels: int) -> list[Channels]:
    """Zeros for the channels that no part has."""
    covered = {i for _, _, _, count, first, step in parts for i in range(first, first + count * step, step)}
    rest = [i for i in range(channels) if i not in covered]
    runs = [[i for _, i in run] for _, run in groupby(enumerate(rest), lambda pair: pair[1] - pair[0])]
    return [(None, 0, 1, len(run), run[0], 1) for run in runs]


def _gate(x: Tensor, gate: Tensor) -> tuple[int, int, int, bool]:
    """Of a product: images, pixels, channels, and whether the gate has a value for each channel or for each pixel."""
    images, channels = x.shape[:2]
    return images, x.shape[2] * x.shape[3], channels, gate.shape[1] == channels


def _windows(state: State, x: Tensor, y: Tensor) -> tuple:
    """Of a sum over windows: images, channels, height, width, results' height and width, tables and weights."""
    axes = [state.stage.options[name] for name in ("rows", "columns")]
    tables = [torch.tensor([axis.begin, axis.end], dtype=torch.int32) for axis in axes]
    return (*x.shape, *y.shape[2:], *tables, *(torch.tensor(axis.weight, dtype=torch.float32) for axis in axes))


def _bind(name: str, *arguments) -> Run:
    """The call of a C++ function, its tensors as pointers."""
    function = getattr(_C, f"{name}_cpu")
    held = [a for a in arguments if isinstance(a, Tensor)]
    plain = tuple(pointer_of(a) if a is None or isinstance(a, Tensor) else a for a in arguments)

    def run(held=held):
        check_status(name, function(*plain, *_how()))

    return run


class KernelInput(Input):
    """The input's steps in one pass."""

    def fill(self, steps: list[tuple]) -> None:
        super().fill(steps)
        self._channels, size = self.shape[0], self.shape[1:]
        rows, cols = (sources_of(small, big) for small, big in zip(size, self.resized or size, strict=True))
        self._kernel = _C.InputProgram([self._listed(step) for step in steps], self.shape[0], tuple(size), rows, cols)

    def _listed(self, step: tuple) -> tuple:
        """(kind, values, derivative of a clamp at its bounds), as the kernel takes it."""
        kind, *arguments = step
        if kind == "clamp":
            low, high, at_bounds = arguments
            return kind, [low, high], at_bounds
        other = torch.as_tensor(arguments[0], dtype=torch.float32).flatten().expand(self._channels)
        return kind, other.tolist(), 0

    def prepare(self, x: Tensor, out: Tensor) -> None:
        pointers = (x.data_ptr(), out.data_ptr())
        check_status("prepare", self._kernel.prepare(len(x), dtype_name(out.dtype), *pointers, *_how()))

    def gradient(self, x: Tensor, gradient: Tensor) -> Tensor:
        d = torch.empty_like(x)
        pointers = (gradient.data_ptr(), x.data_ptr(), d.data_ptr())
        check_status("gradient", self._kernel.gradient(len(x), dtype_name(gradient.dtype), *pointers, *_how()))
        return d

    def sign_step(
        self, x: Tensor, clean: Tensor, gradient: Tensor, alpha: float, eps: float, nan: Tensor, out: Tensor
    ) -> None:
        pointers = (gradient.data_ptr(), x.data_ptr(), clean.data_ptr())
        results = (nan.data_ptr(), x.data_ptr(), out.data_ptr())
        check_status("step", self._kernel.step(len(x), dtype_name(out.dtype), *pointers, alpha, eps, *results, *_how()))


def algorithm_of(geometry: Convolution, dtype: torch.dtype) -> str:
    """``winograd4``, ``winograd``, ``gemm``, ``direct`` or ``library``.

    A fixed rule made from measurements, not a measurement, so that results are the same in every run.
    """
    g = geometry
    few = min(g.in_channels, g.out_channels) < FEWEST_CHANNELS
    if g.groups > 1:
        wide = g.in_channels > LANES * g.groups
        return "direct" if _in_lanes(g) and not (wide and has_matrix_unit(dtype)) else "library"
    if has_matrix_unit(dtype):
        return "gemm" if few or g.upsample != (1, 1) or uses_matrix_unit(dtype) else "library"
    ordinary = (g.kernel, g.stride, g.padding, g.dilation, g.upsample) == ((3, 3), (1, 1), (1, 1), (1, 1), (1, 1))
    ordinary = ordinary and g.in_size == g.out_size
    height, width = g.out_size
    if not ordinary or few or height * width == 1:
        return "gemm"
    products = {size: (size + 2) ** 2 * -(-height // size) * -(-width // size) for size in (2, 4)}
    return "winograd4" if products[4] < products[2] else "winograd"


def _in_lanes(geometry: Convolution) -> bool:
    """Whether vectors hold whole groups, or parts of one in whole bytes of bits."""
    inputs, outputs = (channels // geometry.groups for channels in (geometry.in_channels, geometry.out_channels))
    return (inputs % 8 == 0 and outputs % 8 == 0) or (inputs == outputs and inputs in (1, 2, 4))


def shares_weights(geometry: Convolution, algorithm: str) -> bool:
    """Whether the input gradient takes the packed weights of the forward pass.

    That makes it 5 to 15 % slower with AVX-512, as channels are exchanged at every use, and packing twice as fast; with
    AVX2, whose tiles have less than half as many rows, it takes two to four times as long. Small weights are not worth
    it. The number of images must not count, so that it changes no image's result.
    """
    large = geometry.in_channels * geometry.out_channels >= SHARED
    return algorithm.startswith("winograd") and large and _isa().startswith(("avx512", "amx"))


def has_matrix_unit(dtype: torch.dtype) -> bool:
    """Whether this CPU has a matrix unit for ``dtype`` (AMX), which oneDNN uses."""
    has = {torch.bfloat16: torch.cpu._is_amx_tile_supported, torch.float16: torch.cpu._is_amx_fp16_supported}
    return dtype in has and has[dtype]()


def uses_matrix_unit(dtype: torch.dtype) -> bool:
    """Whether the C++ kernels do."""
    return dtype == torch.bfloat16 and _isa() == "amx"


def _isa() -> str:
    """The instruction set of the C++ kernels."""
    return native.cpu_isa or _C.cpu_isas[0]
