"""Publish the finished runs of a study as data: docs/results/data/runs/<hash>/.

    python docs/results/publish.py STUDY [--scale overnight] [--data-dir DATA] [--into FOLDER]

A training and its fine-tunings are published together, once all of them are finished: whoever
continues the study from published runs never needs a model that is not there. Every run is
verified first. Published: certificates with all votes (Parquet), spec, record and history; not
published: models, and folders of the machine. The same command adds what was finished since, and
writes nothing that is there already. A study continues from published runs elsewhere, without
computing them again:

    cp -r docs/results/data STUDY && certifl reproduce all --scale overnight --out STUDY
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from certifl.errors import CertiflError
from certifl.experiments.verify import verify_run
from certifl.paper.figures import EXTRA, FIGURES
from certifl.paper.reproduce import INDEX, Plan, figure_index, make_plan
from certifl.paper.scales import SCALES, scale_named
from certifl.runs.atomic import read_json, write_json
from certifl.runs.folder import RunFolder, StoredRun
from certifl.runs.published import publish
from paging import head_commit

DATA = Path(__file__).resolve().parent / "data"
MOST_BYTES = 40_000_000
COMMITS = "commits.json"


def together(plan: Plan) -> list[list[Path]]:
    """Run folders of the plan in groups: a training with all that continues it."""
    groups: dict[str, list[Path]] = {}
    for job in plan.jobs:
        groups.setdefault(job.spec.training_hash(of_base=True), []).append(job.path)
    return list(groups.values())


def finished_groups(plan: Plan) -> tuple[list[Path], int]:
    """Runs of the groups in which all are finished, and the number of other finished runs."""
    ready: list[Path] = []
    waiting = 0
    for group in together(plan):
        done = [path for path in group if RunFolder(path).complete()]
        if len(done) == len(group):
            ready += group
        else:
            waiting += len(done)
    return ready, waiting


def add(runs: Iterable[Path], into: Path, data_dir: Path | None) -> list[str]:
    """Verify and publish runs; returns the names of those that were written.

    What is there unchanged is not verified again.

    Raises:
        SystemExit: a run does not follow from its votes; nothing of it is published.
    """
    check = partial(require_verified, data_dir=data_dir)
    return [run.name for run in runs if publish(StoredRun(run), into / run.name, check)]


def require_verified(run: Path, data_dir: Path | None) -> None:
    """Refuse a run in which `verify` finds a problem."""
    problems = verify_run(run, data_dir).problems
    if problems:
        sys.exit(f"{run} is not published: {problems[0]}")


def write_indices(plan: Plan, into: Path) -> None:
    """`figure.json` of every figure, also of those whose runs are not computed yet."""
    for name in plan.figures:
        command = f"certifl reproduce {name} --scale {plan.scale.name} --data-dir DATA --out OUT"
        write_json(into / name / INDEX, {**figure_index(plan, name), "command": command})


def note_commit(into: Path, added: Iterable[str], commit: str) -> None:
    """The commit of the code at which each run was published first."""
    path = into / COMMITS
    known = read_json(path) if path.is_file() else {}
    write_json(path, {**dict.fromkeys(added, commit), **known})


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    """Publish, and say what is there and what is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("study", type=Path)
    parser.add_argument("--scale", default="overnight", choices=SCALES)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--into", type=Path, default=DATA)
    parser.add_argument("--commit", default="")
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE, as the study had")
    options = parser.parse_args()
    try:
        scale = scale_named(options.scale, options.set)
        plan = make_plan({**FIGURES, **EXTRA}, scale, options.study)
        ready, waiting = finished_groups(plan)
        if not ready:
            parser.exit(
                2, f"{options.study}: no training is finished with all its fine-tunings.\n"
            )
        added = add(ready, options.into / "runs", options.data_dir)
    except CertiflError as error:
        parser.exit(2, f"{error}\n")
    write_indices(plan, options.into)
    note_commit(options.into, added, options.commit or head_commit())
    total = size_of(options.into)
    print(
        f"{len(added)} runs added, {len(ready)} of {len(plan.jobs)} published, "
        f"{total / 1e6:.1f} MB; {waiting} finished runs wait for others of their training."
    )
    if total > MOST_BYTES:
        parser.exit(1, f"{options.into} is larger than {MOST_BYTES / 1e6:.0f} MB.\n")


if __name__ == "__main__":
    main()
