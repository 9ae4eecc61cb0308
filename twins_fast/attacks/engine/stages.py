"""Nodes fused into stages: batch norm, a gain, residual sum and ReLU go into the convolution before them."""

from __future__ import annotations

from math import inf, prod
from typing import Any

import torch

from twins_fast.attacks.engine.activations import Activation
from twins_fast.attacks.engine.convolution import Convolution, Sizes
from twins_fast.attacks.engine.layout import Layout, value_shape
from twins_fast.attacks.engine.nodes import Node, NotCaptured, Ref, map_values
from twins_fast.attacks.engine.plan import Stage, Value

_INSIDE = -1  # the value of a node inside the input program


class Fuser:
    """Stages of a list of nodes, in the order in which they run, and the values that they read and write."""

    def __init__(self, nodes: list[Node]):
        self.nodes = nodes
        self.users: list[list[int]] = [[] for _ in nodes]
        for index, node in enumerate(nodes):
            for source in set(self._read(node)):
                self.users[source].append(index)
        self.users[-1].append(len(nodes))  # whoever reads the logits
        self.values: list[Value] = []
        self.value_of: dict[int, int | tuple[str, int]] = {}  # node -> value, or ("same", the node whose value it has)
        self.owner: dict[int, Stage] = {}  # node -> the stage that it is a part of
        self.stages: list[Stage] = []
        self.program: list[tuple] = []
        self.resized: tuple[int, int] | None = None
        self._reached = {0}  # nodes that depend on the images
        for index, node in enumerate(nodes):
            if self._reached.intersection(node.inputs):
                self._reached.add(index)
        # What does not depend on the images has no gradient.
        self._generic = {i for i, node in enumerate(nodes) if node.op in ("call", "rows") or i not in self._reached}
        layout = Layout(nodes, self._generic)
        self._generic |= layout.impossible
        self.channels = layout.channels
        self._read_input()
        self._spread_generic()
        for index in range(len(nodes)):
            if index not in self.owner and index not in self.value_of:
                self._start(index)
        self._place()
        self._collapse()

    @staticmethod
    def _read(node: Node) -> list[int]:
        operands: list[int] = []
        if node.call is not None:
            map_values(lambda v: operands.append(v.index) if isinstance(v, Ref) else None, node.call[1:])
        return [*operands, *node.inputs]

    def _read_input(self) -> None:
        """Move the first operations, on the image itself, into the input program."""
        last = 0
        while len(self.users[last]) == 1 and self.users[last][0] < len(self.nodes):
            user = self.users[last][0]
            if user in self._generic:
                break
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
        self.value_of[last] = self._value(last)

    def _clamp(self, options: dict[str, Any]) -> tuple:
        """A step of the input program; a one-sided clamp before it becomes a part of it."""
        low, high, at_bounds = options["low"], options["high"], options["at_bounds"]
        before = self.program[-1] if self.program else ("",)
        if before[0] == "clamp" and low == -inf and before[1] <= high and before[2:] == (inf, at_bounds):
            low = self.program.pop()[1]
        return "clamp", low, high, at_bounds

    def _spread_generic(self) -> None:
        """Small operations between generic ones are differentiated with them."""
        parts: dict[int, str] = {}  # results of convolutions, and of what these take over -> the last part
        for index, node in enumerate(self.nodes):
            if index in self.value_of or index in self._generic:
                continue
            alone = [parts[source] for source in node.inputs if source in parts and len(self.users[source]) == 1]
            is_gain = bool(alone) and node.op == "arithmetic" and node.options["kind"] == "mul"
            if node.op == "upsample" or (node.op == "arithmetic" and not (is_gain and alone != ["gain"])):
                self._generic.add(index)
            elif node.op == "layer_norm" and self.value_of.get(self._renamed(node.inputs[0])) == 0:
                self._generic.add(index)  # the step of the pixels writes where its operand would have to stay
            elif node.op in ("add", "relu", "same") and not alone and self._generic.intersection(node.inputs):
                self._generic.add(index)
            elif node.op in ("conv", "linear") or (node.op == "batch_norm" and alone == ["layer"]):
                parts[index] = "norm" if node.op == "batch_norm" else "layer"
            elif alone and node.op in ("arithmetic", "same"):
                parts[index] = "gain" if is_gain else alone[0]

    def _value(self, index: int, masked: bool = False) -> int:
        self.values.append(Value(value_shape(self.nodes[index].shape, self.channels[index]), masked))
        return len(self.values) - 1

    def _only_user(self, index: int, op: str) -> int | None:
        """The one reader of a result, perhaps in another shape, if it is such an operation."""
        users = self.users[index]
        if len(users) != 1 or users[0] >= len(self.nodes) or users[0] in self.owner or users[0] in self._generic:
            return None
        same = self.nodes[users[0]].op == "same"
        return self._only_user(users[0], op) if same else users[0] if self.nodes[users[0]].op == op else None

    def _start(self, index: int) -> None:
        node = self.nodes[index]
        if index in self._generic:
            stage = Stage("segment", node.where, [], [])
            self._own(index, stage)
            return
        if node.op == "same":
            self.value_of[index] = ("same", node.inputs[0])
            return
        kinds = {
            "linear": "conv",
            "batch_norm": "affine",
            "add": "pointwise",
            "relu": "pointwise",
            "clamp": "activation",
        }
        kind = kinds.get(node.op, node.op)
        stage = Stage(kind, node.where, [node.inputs[0]], [], options=dict(node.options))
        self._own(index, stage)
        last = index
        if kind in ("max_pool", "avg_pool"):
            stage.options["sizes"] = Sizes(self._size(node.inputs[0]), self._size(index))
        if kind == "conv":
            self._convolution(stage, node)
            norm = self._only_user(last, "batch_norm")
            if norm is not None:
                stage.options["norm"] = self.nodes[norm].options
                last = self._own(norm, stage)
            gain = self._only_user(last, "arithmetic")
            if gain is not None:
                stage.options["gain"] = self.nodes[gain].options["other"]
                last = self._own(gain, stage)
            total = self._only_user(last, "add")
            if total is not None:
                last = self._take_sum(stage, total, last)
        elif kind == "affine":
            stage.options = {"norm": node.options}
        elif node.op == "add":
            stage.other = node.inputs[1]
        elif node.op == "relu":
            stage.relu = True
        elif node.op == "clamp":
            o = node.options
            stage.options = {
                "activation": Activation("clamp closed" if o["at_bounds"] else "clamp open", o["low"], o["high"])
            }
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
        stage.other = right if self._renamed(left) == last else left
        return self._own(total, stage)

    def _renamed(self, index: int) -> int:
        """The node whose memory a result is."""
        node = self.nodes[index]
        return self._renamed(node.inputs[0]) if node.op == "same" and index not in self._generic else index

    def _size(self, index: int) -> tuple[int, int]:
        """Height and width of a result; of tokens, how many they are."""
        shape = value_shape(self.nodes[index].shape, self.channels[index])
        return shape[1:] if len(shape) == 3 else (prod(shape[:-1]), 1)

    def _convolution(self, stage: Stage, node: Node) -> None:
        source = self.nodes[node.inputs[0]].shape
        if node.op == "linear":
            size = self._size(node.inputs[0])
            geometry = Convolution(source[-1], size, node.shape[-1], size)
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
            stage.inputs = [self.resolve(index) for index in stage.inputs]
            stage.other = None if stage.other is None else self.resolve(stage.other)
            last = stage.outputs[0]
            self.value_of[last] = self._value(last, masked=stage.relu)
            stage.outputs = [self.value_of[last]]

    def _close(self, stage: Stage) -> None:
        """Which values a segment takes and gives, and which results it keeps for later segments."""
        inside = {index for index, _ in stage.nodes}
        sources = dict.fromkeys(s for _, node in stage.nodes for s in self._read(node) if s not in inside)
        results = [index for index, _ in stage.nodes if any(user not in inside for user in self.users[index])]
        stage.options = {"takes": {}, "gives": {}, "keeps": []}
        for index in sources:
            if index not in self._reached or not self._has_gradient(index):
                stage.options["takes"][index] = None
                continue
            if self.nodes[index].shape is None:
                raise NotCaptured(f"{stage.where}: a result that is not batched crosses planned layers")
            value = self.resolve(index)
            stage.options["takes"][index] = value
            if value not in stage.inputs:
                stage.inputs.append(value)
        for index in results:
            if index not in self._reached or not self._has_gradient(index):
                stage.options["keeps"].append(index)  # independent of the images, or not floating point
                if all(user in self._generic for user in self.users[index]):
                    continue
            elif self.nodes[index].dtype != torch.float32:
                raise NotCaptured(f"{stage.where}: a {self.nodes[index].dtype} result crosses planned layers")
            if self.nodes[index].shape is None:
                continue
            self.value_of[index] = stage.options["gives"][index] = self._value(index)
            stage.outputs.append(self.value_of[index])
        crossing = [
            i for i, value in (*stage.options["takes"].items(), *stage.options["gives"].items()) if value is not None
        ]
        stage.options["views"] = {i: (self.nodes[i].shape, self.channels[i]) for i in crossing}

    def _has_gradient(self, index: int) -> bool:
        dtype = self.nodes[index].dtype
        return dtype is None or dtype.is_floating_point or dtype.is_complex

    def resolve(self, index: int) -> int:
        """The value that holds the result of a node."""
        value = self.value_of[index]
        return self.resolve(value[1]) if isinstance(value, tuple) else value

    def _collapse(self) -> None:
        """Let the first convolution read the small image if that was upsampled by whole numbers."""
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
