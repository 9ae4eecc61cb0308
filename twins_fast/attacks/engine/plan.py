"""The explicit program of an attack step: fused stages, the steps of both passes, and what lives in memory when.

The forward pass keeps what the input gradient needs and nothing else: one mask per ReLU, the arg-max of max-pooling,
the moments of layer norms, the factors of products.
Nothing here knows a device; :mod:`twins_fast.attacks.engine.executors` has what runs the steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

from twins_fast.attacks.engine.nodes import Node

LIKE_VALUES = ("value", "gradient", "slope")  # kinds of slots that have a value's shape, in the compute dtype


@dataclass
class Value:
    """A tensor of the program: shape without the batch, [C, H, W] of an image, which is channels-last, or [..., C].

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


SEGMENTS = ("segment", "segment_backward")  # steps that PyTorch runs, whatever the executor


class Part(NamedTuple):
    """Channels ``first + i * step`` of an input, which become channels ``y_first + i * y_step`` of an output.

    Attributes:
        input, output: which one of the stage's.
    """

    input: int
    first: int
    step: int
    channels: int
    output: int
    y_first: int
    y_step: int


@dataclass
class Stage:
    """What is computed in one pass: ``y = relu(op(x) + other)``.

    Attributes:
        kind: ``conv``, ``affine`` (a batch norm or arithmetic by itself), ``layer_norm`` (over channels), ``pointwise``
            (sum or ReLU alone), ``activation`` (any other one), ``product`` (of two values), ``gather`` (channels of
            several values side by side, or some of one), ``max_pool``, ``avg_pool`` (any sums over windows) or
            ``segment`` (any operations, differentiated by PyTorch).
        inputs, outputs: indices of values; segments and gathers may have several outputs, and a sum's second operand
            is ``other``.
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
    """One call of an executor.

    Attributes:
        operation: name of the executor's method.
        stage: index of the stage.
        tensors: role -> slot, of the tensors that it reads and writes.
        part: the output that it computes, or the input whose gradient it does.
    """

    operation: str
    stage: int
    tensors: dict[str, Any]
    part: int = 0


@dataclass
class Slot:
    """Memory of one tensor, live from step ``first`` to step ``last``.

    Attributes:
        kind: ``value``, ``gradient``, ``mask``, ``argmax``, ``slope`` (of an activation) or ``moments`` (of a layer
            norm).
        value: index of the value that it is, or belongs to.
    """

    kind: str
    value: int
    first: int
    last: int = -1


@dataclass
class Plan:
    """A program for any batch.

    Attributes:
        program: steps of the input's program, see :class:`~twins_fast.attacks.engine.executors.pixels.Input`.
        resized: (height, width) that the image is upsampled to, or None.
        loss: the time between the passes.
        keeps_image: whether the backward pass reads the image.
        per_sample: whether the batch may be cut into chunks.
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
    loss: int
    keeps_image: bool
    per_sample: bool
