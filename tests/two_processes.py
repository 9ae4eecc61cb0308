"""Two processes that talk by gloo, for tests."""

import datetime
import multiprocessing
import os

import torch
import torch.distributed as dist

SECONDS = 120  # a hang is a failure


def _process(rank, jobs, folder, may_break):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/meeting", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=SECONDS // 4)
    )
    torch.save({job.__name__: job(rank) for job in jobs}, folder / f"{rank}.pt")
    if may_break:
        os._exit(0)  # gloo may abort while it takes a broken connection down
    dist.barrier()
    dist.destroy_process_group()


def run_two(jobs, folder, may_break=False):
    """What each job, a function of the rank, returned in each of two processes; they may leave one alone."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_process, args=(rank, jobs, folder, may_break)) for rank in range(2)]
    for each in processes:
        each.start()
    for each in processes:
        each.join(SECONDS)
    hung = [each for each in processes if each.is_alive()]
    for each in hung:
        each.kill()
    assert not hung, "a process hangs"
    assert [each.exitcode for each in processes] == [0, 0]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]
