"""Nodes fused into stages: batch norm, arithmetic, residual sum and ReLU go into the convolution before them."""

from __future__ import annotations

from math import inf, prod
from typing import Any

import torch

from twins_fast.attacks.engine.activations import Activation
from twins_fast.attacks.engine.convolution import Convolution, Sizes
from twins_fast.attacks.engine.layout import Layout, value_shape
from twins_fast.attacks.engine.nodes import Node, NotCaptured, Ref
from twins_fast.attacks.engine.plan import Part, Stage, Value
from twins_fast.attacks.engine.unread import unread

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
        return [*(v.index for v in node.reads() if isinstance(v, Ref)), *node.inputs]

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
            elif node.op == "arithmetic" and node.options["kind"] != "rsub":
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
        parts: set[int] = set()  # results of convolutions, and of what these take over
        for index, node in enumerate(self.nodes):
            if index in self.value_of or index in self._generic:
                continue
            alone = any(source in parts and len(self.users[source]) == 1 for source in node.inputs)
            small = node.op in ("add", "relu", "same", "arithmetic")
            if small and not alone and self._generic.intersection(node.inputs):
                self._generic.add(index)
            elif node.op == "flatten" and not self._is_taken(index):
                self._generic.add(index)
            elif node.op in ("conv", "linear") or (alone and node.op in ("batch_norm", "arithmetic", "same")):
                parts.add(index)

    def _is_taken(self, index: int) -> bool:
        """Whether a flattened image, or a padding, becomes a part of the layers that follow."""
        node, users = self.nodes[index], self.users[index]
        if min(node.options.get("padding", (0,))) < 0:
            return False
        op = "linear" if node.op == "flatten" else "conv"
        return all(user < len(self.nodes) and self.nodes[user].op == op for user in users)

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
        taken = node.op == "same" or (node.op in ("flatten", "pad") and self._is_taken(index))
        if taken or (node.op == "concat" and len(node.inputs) == 1):
            self.value_of[index] = ("same", node.inputs[0])
            return
        kinds = {
            "linear": "conv",
            "batch_norm": "affine",
            "add": "pointwise",
            "relu": "pointwise",
            "clamp": "activation",
            "arithmetic": "affine",
            "upsample": "avg_pool",
            "pad": "avg_pool",
            "crop": "avg_pool",
            "concat": "gather",
            "shuffle": "gather",
            "slice": "gather",
        }
        kind = kinds.get(node.op, node.op)
        inputs = node.inputs if node.op in ("concat", "product") else node.inputs[:1]
        stage = Stage(kind, node.where, list(inputs), [], options=dict(node.options))
        if node.op == "slice":
            stage.outputs = self._slices(stage, index)
            return
        last = self._own(index, stage)
        if kind in ("max_pool", "avg_pool"):
            stage.options["sizes"] = Sizes(self._size(node.inputs[0]), self._size(index))
        if kind == "conv":
            self._convolution(stage, node)
        elif kind == "gather":
            last = self._gather(stage, node, index)
        if kind == "affine":
            stage.options = {"norm": node.options} if node.op == "batch_norm" else {"then": [self._arithmetic(node)]}
        in_order = node.op == "concat" and all(part.y_step == 1 for part in stage.options["parts"])
        if kind in ("conv", "affine") or in_order:
            last = self._take_affine(stage, last)
        if kind in ("conv", "affine", "product"):
            total = self._only_user(last, "add")
            if total is not None:
                last = self._take_sum(stage, total, last)
        elif node.op == "add":
            stage.other = node.inputs[1]
        elif node.op == "relu":
            stage.relu = True
        elif node.op == "clamp":
            o = node.options
            stage.options = {
                "activation": Activation("clamp closed" if o["at_bounds"] else "clamp open", o["low"], o["high"])
            }
        if kind in ("conv", "affine", "product", "gather") or node.op == "add":
            relu = self._only_user(last, "relu")
            if relu is not None:
                stage.relu = True
                last = self._own(relu, stage)
        stage.outputs = [last]

    def _own(self, index: int, stage: Stage) -> int:
        self.owner[index] = stage
        stage.nodes.append((index, self.nodes[index]))
        return index

    @staticmethod
    def _arithmetic(node: Node) -> tuple[str, Any]:
        return node.options["kind"], node.options["other"]

    def _take_affine(self, stage: Stage, last: int) -> int:
        """A batch norm, and arithmetic with numbers and parameters, behind what the stage has so far."""
        norm = self._only_user(last, "batch_norm")
        if norm is not None and not {"norm", "then"} & stage.options.keys():
            stage.options["norm"] = self.nodes[norm].options
            last = self._own(norm, stage)
        while (more := self._only_user(last, "arithmetic")) is not None:
            stage.options.setdefault("then", []).append(self._arithmetic(self.nodes[more]))
            last = self._own(more, stage)
        return last

    def _gather(self, stage: Stage, node: Node, last: int) -> int:
        """All channels of some values side by side, perhaps shuffled."""
        sizes = [self.nodes[index].shape[0] for index in stage.inputs]
        firsts = [sum(sizes[:k]) for k in range(len(sizes))]
        parts = [Part(k, 0, 1, size, 0, first, 1) for k, (size, first) in enumerate(zip(sizes, firsts, strict=True))]
        shuffle = last if node.op == "shuffle" else self._only_user(last, "shuffle")
        if shuffle is not None:
            groups = self.nodes[shuffle].options["groups"]
            parts = [piece for part in parts for piece in _shuffled(part, groups, sum(sizes) // groups)]
            last = self._own(shuffle, stage) if shuffle != last else last
        stage.options = {"parts": parts}
        return last

    def _slices(self, stage: Stage, index: int) -> list[int]:
        """Slices of one value that do not overlap are one stage, so that its gradient is put together in one pass."""
        source, taken, outputs, parts = self.nodes[index].inputs[0], set(), [], []
        for user in self.users[source]:
            node = self.nodes[user] if user < len(self.nodes) else None
            if node is None or node.op != "slice" or user in self.owner:
                continue
            first, step, channels = node.options["first"], node.options["step"], node.shape[0]
            its = set(range(first, first + channels * step, step))
            if its & taken:
                continue
            parts.append(Part(0, first, step, channels, len(outputs), 0, 1))
            outputs.append(self._own(user, stage))
            taken |= its
        stage.options = {"parts": parts}
        return outputs

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
        index, padding = node.inputs[0], (0, 0)
        while (before := self.nodes[index]).op in ("flatten", "pad") and isinstance(self.value_of.get(index), tuple):
            padding = tuple(map(sum, zip(padding, before.options.get("padding", (0, 0)), strict=True)))
            index = before.inputs[0]
        stage.inputs, source = [index], before.shape
        if node.op == "linear":
            if index == node.inputs[0]:
                size = self._size(index)
                geometry = Convolution(source[-1], size, node.shape[-1], size)
            else:  # flattened
                size = tuple(source[1:])
                geometry = Convolution(source[0], size, node.shape[-1], (1, 1), size)
        else:
            sizes = {name: node.options[name] for name in ("kernel", "stride", "padding", "dilation", "groups")}
            sizes["padding"] = tuple(map(sum, zip(padding, sizes["padding"], strict=True)))
            geometry = Convolution(source[0], tuple(source[1:]), node.shape[0], tuple(node.shape[1:]), **sizes)
        stage.options = {"geometry": geometry, "weight": node.options["weight"], "bias": node.options["bias"]}

    def _place(self) -> None:
        """Order the stages by their last node, join neighbouring segments, and number the values."""
        stages = {id(stage): stage for stage in self.owner.values()}
        # What slices are made from is there before the first of them.
        ordered = sorted(stages.values(), key=lambda stage: stage.nodes[0 if len(stage.outputs) > 1 else -1][0])
        for stage in self._late(ordered):
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
            for last in stage.outputs:
                self.value_of[last] = self._value(last, masked=stage.relu)
            stage.outputs = [self.value_of[last] for last in stage.outputs]

    def _late(self, ordered: list[Stage]) -> list[Stage]:
        """Results that are not batched right before their first use, as they cannot cross planned layers."""
        places: dict[int, int] = {}
        for place, stage in reversed([*enumerate(ordered)]):
            inside = [index for index, _ in stage.nodes]
            users = {user for index in inside for user in self.users[index] if user not in inside}
            moves = stage.kind == "segment" and all(self.nodes[index].shape is None for index in inside)
            uses = [places[id(self.owner[user])] for user in users if user in self.owner]
            places[id(stage)] = min(uses) if moves and uses else place
        return sorted(ordered, key=lambda stage: places[id(stage)])

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
        stage.options["unread"] = unread(stage.nodes, stage.options["takes"])

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


def _shuffled(part: Part, groups: int, channels: int) -> list[Part]:
    """A part of a result whose ``groups`` of ``channels`` each then take turns: it is cut where a group ends."""
    pieces = []
    while part.channels:
        group, place = divmod(part.y_first, channels)
        taken = min(part.channels, channels - place)
        pieces.append(part._replace(channels=taken, y_first=place * groups + group, y_step=groups))
        part = part._replace(first=part.first + taken, channels=part.channels - taken, y_first=part.y_first + taken)
    return pieces
