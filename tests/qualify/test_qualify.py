"""A device that is faked: what its checks say decides what runs, is kept, and is found again."""

import json
import os
import sys
import threading
import warnings
from types import SimpleNamespace

import pytest
import torch

from twins_fast import verdicts
from twins_fast.attacks.engine import cache
from twins_fast.ops import backend
from twins_fast.qualify import process, qualify, run
from twins_fast.verdicts import FAILED, PASSED, SLOWER, UNKNOWN

DEVICE = torch.device("cuda", 0)
DTYPES = ("bfloat16", "float16", "float32")
ALL = [f"{check} {dtype}" for check in run.LIMITS for dtype in DTYPES]
PASS = "report(subject=subject, outcome='passed')"


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """One fake GPU, and a folder of verdicts; ``lines`` is what was said, ``ran`` the checks that were made."""
    properties = SimpleNamespace(
        name="Fake GPU", major=9, minor=0, multi_processor_count=132, L2_cache_size=1 << 26, uuid="GPU-1"
    )
    fake = SimpleNamespace(properties=properties, lines=[], ran=[])
    for name, value in {
        "is_available": lambda: True, "current_device": lambda: 0, "device_count": lambda: 1,
        "get_device_properties": lambda *_: properties, "get_device_name": lambda *_: properties.name,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setenv("TWINS_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(verdicts, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(verdicts, "DRIVER", tmp_path / "driver")
    monkeypatch.setattr(process, "GRACE", 0.3)
    verdicts._told.clear()
    verdicts._known.clear()
    yield fake
    verdicts._told.clear()
    verdicts._known.clear()


def made(gpu, code=PASS, **options):
    """Qualify by checks that run ``code`` for each of their subjects."""

    def command(check, device):
        gpu.ran.append(check)
        program = f"""
import json, os, sys, time
def report(**values):
    print("RESULT " + json.dumps(values), flush=True)
check = {check!r}
for subject in [check + " " + dtype for dtype in {DTYPES}]:
    {code}
"""
        return [sys.executable, "-c", program]

    return qualify(DEVICE, say=gpu.lines.append, command=command, **options)


def another_process():
    verdicts._known.clear()
    return verdicts.load(DEVICE)


def reservations(values=1 << 30):
    """Why the kernels do not run: CUDA, Triton, the plan."""
    norms = [backend._reservation(b, "twin_batch_norm", DEVICE, torch.bfloat16, values) for b in ("cuda", "triton")]
    return [*norms, cache._reservation(DEVICE, torch.bfloat16)]


def test_a_device_that_passes_runs_the_kernels(gpu):
    with pytest.warns(UserWarning, match="runs on Fake GPU: `twins-fast qualify --device cuda:0` finds") as told:
        assert all("unknown on this device" in why for why in reservations())
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reservations()  # it has been said
    found = made(gpu)
    assert list(found) == ALL and {v.outcome for v in found.values()} == {PASSED}
    assert reservations() == ["", "", ""] and gpu.ran == list(run.LIMITS)
    assert "3 checks of Fake GPU follow, which take" in gpu.lines[0] and gpu.lines[-1].startswith("kept in")
    assert another_process() == found and made(gpu) == found and gpu.ran == list(run.LIMITS)
    made(gpu, again=True)
    assert gpu.ran == 2 * list(run.LIMITS)


def test_wrong_and_slow_kernels_do_not_run(gpu):
    code = (
        "report(subject=subject, outcome='failed' if 'cuda' in check else 'slower' if 'plan' in check else 'passed',"
        " reason='because', smallest=1000)"
    )
    found = made(gpu, code)
    assert [found[f"{check} bfloat16"].outcome for check in run.LIMITS] == [FAILED, PASSED, SLOWER]
    cuda, triton, plan = reservations()
    assert (
        cuda == "failed on this device: because"
        and triton == ""
        and plan == "the plan is slower on this device: because"
    )
    assert reservations(values=999)[1] == "slower than plain PyTorch below 1000 values"
    assert another_process() == found


def test_what_runs_out_of_memory_is_tried_again(gpu):
    found = made(gpu, "report(subject=subject, outcome='unknown', reason='memory ran out')")
    assert {v.outcome for v in found.values()} == {UNKNOWN} and another_process() == {}
    assert {v.outcome for v in made(gpu).values()} == {PASSED}


def test_a_hang_is_ended_and_tried_again(gpu, monkeypatch):
    monkeypatch.setattr(run, "LIMITS", dict.fromkeys(run.LIMITS, 20.0) | {"plan": 4.0})
    code = f"{PASS} if 'plan' not in check or subject.endswith('bfloat16') else time.sleep(60)"
    found = made(gpu, code)
    assert [found[f"plan {dtype}"].outcome for dtype in DTYPES] == [
        PASSED,
        UNKNOWN,
        UNKNOWN,
    ]
    assert found["plan float16"].reason == "its check stopped at its limit of 4 s"
    assert len(another_process()) == 7
    gpu.ran.clear()
    assert {v.outcome for v in made(gpu).values()} == {PASSED} and gpu.ran == ["plan"]


def test_a_crash_is_a_failure_of_what_was_being_checked(gpu):
    found = made(gpu, f"os.abort() if subject == 'plan float16' else {PASS}")
    assert [found[f"plan {dtype}"].outcome for dtype in DTYPES] == [PASSED, FAILED, UNKNOWN]
    assert found["plan float16"].reason == "its check crashed by SIGABRT"


def test_checks_that_cannot_start_say_nothing(gpu):
    found = qualify(DEVICE, say=gpu.lines.append, command=lambda *_: ["no-such-program"])
    assert {v.outcome for v in found.values()} == {UNKNOWN}
    assert "missing no-such-program" in found[ALL[0]].reason


def test_a_folder_that_cannot_be_written_is_said_once(gpu, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TWINS_FAST_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="the verdicts cannot be kept, and hold for this process alone") as told:
        made(gpu)
    assert len(told) == 1 and reservations() == ["", "", ""] and another_process() == {}


@pytest.mark.parametrize("ranks", [2, 8])
def test_one_process_checks_and_the_others_wait(gpu, ranks):
    found = []
    threads = [threading.Thread(target=lambda: found.append(made(gpu))) for _ in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == ranks and all(each == found[0] for each in found) and gpu.ran == list(run.LIMITS)
    assert "another process is qualifying this device" in gpu.lines


def test_a_process_that_waits_too_long_goes_on(gpu, monkeypatch):
    from filelock import FileLock

    path = verdicts.file_of(verdicts.key_of(DEVICE))
    path.parent.mkdir(parents=True)
    monkeypatch.setattr(run, "LIMITS", {"plan": -59.9})
    with FileLock(path.with_suffix(".lock")):
        assert made(gpu) == {}
    assert "plain PyTorch runs in this one" in gpu.lines[-1] and gpu.ran == []


def changed_driver(gpu, monkeypatch):
    verdicts.DRIVER.write_text("NVRM version: NVIDIA 999\nand more")


def changed_kernels(gpu, monkeypatch):
    monkeypatch.setattr(verdicts, "sources", lambda: "other")


def changed_device(gpu, monkeypatch):
    gpu.properties.multi_processor_count = 114


def changed_torch(gpu, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "9.9")


@pytest.mark.parametrize("change", [changed_driver, changed_kernels, changed_device, changed_torch])
def test_a_verdict_holds_for_what_it_was_found_with(gpu, monkeypatch, change):
    made(gpu)
    change(gpu, monkeypatch)
    assert another_process() == {}
    made(gpu)
    assert len(gpu.ran) == 6


def truncated(path):
    path.write_text(path.read_text()[:40])


def of_another_version(path):
    path.write_text(json.dumps({"verdicts": {"plan bfloat16": ["passed"]}}))


def of_another_device(path):
    content = json.loads(path.read_text())
    content["key"]["device"] = "Other"
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("damage", [truncated, of_another_version, of_another_device])
def test_a_damaged_file_counts_for_nothing(gpu, damage):
    made(gpu)
    damage(verdicts.file_of(verdicts.key_of(DEVICE)))
    assert another_process() == {}
    assert {v.outcome for v in made(gpu).values()} == {PASSED} and len(gpu.ran) == 6


def test_verdicts_come_with_the_package(gpu):
    made(gpu)
    path = verdicts.file_of(verdicts.key_of(DEVICE))
    verdicts.SHIPPED.mkdir()
    path.rename(verdicts.SHIPPED / "fake.json")
    gpu.properties.name = "Another of the same capability"
    assert set(another_process()) == set(ALL)
    gpu.properties.minor = 1
    assert another_process() == {}


def test_a_check_starts_no_other(gpu, monkeypatch):
    made(gpu)
    verdicts._known.clear()
    monkeypatch.setenv(verdicts.QUALIFYING, "1")
    with pytest.raises(RuntimeError, match="a check of a device cannot start another one"):
        made(gpu)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all("unknown" in why for why in reservations())


def test_the_environment_of_a_check(gpu, monkeypatch):
    for name in run.SCRUBBED:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-5")
    made(gpu, "report(subject=subject, outcome='passed', reason=' '.join(sorted(os.environ)))")
    seen = verdicts._known[0][ALL[0]].reason.split()
    assert not set(run.SCRUBBED) & set(seen) and {"CUDA_VISIBLE_DEVICES", verdicts.QUALIFYING} <= set(seen)
    assert run.check_command("plan", DEVICE)[1:] == ["-m", "twins_fast.qualify", "plan", "GPU-1"]


def test_a_verdict_is_frozen_in_a_process(gpu):
    assert verdicts.verdict(DEVICE, ALL[0]).outcome == UNKNOWN
    verdicts.save(verdicts.key_of(DEVICE), {ALL[0]: verdicts.Verdict(PASSED)})
    assert verdicts.verdict(DEVICE, ALL[0]).outcome == UNKNOWN
    verdicts._known.clear()
    assert verdicts.verdict(DEVICE, ALL[0]).outcome == PASSED
    assert "qualify --again" in verdicts.verdict(DEVICE, ALL[1]).reason


@pytest.mark.parametrize("name", ["cpu", "meta"])
def test_only_a_gpu_needs_a_verdict(name):
    with pytest.raises(ValueError, match=f"{name} is no CUDA device"):
        qualify(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_driver_it_says_so():
    with pytest.raises(ValueError, match="cuda is no CUDA device that PyTorch can use"):
        qualify()


def test_other_devices_stay_as_they_were():
    assert cache._reservation(torch.device("mps"), torch.float32) == "the plan does not run on mps"
    assert os.environ.get(verdicts.QUALIFYING) is None


def test_info_shows_what_is_known(gpu, capsys):
    from twins_fast.train.info import print_info

    made(gpu, "report(subject=subject, outcome='passed' if 'plan' in check else 'failed', reason='because')")
    capsys.readouterr()
    print_info()
    said = capsys.readouterr().out
    assert "cuda:0: Fake GPU, sm_90\n    twin_batch_norm cuda bfloat16: failed because\n" in said
    assert "    plan float32: passed because\n" in said
    assert "twin_batch_norm on cuda: torch runs" in said and "triton does not: failed on this device: because" in said


def test_an_op_says_once_that_there_is_no_verdict(gpu):
    x = SimpleNamespace(device=DEVICE, dtype=torch.bfloat16, is_cuda=True, numel=lambda: 1 << 20)
    with pytest.warns(UserWarning, match="plain PyTorch runs on Fake GPU") as told:
        assert backend.choose("twin_batch_norm", x) == "torch" == backend.choose("twin_batch_norm", x)
    assert len(told) == 1
    found = made(gpu)
    expected = "cuda" if getattr(backend.native._C, "has_cuda", False) else "triton"
    assert found and backend.choose("twin_batch_norm", x) == expected
