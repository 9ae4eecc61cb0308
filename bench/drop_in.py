"""Loops of other codebases, and the same loops with the lines of docs/drop-in.md: ``python -m bench.drop_in``."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.harness import PARTIAL, RESULTS, Record, Runner, fails, interleave, one_line
from bench.header import ROOT
from bench.networks import CIFAR_MEAN, CIFAR_STD
from bench.peers import published_attack, published_twin
from bench.third_party import library
from bench.workloads import ALPHA, EPS, Inputs, inputs, own_copy, workload
from twins_fast import convert_twin_bn
from twins_fast.compat import advertorch, dm, mair, robustness, torchattacks, trades, twins
from twins_fast.compat.locuslab import fast_adversarial, robust_overfitting
from twins_fast.nn.modes import in_mode

NAME = "drop_in"
DOCUMENT = ROOT / "docs" / "drop-in.md"
WORKLOAD = "resnet18-32:batch=32"
WAYS = {  # name -> whether it is ours, and the type; the first one is what others are compared with
    "original, float32": (False, None),
    "original, bfloat16": (False, torch.bfloat16),
    "ours, float32": (True, None),
    "ours, bfloat16": (True, torch.bfloat16),
}
ROUNDS = 2
TOLERANCE = {None: 1e-3, torch.bfloat16: 0.1}  # of the losses, relative
RATE, MOMENTUM, BETA, GAMMA = 1e-5, 0.9, 6.0, 0.005


@dataclass
class Setting:
    """What a loop is given.

    Attributes:
        model: of images in [0, 1], in train mode; ``model.body`` takes normalised ones.
        images, labels: a batch.
        optimizer: of the model.
        steps: of the attack.
        how: ``amp_dtype`` of our calls.
    """

    model: nn.Module
    images: Tensor
    labels: Tensor
    optimizer: torch.optim.Optimizer
    steps: int
    how: dict

    @property
    def batch(self) -> tuple[Tensor, Tensor]:
        return self.images, self.labels


Loop = Callable[[], Tensor]  # one step of a training loop up to the loss, of which the rest is the same


@dataclass(frozen=True)
class Case:
    """A loop of another codebase.

    Attributes:
        title, block: of the section of the document, and which of its differences is meant.
        original, ours: make the loop.
        attacks: the mode of the network during the attack.
        trains: whether the loss is of a training step.
    """

    title: str
    original: Callable[[Setting], Loop]
    ours: Callable[[Setting], Loop]
    block: int = 0
    attacks: str = "eval"
    trains: bool = True


def differences() -> dict[tuple[str, int], str]:
    """The document's differences, by the title of their section and their number in it."""
    return {
        (title, number): block
        for title, section in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE)
        for number, block in enumerate(re.findall(r"```diff\n(.*?)```", section, re.DOTALL))
    }


def lines_of(case: Case) -> int:
    """How many lines it takes."""
    return sum(line.startswith("+") for line in differences()[case.title, case.block].splitlines())


def ascent(s: Setting, start: Tensor, objective: Callable[[Tensor], Tensor]) -> Tensor:
    """Sign steps on the objective of the logits, in the mode that the model is in."""
    x = start
    for _ in range(s.steps):
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(objective(s.model(x)), x)
        x = x.detach() + ALPHA * gradient.sign()
        x = torch.min(torch.max(x, s.images - EPS), s.images + EPS).clamp(0, 1)
    return x.detach()


def divergence(s: Setting, logits: Tensor) -> Tensor:
    """From the clean prediction, which TRADES computes for every step anew."""
    return F.kl_div(F.log_softmax(logits, 1), F.softmax(s.model(s.images), 1), reduction="sum")


def noise_of(s: Setting) -> Tensor:
    return s.images + 0.001 * torch.randn(s.images.shape).to(s.images)


def trained_on(s: Setting, attack: Callable[[], Tensor]) -> Tensor:
    """The loss of adversarial training."""
    adversarial = attack()
    return F.cross_entropy(s.model.train()(adversarial), s.labels)


def with_torchattacks(module, s: Setting, **how) -> Loop:
    attack = module.PGD(s.model, EPS, ALPHA, s.steps, **how)
    return lambda: trained_on(s, lambda: attack(*s.batch))


def with_trainer(accelerate, s: Setting) -> Loop:
    """As MAIR's ``AT`` has it, whose attacks are those of torchattacks."""
    trainer = SimpleNamespace(rmodel=s.model, atk=library("torchattacks").PGD(s.model, EPS, ALPHA, s.steps))
    accelerate(trainer)
    return lambda: trained_on(s, lambda: trainer.atk(*s.batch))


