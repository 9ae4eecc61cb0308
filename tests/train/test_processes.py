"""Training and evaluation by two processes (gloo) against one, and what happens when one of them is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import twins_fast
from tests.train.helpers import REGISTER_TINY, TINY, assert_same_run
from tests.two_processes import run_two
from twins_fast import PGD, TrainingStep, convert_sync_twin_bn, convert_twin_bn
from twins_fast.methods.training_step import running_statistics
from twins_fast.models import CifarResNet
from twins_fast.ops.group import ProcessLost
from twins_fast.train.loaders import MIN_BATCH, EpochBatches, loaders
from twins_fast.train.processes import Processes
from twins_fast.train.run_folder import RunFolder

STEPS = {"twins-at": {}, "twins-at with awp": {"awp": 0.01}, "twins-trades": {}}
TWO = "-m torch.distributed.run --standalone --nproc-per-node 2 --".split()
SECONDS = 240


# What the processes do, and one alone.


def network():
    torch.manual_seed(0)
    return convert_twin_bn(CifarResNet(3, width=4, blocks=(1, 1))).double().train()


def step_of(model, method, group, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    attack = PGD(model, 8 / 255, 2 / 255, 2, random_start=False, engine="eager")
    return TrainingStep(model, optimizer, method=method, attack=attack, process_group=group, **options)


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.rand(8, 3, 8, 8, generator=generator).double(), torch.randint(0, 3, (8,), generator=generator)


def trained(name, images, labels, group=None):
    """What a network holds after two steps in float64, and the norms of the last gradients."""
    model = network() if group is None else convert_sync_twin_bn(network())
    step = step_of(model, name.split()[0], group, gradient_norms=True, **STEPS[name])
    for _ in range(2):
        metrics = step(images, labels)
    return {name: value.clone() for name, value in model.state_dict().items()} | {"norms": metrics["gradient_norms"]}


def part(rank):
    """Rows whose halves are parts of the halves of the whole batch."""
    images, labels = batch()
    rows = [2 * rank, 2 * rank + 1, 4 + 2 * rank, 5 + 2 * rank]
    return images[rows], labels[rows]


def of_all_methods(rank):
    return {name: trained(name, *part(rank), "world") for name in STEPS}


def statistics_of_their_own(rank):
    """Before and after a step whose batch statistics are each process's."""
    model = network()
    step_of(model, "twins-at", "world")(*part(rank))
    return [value.clone() for value in running_statistics(model)]


def a_loss_that_is_not_finite_in_one(rank):
    """What changes, and each one's loss."""
    model = network()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    step = step_of(model, "twins-at", "world")
    step.attack = lambda images, labels, x_init=None: images * torch.nan if rank else images
    loss = step(*part(rank))["loss"]
    changed = any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    return changed, loss.isfinite().item()


def numbers(rank):
    processes = Processes(rank, 2)
    assert processes.mean({"b": 2.0 * rank, "a": 1.0}) == {"a": 1.0, "b": 1.0}
    assert processes.any(rank == 1) and not processes.any(False)
    assert processes.of_first(f"rank {rank}") == "rank 0"


def one_leaves(rank):
    if rank == 0:
        with pytest.raises(ProcessLost, match="another process of this run has ended"):
            for _ in range(100):
                Processes(0, 2).wait()


JOBS = [of_all_methods, statistics_of_their_own, a_loss_that_is_not_finite_in_one, numbers]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    first, second = run_two(JOBS, tmp_path_factory.mktemp("two"))
    return {name: (first[name], second[name]) for name in first}


@pytest.mark.parametrize("name", STEPS)
def test_two_processes_step_as_one_on_the_whole_batch(both, name):
    whole = trained(name, *batch())
    for found in both["of_all_methods"]:
        assert found[name].keys() == whole.keys()
        for key, value in whole.items():
            torch.testing.assert_close(found[name][key], value, rtol=1e-9, atol=1e-12, msg=lambda m, k=key: f"{k}: {m}")


def test_running_statistics_are_averages(both):
    alone = []
    for rank in (0, 1):
        model = network()
        step_of(model, "twins-at", None)(*part(rank))
        alone.append(running_statistics(model))
    for first, second, *own in zip(*both["statistics_of_their_own"], *alone, strict=True):
        assert torch.equal(first, second) and not torch.equal(*own)
        torch.testing.assert_close(first, (own[0] + own[1]) / 2)


def test_a_loss_that_is_not_finite_in_one_process_stops_the_step_in_both(both):
    assert both["a_loss_that_is_not_finite_in_one"] == ((False, True), (False, False))


def test_a_process_that_leaves_is_missed(tmp_path):
    run_two([one_leaves], tmp_path, may_break=True)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("size", [24, 28, 29, 37])
