"""Attack libraries on an accelerated network: ``python -m bench.libraries``; ``--autoattack`` for AutoAttack itself."""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from pyautoattack import AutoAttack
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from pyautoattack.fab_pt import FABAttack_PT
from pyautoattack.square import SquareAttack
from torch import Tensor, nn

from bench.attack import embedded, embedded_images
from bench.harness import PARTIAL, RESULTS, Record, Runner, fails, interleave, one_line
from bench.third_party import library
from bench.workloads import ALPHA, EPS, inputs, own_copy, workload
from bench.workloads import NETWORKS as WORKLOADS
from twins_fast import PGD, accelerate, adversarial_loss
from twins_fast.evaluation import judged
from twins_fast.nn.guards import random_numbers_restored

NAME, AUTOATTACK = "libraries", "libraries_autoattack"
EMBEDDED = "embedded"
NETWORKS = {EMBEDDED: (5, 20), "resnet18-32": (2, 6)}  # iterations of the two runs whose difference is timed
ROWS = {  # name -> accelerated, dtype
    "eager": (False, None),
    "autocast": (False, torch.bfloat16),
    "accelerate-float32": (True, None),
    "accelerate-bf16": (True, torch.bfloat16),
}
BATCH, ROUNDS = 128, 3
UNSEEN = 1e-6  # radius at which Square fools nobody, so that every query has all images
TOLERANCE = {None: (5e-3, 0.01), torch.bfloat16: (5e-2, 0.05)}  # of the loss, relative, and of robust accuracy
ON_THE_BORDER = ("FAB-T",)  # its images lie between two classes, and half precision sees that border elsewhere

AUTO_ROWS = ("eager", "accelerate-float32", "accelerate-bf16")
AUTO_IMAGES, AUTO_BATCHES = 1000, {EMBEDDED: 250, "resnet18-32": 100}
EPOCHS, RATE, AT_ONCE = 3, 0.1, 50  # of the adversarial training of a network that is not robust


@dataclass
class Problem:
    """A network in eval mode, images and labels, and where attacks start that can be told so."""

    model: nn.Module
    images: Tensor
    labels: Tensor
    start: Tensor

    @functools.cached_property
    def second(self) -> Tensor:
        """The target of targeted attacks: the class that the network holds for the second likeliest."""
        with torch.no_grad():
            return self.model(self.images).argsort(1)[:, -2]

    def judge(self, x: Tensor) -> tuple[float, float]:
        """Loss and accuracy of the float32 network."""
        with torch.no_grad():
            logits = self.model(x)
        right = (logits.argmax(1) == self.labels).float().mean().item()
        return F.cross_entropy(logits, self.labels).item(), right


def problem_of(network: str, batch: int, device: str) -> Problem:
    """The images that the network is surest of, labelled by it, so that none falls out of an attack's batch.

    They are contiguous, as AutoAttack asks for; a channels-last network computes in channels-last all the same.
    """
    if network == EMBEDDED:
        model, images, _ = embedded(device)
    else:
        attack = replace(workload(network, device), batch=2 * batch)
        made = inputs(attack, device)
        model, images = own_copy(made.model), made.images
    with torch.no_grad():
        logits = torch.cat([model(part) for part in images.split(BATCH)])
    best, second = logits.topk(2).values.T
    chosen = (best - second).argsort(descending=True)[:batch]
    images = images[chosen].contiguous()
    noise = torch.empty(images.shape).uniform_(-EPS, EPS, generator=torch.Generator().manual_seed(0))
    return Problem(model, images, logits.argmax(1)[chosen], (images + noise.to(device)).clamp(0, 1))


class Autocast(nn.Module):
    """A network under autocast, with float32 logits."""

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, self.dtype):
            return self.model(images).float()


def victim(model: nn.Module, row: str) -> nn.Module:
    """What the libraries are given: a channels-last network without gradients of parameters, as the row says."""
    accelerated, dtype = ROWS[row]
    model = own_copy(model, torch.channels_last)
    if accelerated:
        return accelerate(model, dtype)
    return (model if dtype is None else Autocast(model, dtype)).eval()


Run = Callable[[nn.Module, Problem, int], Tensor]  # (what victim gives, problem, iterations) -> adversarial images


def gradient_alone(model: nn.Module, problem: Problem, iterations: int) -> Tensor:
    """A forward and a backward pass, of which an attack makes nothing: what is left is the network's part."""
    for _ in range(iterations):
        x = problem.start.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), problem.labels, reduction="sum"), x)
    return (problem.start + ALPHA * gradient.sign()).clamp(0, 1)