def trades_original(s: Setting) -> Loop:
    def loop():
        s.model.eval()
        adversarial = ascent(s, noise_of(s), partial(divergence, s))
        s.model.train()
        s.optimizer.zero_grad()
        natural = s.model(s.images)
        return F.cross_entropy(natural, s.labels) + BETA / len(s.images) * divergence(s, s.model(adversarial))

    return loop


def mart_original(s: Setting) -> Loop:
    def loop():
        s.model.eval()
        adversarial = ascent(s, noise_of(s), lambda logits: F.cross_entropy(logits, s.labels))
        s.model.train()
        s.optimizer.zero_grad()
        natural, logits = s.model(s.images), s.model(adversarial)
        probabilities, clean = F.softmax(logits, 1), F.softmax(natural, 1)
        likeliest = torch.argsort(probabilities, dim=1)[:, -2:]
        other = torch.where(likeliest[:, -1] == s.labels, likeliest[:, -2], likeliest[:, -1])
        boosted = F.cross_entropy(logits, s.labels) + F.nll_loss((1.0001 - probabilities + 1e-12).log(), other)
        apart = F.kl_div((probabilities + 1e-12).log(), clean, reduction="none").sum(1)
        own = clean.gather(1, s.labels[:, None])[:, 0]
        return boosted + BETA * (apart * (1.0000001 - own)).mean()

    return loop


def with_loss(function, s: Setting) -> Loop:
    return lambda: function(s.model, *s.batch, s.optimizer, ALPHA, EPS, s.steps, BETA, **s.how)


def with_awp(s: Setting, attack: Callable[[], Tensor], perturbation) -> Loop:
    """A step of TRADES-AWP, whose weights are moved back before the next one."""
    proxy = own_copy(s.model, train=True)
    awp = perturbation(s.model, proxy, torch.optim.SGD(proxy.parameters(), 0.01), GAMMA)
    moves = []

    def loop():
        if moves:
            awp.restore(moves.pop())
        adversarial = attack()
        s.model.train()
        moves.append(awp.calc_awp(inputs_adv=adversarial, inputs_clean=s.images, targets=s.labels, beta=BETA))
        awp.perturb(moves[0])
        torch.clear_autocast_cache()  # which has the weights before the move
        return F.cross_entropy(s.model(s.images), s.labels) + BETA / len(s.images) * divergence(s, s.model(adversarial))

    return loop


def awp_original(s: Setting) -> Loop:
    def attack():
        s.model.eval()
        return ascent(s, noise_of(s), partial(divergence, s))

    return with_awp(s, attack, Perturbation)


class Perturbation:
    """Of the weights, as the authors of AWP compute it."""

    def __init__(self, model, proxy, optimizer, gamma):
        self.model, self.proxy, self.optimizer, self.gamma = model, proxy, optimizer, gamma

    def calc_awp(self, inputs_adv, inputs_clean, targets, beta):
        self.proxy.load_state_dict(self.model.state_dict())
        self.proxy.train()
        loss = F.cross_entropy(self.proxy(inputs_clean), targets)
        apart = F.log_softmax(self.proxy(inputs_adv), 1), F.softmax(self.proxy(inputs_clean), 1)
        loss = loss + beta * F.kl_div(*apart, reduction="batchmean")
        self.optimizer.zero_grad()
        (-loss).backward()
        self.optimizer.step()
        weights = zip(self.model.named_parameters(), self.proxy.parameters(), strict=True)
        moves = {name: (weight.detach(), moved.detach() - weight.detach()) for (name, weight), moved in weights}
        return {
            name: weight.norm() / (move.norm() + 1e-20) * move
            for name, (weight, move) in moves.items()
            if weight.dim() > 1
        }

    def perturb(self, moves, sign=1):
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if name in moves:
                    parameter.add_(sign * self.gamma * moves[name])

    def restore(self, moves):
        self.perturb(moves, -1)


def numbers(s: Setting) -> list[Tensor]:
    """Mean and standard deviation of CIFAR-10, [3, 1, 1]."""
    values = (fast_adversarial.cifar10_mean, fast_adversarial.cifar10_std)
    return [torch.tensor(value).view(3, 1, 1).to(s.images) for value in values]


