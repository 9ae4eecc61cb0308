"""Operations that are not planned: run and differentiated by PyTorch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from twins_fast.attacks.engine.executors.attention import attention
from twins_fast.attacks.engine.layout import as_result
from twins_fast.attacks.engine.nodes import Ref, Source, map_values
from twins_fast.attacks.engine.plan import Stage
from twins_fast.devices import autocast

Result = tuple[GradientEdge, torch.dtype] | None  # where its gradient goes in: the values lie in the arena


@dataclass
class Segment:
    """Neighbouring operations that are not planned, under autocast if ``dtype`` is half precision.

    Attributes:
        parameters: what it reads besides values, filled in by every attack call.
        carried: results of this segment that later ones read outside autograd; shared by all segments of a plan.
    """

    stage: Stage
    dtype: torch.dtype
    device: torch.device
    carried: dict
    parameters: dict[Source, Tensor] = field(default_factory=dict)
    rows: int = 0
    _results: list[Result] = field(default_factory=list)
    _operands: list[Tensor] = field(default_factory=list)
    _again: bool = False  # whether another backward pass may follow
    _ended: list[list[int]] = field(init=False)  # after each operation, the results that no later one reads

    def __post_init__(self) -> None:
        nodes, options = self.stage.nodes, self.stage.options
        last: dict[int, int] = {}
        for position, (index, node) in enumerate(nodes):
            last |= {v.index: position for v in node.reads() if isinstance(v, Ref)} | {index: position}
        self._ended = [[] for _ in nodes]
        for index in last.keys() - {*options["gives"], *options["keeps"]}:
            self._ended[last[index]].append(index)

    def sources(self) -> Iterable[Source]:
        """The parameters that it reads, and what is derived of them."""
        return dict.fromkeys(v for _, node in self.stage.nodes for v in node.reads() if not isinstance(v, Ref))

    def forward(self, rows: int, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        stage, views = self.stage, self.stage.options["views"]
        half = None if self.dtype == torch.float32 else self.dtype
        self.rows = rows
        by_value = dict(zip(stage.inputs, inputs, strict=True))
        with torch.enable_grad(), autocast(half, self.device):
            # With .data each gets a version of its own: others write elsewhere in the arena until the backward pass.
            values_in = {value: tensor.data.requires_grad_() for value, tensor in by_value.items()}
            values: dict = dict(self.carried)
            for index, value in stage.options["takes"].items():
                if value is not None:
                    values[index] = as_result(values_in[value], *views[index])
            for (index, node), ended in zip(stage.nodes, self._ended, strict=True):
                values[index] = self._call(node, values)
                for other in ended:
                    del values[other]
        self._operands = list(values_in.values())
        results = [values[index] for index in stage.options["gives"]]
        for index, tensor, output in zip(stage.options["gives"], results, outputs, strict=True):
            as_result(output, *views[index]).copy_(tensor.detach())
        self._results = [(get_gradient_edge(t), t.dtype) if t.requires_grad else None for t in results]
        self.carried.update((i, values[i]) for i in stage.options["keeps"])

    def backward(self, gradients: list[Tensor | None], input_gradients: list[Tensor]) -> None:
        """From the gradients of the results, those of the inputs, written into ``input_gradients``."""
        views = (self.stage.options["views"][index] for index in self.stage.options["gives"])
        pairs = [
            (result[0], as_result(g, *view).to(result[1]))
            for result, g, view in zip(self._results, gradients, views, strict=True)
            if g is not None and result is not None
        ]
        results, cast = [edge for edge, _ in pairs], [g for _, g in pairs]
        computed = torch.autograd.grad(results, self._operands, cast, retain_graph=self._again, allow_unused=True)
        for slot, gradient in zip(input_gradients, computed, strict=True):
            slot.zero_() if gradient is None else slot.copy_(gradient)
        self.release()

    def release(self) -> None:
        """Forget PyTorch's graph."""
        self._results, self._operands, self._again = [], [], False

    def take(self) -> tuple[list[Result], list[Tensor]]:
        """PyTorch's graph, which is forgotten here."""
        taken = self._results, self._operands
        self.release()
        return taken

    def put(self, taken: tuple[list[Result], list[Tensor]]) -> None:
        """For one more backward pass."""
        (self._results, self._operands), self._again = taken, True

    def _call(self, node, values: dict):
        if node.op == "rows":
            return self.rows

        def real(v):
            return values[v.index] if isinstance(v, Ref) else self.parameters[v]

        target, arguments, keywords = node.call
        arguments, keywords = map_values(real, arguments), map_values(real, keywords)
        if target is torch.ops.aten.scaled_dot_product_attention.default and self.device.type == "cpu":
            target = attention
        if target is torch.ops.aten.linear.default:
            # Of transposed rows PyTorch makes one product for each sample, and copies the weight as often.
            arguments = (arguments[0].contiguous(), *arguments[1:])
        return target(*arguments, **keywords)