def apgd(model: nn.Module, problem: Problem, iterations: int, targeted: bool = False) -> Tensor:
    """One run of APGD from a seeded start; ``targeted``, on the targeted DLR loss."""
    kind = APGDAttack_targeted if targeted else APGDAttack
    attack = kind(model, iterations, eps=EPS, seed=0, device=problem.images.device)
    attack.init_hyperparam(problem.images)
    attack.y_target = problem.second if targeted else None
    torch.manual_seed(0)
    return attack.attack_single_run(problem.images, problem.labels)[0]


def fab(model: nn.Module, problem: Problem, iterations: int) -> Tensor:
    attack = FABAttack_PT(model, n_iter=iterations, eps=EPS, seed=0, device=problem.images.device)
    attack.target_class = 2
    with torch.no_grad():
        return attack.attack_single_run(problem.images, problem.labels, is_targeted=True)


def square(model: nn.Module, problem: Problem, iterations: int) -> Tensor:
    attack = SquareAttack(model, eps=UNSEEN, n_queries=iterations, device=problem.images.device, resc_schedule=False)
    attack.init_hyperparam(problem.images)
    torch.manual_seed(0)
    return attack.attack_single_run(problem.images, problem.labels)[1]


def torchattack(model: nn.Module, problem: Problem, iterations: int, name: str) -> Tensor:
    torch.manual_seed(0)
    attack = getattr(library("torchattacks"), name)(model, eps=EPS, alpha=ALPHA, steps=iterations)
    return attack(problem.images, problem.labels)


def foolbox_pgd(model: nn.Module, problem: Problem, iterations: int) -> Tensor:
    foolbox = library("foolbox")
    network = foolbox.PyTorchModel(model, bounds=(0, 1), device=problem.images.device)
    attack = foolbox.attacks.LinfPGD(abs_stepsize=ALPHA, steps=iterations, random_start=False)
    return attack.run(network, problem.images, foolbox.Misclassification(problem.labels), epsilon=EPS)


ATTACKS: dict[str, Run] = {
    "gradient alone": gradient_alone,
    "APGD-CE": apgd,
    "APGD-T": functools.partial(apgd, targeted=True),
    "FAB-T": fab,
    "Square": square,
    "torchattacks PGD": functools.partial(torchattack, name="PGD"),
    "torchattacks MI-FGSM": functools.partial(torchattack, name="MIFGSM"),
    "foolbox LinfPGD": foolbox_pgd,
}
STEP = "our PGD"  # its step in the same precision is what the others are compared with


def own_pgd(row: str) -> Run:
    """This package's attack, in the row's precision; of the network itself for rows that are not accelerated."""
    accelerated, dtype = ROWS[row]

    def run(model: nn.Module, problem: Problem, iterations: int) -> Tensor:
        engine = "plan" if accelerated else "eager"
        network = model.module if accelerated else getattr(model, "model", model)
        attack = PGD(network, EPS, ALPHA, iterations, amp_dtype=dtype, engine=engine)
        return attack(problem.images, problem.labels, x_init=problem.start)

    return run


def iterations(networks: list[str], rows: list[str], batch: int, rounds: int, record: Record) -> list[str]:
    """Seconds that one iteration of each attack takes, from the difference of a longer and a shorter run."""
    for network in networks:
        problem, (few, many) = problem_of(network, batch, record.device), NETWORKS[network]
        victims = {row: victim(problem.model, row) for row in rows}
        for name in (STEP, *ATTACKS):
            line = {"name": network, "attack": name, "batch": batch, "iterations": [few, many], "peers": {}}
            runners, expected = {}, None
            for row, model in victims.items():
                run = own_pgd(row) if name == STEP else ATTACKS[name]
                outcome = line["peers"][row] = {"status": "ok"}
                try:
                    loss, robust = problem.judge(run(model, problem, many))
                except Exception as error:
                    outcome.update(status="error", reason=one_line(error))
                    continue
                expected = expected or (loss, robust)
                loose, accuracy = TOLERANCE[ROWS[row][1]]
                if name in ON_THE_BORDER:
                    loose, accuracy = 3 * loose, 1
                outcome |= {"loss": loss, "robust": robust}
                if not (abs(loss / expected[0] - 1) <= loose and abs(robust - expected[1]) <= accuracy):
                    reason = f"loss {loss:.5g}, robust {robust:.1%}; {rows[0]}: {expected[0]:.5g}, {expected[1]:.1%}"
                    outcome.update(status="wrong", reason=reason)
                    continue
                runners[row] = runner(run, model, problem, few, many)
            samples, failures = interleave(runners, {"": [()]}, rounds, record.device, long=True)
            for row, seconds in samples.items():
                taken = (min(seconds["many"]) - min(seconds["few"])) / (many - few)
                line["peers"][row] |= {"seconds": taken, "samples": seconds}
            for row, reason in failures.items():
                line["peers"][row].update(status="error", reason=reason)
            record.add(line)
            print(f"{network}, {name}: {', '.join(f'{r} {cell(line, r)}' for r in line['peers'])}", flush=True)
    return [f"{line['attack']}: {text}" for line in record.rows for text in fails([line])]


