"""Whether a plan computes its model, and its kernels what PyTorch does: checked before its first attack."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from twins_fast.attacks.engine.executors.torch import TorchExecutor, mask_like
from twins_fast.attacks.engine.nodes import NotCaptured, as_float32, in_one_line
from twins_fast.attacks.engine.passes import Bound, Pass, magnifying
from twins_fast.attacks.engine.plan import LIKE_VALUES, SEGMENTS, Step
from twins_fast.attacks.engine.program import Program
from twins_fast.attacks.engine.widened import widened
from twins_fast.models.output import Output, output_of
from twins_fast.nn.guards import random_numbers_restored

DIFFERENT = 0.05  # relative L2 distance beyond which results are not the same
CANCELLED = 0.01  # so much of a sum's terms without their signs counts as a part of it
STEP_SIZE = 1 / 64  # of the pixels
GARBAGE = 0xA5  # where a kernel is going to write bits

_SAVED = ("slope", "moments")  # for the backward pass, compared as results are
_RESULTS = {"forward": ("y", "mask", "argmax", *_SAVED), "backward": ("y", "dx")}  # roles of what a step writes


def difference(program: Program, model: nn.Module, images: Tensor, rounded: bool) -> str:
    """What is wrong with a plan, checked once for each number of images that its steps take at once; "" if nothing is.

    Two of the images go through the plan in float32 by PyTorch, which has to give the model's logits and gradients: a
    forward that the capture did not see in full does not. Then all of them go through the executor that is going to
    run, in its precision, and each of its steps has to give for these two what PyTorch makes of the same operands.

    The tolerance is far wider than roundoff.

    Args:
        images: [N, C, H, W] float32 or, as the model is, of half precision.
        rounded: whether the program runs so, see :meth:`Program.chunk`.

    Raises:
        NotCaptured: the model itself fails on so few images.
    """
    unknown = program.sizes(len(images), rounded) - program.verified if len(images) else ()
    if not unknown:
        return ""
    device = program.executor.device
    plain = Program(program.plan, program.nodes, model, program.shape, TorchExecutor(torch.float32, device))
    plainly = torch.autocast(device.type, enabled=False)
    with random_numbers_restored(), torch.inference_mode(False), plainly, widened(model):
        with torch.no_grad():
            plain.fold(model)
        images = as_float32(images.detach()).clone(memory_format=torch.contiguous_format)
        if not program.verified and not _computes_model(plain, model, images[_ends(len(images))], program.output):
            return "the plan's logits or gradients are not the model's"
        for rows in sorted(unknown) if type(program.executor) is not TorchExecutor else ():
            x, wrong = images[torch.arange(rows, device=device) % len(images)], []

            def check(network: Pass, rows: slice, x: Tensor = x, wrong: list[str] = wrong) -> None:
                wrong.append(_wrong_step(program, plain, network.bound, x[rows]))

            with torch.no_grad():
                program.fold(model)
                program.in_parts(rows, check)
            if any(wrong):
                return f"{max(wrong)} by {program.executor.name} gives other results than PyTorch"
    program.verified |= program.sizes(len(images), rounded)  # others than were asked for if memory ran out
    return ""


def _ends(rows: int) -> list[int]:
    return sorted({0, rows - 1})


def _direction(like: Tensor) -> Tensor:
    """A gradient of the logits."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(0)).to(like.device)


def _computes_model(plain: Program, model: nn.Module, x: Tensor, output: Output) -> bool:
    plain.largest_chunk = 1  # images must not see each other
    direction = _direction(x.new_empty(len(x), plain.classes))
    planned_logits, gradient = torch.empty_like(direction), torch.empty_like(x)

    def work(network: Pass, rows: slice) -> None:
        planned_logits[rows] = network.logits(x[rows])
        gradient[rows] = network.gradient(x[rows], direction[rows])

    with torch.no_grad():
        plain.in_parts(len(x), work)
    try:
        with torch.enable_grad():
            pixels = x.clone().requires_grad_()
            logits = output_of(model(pixels), output)
            if logits.shape != direction.shape:
                return False
            (expected,) = torch.autograd.grad((logits * direction).sum(), pixels)
    except Exception as error:  # no fault of the plan
        raise NotCaptured(f"the model fails on {len(x)} of the images: {in_one_line(error)}") from error
    pairs = zip((*planned_logits, *gradient), (*logits.detach(), *expected), strict=True)
    return all(_close(actual, right) for actual, right in pairs)  # each image by itself: one may be far larger


