"""The driver of a GPU's first run: whatever a stage does, the record is complete and says what became of it."""

import errno
import json
import os
import subprocess
import sys
import time

import pytest
import torch

from bench import gpu_check, gpu_stages
from bench.gpu_check import Record, Stage, run, summary
from twins_fast.ops import native
from twins_fast.qualify import process

SPOILT_KERNELS = """
import sys
from bench import gpu_stages
from twins_fast.ops import native
from twins_fast.qualify import process
real = native.forward
def wrong(*arguments):
    y, *rest = real(*arguments)
    y[-1].mul_(1.01)
    return (y, *rest)
native.forward = wrong
sys.exit(gpu_stages.main(["smoke", "--device", "cpu"]))
"""


def python(name, code, limit=30.0):
    return Stage(name, limit, [sys.executable, "-c", code])


def result(values):
    return f"print('RESULT ' + {json.dumps(json.dumps(values))}, flush=True)"


@pytest.fixture
def record(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "GRACE", 0.5)
    monkeypatch.setattr(gpu_check, "ENDING", 0.0)
    return Record(tmp_path / "made" / "record.json", "the command")


def read(record):
    content = json.loads(record.path.read_text())
    assert sorted(path.name for path in record.path.parent.iterdir()) == ["record.json"]
    return content


def test_a_failure_does_not_stop_the_next(record, tmp_path):
    mark = tmp_path / "grandchild"
    child = f"import time; time.sleep(3); open({str(mark)!r}, 'w')"
    hang = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        f"subprocess.Popen([sys.executable, '-c', {child!r}]); {result({'text': 'half'})}; time.sleep(60)"
    )
    stages = [
        python("good", f"print('a line'); {result({'text': 'found', 'value': 3})}"),
        python("hang", hang, limit=2),
        python("crash", f"import os; {result([1])}; os.abort()"),
        python("fails", "import sys; print('what is wrong'); sys.exit(3)"),
        Stage("missing", 5, ["no-such-program"]),
        python("odd", "import sys; sys.stdout.buffer.write(b'\\xff\\nRESULT {cut\\n')"),
        python("much", "for i in range(20000): print(i)"),
    ]
    assert not run(stages, record, 60)
    content = read(record)
    assert content["complete"] and not content["faults"]
    became = {name: (stage["status"], stage["reason"]) for name, stage in content["stages"].items()}
    assert became == {
        "good": ("passed", ""),
        "hang": ("stopped", "at its limit of 2 s"),
        "crash": ("crashed", "by SIGABRT"),
        "fails": ("failed", "exit code 3: what is wrong"),
        "missing": ("missing", "no-such-program: No such file or directory"),
        "odd": ("passed", ""),
        "much": ("passed", ""),
    }
    results = [stage["results"] for stage in content["stages"].values()]
    assert results[:3] == [[{"text": "found", "value": 3}], [{"text": "half"}], [[1]]]
    assert content["stages"]["odd"]["output"] == ["\N{REPLACEMENT CHARACTER}", "RESULT {cut"]
    assert content["stages"]["much"]["output"][-1] == "19999"
    assert len(content["stages"]["much"]["output"]) == process.KEPT_LINES
    shown = summary(content)
    assert "hang     stopped" in shown and "  half\n" in shown and "  [1]" in shown
    time.sleep(1.5)
    assert not mark.exists()  # what a stage has started ends with it


def test_it_ends_in_time(record):
    started = time.monotonic()
    monkeys = [python(name, "import time; time.sleep(60)", limit=60) for name in ("first", "second", "third")]
    assert not run(monkeys, record, 3)
    assert time.monotonic() - started < 6
    became = [(s["status"], s["reason"]) for s in read(record)["stages"].values()]
    assert became == [("stopped", "at its limit of 3 s"), *[("skipped", "3 s are over")] * 2]


def test_the_record_is_complete_after_every_stage(record):
    look = (
        f"import json; content = json.load(open({str(record.path)!r}));"
        "print(list(content['stages']), content['complete'])"
    )
    assert run([python("first", "pass"), python("second", look)], record, 30)
    assert read(record)["stages"]["second"]["output"] == ["['first'] False"]