def locuslab(network, x, labels, delta, eps, alpha, low, high, steps, early_stop) -> Tensor:
    """``attack_pgd`` of fast_adversarial and robust_overfitting, which computes gradients of the weights too."""
    delta = torch.max(torch.min(delta, high - x), low - x).requires_grad_()
    for _ in range(steps):
        logits = network(x + delta)
        left = torch.where(logits.argmax(1) == labels)[0] if early_stop else slice(None)
        if early_stop and not len(left):
            break
        F.cross_entropy(logits, labels).backward()
        moved = torch.max(torch.min(delta.detach() + alpha * delta.grad.sign(), eps), -eps)
        moved = torch.max(torch.min(moved, high - x), low - x)
        delta.data[left] = moved[left]
        delta.grad.zero_()
    F.cross_entropy(network(x + delta), labels, reduction="none")  # by which it chooses among starts; here is one
    return delta.detach()


def fast_adversarial_loop(s: Setting, attack) -> Loop:
    """``evaluate_pgd``, of normalised images; ``attack(model, x, labels, eps, alpha)``."""
    mean, std = numbers(s)
    x, model = (s.images - mean) / std, s.model.body

    def loop():
        model.eval()
        delta = attack(model, x, s.labels, EPS / std, ALPHA / std)
        with torch.no_grad():
            return F.cross_entropy(model(x + delta), s.labels)

    return loop


def fast_adversarial_original(s: Setting) -> Loop:
    mean, std = numbers(s)

    def attack(model, x, labels, eps, alpha):
        delta = torch.zeros_like(x)
        for channel in range(3):
            delta[:, channel].uniform_(-eps[channel].item(), eps[channel].item())
        return locuslab(model, x, labels, delta, eps, alpha, (0 - mean) / std, (1 - mean) / std, s.steps, True)

    return fast_adversarial_loop(s, attack)


def fast_adversarial_ours(s: Setting) -> Loop:
    return fast_adversarial_loop(s, lambda *given: fast_adversarial.attack_pgd(*given, s.steps, 1, **s.how))


def robust_overfitting_loop(s: Setting, attack, training: bool) -> Loop:
    """A batch of its training, or of its evaluation."""
    mean, std = numbers(s)
    model = s.model.body

    def loop():
        model.train(training)
        adversarial = (s.images + attack(model, *s.batch)).clamp(0, 1)
        with torch.set_grad_enabled(training):
            return F.cross_entropy(model((adversarial - mean) / std), s.labels)

    return loop


def robust_overfitting_original(s: Setting, training: bool) -> Loop:
    mean, std = numbers(s)

    def attack(model, x, labels):
        delta, eps = torch.zeros_like(x).uniform_(-EPS, EPS), torch.tensor(EPS).to(x)
        low, high = torch.zeros_like(eps), torch.ones_like(eps)
        network = lambda x: model((x - mean) / std)  # noqa: E731
        return locuslab(network, x, labels, delta, eps, ALPHA, low, high, s.steps, False)

    return robust_overfitting_loop(s, attack, training)


def robust_overfitting_ours(s: Setting, training: bool) -> Loop:
    def attack(model, x, labels):
        return robust_overfitting.attack_pgd(model, x, labels, EPS, ALPHA, s.steps, 1, "l_inf", **s.how)

    return robust_overfitting_loop(s, attack, training)


def advertorch_original(s: Setting) -> Loop:
    """And DM-Improves-AT, whose attacks are the same; both in eval mode and without gradients of the weights."""

    def attack():
        with in_mode(s.model, training=False):
            delta = torch.zeros_like(s.images).uniform_(-1, 1) * EPS
            start = (s.images + delta).clamp(0, 1)
            return ascent(s, start, lambda logits: F.cross_entropy(logits, s.labels, reduction="sum"))

    return lambda: trained_on(s, attack)


def in_eval_mode(s: Setting, perturb: Callable[..., Tensor]) -> Loop:
    def attack():
        with in_mode(s.model, training=False):
            return perturb(*s.batch)

    return lambda: trained_on(s, attack)


def advertorch_ours(s: Setting) -> Loop:
    adversary = advertorch.LinfPGDAttack(s.model, eps=EPS, nb_iter=s.steps, eps_iter=ALPHA, **s.how)
    return in_eval_mode(s, adversary.perturb)


def dm_ours(s: Setting) -> Loop:
    attack = dm.create_attack(s.model, nn.CrossEntropyLoss(), "linf-pgd", EPS, s.steps, ALPHA, **s.how)
    return in_eval_mode(s, lambda *batch: attack.perturb(*batch)[0])


