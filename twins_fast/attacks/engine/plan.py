"""The explicit program of an attack step: fused stages, the steps of both passes, and where their memory lies.

The forward pass keeps what the input gradient needs and nothing else: one mask per ReLU, the arg-max of max-pooling.
Nothing here knows a device; :mod:`twins_fast.attacks.engine.executors.torch` has what runs the steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import gcd, inf, prod
from typing import Any

import torch

from twins_fast.attacks.engine.capture import Node, NotCaptured, Ref, map_values

_INSIDE = -1  # the value of a node inside the input program


@dataclass
class Value:
    """A tensor of the program: shape without the batch; images are channels-last.

    Attributes:
        masked: whether a ReLU made it, so that its gradient passes where it is not zero.
    """

    shape: tuple[int, ...]
    masked: bool = False

    @property
    def pixels(self) -> int:
        """Rows of channels per image."""
        return prod(self.shape[1:]) if len(self.shape) == 3 else prod(self.shape[:-1])

    @property
    def channels(self) -> int:
        if len(self.shape) == 3:
            return self.shape[0]
        return self.shape[-1] if self.shape else 1


@dataclass(frozen=True)
class Convolution:
    """The geometry of a convolution of an image that was enlarged ``upsample`` times (nearest neighbour)."""

    in_channels: int
    in_size: tuple[int, int]
    out_channels: int
    out_size: tuple[int, int]
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    upsample: tuple[int, int] = (1, 1)

    @property
    def operations(self) -> int:
        """Multiplications and additions for one image, without the upsampling's repetition."""
        kernel = prod(min(k, -(-(k - 1) // f) + 1) for k, f in zip(self.kernel, self.upsample, strict=True))
        return 2 * prod(self.out_size) * self.out_channels * self.in_channels // self.groups * kernel


@dataclass
class Stage:
    """What is computed in one go: ``y = relu(op(x) + other)``.

    Attributes:
        kind: ``conv``, ``affine`` (a batch norm by itself), ``pointwise`` (sum or ReLU alone), ``max_pool``,
            ``avg_pool`` or ``segment`` (any operations, differentiated by PyTorch).
        inputs, outputs: indices of values; all kinds but segments have one output, and a sum's second operand is
            ``other``.
    """

    kind: str
    where: str
    inputs: list[int]
    outputs: list[int]
    other: int | None = None
    relu: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    nodes: list[tuple[int, Node]] = field(default_factory=list)


@dataclass
class Step:
    """One call of a leaf.

    Attributes:
        leaf: name of the leaf, ``forward`` or ``backward`` its direction.
        stage: index of the stage.
        tensors: role -> slot, of the tensors that it reads and writes.
    """

    leaf: str
    stage: int
    tensors: dict[str, Any]


@dataclass
class Slot:
    """Memory of one tensor: its kind (``value``, ``gradient``, ``mask``, ``argmax``), like which value."""

    kind: str
    value: int
    first: int
    last: int = -1


@dataclass
class Plan:
    """A program for any batch.

    Attributes:
        program: steps of the input's program, see :class:`~twins_fast.attacks.engine.executors.torch.Input`.
        resized: the size that the image is enlarged to, or None.
        each_row: whether the batch may be cut into chunks.
    """

    program: list[tuple]
    resized: tuple[int, int] | None
    values: list[Value]
    stages: list[Stage]
    forward: list[Step]
    backward: list[Step]
    slots: list[Slot]
    image: int
    image_gradient: int
    logits: int
    logits_gradient: int
    each_row: bool


def build(nodes: list[Node]) -> Plan:
    """Fuse the nodes into stages and order both passes."""
    fused = _Fuser(nodes)
    return _Scheduler(fused).plan


class _Fuser:
    def __init__(self, nodes: list[Node]):
        self.nodes = nodes
        self.users: list[list[int]] = [[] for _ in nodes]
        for index, node in enumerate(nodes):
            for source in set(self._read(node)):
                self.users[source].append(index)
        self.users[-1].append(len(nodes))  # whoever reads the logits
        self.values: list[Value] = []
        self.value_of: dict[int, int] = {}  # node -> value
        self.owner: dict[int, Stage] = {}  # node -> the stage that it is a part of
        self.stages: list[Stage] = []
        self.program: list[tuple] = []
        self.resized: tuple[int, int] | None = None
        self._reached = {0}  # what depends on the images
        for index, node in enumerate(nodes):
            if self._reached.intersection(node.inputs):
                self._reached.add(index)
        self._generic = {i for i, node in enumerate(nodes) if node.op in ("call", "rows")}
        self._read_input()
        self._spread_generic()
        for index in range(len(nodes)):
            if index not in self.owner and index not in self.value_of:
                self._start(index)
        self._place()
        self._collapse()

    @staticmethod
    def _read(node: Node) -> list[int]:
        found: list[int] = []
        if node.call is not None:
            map_values(lambda v: found.append(v.index) if isinstance(v, Ref) else None, node.call[1:])
        return [*found, *node.inputs]

    def _read_input(self) -> None:
        """Take the operations on the image itself into the input program."""
        last = 0
        while len(self.users[last]) == 1 and self.users[last][0] < len(self.nodes):
            user = self.users[last][0]
            node = self.nodes[user]
            if node.op == "clamp":
                step = self._clamp(node.options)
            elif node.op == "arithmetic":
                step = (node.options["kind"], node.options["other"])
            elif node.op == "upsample" and self.resized is None:
                self.resized, step = node.shape[1:], None
            else:
                break
            if step is not None:
                if len(self.program) == 8:
                    break
                self.program.append(step)
            self.value_of[last] = _INSIDE
            last = user
        if self.resized == self.nodes[0].shape[1:]:
            self.resized = None
        self.value_of[last] = self._value(self.nodes[last])

    def _clamp(self, options: dict[str, Any]) -> tuple:
        """A step of the input program, which takes in a one-sided clamp before it."""
        low, high, at_bounds = options["low"], options["high"], options["at_bounds"]
        before = self.program[-1] if self.program else ("",)
        if before[0] == "clamp" and low == -inf and before[1] <= high and before[2:] == (inf, at_bounds):
            low = self.program.pop()[1]
        return "clamp", low, high, at_bounds

    def _spread_generic(self) -> None:
        """Small operations between generic ones are differentiated with them."""
        for index, node in enumerate(self.nodes):
            if index in self.value_of:
                continue
            if node.op in ("arithmetic", "clamp", "upsample"):
                self._generic.add(index)
            elif node.op in ("add", "relu") and any(source in self._generic for source in node.inputs):
                self._generic.add(index)

    def _value(self, node: Node, masked: bool = False) -> int:
        self.values.append(Value(node.shape, masked))
        return len(self.values) - 1

    def _only_user(self, index: int, op: str) -> int | None:
        users = self.users[index]
        if len(users) != 1 or users[0] >= len(self.nodes) or users[0] in self.owner or users[0] in self._generic:
            return None
        return users[0] if self.nodes[users[0]].op == op else None

    def _start(self, index: int) -> None:
        node = self.nodes[index]
        if node.op == "flatten":
            self.value_of[index] = ("same", node.inputs[0])
            return
        if index in self._generic:
            stage = Stage("segment", node.where, [], [])
            self._own(index, stage)
            return
        kind = {"linear": "conv", "batch_norm": "affine", "add": "pointwise", "relu": "pointwise"}.get(node.op, node.op)
        stage = Stage(kind, node.where, [node.inputs[0]], [], options=dict(node.options))
        self._own(index, stage)
        last = index
        if kind == "conv":
            self._convolution(stage, node)
            norm = self._only_user(last, "batch_norm")
            if norm is not None:
                stage.options["norm"] = self.nodes[norm].options
                last = self._own(norm, stage)
            total = self._only_user(last, "add")
            if total is not None:
                last = self._take_sum(stage, total, last)
        elif kind == "affine":
            stage.options = {"norm": node.options}
        elif node.op == "add":
            stage.other = node.inputs[1]
        elif node.op == "relu":
            stage.relu = True
        if kind in ("conv", "affine") or node.op == "add":
            relu = self._only_user(last, "relu")
            if relu is not None:
                stage.relu = True
                last = self._own(relu, stage)
        stage.outputs = [last]

    def _own(self, index: int, stage: Stage) -> int:
        self.owner[index] = stage
        stage.nodes.append((index, self.nodes[index]))
        return index

    def _take_sum(self, stage: Stage, total: int, last: int) -> int:
        left, right = self.nodes[total].inputs
        if left == right:
            return last
        stage.other = right if left == last else left
        return self._own(total, stage)

    def _convolution(self, stage: Stage, node: Node) -> None:
        source = self.nodes[node.inputs[0]].shape
        if node.op == "linear":
            geometry = Convolution(source[0], (1, 1), node.shape[0], (1, 1))
        else:
            sizes = {name: node.options[name] for name in ("kernel", "stride", "padding", "dilation", "groups")}
            geometry = Convolution(source[0], tuple(source[1:]), node.shape[0], tuple(node.shape[1:]), **sizes)
        stage.options = {"geometry": geometry, "weight": node.options["weight"], "bias": node.options["bias"]}

    def _place(self) -> None:
        """Order the stages by their last node, join neighbouring segments, and number the values."""
        stages = {id(stage): stage for stage in self.owner.values()}
        ordered = sorted(stages.values(), key=lambda stage: stage.nodes[-1][0])
        for stage in ordered:
            before = self.stages[-1] if self.stages else None
            if stage.kind == "segment" and before is not None and before.kind == "segment":
                before.nodes += stage.nodes
            else:
                self.stages.append(stage)
        for stage in self.stages:
            if stage.kind == "segment":
                self._close(stage)
                continue
            stage.inputs = [self._resolve(index) for index in stage.inputs]
            stage.other = None if stage.other is None else self._resolve(stage.other)
            last = stage.outputs[0]
            self.value_of[last] = self._value(self.nodes[last], masked=stage.relu)
            stage.outputs = [self.value_of[last]]

    def _close(self, stage: Stage) -> None:
        """What a segment takes and gives."""
        inside = {index for index, _ in stage.nodes}
        taken = dict.fromkeys(s for _, node in stage.nodes for s in self._read(node) if s not in inside)
        given = [index for index, _ in stage.nodes if any(user not in inside for user in self.users[index])]
        stage.options = {"takes": {}, "gives": {}, "keeps": []}
        for index in taken:
            if index not in self._reached or not self._has_gradient(index):
                stage.options["takes"][index] = None
                continue
            if self.nodes[index].shape is None:
                raise NotCaptured(f"{stage.where}: a result that is not led by the batch crosses planned layers")
            value = self._resolve(index)
            stage.options["takes"][index] = value
            if value not in stage.inputs:
                stage.inputs.append(value)
        for index in given:
            if index not in self._reached or not self._has_gradient(index):
                stage.options["keeps"].append(index)  # made of parameters and numbers, or of another kind than numbers
                if all(user in self._generic for user in self.users[index]):
                    continue
            elif self.nodes[index].dtype != torch.float32:
                raise NotCaptured(f"{stage.where}: a {self.nodes[index].dtype} result crosses planned layers")
            if self.nodes[index].shape is None:
                continue
            self.value_of[index] = stage.options["gives"][index] = self._value(self.nodes[index])
            stage.outputs.append(self.value_of[index])

    def _has_gradient(self, index: int) -> bool:
        dtype = self.nodes[index].dtype
        return dtype is None or dtype.is_floating_point or dtype.is_complex

    def _resolve(self, index: int) -> int:
        found = self.value_of[index]
        return self._resolve(found[1]) if isinstance(found, tuple) else found

    def _collapse(self) -> None:
        """A first convolution reads the small image, if it was enlarged by whole numbers."""
        if self.resized is None or not self.stages:
            return
        first = self.stages[0]
        image = self.nodes[0].shape
        readers = sum(first.inputs[0] in (*s.inputs, s.other) for s in self.stages) if first.inputs else 0
        whole = all(big % small == 0 for big, small in zip(self.resized, image[1:], strict=True))
        if first.kind != "conv" or first.inputs[0] != 0 or readers != 1 or not whole:
            return
        geometry = first.options["geometry"]
        if geometry.groups != 1:
            return
        factors = tuple(big // small for big, small in zip(self.resized, image[1:], strict=True))
        first.options["geometry"] = Convolution(
            **{**geometry.__dict__, "in_size": tuple(image[1:]), "upsample": factors}
        )
        self.values[0].shape = tuple(image)
        self.resized = None


class _Scheduler:
    """Both passes as steps over slots, with the time at which each slot is first written and last read."""

    def __init__(self, fused: _Fuser):
        self.stages, self.values = fused.stages, fused.values
        self.slots: list[Slot] = []
        self.time = 0
        self.saved: dict[tuple[str, int], int] = {}  # (mask of a value | arg-max of a stage) -> slot
        self.value_slot = {0: self._slot("value", 0)}
        forward = [self._forward(i, stage) for i, stage in enumerate(self.stages)]
        self.time += 1  # the loss
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
            all(node.each_row for stage in self.stages for _, node in stage.nodes),
        )

    def _logits(self, fused: _Fuser) -> int:
        return fused._resolve(len(fused.nodes) - 1)

    def _slot(self, kind: str, value: int) -> int:
        self.slots.append(Slot(kind, value, self.time, self.time))
        return len(self.slots) - 1

    def _touch(self, slot: int) -> int:
        self.slots[slot].last = max(self.slots[slot].last, self.time)
        return slot

    def _step(self, leaf: str, stage: int, tensors: dict[str, Any]) -> Step:
        for slot in tensors.values():
            for one in slot if isinstance(slot, list) else [slot]:
                if one is not None:
                    self._touch(one)
        self.time += 1
        return Step(leaf, stage, tensors)

    def _mask(self, value: int) -> int:
        return self.saved["mask", value]

    def _forward(self, i: int, stage: Stage) -> Step:
        inputs = [self.value_slot[v] for v in stage.inputs]
        outputs = [self._slot("value", v) for v in stage.outputs]
        self.value_slot.update(zip(stage.outputs, outputs, strict=True))
        if stage.kind == "segment":
            return self._step("segment", i, {"inputs": inputs, "outputs": outputs})
        tensors = {"x": inputs[0], "y": outputs[0]}
        if stage.kind == "max_pool":
            tensors["argmax"] = self.saved["argmax", i] = self._slot("argmax", stage.outputs[0])
        else:
            tensors["other"] = None if stage.other is None else self.value_slot[stage.other]
            tensors["mask"] = None
            if stage.relu:
                tensors["mask"] = self.saved["mask", stage.outputs[0]] = self._slot("mask", stage.outputs[0])
        return self._step(stage.kind, i, tensors)

    def _count_readers(self) -> dict[int, int]:
        readers: dict[int, int] = {}
        for stage in self.stages:
            for value in [*stage.inputs, *([] if stage.other is None else [stage.other])]:
                readers[value] = readers.get(value, 0) + 1
        return readers

    def _backward(self, i: int, stage: Stage, steps: list[Step]) -> None:
        known = [self.pending.get(value) for value in stage.outputs]
        if stage.kind == "segment":
            if stage.inputs:
                self._segment_backward(i, stage, known, steps)
            return
        if known[0] is None:
            raise NotCaptured(f"{stage.where}: no gradient comes back to it")
        gradient = known[0]
        if stage.other is not None:
            self._pass_on(stage.other, gradient, i, steps)
        value = stage.inputs[0]
        if stage.kind == "pointwise":
            self._pass_on(value, gradient, i, steps)
            return
        tensors = {"g": gradient, **self._sum_into(value)}
        if stage.kind == "max_pool":
            tensors["argmax"] = self.saved["argmax", i]
        steps.append(self._step(f"{stage.kind}_backward", i, tensors))
        self.pending[value] = tensors["dx"]

    def _sum_into(self, value: int, slot: int | None = None) -> dict[str, int | None]:
        """Where a share of the gradient of ``value`` goes, and with what it is finished."""
        self.readers[value] -= 1
        before = self.pending.get(value)
        mask = self._mask(value) if self.readers[value] == 0 and self.values[value].masked else None
        return {"other": before, "mask": mask, "dx": self._slot("gradient", value) if slot is None else slot}

    def _pass_on(self, value: int, gradient: int, i: int, steps: list[Step]) -> None:
        """The gradient itself is a share of that of ``value``."""
        shares = self.pending.get(value)
        last = self.readers[value] == 1
        if shares is None and not (last and self.values[value].masked):
            self.readers[value] -= 1
            self.pending[value] = gradient
            return
        into = self._sum_into(value)
        steps.append(self._step("finish", i, {"x": gradient, "other": shares, "mask": into["mask"], "y": into["dx"]}))
        self.pending[value] = into["dx"]

    def _segment_backward(self, i: int, stage: Stage, known: list[int | None], steps: list[Step]) -> None:
        for value in stage.inputs:
            self._touch(self.value_slot[value])  # PyTorch may have kept it
        made = [self._slot("gradient", value) for value in stage.inputs]
        steps.append(self._step("segment_backward", i, {"gradients": known, "made": made}))
        for value, slot in zip(stage.inputs, made, strict=True):
            into = self._sum_into(value, slot)
            if into["other"] is not None or into["mask"] is not None:
                steps.append(
                    self._step("finish", i, {"x": slot, "y": slot, "other": into["other"], "mask": into["mask"]})
                )
            self.pending[value] = slot


def place(sizes: list[int], slots: list[Slot]) -> tuple[list[int], int]:
    """Offsets per image for slots of these bytes, such that no two that live together overlap; and the total.

    All sizes grow with the batch alike, so that one placement serves every batch. Largest first, lowest gap first.
    """
    offsets = [0] * len(slots)
    placed: list[int] = []
    for index in sorted(range(len(slots)), key=lambda i: -sizes[i]):
        slot = slots[index]
        taken = sorted(
            (offsets[i], offsets[i] + sizes[i])
            for i in placed
            if slots[i].first <= slot.last and slot.first <= slots[i].last
        )
        offset = 0
        for begin, end in taken:
            if offset + sizes[index] <= begin:
                break
            offset = max(offset, end)
        offsets[index] = offset
        placed.append(index)
    return offsets, max((o + s for o, s in zip(offsets, sizes, strict=True)), default=0)


def axis_forward(kernel: int, stride: int, padding: int, dilation: int, factor: int) -> tuple[int, int, list]:
    """A convolution along one axis over an image that was enlarged ``factor`` times.

    Returns:
        (in_step, out_step, phases): output ``phase + i * out_step`` reads the small image at ``i * in_step + tap``
        for each (tap, kernel indices) of the phase's list.
    """
    out_step = factor // gcd(stride, factor)
    phases = []
    for phase in range(out_step):
        taps: dict[int, list[int]] = {}
        for k in range(kernel):
            taps.setdefault((phase * stride - padding + k * dilation) // factor, []).append(k)
        phases.append(sorted(taps.items()))
    return out_step * stride // factor, out_step, phases


def axis_backward(kernel: int, stride: int, padding: int, dilation: int, factor: int) -> tuple[int, int, list]:
    """The input gradient of :func:`axis_forward`, as a convolution over the output's gradient, in the same form."""
    out_step = stride // gcd(stride, factor)
    phases = []
    for phase in range(out_step):
        taps: dict[int, list[int]] = {}
        for k in range(kernel):
            # Output o reads the enlarged image at o * stride - padding + k * dilation.
            low = factor * phase + padding - k * dilation
            for o in range(-(-low // stride), (low + factor - 1) // stride + 1):
                taps.setdefault(o, []).append(k)
        phases.append(sorted(taps.items()))
    return factor * out_step // stride, out_step, phases