def runner(run: Run, model: nn.Module, problem: Problem, few: int, many: int) -> Runner:
    chains = [{"few": lambda _: run(model, problem, few)}, {"many": lambda _: run(model, problem, many)}]
    return Runner(tuple, chains, dict, "")


def cell(line: dict, row: str) -> str:
    outcome = line["peers"][row]
    return f"{1e3 * outcome['seconds']:.1f} ms" if "seconds" in outcome else outcome["status"]


def table(lines: list[dict]) -> list[list[str]]:
    """A network's attacks: milliseconds of an iteration, times faster than eager, and as a multiple of our step."""
    rows = list(lines[0]["peers"])
    step = next((line["peers"] for line in lines if line["attack"] == STEP), {})
    result = [[f"{lines[0]['name']}, batch {lines[0]['batch']}", *rows]]
    for line in lines:
        result.append([line["attack"]])
        for row in rows:
            text, outcome = cell(line, row), line["peers"][row]
            own, first, ours = (o.get("seconds") for o in (outcome, line["peers"][rows[0]], step.get(row, {})))
            text += f", {first / own:.1f} x" if own and first and row != rows[0] else ""
            text += f", {own / ours:.2f} steps" if own and ours and line["attack"] != STEP else ""
            result[-1].append(text)
    return result


