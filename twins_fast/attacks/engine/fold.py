"""The parameters as they are now: norms and gains as scale and shift, weights packed, the input program filled."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from twins_fast.attacks.engine.executors.pixels import Input
from twins_fast.attacks.engine.executors.torch import State, TorchExecutor
from twins_fast.attacks.engine.nodes import Derived, Param, Parameters
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
        self._vectors = _Vectors(plan, states, model, executor.device)

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> Input:
        """The path of the images into the network, with the current parameters."""
        parameters = Parameters(model)
        self._vectors.fill(parameters)
        for state in self._states:
            if state.convolution is not None:
                g = state.stage.options["geometry"]
                weight = _float32(parameters[state.stage.options["weight"]])
                weight = weight.reshape(g.out_channels, g.in_channels // g.groups, *g.kernel)
                state.convolution.fold(weight.contiguous(), state.scale)
            elif state.segment is not None:
                state.segment.parameters = {source: parameters[source] for source in state.segment.sources()}
        steps = [
            (kind, *(_float32(parameters[a]) if isinstance(a, (Param, Derived)) else a for a in arguments))
            for kind, *arguments in self._plan.program
        ]
        if self._input is None:
            self._input = self._executor.input(steps, self._shape, self._plan.resized)
        else:
            self._input.fill(steps)
        return self._input


class _Vectors:
    """Scale and shift of all layers; batch norms are computed together: one by one they would be many operations."""

    def __init__(self, plan: Plan, states: list[State], model: nn.Module, device: torch.device):
        parameters = Parameters(model)
        self._layers = [s for s in states if s.stage.kind in ("conv", "affine", "gather")]
        self._layer_norms = [s for s in states if s.stage.kind == "layer_norm"]
        self._norms = [s for s in self._layers if "norm" in s.stage.options]
        lengths = [parameters[s.stage.options["norm"]["mean"]].numel() for s in self._norms]
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
            if state.scale is not None:
                continue
            channels = plan.values[state.stage.outputs[0]].channels
            if state.stage.options.get("then"):
                state.scale, state.shift = (torch.empty(channels, device=device) for _ in range(2))
            elif state.stage.options.get("bias") is not None:
                state.shift = torch.empty(channels, device=device)
        for state in self._layer_norms:
            channels = plan.values[state.stage.outputs[0]].channels
            given = (state.stage.options[entry] is not None for entry in ("weight", "bias"))
            state.scale, state.shift = (torch.empty(channels, device=device) if one else None for one in given)

    def fill(self, parameters: Parameters) -> None:
        if self._norms:
            weight, bias, mean, var = (
                torch.cat(
                    [self._vector(parameters, s, entry, n) for s, n in zip(self._norms, self._lengths, strict=True)]
                )
                for entry in ("weight", "bias", "mean", "var")
            )
            torch.mul(weight, torch.rsqrt(var + self._eps), out=self._scale)
            torch.addcmul(bias, mean, self._scale, value=-1, out=self._shift)
        for state in self._layers:
            options = state.stage.options
            own, then = options.get("bias"), options.get("then", ())
            if then and "norm" not in options:
                state.scale.fill_(1), state.shift.zero_()
            if own is not None:
                own = _float32(parameters[own])
                state.shift.copy_(own) if state.scale is None else state.shift.addcmul_(own, state.scale)
            for kind, other in then:
                _ARITHMETIC[kind](state.scale, state.shift, self._operand(parameters, other))
        for state in self._layer_norms:
            for entry, vector in (("weight", state.scale), ("bias", state.shift)):
                if vector is not None:
                    vector.copy_(_float32(parameters[state.stage.options[entry]]))

    @staticmethod
    def _operand(parameters: Parameters, other):
        other = parameters[other] if isinstance(other, (Param, Derived)) else other
        return _float32(other).flatten() if isinstance(other, Tensor) else other

    def _vector(self, parameters: Parameters, state: State, entry: str, length: int) -> Tensor:
        source = state.stage.options["norm"][entry]
        if source is None:
            return (self._ones if entry == "weight" else self._zeros)[:length]
        return _float32(parameters[source])


# What becomes of scale and shift by an operation with one more number per channel.
_ARITHMETIC = {
    "add": lambda scale, shift, other: shift.add_(other),
    "sub": lambda scale, shift, other: shift.sub_(other),
    "mul": lambda scale, shift, other: (scale.mul_(other), shift.mul_(other)),
    "div": lambda scale, shift, other: (scale.div_(other), shift.div_(other)),
    "rsub": lambda scale, shift, other: (scale.neg_(), shift.neg_().add_(other)),
}


def _float32(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float32)