def _wrong_step(program: Program, plain: Program, own: Bound, images: Tensor) -> str:
    """The first step whose results are not PyTorch's; "" if there is none."""
    ends = _ends(len(images)) if program.plan.per_sample else list(range(len(images)))
    reference = plain.bound(len(ends))
    program.input.prepare(images, own.image)
    plain.input.prepare(images[ends], reference.image)
    if not _close(own.image[ends], reference.image):
        return "normalisation of the images"
    direction = _direction(own.logits_gradient)
    own.logits_gradient.copy_(torch.ldexp(direction, magnifying(direction)))
    for name, results in _RESULTS.items():
        runs = zip(getattr(program.plan, name), getattr(own, name), getattr(reference, name), strict=True)
        for step, run, run_plain in runs:
            if step.operation in SEGMENTS:
                run()
            elif not _is_right(program, step, results, (own, run), (reference, run_plain), ends):
                return f"{program.plan.stages[step.stage].where or 'the model'}: {step.operation}"
    moves = []
    for input_, rows in ((program.input, slice(None)), (plain.input, ends)):
        x, gradient = images[rows].clone(), own.image_gradient[rows]
        nan = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        input_.sign_step(x, images[rows], gradient, STEP_SIZE, STEP_SIZE, nan, torch.empty_like(gradient))
        moves.append((x - images[rows], input_.gradient(images[rows], gradient)))
    (move, gradient), (plain_move, plain_gradient) = moves
    right = _close(move[ends], plain_move) and _close(gradient[ends], plain_gradient)
    return "" if right else "step of the pixels"


def _is_right(
    program: Program,
    step: Step,
    results: tuple[str, ...],
    own: tuple[Bound, Callable[[], None]],
    reference: tuple[Bound, Callable[[], None]],
    ends: list[int],
) -> bool:
    """Run one step into garbage, and by PyTorch on the same operands."""
    (bound, run), (plain, run_plain) = own, reference
    slots = {role: slot for role, slot in step.tensors.items() if slot is not None}
    listed = [slot if isinstance(slot, list) else [slot] for role, slot in slots.items() if role not in results]
    read = set(itertools.chain(*listed))
    values = [slot for slot in read if program.plan.slots[slot].kind in (*LIKE_VALUES, "moments")]
    for slot in values:
        plain.tensors[slot].copy_(bound.tensors[slot][ends])
    for slot in {slots[role] for role in results if role in slots} - read:
        bound.tensors[slot].fill_(GARBAGE if bound.tensors[slot].dtype == torch.uint8 else torch.nan)
    run()
    run_plain()
    slot = slots.get("y", slots.get("dx"))
    y, expected = bound.tensors[slot][ends], plain.tensors[slot]
    if "mask" in slots and "mask" in results:  # a value that is nearly zero may be on either side of it
        mask_like(plain.tensors[slots["mask"]], expected).copy_(~(y <= 0))
    saved = [slots[role] for role in _SAVED if role in slots and role in results]
    if not all(_close(bound.tensors[one][ends], plain.tensors[one]) for one in saved):
        return False
    # What is subtracted may be larger than the difference, which then has the larger one's roundoff.
    added = ("conv", "affine", "layer_norm", "gather")
    shift = program.states[step.stage].shift if step.operation in added else None
    terms = [plain.tensors[slots["other"]]] if "other" in slots else []
    terms += [] if shift is None else [shift.expand(y.numel() // len(shift), -1)]
    if step.operation == "product_backward":  # nothing but roundoff where what follows ignores the factor's scale
        expected = expected.clone()
        for role in ("g", "factor"):
            plain.tensors[slots[role]].abs_()
        run_plain()
        terms.append(CANCELLED * plain.tensors[slot])
    return _close(y, expected, *terms)


def _close(actual: Tensor, expected: Tensor, *terms: Tensor) -> bool:
    """Whether their L2 distance is small relative to ``expected`` and its ``terms``, where that is finite."""
    finite = expected.isfinite()
    kind = torch.finfo(actual.dtype)
    smallest = 1e-6 + kind.smallest_normal * kind.eps * expected.numel() ** 0.5
    allowed = DIFFERENT * sum(_norm(t.where(t.isfinite(), 0)) for t in (expected, *terms)) + smallest
    return bool(_norm((actual - expected).where(finite, 0)) <= allowed)


def _norm(x: Tensor) -> Tensor:
    return x.double().norm()
