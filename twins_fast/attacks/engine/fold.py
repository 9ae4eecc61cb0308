"""The parameters as they are now: norms and gains as scale and shift, weights packed, the input program filled."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from twins_fast.attacks.engine.executors.pixels import Input
from twins_fast.attacks.engine.executors.torch import State, TorchExecutor
from twins_fast.attacks.engine.nodes import Param, tensor_of
from twins_fast.attacks.engine.plan import Plan


class Fold:
    """Fills the states of a program from a model, in place, so that addresses stay."""

    def __init__(
        self, plan: Plan, states: list[State], model: nn.Module, shape: tuple[int, ...], executor: TorchExecutor
    ):
        self._plan = plan
        self._states = states
        self._shape = shape
        self._executor = executor
        self._input: Input | None = None
        self._vectors = _Vectors(states, model, executor.device)

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> Input:
        """The path of the images into the network, with the current parameters."""
        self._vectors.fill(model)
        for state in self._states:
            if state.convolution is not None:
                weight = _float32(tensor_of(model, state.stage.options["weight"].name))
                weight = weight if weight.dim() == 4 else weight[:, :, None, None]
                state.convolution.fold(weight.contiguous(), state.scale)
            elif state.segment is not None:
                state.segment.parameters = {n: tensor_of(model, n).detach() for n in state.segment.names()}
        steps = [
            (kind, *(_float32(tensor_of(model, a.name)) if isinstance(a, Param) else a for a in arguments))
            for kind, *arguments in self._plan.program
        ]
        if self._input is None:
            self._input = self._executor.input(steps, self._shape, self._plan.resized)
        else:
            self._input.fill(steps)
        return self._input


class _Vectors:
    """Scale and shift of all layers, computed together: per layer that would be many small operations."""

    def __init__(self, states: list[State], model: nn.Module, device: torch.device):
        self._layers = [s for s in states if s.stage.kind in ("conv", "affine")]
        self._layer_norms = [s for s in states if s.stage.kind == "layer_norm"]
        self._norms = [s for s in self._layers if "norm" in s.stage.options]
        lengths = [self._length(s, model) for s in self._norms]
        self._eps = torch.cat(
            [
                torch.full((n,), s.stage.options["norm"]["eps"], dtype=torch.float32)
                for n, s in zip(lengths, self._norms, strict=True)
            ]
            or [torch.empty(0)]
        ).to(device)
        self._ones, self._zeros = (torch.full((max(lengths, default=0),), v, device=device) for v in (1.0, 0.0))
        self._lengths = lengths
        self._scale = torch.empty(sum(lengths), device=device)
        self._shift = torch.empty(sum(lengths), device=device)
        parts = zip(self._scale.split(lengths), self._shift.split(lengths), strict=True) if lengths else ()
        for state, (scale, shift) in zip(self._norms, parts, strict=True):
            state.scale, state.shift = scale, shift
        for state in self._layers:
            if "norm" not in state.stage.options:
                length, gained = state.stage.options["geometry"].out_channels, "gain" in state.stage.options
                state.scale = torch.empty(length, device=device) if gained else None
                state.shift = self._empty_like(state, "bias", model, device)
        for state in self._layer_norms:
            state.scale, state.shift = (self._empty_like(state, entry, model, device) for entry in ("weight", "bias"))

    @staticmethod
    def _empty_like(state: State, entry: str, model: nn.Module, device: torch.device) -> Tensor | None:
        name = state.stage.options[entry]
        return None if name is None else torch.empty(tensor_of(model, name.name).numel(), device=device)

    @staticmethod
    def _length(state: State, model: nn.Module) -> int:
        return tensor_of(model, state.stage.options["norm"]["mean"].name).numel()

    def fill(self, model: nn.Module) -> None:
        if self._norms:
            weight, bias, mean, var = (
                torch.cat([self._vector(model, s, entry, n) for s, n in zip(self._norms, self._lengths, strict=True)])
                for entry in ("weight", "bias", "mean", "var")
            )
            torch.mul(weight, torch.rsqrt(var + self._eps), out=self._scale)
            torch.addcmul(bias, mean, self._scale, value=-1, out=self._shift)
        for state in self._layers:
            options = state.stage.options
            own, gain = options.get("bias"), options.get("gain")
            if own is not None:
                own = _float32(tensor_of(model, own.name))
                state.shift.addcmul_(own, state.scale) if "norm" in options else state.shift.copy_(own)
            if gain is not None:
                gain = _float32(tensor_of(model, gain.name)).flatten() if isinstance(gain, Param) else gain
                state.scale.mul_(gain) if "norm" in options else state.scale.fill_(1).mul_(gain)
                if state.shift is not None:
                    state.shift.mul_(gain)
        for state in self._layer_norms:
            for entry, vector in (("weight", state.scale), ("bias", state.shift)):
                if vector is not None:
                    vector.copy_(_float32(tensor_of(model, state.stage.options[entry].name)))

    def _vector(self, model: nn.Module, state: State, entry: str, length: int) -> Tensor:
        name = state.stage.options["norm"][entry]
        if name is None:
            return (self._ones if entry == "weight" else self._zeros)[:length]
        return _float32(tensor_of(model, name.name))


def _float32(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float32)
