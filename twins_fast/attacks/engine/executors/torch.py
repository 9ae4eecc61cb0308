"""What runs the steps of a plan: each operation binds tensors once and gives a function without arguments.

:class:`TorchExecutor` is plain PyTorch, for any device: the reference that the kernels are tested against.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from twins_fast.attacks.engine.activations import value_and_slope
from twins_fast.attacks.engine.convolution import Convolution
from twins_fast.attacks.engine.executors.pixels import Input
from twins_fast.attacks.engine.executors.segment import Segment
from twins_fast.attacks.engine.plan import Part, Stage, Value

Run = Callable[[], None]
Tensors = dict[str, Any]  # role -> tensor, list of tensors or None; "rows" -> number of images


@dataclass
class State:
    """A stage together with what an attack call filled in; the tensors keep their addresses between calls."""

    stage: Stage
    convolution: TorchConvolution | None = None
    scale: Tensor | None = None  # [C] float32: gain and folded batch norm; of a layer norm its weight
    shift: Tensor | None = None  # [C] float32: bias, likewise
    segment: Segment | None = None


class TorchConvolution:
    """A convolution by PyTorch.

    Attributes:
        runs: what computes it, as :func:`~twins_fast.attacks.engine.explain.explain` names it.
    """

    runs = "PyTorch"

    def __init__(self, geometry: Convolution, dtype: torch.dtype, device: torch.device):
        self.geometry = geometry
        self.dtype = dtype
        self.weight: Tensor | None = None

    def fold(self, weight: Tensor, scale: Tensor | None) -> None:
        """Take over ``weight`` [O, I / groups, kh, kw] float32, each output channel times ``scale`` [O]."""
        folded = scaled(weight, scale).to(self.dtype, memory_format=torch.channels_last)
        if self.weight is None:
            self.weight = torch.empty_like(folded)
        self.weight.copy_(folded)

    def forward(self, x: Tensor) -> Tensor:
        g = self.geometry
        for axis, factor in enumerate(g.upsample):
            x = x.repeat_interleave(factor, 2 + axis) if factor > 1 else x
        padding = g.padding
        if not g.pads_alike:
            x, padding = F.pad(x, self._borders()), (0, 0)
        return F.conv2d(x, self.weight, None, g.stride, padding, g.dilation, g.groups)

    def _borders(self) -> tuple[int, ...]:
        """Padding as :func:`torch.nn.functional.pad` takes it."""
        (top, left), (bottom, right) = self.geometry.padding, self.geometry.padding_behind
        return left, right, top, bottom

    def backward(self, gradient: Tensor) -> Tensor:
        g = self.geometry
        if g.pads_alike:
            rest = [p - behind for p, behind in zip(g.padding, g.padding_behind, strict=True)]
            dx = F.conv_transpose2d(gradient, self.weight, None, g.stride, g.padding, rest, g.groups, g.dilation)
        else:
            dx = F.conv_transpose2d(gradient, self.weight, None, g.stride, 0, 0, g.groups, g.dilation)
            dx = F.pad(dx, [-border for border in self._borders()])
        if g.upsample != (1, 1):
            dx = F.avg_pool2d(dx.float(), g.upsample) * (g.upsample[0] * g.upsample[1])
        return dx.to(gradient.dtype)


def scaled(weight: Tensor, scale: Tensor | None) -> Tensor:
    """A weight with each output channel times its ``scale``."""
    return weight if scale is None else weight * scale.view(-1, 1, 1, 1)


class TorchExecutor:
    """Plain PyTorch: masks of one byte per value."""

    name = "PyTorch"
    argmax_bytes = 8  # PyTorch's own form
    folding = 300  # operations, per weight, that it has to run before it has saved what folding the weight takes

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.dtype = dtype
        self.device = device

    def mask_bytes(self, value: Value) -> int:
        """Bytes of a ReLU's mask, per image."""
        return value.pixels * value.channels

    def convolution(self, geometry: Convolution) -> TorchConvolution:
        return TorchConvolution(geometry, self.dtype, self.device)

    def input(self, steps: list[tuple], shape: tuple[int, ...], resized: tuple[int, int] | None) -> Input:
        return Input(steps, shape, resized)

    def conv(self, state: State, t: Tensors) -> Run:
        convolution = state.convolution

        def run():
            self._finish(convolution.forward(t["x"]), state.shift, t["other"], None, t["mask"], t["y"])

        return run

    def conv_backward(self, state: State, t: Tensors) -> Run:
        convolution = state.convolution
        return lambda: self._finish(convolution.backward(t["g"]), None, t["other"], t["mask"], None, t["dx"])

    def affine(self, state: State, t: Tensors) -> Run:
        def run():
            y = t["x"] * state.scale.view(1, -1, 1, 1)
            self._finish(y, state.shift, t["other"], None, t["mask"], t["y"])

        return run

    def affine_backward(self, state: State, t: Tensors) -> Run:
        return lambda: self._finish(t["g"] * state.scale.view(1, -1, 1, 1), None, t["other"], t["mask"], None, t["dx"])

    def activation(self, state: State, t: Tensors) -> Run:
        def run():
            y, slope = value_and_slope(state.stage.options["activation"], t["x"].float())
            t["y"].copy_(y)
            t["slope"].copy_(slope)

        return run

    def activation_backward(self, state: State, t: Tensors) -> Run:
        return lambda: self._finish(t["g"].float() * t["slope"].float(), None, t["other"], t["mask"], None, t["dx"])

    def layer_norm(self, state: State, t: Tensors) -> Run:
        def run():
            rows = rows_like(t["x"]).float()
            arguments = (rows.shape[-1:], state.scale, state.shift, state.stage.options["eps"])
            y, mean, deviation = torch.native_layer_norm(rows, *arguments)
            rows_like(t["y"]).copy_(y)
            torch.cat([mean, deviation], 1, out=t["moments"].view(len(rows), 2))

        return run

    def layer_norm_backward(self, state: State, t: Tensors) -> Run:
        def run():
            moments = (one.contiguous() for one in t["moments"].view(-1, 2, 1).unbind(1))
            rows, g = rows_like(t["x"]).float(), rows_like(t["g"]).float()
            arguments = (rows.shape[-1:], *moments, state.scale, state.shift, [True, False, False])
            dx, _, _ = torch.ops.aten.native_layer_norm_backward(g, rows, *arguments)
            dx = dx.view(len(t["dx"]), *t["dx"].shape[2:], -1).permute(0, 3, 1, 2)
            self._finish(dx, None, t["other"], t["mask"], None, t["dx"])

        return run

    def gather(self, state: State, t: Tensors) -> Run:
        parts = [part for part in state.stage.options["parts"] if part.output == t["part"]]

        def run():
            y = torch.empty(t["y"].shape, device=self.device)
            for part in parts:
                x = t["parts"][part.input]
                y[:, _channels(part.y_first, part.y_step, part)] = x[:, _channels(part.first, part.step, part)].float()
            scaled = y if state.scale is None else y * state.scale.view(1, -1, 1, 1)
            self._finish(scaled, state.shift, t["other"], None, t["mask"], t["y"])

        return run

    def gather_backward(self, state: State, t: Tensors) -> Run:
        parts = [part for part in state.stage.options["parts"] if part.input == t["part"]]

        def run():
            dx = torch.zeros(t["dx"].shape, device=self.device)
            for part in parts:
                g = t["gradients"][part.output].float()
                g = g if state.scale is None else g * state.scale.view(1, -1, 1, 1)
                dx[:, _channels(part.first, part.step, part)] = g[:, _channels(part.y_first, part.y_step, part)]
            self._finish(dx, None, t["other"], t["mask"], None, t["dx"])

        return run

    def product(self, state: State, t: Tensors) -> Run:
        return lambda: self._finish(t["x"].float() * t["gate"].float(), None, t["other"], None, t["mask"], t["y"])

    def product_backward(self, state: State, t: Tensors) -> Run:
        def run():
            dx = (t["g"].float() * t["factor"].float()).sum_to_size(t["dx"].shape)
            self._finish(dx, None, t["other"], t["mask"], None, t["dx"])

        return run

    def pointwise(self, state: State, t: Tensors) -> Run:
        return lambda: self._finish(t["x"], None, t["other"], None, t["mask"], t["y"])

    def finish(self, state: State, t: Tensors) -> Run:
        """A sum of gradients, masked."""
        return lambda: self._finish(t["x"], None, t.get("other"), t["mask"], None, t["y"])

    def max_pool(self, state: State, t: Tensors) -> Run:
        o = state.stage.options
        index = _index_like(t["argmax"], t["y"])

        def run():
            sizes = (o["kernel"], o["stride"], o["padding"], (1, 1), o["ceil"])
            y, argmax = F.max_pool2d(t["x"], *sizes, return_indices=True)
            t["y"].copy_(y)
            index.copy_(argmax)

        return run

    def max_pool_backward(self, state: State, t: Tensors) -> Run:
        o = state.stage.options
        index = _index_like(t["argmax"], t["g"])

        def run():
            x = torch.empty_like(t["dx"])
            sizes = (o["kernel"], o["stride"], o["padding"], (1, 1), o["ceil"], index)
            dx = torch.ops.aten.max_pool2d_with_indices_backward(t["g"], x, *sizes)
            self._finish(dx, None, t["other"], t["mask"], None, t["dx"])

        return run

    def avg_pool(self, state: State, t: Tensors) -> Run:
        mean = plain_mean(state)
        if mean is not None:
            return lambda: t["y"].copy_(F.avg_pool2d(t["x"].float(), *mean))
        rows, columns = self._sums(state)
        return lambda: t["y"].copy_(rows @ t["x"].float() @ columns.T)

    def avg_pool_backward(self, state: State, t: Tensors) -> Run:
        mean = plain_mean(state)
        rows, columns = self._sums(state)

        def run():
            g, x = t["g"].float(), t["dx"]
            if mean is not None:
                sizes = (*mean, (0, 0), False, True, None)
                dx = torch.ops.aten.avg_pool2d_backward(g.contiguous(), x.float().contiguous(), *sizes)
            else:
                dx = rows.T @ g @ columns
            self._finish(dx, None, t["other"], t["mask"], None, x)

        return run

    def _sums(self, state: State) -> list[Tensor]:
        """Sums over windows as matrices."""
        return [state.stage.options[name].matrix(self.device) for name in ("rows", "columns")]

    def segment(self, state: State, t: Tensors) -> Run:
        return lambda: state.segment.forward(t["rows"], t["inputs"], t["outputs"])

    def segment_backward(self, state: State, t: Tensors) -> Run:
        return lambda: state.segment.backward(t["gradients"], t["input_gradients"])

    def _finish(
        self,
        v: Tensor,
        bias: Tensor | None,
        other: Tensor | None,
        mask: Tensor | None,
        relu_mask: Tensor | None,
        y: Tensor,
    ) -> None:
        """y = v + bias + other, then a ReLU that fills ``relu_mask``, or 0 where the ``mask`` of an earlier ReLU is."""
        v = v.float().view(y.shape)
        if bias is not None:
            v = v + bias.view(1, -1, 1, 1)
        if other is not None:
            v = v + other.view(y.shape)
        if relu_mask is not None:
            positive = ~(v <= 0)  # lets NaN pass
            mask_like(relu_mask, y).copy_(positive)
            v = v.where(positive, 0)
        if mask is not None:
            v = v.where(mask_like(mask, y), 0)
        y.copy_(v)


