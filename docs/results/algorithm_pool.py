"""Parallel jobs in processes that end with the command, however it ends."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

from certifl.torch_env import follow_parent

Job = TypeVar("Job")


def run_jobs(
    jobs: Sequence[Job],
    workers: int,
    work: Callable[[Job], None],
    report: Callable[[str], None],
    words: Callable[[Job], str] = str,
) -> list[str]:
    """Run all jobs, `workers` of them at a time, each in a process.

    Ctrl-C or SIGTERM ends the processes at once; if this process is killed, they end themselves.

    Args:
        jobs: in the order in which they are started.
        work: runs one job; a function of a module, so that processes can import it.
        report: called after every job.
        words: name of a job for people.

    Returns:
        Failures with their reasons; all other jobs are done.
    """
    failures = []
    with _processes(workers) as pool:
        pending = {pool.submit(work, job): words(job) for job in jobs}
        for number, future in enumerate(as_completed(pending), 1):
            done, error = pending[future], future.exception()
            if error is not None:
                done += f" FAILED: {type(error).__name__}: {error}"
                failures.append(done)
            report(f"{number} of {len(jobs)}: {done}")
    return failures


@contextlib.contextmanager
def _processes(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that end with the block, also if it is left early."""
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
