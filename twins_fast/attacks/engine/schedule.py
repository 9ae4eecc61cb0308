"""Both passes over the stages, ordered as steps."""

from __future__ import annotations

from typing import Any

from twins_fast.attacks.engine.nodes import Node, NotCaptured
from twins_fast.attacks.engine.plan import Plan, Slot, Stage, Step
from twins_fast.attacks.engine.stages import Fuser

_SAVED = {
    "max_pool": "argmax",
    "activation": "slope",
    "layer_norm": "moments",
}  # kind of a stage -> what its backward reads of its forward


def build(nodes: list[Node]) -> Plan:
    """Fuse the nodes into stages and order both passes."""
    fused = Fuser(nodes)
    return _Scheduler(fused).plan


class _Scheduler:
    """Both passes as steps over slots, with the time at which each slot is first written and last read."""

    def __init__(self, fused: Fuser):
        self.stages, self.values = fused.stages, fused.values
        self.slots: list[Slot] = []
        self.time = 0
        self.saved: dict[tuple[str, int], int] = {}  # (mask of a value | arg-max or slope of a stage) -> slot
        self.value_slot = {0: self._slot("value", 0)}
        forward = [step for i, stage in enumerate(self.stages) for step in self._forward(i, stage)]
        self.time += 1
        loss = self.time
        logits = self._logits(fused)
        self._touch(self.value_slot[logits])
        gradient = self._slot("gradient", logits)
        self.readers = self._count_readers()
        self.pending = {logits: gradient}
        backward: list[Step] = []
        if self.values[logits].masked:
            backward.append(self._step("finish", 0, {"x": gradient, "mask": self._mask(logits), "y": gradient}))
        for i in reversed(range(len(self.stages))):
            self._backward(i, self.stages[i], backward)
        self.time += 1  # the step of the pixels
        image_gradient = self.pending[0]
        self._touch(image_gradient)
        self._touch(self.value_slot[0])  # what the next pass reads, written while the gradient is read
        self.plan = Plan(
            fused.program,
            fused.resized,
            self.values,
            self.stages,
            forward,
            backward,
            self.slots,
            self.value_slot[0],
            image_gradient,
            self.value_slot[logits],
            gradient,
            loss,
            any(0 in stage.inputs for stage in self.stages if stage.kind in ("segment", "product", "layer_norm")),
            all(node.per_sample for stage in self.stages for _, node in stage.nodes),
        )

    def _logits(self, fused: Fuser) -> int:
        return fused.resolve(len(fused.nodes) - 1)

    def _slot(self, kind: str, value: int) -> int:
        self.slots.append(Slot(kind, value, self.time, self.time))
        return len(self.slots) - 1

    def _touch(self, slot: int) -> int:
        self.slots[slot].last = max(self.slots[slot].last, self.time)
        return slot

    def _step(self, operation: str, stage: int, tensors: dict[str, Any], part: int = 0) -> Step:
        for slot in tensors.values():
            for one in slot if isinstance(slot, list) else [slot]:
                if one is not None:
                    self._touch(one)
        self.time += 1
        return Step(operation, stage, tensors, part)

    def _mask(self, value: int) -> int:
        return self.saved["mask", value]

    def _forward(self, i: int, stage: Stage) -> list[Step]:
        inputs = [self.value_slot[v] for v in stage.inputs]
        outputs = [self._slot("value", v) for v in stage.outputs]
        self.value_slot.update(zip(stage.outputs, outputs, strict=True))
        if stage.kind == "segment":
            return [self._step("segment", i, {"inputs": inputs, "outputs": outputs})]
        if stage.kind == "gather" and len(outputs) > 1:
            tensors = {"parts": inputs, "other": None, "mask": None}
            return [self._step("gather", i, {**tensors, "y": y}, part) for part, y in enumerate(outputs)]
        tensors = {"parts": inputs} if stage.kind == "gather" else {"x": inputs[0]}
        tensors["y"] = outputs[0]
        if stage.kind == "product":
            tensors["gate"] = inputs[1]
        if stage.kind in _SAVED:
            saved = _SAVED[stage.kind]
            tensors[saved] = self.saved[saved, i] = self._slot(saved, stage.outputs[0])
        else:
            tensors["other"] = None if stage.other is None else self.value_slot[stage.other]
            tensors["mask"] = None
            if stage.relu:
                tensors["mask"] = self.saved["mask", stage.outputs[0]] = self._slot("mask", stage.outputs[0])
        return [self._step(stage.kind, i, tensors)]

    def _count_readers(self) -> dict[int, int]:
        readers: dict[int, int] = {}
        for stage in self.stages:
            for value in [*stage.inputs, *([] if stage.other is None else [stage.other])]:
                readers[value] = readers.get(value, 0) + 1
        return readers

    def _backward(self, i: int, stage: Stage, steps: list[Step]) -> None:
        gradients = [self.pending.get(value) for value in stage.outputs]
        if stage.kind == "segment":
            if stage.inputs:
                self._segment_backward(i, stage, gradients, steps)
            return
        gradient = gradients[0]
        if None in gradients:
            raise NotCaptured(f"{stage.where}: no gradient comes back to it")
        if stage.other is not None:
            self._pass_on(stage.other, gradient, i, steps)
        value = stage.inputs[0]
        if stage.kind == "pointwise":
            self._pass_on(value, gradient, i, steps)
            return
        if stage.kind in ("gather", "product"):
            self._parts_backward(i, stage, gradients, steps)
            return
        tensors = {"g": gradient, **self._sum_into(value)}
        if stage.kind in _SAVED:
            tensors[_SAVED[stage.kind]] = self.saved[_SAVED[stage.kind], i]
        if stage.kind == "layer_norm":
            tensors["x"] = self.value_slot[value]
        steps.append(self._step(f"{stage.kind}_backward", i, tensors))
        self.pending[value] = tensors["dx"]

    def _parts_backward(self, i: int, stage: Stage, gradients: list[int | None], steps: list[Step]) -> None:
        """A step for the gradient of each input."""
        for part, value in enumerate(stage.inputs):
            tensors: dict[str, Any] = {"gradients": gradients}
            if stage.kind == "product":
                tensors = {"g": gradients[0], "factor": self.value_slot[stage.inputs[1 - part]]}
            tensors |= self._sum_into(value)
            steps.append(self._step(f"{stage.kind}_backward", i, tensors, part))
            self.pending[value] = tensors["dx"]

    def _sum_into(self, value: int, slot: int | None = None) -> dict[str, int | None]:
        """Slots for a step that adds a summand to the gradient of ``value``; the last one applies the ReLU's mask."""
        self.readers[value] -= 1
        before = self.pending.get(value)
        mask = self._mask(value) if self.readers[value] == 0 and self.values[value].masked else None
        return {"other": before, "mask": mask, "dx": self._slot("gradient", value) if slot is None else slot}

    def _pass_on(self, value: int, gradient: int, i: int, steps: list[Step]) -> None:
        """Add ``gradient`` as it is to the gradient of ``value``."""
        summed = self.pending.get(value)
        last = self.readers[value] == 1
        if summed is None and not (last and self.values[value].masked):
            self.readers[value] -= 1
            self.pending[value] = gradient
            return
        into = self._sum_into(value)
        steps.append(self._step("finish", i, {"x": gradient, "other": summed, "mask": into["mask"], "y": into["dx"]}))
        self.pending[value] = into["dx"]

    def _segment_backward(self, i: int, stage: Stage, gradients: list[int | None], steps: list[Step]) -> None:
        for value in stage.inputs:
            if value not in stage.options["unread"]:  # autograd may have saved it
                self._touch(self.value_slot[value])
        slots = [self._slot("gradient", value) for value in stage.inputs]
        steps.append(self._step("segment_backward", i, {"gradients": gradients, "input_gradients": slots}))
        for value, slot in zip(stage.inputs, slots, strict=True):
            into = self._sum_into(value, slot)
            if into["other"] is not None or into["mask"] is not None:
                steps.append(
                    self._step("finish", i, {"x": slot, "y": slot, "other": into["other"], "mask": into["mask"]})
                )
            self.pending[value] = slot