def _channels(first: int, step: int, part: Part) -> slice:
    return slice(first, first + (part.channels - 1) * step + 1, step)


def mask_like(mask: Tensor, y: Tensor) -> Tensor:
    """A mask of one byte per value as booleans of the shape of ``y``."""
    return mask.view(torch.bool).as_strided(y.shape, y.stride())


def _index_like(argmax: Tensor, y: Tensor) -> Tensor:
    return argmax.view(torch.int64).as_strided(y.shape, y.stride())


def bytes_of_bits(value: Value) -> int:
    """Bytes of one image's mask of one bit per value, in whole bytes per pixel."""
    return value.pixels * ((value.channels + 7) // 8)


def dense(v: Tensor) -> Tensor:
    """Channels-last, as the arena is; a library's strides may only look different where height or width is 1."""
    return v.contiguous(memory_format=torch.channels_last) if v.dim() == 4 else v.contiguous()


def rows_like(x: Tensor) -> Tensor:
    """An image's memory as rows of channels."""
    return x.permute(0, 2, 3, 1).view(-1, x.shape[1])


def rows_of(y: Tensor) -> tuple[int, int]:
    """Pixels of all images, and channels."""
    channels = y.shape[1] if y.dim() == 4 else y.shape[-1]
    return y.numel() // channels, channels


def plain_mean(state: State) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Kernel and stride of sums over windows that are means over windows of one size; None of others."""
    rows, columns = (state.stage.options[name].regular for name in ("rows", "columns"))
    return None if rows is None or columns is None else ((rows[0], columns[0]), (rows[1], columns[1]))


def window_of(state: State, x: Tensor, y: Tensor) -> tuple[int, ...]:
    """Of a max-pooling: images, channels, height, width, results' height and width, kernel, stride, padding."""
    o = state.stage.options
    return (*x.shape, *y.shape[2:], *o["kernel"], *o["stride"], *o["padding"])