@pytest.mark.parametrize("times", [1, 100])
def test_a_full_disk_is_said(record, monkeypatch, times, capsys):
    """Once, and for good: then only what is printed is left."""
    replaced, failures = Record._replace, []

    def full(self):
        if record._reserve.exists() or len(failures) < times:
            failures.append(1)
            raise OSError(errno.ENOSPC, "No space left on device")
        replaced(self)

    monkeypatch.setattr(Record, "_replace", full)
    assert run([python("first", result({"text": "found"}))], record, 30)
    assert "No space left on device" in summary(record.content) and "found" in summary(record.content)
    assert record.lost == (times > 1)
    if times == 1:
        assert "No space left on device" in read(record)["faults"][0] and read(record)["complete"]


def test_a_folder_that_cannot_be_written_loses_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    record = Record(tmp_path / "file" / "record.json", "the command")
    assert run([python("first", result({"text": "found"}))], record, 30)
    assert "could not be written" in summary(record.content) and "found" in summary(record.content)


@pytest.mark.skipif(native._C is None, reason="needs the C++ kernels")
def test_a_wrong_kernel_is_said(record):
    assert not run([python("smoke", SPOILT_KERNELS, limit=120)], record, 130)
    stage = read(record)["stages"]["smoke"]
    assert stage["status"] == "failed" and stage["reason"].startswith("exit code 1: 3 of them are wrong")
    outcomes = [result["outcome"] for result in stage["results"]]
    assert outcomes[:3] == ["failed"] * 3 and "y of (2, 1, 1, 2)" in stage["results"][0]["text"]


def test_a_build_without_cuda_is_said(monkeypatch, capsys):
    class Done:
        stdout = "without CUDA\n"

    monkeypatch.setattr(gpu_stages.subprocess, "run", lambda *a, **b: Done())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert gpu_stages.main(["build", "--device", "cuda"]) == 1
    assert "the CUDA kernels are missing: without CUDA; is nvcc on the PATH" in capsys.readouterr().out
    assert gpu_stages.main(["build", "--device", "cpu"]) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_device_it_says_so(record):
    stages = [stage for stage in gpu_check.first_session("cuda") if stage.name == "smoke"]
    assert not run(stages, record, 60)
    assert read(record)["stages"]["smoke"]["reason"] == "exit code 1: no CUDA device that PyTorch can use"


def test_the_sessions_fit_and_their_tools_look_at_our_kernels():
    first = gpu_check.first_session("cuda")
    assert [stage.name for stage in first][:3] == ["device", "build", "smoke"] and first[-1].name == "compile"
    assert sum(stage.limit for stage in first if stage.name not in ("memcheck", "compile")) <= 600
    (memcheck,) = (stage for stage in first if stage.name == "memcheck")
    assert "moments_kernel" in str(memcheck.command) and "twins_fast" in str(memcheck.command)
    assert {stage.name for stage in gpu_check.second_session("cuda")} >= {"racecheck", "synccheck", "attack"}


def test_unknown_stages_are_refused(capsys):
    with pytest.raises(SystemExit):
        gpu_check.main(["--only", "smoke,nonsense"])
    assert "no stage nonsense; there are device, build" in capsys.readouterr().err


def test_a_fault_of_the_device_fails_one_test_alone(tmp_path):
    """The worker that saw it is replaced."""
    (tmp_path / "conftest.py").write_text(
        "from tests.gpu_faults import pytest_runtest_logfinish, pytest_runtest_makereport\n"
    )
    (tmp_path / "test_faults.py").write_text(
        "poisoned = []\n"
        "def fault():\n"
        "    poisoned.append(1)\n"
        "    raise RuntimeError('CUDA error: an illegal memory access was encountered')\n"
        "def test_before(): pass\n"
        "def test_fault(): fault()\n"
        "def test_after(): assert not poisoned\n"
        "def test_last(): assert not poisoned\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-n", "1", "--max-worker-restart", "4", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [*command, str(tmp_path)],
        cwd=gpu_check.ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": "."},
    )
    assert "3 passed" in run.stdout and "illegal memory access" in run.stdout, run.stdout
    assert "assert not poisoned" not in run.stdout
