"""Peers of the attack benchmark, this package's engines among them, and of the training step around the attack."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from bench.harness import Runner, Unavailable, peer
from bench.third_party import library
from bench.twin_bn import as_published
from bench.workloads import ALPHA, EPS, Attack, Inputs, own_copy
from twins_fast import PGD, adversarial_loss, convert_twin_bn, fuse_twin_bn

ATTACK, TRAINING = "attack", "attack_training"
TOLERANCE = {None: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-2}  # of the loss, relative to the published code's
ENGINES = {  # name -> engine and type of this package's attack
    "eager": ("eager", None),
    "eager-bf16": ("eager", torch.bfloat16),
    "plan-float32": ("plan", None),
    "plan-bf16": ("plan", torch.bfloat16),
    "plan-fp16": ("plan", torch.float16),
}
RATE, MOMENTUM, DECAY = 3e-3, 0.9, 1e-5


def published_attack(model, images, labels, start, steps, context=nullcontext) -> Tensor:
    """The loop of the published code, from ``start``; the model is in eval mode."""
    x = start.detach().clone()
    for _ in range(steps):
        x.requires_grad_()
        with context():
            loss = F.cross_entropy(model(x), labels)
        (gradient,) = torch.autograd.grad(loss, x)
        x = x.detach() + ALPHA * gradient.sign()
        x = torch.min(torch.max(x, images - EPS), images + EPS).clamp(0, 1)
    return x


def runner(attack: Attack, problem: Inputs, function, dtype=None, layout=torch.contiguous_format, start=None) -> Runner:
    """A runner whose one stage is ``function(images, labels, start, steps) -> adversarial images``."""
    start = problem.start if start is None else start

    def operands():
        images, first = (t.clone(memory_format=layout) for t in (problem.images, start))
        return images, problem.labels.clone(), first

    def run(operands, steps=attack.steps):
        return function(*operands, steps)

    def results(operands):
        return {"x": run(operands), "start": start, "allowed": torch.tensor(TOLERANCE[dtype])}

    def more(operands):
        rows = problem.rows()
        once = published_attack(problem.model, problem.images[rows], problem.labels[rows], start[rows], 1)
        return {"agreement": (run(operands, 1)[rows] == once).float().mean().item()}

    return Runner(operands, [{"attack": run}], results, (layout, start is problem.start), more=more)


@peer(ATTACK, "published")
def published(attack, problem):
    return runner(attack, problem, partial(published_attack, problem.model))


@peer(ATTACK, "torchattacks")
def with_torchattacks(attack, problem):
    try:
        torchattacks = library("torchattacks")
    except ImportError as error:
        raise Unavailable(f"torchattacks cannot be imported: {error}") from error

    def function(images, labels, start, steps):
        return torchattacks.PGD(problem.model, EPS, ALPHA, steps, random_start=False)(images, labels)

    # Its ball is around the image that it starts from, so it cannot take our start: it starts from the image itself,
    # and so does the loop that it is compared with.
    return runner(attack, problem, function, start=problem.images)


def _bf16(problem: Inputs):
    return partial(torch.autocast, problem.images.device.type, torch.bfloat16)


def _autocast(attack: Attack, problem: Inputs, model: nn.Module) -> Runner:
    function = partial(published_attack, model, context=_bf16(problem))
    return runner(attack, problem, function, torch.bfloat16, torch.channels_last)


@peer(ATTACK, "autocast")
def autocast(attack, problem):
    return _autocast(attack, problem, own_copy(problem.model, torch.channels_last))


COMPILED = ("resnet50-224", "resnet18-32")


@peer(ATTACK, "compile")
def compiled(attack, problem, mode=None, folded=False):
    if problem.images.device.type == "cpu" and attack.network not in COMPILED:
        raise Unavailable(f"on a CPU compiled for {' and '.join(COMPILED)} alone, which takes minutes each")
    model = own_copy(problem.model, torch.channels_last)
    if folded:
        model = own_copy(fuse(model), torch.channels_last)
    # torch._inductor.config.freezing would do nothing: it holds only where no gradients are computed.
    return _autocast(attack, problem, torch.compile(model, dynamic=False, mode=mode))


peer(ATTACK, "compile-max")(partial(compiled, mode="max-autotune"))
peer(ATTACK, "compile-folded")(partial(compiled, folded=True))


def engine_attack(
    model: nn.Module, name: str, steps: int, chunk_size: int | None = None, engine: str | None = None
) -> PGD:
    """This package's attack, as :data:`ENGINES` names it, or with another ``engine``."""
    own, dtype = ENGINES[name]
    engine = engine or own
    return PGD(model, EPS, ALPHA, steps, engine=engine, amp_dtype=dtype, chunk_size=chunk_size)