def test_every_number_of_processes_sees_the_same_batches(size, count):
    def keys(rank, count, shuffle):
        batches = EpochBatches(size, 12, 0, shuffle, Processes(rank, count))
        assert len(list(batches)) == len(batches)
        return list(batches)

    whole = keys(0, 1, True)
    parts = [keys(rank, count, True) for rank in range(count)]
    for batch, *own in zip(whole, *parts, strict=True):
        assert len({len(part) for part in own}) == 1 and len(own[0]) >= MIN_BATCH
        together = [key for part in own for key in part]
        assert together[: len(batch)] == batch and set(together[len(batch) :]) <= set(whole[0])
    tested = [keys(rank, count, False) for rank in range(count)]
    assert sorted(key for own in tested for batch in own for key in batch) == [(0, index) for index in range(size)]


def test_a_batch_that_cannot_be_parted_is_refused():
    images = [(torch.zeros(32, 32, 3, dtype=torch.uint8).numpy(), 0)] * 32
    for size, count in ((9, 2), (8, 4)):
        with pytest.raises(
            ValueError, match=f"batch_size must be a multiple of the {count} processes, with at least 4"
        ):
            loaders(images, images, batch_size=size, processes=Processes(0, count))


def started(folder, npz, *arguments, launcher=TWO):
    """A command of twins-fast by two processes, which leave their numbers beside the run."""
    main = folder.parent / "main.py"
    main.write_text(
        f"{REGISTER_TINY}\nimport os, pathlib, sys\nfrom twins_fast.train import cli, trainer\n"
        "trainer.SAVE_EVERY_SECONDS = 0.0\n"
        "place = pathlib.Path(__file__).with_name(f\"pid-{os.environ.get('RANK', 0)}\")\n"
        "place.write_text(str(os.getpid()))\nsys.exit(cli.main())\n"
    )
    command = [sys.executable, *launcher, str(main), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(twins_fast.__file__).parents[1])}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def training(folder, npz):
    start = ["train", "--recipe", "mini-pretrain", "--run", str(folder), "--data-root", str(npz), *TINY]
    return [*start, "--method", "twins-at", "--workers", "0", "--epochs", "4"]


def ended(process):
    said = process.communicate(timeout=SECONDS)[0]
    return process.returncode, said


@pytest.mark.slow
def test_a_killed_process_ends_the_run_with_a_line_and_it_goes_on(tmp_path, npz):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    status, said = ended(started(whole, npz, *training(whole, npz)))
    assert status == 0, said
    assert "2 processes" in said and said.count("written to") == 1
    result = RunFolder(whole).read_result()
    assert result["processes"] == 2 and result["after"]["images"] == 12
    steps = [line for line in RunFolder(whole).read_metrics() if line["kind"] == "train"]
    assert [line["step"] for line in steps] == list(range(1, 13))

    process, deadline = started(cut, npz, *training(cut, npz)), time.monotonic() + SECONDS
    while not (cut / "last.safetensors").exists() or len(RunFolder(cut).read_metrics()) < 5:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(int((tmp_path / "pid-1").read_text()), signal.SIGKILL)
    status, said = ended(process)
    lines = [line for line in said.splitlines() if line.startswith("twins-fast: error")]
    assert status != 0 and len(lines) == 1, said
    assert "another process of this run has ended" in lines[0] and f"--resume {cut} goes on" in lines[0]

    status, said = ended(started(cut, npz, "train", "--resume", str(cut)))
    assert status == 0, said
    assert_same_run(whole, cut)

    status, said = ended(started(cut, npz, "train", "--resume", str(cut), "--epochs", "5", launcher=()))  # and by one
    assert status == 0, said
    lines = [line for line in RunFolder(cut).read_metrics() if line["kind"] == "train"]
    assert [line["step"] for line in lines] == list(range(1, 16))

    measured = {}
    for name, launcher in (("one", ()), ("two", TWO)):
        figures = tmp_path / f"{name}.json"
        attacks = ["--attacks", "clean,pgd3,apgd", "--batch-size", "4", "--again", "--json", str(figures)]
        status, said = ended(started(cut, npz, "eval", str(cut), *attacks, launcher=launcher))
        assert status == 0 and said.count("12 images") == 1, said
        found = json.loads(figures.read_text())["results"]
        measured[name] = [{key: value for key, value in one.items() if key != "seconds"} for one in found]
    assert measured["one"] == measured["two"]


def test_a_signal_stops_both_with_a_checkpoint(tmp_path, npz):
    run = tmp_path / "run"
    process, deadline = started(run, npz, *training(run, npz), "--epochs", "400"), time.monotonic() + SECONDS
    while not (run / "metrics.jsonl").exists() or len(RunFolder(run).read_metrics()) < 5:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    status, said = ended(process)
    assert status != 0 and f"interrupted; twins-fast train --resume {run} resumes" in said, said
    last = max(line["step"] for line in RunFolder(run).read_metrics())
    assert json.loads((run / "last.json").read_text())["step"] == last