def trained(network: str, device: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A network after :data:`EPOCHS` of adversarial training on the embedded training images; the test images."""
    (images, labels), test = embedded_images(device)
    attack = workload(network, device)
    with random_numbers_restored():
        torch.manual_seed(0)
        model = WORKLOADS[attack.network].build(attack.width).to(device, memory_format=torch.channels_last).train()
    adversary = PGD(model, EPS, EPS / 2, 2, amp_dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(model.parameters(), RATE, 0.9, weight_decay=5e-4, nesterov=True)
    order = torch.Generator().manual_seed(0)
    parts = [rows for _ in range(EPOCHS) for rows in torch.randperm(len(images), generator=order).split(AT_ONCE)]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, len(parts))
    for number, rows in enumerate(parts):
        x = images[rows].flip(3) if number % 2 else images[rows]
        with torch.autocast(images.device.type, torch.bfloat16):
            loss, _ = adversarial_loss(model, x, labels[rows], method="at", attack=adversary)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return own_copy(model.eval()), *test


def auto_problem(network: str, images: int, device: str) -> tuple[nn.Module, Tensor, Tensor]:
    """Network, images and labels; robust ones and real ones: AutoAttack works longest on images that survive."""
    model, x, labels = embedded(device) if network == EMBEDDED else trained(network, device)
    return model, x[:images], labels[:images]


def auto_attack(model: nn.Module, batch: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The standard version: APGD-CE, APGD-T, FAB-T and Square; with fewer than 10 classes all others are targets."""

    def attack(images: Tensor, labels: Tensor) -> Tensor:
        made = AutoAttack(model, eps=EPS, norm="Linf", seed=0, device=images.device)
        with torch.no_grad():
            targets = min(made.fab.n_target_classes, model(images).shape[1] - 1)
        made.apgd_targeted.n_target_classes = made.fab.n_target_classes = targets
        return made.run_standard_evaluation(images, labels, batch_size=batch)[0]

    return attack


def batch_of(model: nn.Module, row: str, x: Tensor, labels: Tensor) -> dict:
    """Seconds of one row on one batch, and how many images are robust in the eyes of the float32 network."""
    network = victim(model, row)
    started = time.perf_counter()
    if ROWS[row][1] is None:
        adversarial, again = auto_attack(network, len(x))(x, labels), 0
    else:
        exact = victim(model, row.replace("bf16", "float32").replace("autocast", "eager"))
        adversarial, again = judged(exact, network, x, labels, auto_attack(network, len(x)), auto_attack(exact, len(x)))
    seconds = time.perf_counter() - started
    with torch.no_grad():
        robust = int((model(adversarial).argmax(1) == labels).sum())
    return {"status": "ok", "seconds": seconds, "robust": robust, "again": again}


def autoattack(networks: list[str], rows: list[str], images: int, record: Record) -> list[str]:
    """AutoAttack's standard version a batch at a time, rows in turns; a batch that the record holds is not repeated."""
    for network in networks:
        model, *test = auto_problem(network, images, record.device)
        for part, (x, labels) in enumerate(zip(*(t.split(AUTO_BATCHES[network]) for t in test), strict=True)):
            known = next((line for line in record.rows if (line["name"], line["batch"]) == (network, part)), None)
            if known is not None and known["images"] >= len(x):
                continue
            if known is not None:  # it was the last one of fewer images
                record.rows.remove(known)
            line = {"name": network, "batch": part, "images": len(x), "commit": record.header["commit"], "peers": {}}
            for row in rows:
                try:
                    outcome = batch_of(model, row, x, labels)
                except Exception as error:
                    outcome = {"status": "error", "reason": one_line(error)}
                line["peers"][row] = outcome
                print(f"{network}, batch {part}, {row}: {outcome}", flush=True)
            record.add(line)
    return fails(record.rows)


def auto_table(lines: list[dict]) -> list[list[str]]:
    """A line per network and row: time, and its share of the first row's; robust accuracy."""
    result = [["AutoAttack, standard", "images", "time", "share of eager", "robust accuracy", "attacked again"]]
    for network in dict.fromkeys(line["name"] for line in lines):
        batches = [line for line in lines if line["name"] == network]
        images, total = sum(line["images"] for line in batches), None
        for row in batches[0]["peers"]:
            outcomes = [line["peers"][row] for line in batches]
            if wrong := [outcome["status"] for outcome in outcomes if outcome["status"] != "ok"]:
                result.append([f"{network}: {row}", wrong[0], "", "", "", ""])
                continue
            seconds, robust, again = (
                sum(outcome[what] for outcome in outcomes) for what in ("seconds", "robust", "again")
            )
            total = total or seconds
            shares = f"{100 * seconds / total:.0f} %", f"{100 * robust / images:.1f} %"
            result.append([f"{network}: {row}", str(images), f"{seconds:.0f} s", *shares, str(again)])
    return result


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m bench.libraries", description=__doc__)
    parser.add_argument("--autoattack", action="store_true", help="the standard version, from beginning to end")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--networks", help=f"comma-separated, of {', '.join(NETWORKS)}")
    parser.add_argument("--rows", help=f"comma-separated, of {', '.join(ROWS)}; others are compared with the first")
    parser.add_argument("--batch", type=int, default=BATCH, help="of an iteration")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="turns of each row")
    parser.add_argument("--images", type=int, default=AUTO_IMAGES, help=f"of --autoattack ({AUTO_IMAGES})")
    parser.add_argument("--resume", action="store_true", help="--autoattack: keep what an earlier run on this machine "
                        "has measured, finished or not, and go on from there")  # fmt: skip
    parser.add_argument("--json", type=Path, help=f"default: a file in {RESULTS.name}, or of runs/bench for a part")
    args = parser.parse_args(arguments)
    networks = args.networks.split(",") if args.networks else list(NETWORKS)
    rows = args.rows.split(",") if args.rows else list(AUTO_ROWS if args.autoattack else ROWS)
    if unknown := ({*networks} - {*NETWORKS}) | ({*rows} - {*ROWS}):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here")
    all_of_it = not (args.networks or args.rows) and args.rounds >= ROUNDS and args.batch == BATCH
    all_of_it = all_of_it and args.images >= AUTO_IMAGES
    name = AUTOATTACK if args.autoattack else NAME
    command = " ".join(["python -m bench.libraries", *(sys.argv[1:] if arguments is None else arguments)])
    options = {"rounds": args.rounds, "eps": EPS, "alpha": ALPHA, "epochs": EPOCHS}
    record = Record(name, args.device, command, options, RESULTS if all_of_it else PARTIAL, args.json)
    torch.backends.cudnn.benchmark = True  # for all rows
    if args.resume:
        record.resume()
    if args.autoattack:
        problems = autoattack(networks, rows, args.images, record)
    else:
        problems = iterations(networks, rows, args.batch, args.rounds, record)
    return record.conclude(problems)


if __name__ == "__main__":
    sys.exit(main())
