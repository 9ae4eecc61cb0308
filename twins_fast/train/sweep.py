"""Many runs of one recipe: every setting with several seeds, the best setting of each method chosen and measured."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from twins_fast.checkpoints import write_atomically
from twins_fast.train.config_file import recipe_as_toml
from twins_fast.train.interruption import Interruption
from twins_fast.train.recipe import Recipe
from twins_fast.train.run_folder import RunError, RunFolder
from twins_fast.train.settings import Setting, applied, label_of

COMMAND = (sys.executable, "-m", "twins_fast")
LOOK_EVERY_SECONDS = 5.0  # at a run that another process is training
MEASURES = ("clean", "robust")


@dataclass(frozen=True)
class Member:
    """One run of a sweep."""

    setting: Setting
    seed: int
    recipe: Recipe
    folder: RunFolder

    @property
    def label(self) -> str:
        return f"{label_of(self.setting)} seed={self.seed}".strip()

    @property
    def log(self) -> Path:
        """What its processes have said."""
        return self.folder.folder.with_suffix(".log")

    def validated(self) -> dict[str, Any] | None:
        """The evaluation on validation images at which the run's best network was chosen, if it has ended."""
        lines = [line for line in self.folder.read_metrics() if line["kind"] == "validation"]
        return max(lines, key=lambda line: line["robust"]) if self.folder.read_result() and lines else None


def members_of(recipe: Recipe, settings: Iterable[Setting], seeds: Iterable[int], folder: Path) -> list[Member]:
    """A run for each setting and seed, in a folder of the setting's name.

    The best network of a run is chosen on validation images, whatever the recipe says, as a setting is, too.
    """
    found = []
    for setting in settings:
        for seed in dict.fromkeys(seeds):
            own = applied(recipe, setting).replaced(
                run={"seed": seed, "baselines": []}, evaluation={"choose_on": "validation", "before": False}
            )
            place = folder / (label_of(setting).replace(" ", ",").replace("/", "-") or "recipe")
            found.append(Member(setting, seed, own, RunFolder(place / f"seed-{seed}")))
    return found


def run_sweep(
    members: Sequence[Member],
    data_root: str | None,
    devices: Sequence[str],
    attacks: Sequence[str] = (),
    images: int | None = None,
) -> dict[str, str]:
    """Train every run to its end, and measure it; what has been done stays, and other machines may share the folder.

    Args:
        members: the runs.
        data_root: of their images.
        devices: one run at a time on each of them; the same may be named again.
        attacks: names (:func:`twins_fast.evaluation.attack_named`) of what the best networks are measured by; none to
            leave that out.
        images: of the test set, for these; None for what the recipe says.

    Returns:
        label of a run that failed -> why.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM, once the runs have saved.
    """
    waiting, ended, failures, processes = deque(members), itertools.count(1), {}, _Processes(len(devices))

    def work(device: str) -> None:
        while not processes.stopped:
            try:
                member = waiting.popleft()
            except IndexError:
                return
            with _taken(member, processes) as taken:
                if not taken:
                    waiting.append(member)
                else:
                    try:
                        why = _train(member, data_root, device, processes)
                        if attacks and not why:
                            why = processes.run(_evaluation(member, device, attacks, images), member.log)
                        found = member.validated()
                    except (OSError, RunError) as error:
                        why, found = str(error), None
            if not taken:
                time.sleep(LOOK_EVERY_SECONDS / len(members))
            elif not processes.stopped:
                failures.update({member.label: why} if why else {})
                figures = ", ".join(f"{name} {found[name]:.1%}" for name in MEASURES) if found else ""
                said = f"failed: {why}" if why else f"{figures} on validation images"
                # In one piece, as the threads' lines would mix.
                print(f"[{next(ended)}/{len(members)}] {member.label}: {said}\n", end="", flush=True)

    with Interruption(), ThreadPoolExecutor(len(devices)) as pool:
        try:
            for _ in pool.map(work, devices):
                pass
        except BaseException:
            processes.stop()
            raise
    return failures


@contextmanager
def _taken(member: Member, processes: _Processes) -> Iterator[bool]:
    """Whether the run is this sweep's inside the block.

    One that goes on without its sweep, which was killed, is waited for first, as it uses a device.
    """
    member.folder.folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(member.folder.folder.with_suffix(".lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    try:
        while _is_trained_now(member.folder) and not processes.stopped:
            time.sleep(LOOK_EVERY_SECONDS)
        yield True
    finally:
        lock.release()


def _is_trained_now(run: RunFolder) -> bool:
    try:
        with run.locked():
            return False
    except RunError:
        return True


def _train(member: Member, data_root: str | None, device: str, processes: _Processes) -> str:
    """Train a run to its end; returns why it failed.

    Raises:
        RunError, OSError: its folder is of another recipe, or cannot be used.
    """
    run = member.folder
    if run.exists():
        run.check_recipe(member.recipe)
        if run.read_result() and run.load_config()[0] == member.recipe:
            return ""
    config = run.folder.with_suffix(".toml")
    write_atomically(config, recipe_as_toml(member.recipe).encode())
    command = ["train", "--config", str(config), "--resume" if run.exists() else "--run", str(run.folder)]
    command += ["--device", device] + ([] if data_root is None else ["--data-root", data_root])
    return processes.run(command, member.log)


def _evaluation(member: Member, device: str, attacks: Sequence[str], images: int | None) -> list[str]:
    command = ["eval", str(member.folder.folder), "--device", device, "--attacks", ",".join(attacks)]
    return command + ([] if images is None else ["--n", str(images)])


class _Processes:
    """Commands of twins-fast, each as a process of its own; so many at a time share the processors."""

    def __init__(self, at_a_time: int):
        self.stopped = False
        self._running: set[subprocess.Popen] = set()
        self._lock = threading.Lock()
        threads = max(1, len(os.sched_getaffinity(0)) // at_a_time)
        self._environment = ({"OMP_NUM_THREADS": str(threads)} if at_a_time > 1 else {}) | os.environ

    def run(self, command: list[str], log: Path) -> str:
        """Run to its end, all output into the file; returns why it failed, in a line."""
        with log.open("ab") as file:
            with self._lock:
                if self.stopped:
                    return "interrupted"
                process = subprocess.Popen(
                    [*COMMAND, *command],
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=self._environment,
                    start_new_session=True,  # Ctrl-C reaches it once, by stop()
                )
                self._running.add(process)
            status = process.wait()
            with self._lock:
                self._running.remove(process)
        if status == 0:
            return ""
        said = log.read_text(errors="replace").splitlines()[-1:]
        return f"{''.join(said).removeprefix('twins-fast: error: ')} (exit status {status}, {log})"

    def stop(self) -> None:
        """Let all of them save and end."""
        with self._lock:
            self.stopped = True
            for process in self._running:
                process.terminate()