def _engine(attack, problem, name):
    attacks = {n: engine_attack(problem.model, name, n, attack.chunk_size) for n in {attack.steps, 1}}

    def function(images, labels, start, steps):
        return attacks[steps](images, labels, x_init=start)

    return runner(attack, problem, function, ENGINES[name][1])


for _name in ENGINES:
    _devices = ("cuda",) if _name == "plan-fp16" else ("cpu", "cuda")
    peer(ATTACK, _name, devices=_devices)(partial(_engine, name=_name))


class PublishedTwin(nn.Module):
    """The published two-wing layer: two batch norms and a concatenation."""

    def __init__(self, norm: nn.BatchNorm2d):
        super().__init__()
        self.frozen, self.adaptive = copy.deepcopy(norm), copy.deepcopy(norm)

    def train(self, mode: bool = True):
        super().train(mode)
        self.frozen.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.adaptive(x)
        return as_published(x, None, len(x) // 2, self.frozen, self.adaptive, relu=False)


def published_twin(model: nn.Module) -> nn.Module:
    """``model`` with every batch norm replaced by a :class:`PublishedTwin`, in place."""
    for name, child in model.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(model, name, PublishedTwin(child))
        else:
            published_twin(child)
    return model


@dataclass
class Training:
    """One TWINS-AT step: ``loss(images, labels, start)`` and what follows from it."""

    model: nn.Module
    loss: object

    def __post_init__(self):
        self.optimizer = torch.optim.SGD(self.model.parameters(), RATE, MOMENTUM, weight_decay=DECAY)

    def __call__(self, operands) -> Tensor:
        loss = self.loss(*operands)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def published_training(attack: Attack, problem: Inputs) -> Training:
    model = published_twin(own_copy(problem.model, train=True))

    def loss(images, labels, start):
        model.eval()
        x = published_attack(model, images, labels, start, attack.steps)
        logits, half = model.train()(x), len(x) // 2
        return F.cross_entropy(logits[:half], labels[:half]) + F.cross_entropy(logits[half:], labels[half:])

    return Training(model, loss)


def our_training(attack: Attack, problem: Inputs, dtype: torch.dtype | None) -> Training:
    model = fuse_twin_bn(convert_twin_bn(own_copy(problem.model, torch.channels_last, train=True))).train()
    attacker = PGD(model, EPS, ALPHA, attack.steps, engine="auto", amp_dtype=dtype)
    context = nullcontext if dtype is None else _bf16(problem)

    def loss(images, labels, start):
        with context():
            return adversarial_loss(model, images, labels, method="twins-at", attack=attacker, x_init=start)[0]

    return Training(model, loss)


def _training_runner(attack, problem, make, layout, dtype=None) -> Runner:
    """``make(attack, problem)`` gives the step; ``dtype`` sets the tolerance of its loss."""
    step = make(attack, problem)

    def operands():
        return problem.images.clone(memory_format=layout), problem.labels, problem.start.clone(memory_format=layout)

    def results(operands):  # of a second step: it depends on the gradients of the first
        return {"loss": torch.stack([step(operands), step(operands)]), "allowed": torch.tensor(10 * TOLERANCE[dtype])}

    return Runner(operands, [{"step": step}], results, layout)


for _name, _make, _layout, _dtype in (
    ("published", published_training, torch.contiguous_format, None),
    ("twins-fast-float32", partial(our_training, dtype=None), torch.channels_last, None),
    ("twins-fast-bf16", partial(our_training, dtype=torch.bfloat16), torch.channels_last, torch.bfloat16),
):
    peer(TRAINING, _name)(partial(_training_runner, make=_make, layout=_layout, dtype=_dtype))
