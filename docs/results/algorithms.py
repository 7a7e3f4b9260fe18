"""Make docs/results/algorithms.md: every algorithm on MNIST, two perturbations, two splits.

    nice -n 10 env OMP_NUM_THREADS=1 python docs/results/algorithms.py --data-dir DATA

Two runs are computed in parallel, each in a process with one thread; `--jobs` sets another number.
The command may be stopped at any moment: finished runs are not repeated, interrupted ones are
resumed. `--page-only` makes the page from the existing runs; `--first N` computes the runs of the
first N seeds.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import torch

from algorithm_page import page
from algorithm_pool import run_jobs
from algorithm_study import SEEDS, Study, compute, jobs, ready, studies
from certifl.errors import CertiflError
from certifl.runs.atomic import write_text

HERE = Path(__file__).resolve().parent


def work(job: tuple[Study, ...], runs: Path, data_dir: Path) -> None:
    """The runs of one job, in their order and in one thread."""
    torch.set_num_threads(1)
    for study in job:
        compute(study, runs, data_dir)


def named(job: tuple[Study, ...]) -> str:
    """A job for people."""
    return "; ".join(study.words for study in job)


def say(words: str) -> None:
    """To the terminal or a log, at once."""
    print(words, flush=True)


def make_runs(runs: Path, data_dir: Path, workers: int, first: int) -> list[str]:
    """Make the runs that are missing; what failed, and why."""
    wanted = [study for study in studies(SEEDS[:first]) if not ready(study, runs)]
    say(f"{len(wanted)} runs to make")
    begin = partial(work, runs=runs, data_dir=data_dir)
    return run_jobs(jobs(wanted), workers, begin, say, named)


def main() -> None:
    """Make what is missing, then the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/algorithms"))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--first", type=int, default=len(SEEDS))
    parser.add_argument("--page-only", action="store_true")
    parser.add_argument("--into", type=Path, default=HERE / "algorithms.md")
    options = parser.parse_args()
    try:
        failures = []
        if not options.page_only:
            failures = make_runs(options.runs, options.data_dir, options.jobs, options.first)
        write_text(options.into, page(options.runs))
    except CertiflError as error:
        parser.exit(2, f"{error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "Stopped; the same command resumes.\n")
    if failures:
        print(*failures, sep="\n", file=sys.stderr)
        parser.exit(1, f"{len(failures)} jobs failed; their seeds are not in the tables.\n")


if __name__ == "__main__":
    main()
