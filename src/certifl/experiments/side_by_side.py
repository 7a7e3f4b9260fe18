"""Runs of a study side by side: helpers that take what is free, as other terminals would.

A helper is a process that computes runs of the plan until none is left that nobody is at. It
writes what a process working alone writes, and nothing else: figures and pages are left to whoever
asked. What a helper fails at is tried again, and told, by that process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
from collections.abc import Iterator

import torch

from certifl.errors import CertiflError, InputError
from certifl.experiments.reproduce import Plan, compute_free
from certifl.experiments.run import Options
from certifl.work.processes import follow_parent

__all__ = ["helped", "jobs_here"]


def jobs_here(asked: int | None, plan: Plan, device: str, overwrite: bool) -> int:
    """How many runs are computed at a time.

    Args:
        asked: by the user; None = one for each core, as many as the scale allows, on a CPU.
        plan: of the figures. device: as in `Options`.
        overwrite: replace finished runs; then one after the other, for a helper cannot tell what
            was replaced already.

    Raises:
        InputError: more than one with `overwrite`.
    """
    if overwrite:
        if asked is not None and asked > 1:
            raise InputError(
                "--overwrite replaces runs one after the other. Leave --jobs out, or choose a new "
                "folder with --out."
            )
        return 1
    if asked is not None:
        return asked
    on_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    return min(os.cpu_count() or 1, plan.scale.jobs) if on_cpu else 1


@contextlib.contextmanager
def helped(plan: Plan, options: Options, jobs: int) -> Iterator[None]:
    """`jobs` - 1 helpers work on the plan meanwhile; torch's threads are shared among all.

    However the block is left, they end with it; should this process be killed, they end
    themselves. Their unfinished runs are gone on with like any other.
    """
    before = torch.get_num_threads()
    threads = max(1, before // jobs) if jobs > 1 else before
    context = multiprocessing.get_context("spawn")
    quiet = dataclasses.replace(options, report=None)
    helpers = [context.Process(target=_help, args=(plan, quiet, threads)) for _ in range(jobs - 1)]
    try:
        torch.set_num_threads(threads)
        for helper in helpers:
            helper.start()
        yield
    finally:
        for helper in helpers:
            if helper.is_alive():
                helper.terminate()
        for helper in helpers:
            if helper.pid is not None:
                helper.join()
        torch.set_num_threads(before)


def _help(plan: Plan, options: Options, threads: int) -> None:
    follow_parent()
    torch.set_num_threads(threads)
    with contextlib.suppress(CertiflError):  # the process that asked meets it, and tells
        compute_free(plan, options)
