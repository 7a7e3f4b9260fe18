"""Jobs side by side in processes that end with the command, however it is ended."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

from certifl.torch_env import follow_parent

__all__ = ["work_off"]

Job = TypeVar("Job")


def work_off(
    jobs: Sequence[Job],
    workers: int,
    work: Callable[[Job], None],
    told: Callable[[str], None],
    words: Callable[[Job], str] = str,
) -> list[str]:
    """Do all jobs, `workers` of them at a time, each in a process.

    Ended by Ctrl-C or SIGTERM, it ends its processes at once; should it be killed, they end
    themselves.

    Args:
        jobs: in the order in which they are begun.
        work: does one; a function of a module, so that processes find it.
        told: told of every job that is done.
        words: a job for people.

    Returns:
        What failed and why; the other jobs are done all the same.
    """
    failures = []
    with _processes(workers) as pool:
        pending = {pool.submit(work, job): words(job) for job in jobs}
        for number, future in enumerate(as_completed(pending), 1):
            done, error = pending[future], future.exception()
            if error is not None:
                done += f" FAILED: {type(error).__name__}: {error}"
                failures.append(done)
            told(f"{number} of {len(jobs)}: {done}")
    return failures


@contextlib.contextmanager
def _processes(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that are ended with the block, whatever they are at if it is left early."""
    before = signal.signal(signal.SIGTERM, _leave)
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=follow_parent)
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown()
        signal.signal(signal.SIGTERM, before)


def _leave(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)