class WithOptions(nn.Module):
    """A network as the robustness library calls it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, **_) -> Tensor:
        return self.model(x)


def with_robustness(accelerate, s: Setting) -> Loop:
    dataset = SimpleNamespace(mean=torch.tensor(CIFAR_MEAN), std=torch.tensor(CIFAR_STD))
    model = library("robustness.attacker").AttackerModel(WithOptions(s.model.body), dataset).to(s.images.device)
    accelerate(model)
    options = {"make_adv": True, "constraint": "inf", "eps": EPS, "step_size": ALPHA, "iterations": s.steps}

    def loop():
        output, _ = model.train()(*s.batch, **options)
        return F.cross_entropy(output, s.labels)

    return loop


def twins_loss(s: Setting, model: nn.Module, adversarial: Tensor) -> Tensor:
    logits, half = model.train()(adversarial), len(s.images) // 2
    return F.cross_entropy(logits[:half], s.labels[:half]) + F.cross_entropy(logits[half:], s.labels[half:])


def twins_original(s: Setting) -> Loop:
    model = with_layers(s, published_twin)
    return lambda: twins_loss(s, model, published_attack(model.eval(), *s.batch, s.images, s.steps))


def twins_ours(s: Setting) -> Loop:
    model = with_layers(s, convert_twin_bn)
    attack = twins.FastGradientSignUntargeted(model, EPS, ALPHA, 0, 1, s.steps, **s.how)
    return lambda: twins_loss(s, model, attack.perturb(*s.batch))


def with_layers(s: Setting, convert: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """The model with two-wing layers, whose optimizer knows both wings."""
    model = convert(s.model)
    s.optimizer = optimizer_of(model)
    return model


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), RATE, MOMENTUM)


LOSSES = "TRADES, MART, AWP"
LOCUSLAB = "fast_adversarial, robust_overfitting"
CASES = {
    "torchattacks": Case(
        "torchattacks",
        lambda s: with_torchattacks(library("torchattacks"), s),
        lambda s: with_torchattacks(torchattacks, s, **s.how),
    ),
    "TRADES": Case(LOSSES, trades_original, partial(with_loss, trades.trades_loss)),
    "MART": Case(LOSSES, mart_original, partial(with_loss, trades.mart_loss)),
    "TRADES-AWP": Case(
        LOSSES,
        awp_original,
        lambda s: with_awp(
            s, lambda: trades.perturb_input(s.model, s.images, ALPHA, EPS, s.steps, **s.how), trades.TradesAWP
        ),
        block=1,
    ),  # fmt: skip
    "fast_adversarial (evaluation)": Case(LOCUSLAB, fast_adversarial_original, fast_adversarial_ours, trains=False),
    "robust_overfitting (evaluation)": Case(
        LOCUSLAB,
        partial(robust_overfitting_original, training=False),
        partial(robust_overfitting_ours, training=False),
        block=1,
        trains=False,
    ),
    "robust_overfitting": Case(
        LOCUSLAB,
        partial(robust_overfitting_original, training=True),
        partial(robust_overfitting_ours, training=True),
        block=1,
        attacks="train",
    ),
    "DM-Improves-AT": Case("DM-Improves-AT, adversarial_robustness_pytorch", advertorch_original, dm_ours),
    "advertorch": Case("advertorch", advertorch_original, advertorch_ours),
    "robustness": Case(
        "robustness, robust-models-transfer",
        partial(with_robustness, lambda model: model),
        lambda s: with_robustness(lambda model: robustness.accelerate(model, **s.how), s),
    ),
    "MAIR": Case(
        "MAIR",
        partial(with_trainer, lambda trainer: trainer),
        lambda s: with_trainer(lambda trainer: mair.accelerate(trainer, **s.how), s),
    ),
    "TWINS": Case("The published TWINS code", twins_original, twins_ours),
}


def step_of(case: Case, way: str, problem: Inputs, steps: int) -> tuple[Loop, Loop]:
    """A step of the loop with a copy of the network, channels-last in half precision; and the loss after it.

    Images stay contiguous, so that the same seed draws the same start for all; such a network computes in its layout.
    """
    own, dtype = WAYS[way]
    layout = torch.contiguous_format if dtype is None else torch.channels_last
    model = own_copy(problem.model, layout, train=True)
    images = problem.images
    setting = Setting(model, images, problem.labels, optimizer_of(model), steps, {"amp_dtype": dtype})
    context = nullcontext if dtype is None else partial(torch.autocast, images.device.type, dtype)
    loop = (case.ours if own else case.original)(setting)

    def step():
        torch.manual_seed(0)
        with context():
            loss = loop()
        if case.trains:
            setting.optimizer.zero_grad()
            loss.backward()
            setting.optimizer.step()
        if not loss.isfinite():
            raise FloatingPointError("the loss is not finite")
        return loss.detach()

    @torch.no_grad()
    def after():
        return F.cross_entropy(model.eval()(images), problem.labels)

    return step, after


def where_it_is(device: str) -> AbstractContextManager:
    """The robustness library moves its images to a GPU, whether there is one or not."""
    return nullcontext() if device == "cuda" else mock.patch.object(Tensor, "cuda", lambda self, *_, **__: self)


def measure(names: list[str], text: str, rounds: int, record: Record) -> list[str]:
    """Seconds of a step of each loop in each way; those whose losses are wrong are not timed."""
    attack = workload(text, record.device)
    problem = inputs(attack, record.device)
    known = {row["name"] for row in record.rows}
    for name in names:
        if name in known:
            continue
        case = CASES[name]
        row = {"name": name, "lines": lines_of(case), "attacks": case.attacks, "trains": case.trains, "peers": {}}
        runners, expected = {}, None
        around = partial(where_it_is, record.device)
        for way, (_, dtype) in WAYS.items():
            outcome = row["peers"][way] = {"status": "ok"}
            try:
                with around():
                    step, after = step_of(case, way, problem, attack.steps)
                    losses = torch.stack([step(), after()]).float()
            except Exception as error:
                outcome.update(status="error", reason=one_line(error))
                continue
            expected = losses if expected is None else expected
            apart = (losses / expected - 1).abs().max().item()
            outcome |= {"losses": losses.tolist(), "apart": apart}
            if not apart <= TOLERANCE[dtype]:
                outcome.update(status="wrong", reason=f"losses {losses.tolist()}, not {expected.tolist()}")
                continue
            runners[way] = Runner(tuple, [{"step": lambda _, step=step: step()}], dict, "", around)
        samples, failures = interleave(runners, {"": [()]}, rounds, record.device, long=True)
        for way, seconds in samples.items():
            row["peers"][way] |= {"seconds": min(seconds["step"]), "samples": seconds["step"]}
        for way, reason in failures.items():
            row["peers"][way].update(status="error", reason=reason)
        record.add(row)
        print(f"{name}: {', '.join(f'{way} {cell(row, way)}' for way in WAYS)}", flush=True)
    return fails(record.rows)


def cell(row: dict, way: str) -> str:
    """Milliseconds, and how much faster than the original."""
    first, outcome = next(iter(row["peers"].values())), row["peers"][way]
    if "seconds" not in outcome:
        return outcome["status"]
    text = f"{1e3 * outcome['seconds']:.0f} ms"
    return (
        f"{text}, {first['seconds'] / outcome['seconds']:.1f} x"
        if outcome is not first and "seconds" in first
        else text
    )


def table(rows: list[dict]) -> list[list[str]]:
    """A line for each loop."""
    lines = [["loop", "attacks in", "lines", *WAYS, "losses apart, float32", "bfloat16"]]
    for row in rows:
        apart = [row["peers"][way].get("apart") for way in list(WAYS)[2:]]
        apart = ["" if number is None else f"{100 * number:.2g} %" for number in apart]
        lines.append(
            [row["name"], f"{row['attacks']} mode", str(row["lines"]), *(cell(row, way) for way in WAYS), *apart]
        )
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m bench.drop_in", description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", help=f"comma-separated, of {', '.join(CASES)}")
    parser.add_argument("--workload", default=WORKLOAD, help=f"network and batch, as of bench.attack ({WORKLOAD})")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="turns of each way")
    parser.add_argument("--resume", action="store_true", help="keep what an earlier run on this machine has measured")
    parser.add_argument("--json", type=Path, help=f"default: a file in {RESULTS.name}, or of runs/bench for a part")
    args = parser.parse_args(arguments)
    names = args.only.split(",") if args.only else list(CASES)
    if unknown := {*names} - {*CASES}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here")
    all_of_it = not args.only and args.workload == WORKLOAD and args.rounds >= ROUNDS
    command = " ".join(["python -m bench.drop_in", *(sys.argv[1:] if arguments is None else arguments)])
    options = {"workload": args.workload, "rounds": args.rounds, "eps": EPS, "alpha": ALPHA, "rate": RATE}
    record = Record(NAME, args.device, command, options, RESULTS if all_of_it else PARTIAL, args.json)
    if args.resume:
        record.resume()
    return record.conclude(measure(names, args.workload, args.rounds, record))


if __name__ == "__main__":
    sys.exit(main())
