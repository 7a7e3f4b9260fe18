"""A study folder: the distinct runs of some figures, and an index of each figure.

Every run is trained and certified once, whatever the number of figures that show it.

```
<out>/runs/<spec hash>/       one run folder per distinct spec, shared by all figures of the study
<out>/<figure>/figure.json    which run is which curve of which panel, and which runs share a page
```
Several processes may work in one folder at the same time, on several GPUs for instance: each
takes a free run, and waits for a training that another one computes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from certifl.errors import CertiflError, InputError, StoreError, StoreMismatch
from certifl.experiments.run import Options, run
from certifl.paper.figures import Figure, Regime, Setting
from certifl.paper.scales import Scale, base_spec
from certifl.runs.atomic import read_json, write_json
from certifl.runs.folder import RunFolder
from certifl.spec import Spec
from certifl.torch_env import follow_parent

INDEX = "figure.json"
_POLL_SECONDS = 2.0


@dataclass(frozen=True)
class Job:
    """One distinct run of a study.

    Attributes:
        spec: of the run.
        path: of the run folder.
        figures: names of the figures that show it.
        support: whether it exists only so that others continue its training.
    """

    spec: Spec
    path: Path
    figures: tuple[str, ...]
    support: bool = False

    def done(self) -> bool:
        """Whether everything was computed and can still be read."""
        return RunFolder(self.path).complete()

    def trainings(self) -> set[str]:
        """Hashes of the finished trainings that this run can reuse."""
        return {self.spec.training_hash(), self.spec.training_hash(of_base=True)}


@dataclass(frozen=True)
class Plan:
    """The runs of some figures at one scale.

    Attributes:
        scale: of the study. out: the study folder.
        figures: by name.
        jobs: distinct runs; a training comes before those that continue it.
    """

    scale: Scale
    out: Path
    figures: Mapping[str, Figure]
    jobs: tuple[Job, ...]

    def jobs_of(self, figure: str) -> tuple[Job, ...]:
        """The runs of one figure, in the plan's order."""
        return tuple(job for job in self.jobs if figure in job.figures)


def make_plan(figures: Mapping[str, Figure], scale: Scale, out: Path) -> Plan:
    """The distinct runs of some figures, in an order in which shared training is done once.

    Raises:
        StoreMismatch: the study folder contains figures of another scale.
        StoreError: a run in it is damaged.
    """
    _check_scale(out, scale)
    specs: dict[str, Spec] = {}
    users: dict[str, set[str]] = {}
    for name, figure in figures.items():
        for setting, regime in figure.curves():
            spec = scale.spec(setting, regime)
            users.setdefault(spec.hash(), set()).add(name)
            specs.setdefault(spec.hash(), spec)
    shown, support = list(specs.values()), dict[str, Spec]()
    trained = {spec.training_hash() for spec in shown} | _finished_trainings(out)
    for spec in shown:
        start = spec.training_hash(of_base=True)
        if start not in trained:
            support.setdefault(start, base_spec(spec))
    jobs: list[Job] = []
    for spec in _bases_first(shown, support):
        names = users.get(spec.hash()) or _continued_by(spec, shown, users)
        ordered = tuple(name for name in figures if name in names)
        path = out / "runs" / spec.hash()
        jobs.append(Job(spec, path, ordered, support=spec.hash() not in users))
    return Plan(scale, out, figures, tuple(jobs))


def _bases_first(shown: Sequence[Spec], support: Mapping[str, Spec]) -> list[Spec]:
    """The order of the figures, with each training before its continuations."""
    first: dict[str, Spec] = dict(support)
    for spec in shown:
        first.setdefault(spec.training_hash(), spec)
    ordered: dict[str, Spec] = {}
    for spec in shown:
        start = spec.training_hash(of_base=True)
        if start != spec.training_hash() and start in first:
            ordered.setdefault(first[start].hash(), first[start])
        ordered.setdefault(spec.hash(), spec)
    return list(ordered.values())


def _continued_by(base: Spec, shown: Sequence[Spec], users: Mapping[str, set[str]]) -> set[str]:
    name = base.training_hash()
    return set().union(*(users[s.hash()] for s in shown if s.training_hash(of_base=True) == name))


def _finished_trainings(out: Path) -> set[str]:
    folders = (RunFolder(mark.parent) for mark in out.glob("runs/*/run.json"))
    manifests = (folder.manifest() for folder in folders if folder.finished())
    return {str(manifest.get("training_hash")) for manifest in manifests}


def _check_scale(out: Path, scale: Scale) -> None:
    for path in sorted(out.glob(f"*/{INDEX}")):
        index = read_json(path)
        if not isinstance(index, dict):
            raise StoreError(f"{path} is damaged: it is not a JSON object. Delete it and repeat.")
        stored = (index.get("scale"), *index.get("settings", ()))
        if stored != (scale.name, *scale.settings):
            raise StoreMismatch(
                f"{out} contains figures at the scale {_scale_words(*stored)}, not "
                f"{_scale_words(scale.name, *scale.settings)}. Choose another folder with --out."
            )


def _scale_words(name: object, *settings: object) -> str:
    return f"{name} {' '.join(f'--set {setting}' for setting in settings) or 'without --set'}"


def reproduce(
    plan: Plan, options: Options, stage: Callable[[str], None] | None = None
) -> Iterator[tuple[Path, bool]]:
    """Compute the figures one after the other; resumes where an earlier call was stopped.

    Args:
        plan: of the figures.
        options: as for one run; `out` and `siblings` are set for each.
        stage: called with the name of the run in progress.

    Yields:
        A figure's folder as soon as its runs are finished and its index is written, and whether
        anything changed there.

    Raises:
        RequestError: a spec does not fit the data. WorkError: a run failed; others are kept.
    """
    renewed: list[Path] = []
    for name in plan.figures:
        jobs = [j for j in plan.jobs_of(name) if j.path not in renewed]
        pending = [job for job in jobs if options.overwrite or not job.done()]
        report = None if stage is None else _prefixed(stage, name)
        _compute(pending, options, renewed, report)
        changed = _write_index(plan, name, options.command)
        yield plan.out / name, changed or bool(pending) or options.overwrite


def compute_free(plan: Plan, options: Options) -> None:
    """Compute the plan's runs beside another process, and write nothing else.

    Raises:
        CertiflError: a run failed; the rest is left to the other process.
    """
    _compute([job for job in plan.jobs if not job.done()], options, [], None)


def _prefixed(stage: Callable[[str], None], name: str) -> Callable[[str], None]:
    return lambda text: stage(f"{name} {text}")


def _compute(
    jobs: Sequence[Job],
    options: Options,
    renewed: list[Path],
    stage: Callable[[str], None] | None,
) -> None:
    """Compute runs, and wait for those that another process computes."""
    pending = list(jobs)
    while pending:
        before = len(pending)
        for job in list(pending):
            if _waits(job, pending):
                continue
            if stage is not None:
                number = len(jobs) - len(pending) + 1
                stage(f"[{number}/{len(jobs)}] {job.spec.name}")
            if _compute_one(job, options, renewed):
                renewed.append(job.path)
                pending.remove(job)
        if len(pending) == before:
            if stage is not None:
                stage(f"waits for {len(pending)} runs of another process")
            time.sleep(_POLL_SECONDS)
            pending = [job for job in pending if options.overwrite or not job.done()]


def _waits(job: Job, pending: Sequence[Job]) -> bool:
    """Whether an earlier, unfinished run will have a training that this one can reuse."""
    wanted = job.trainings()
    earlier = pending[: pending.index(job)]
    return any(other.spec.training_hash() in wanted for other in earlier)


def _compute_one(job: Job, options: Options, renewed: Sequence[Path]) -> bool:
    """Compute one run, unless another process does.

    With `overwrite`, only trainings of this call are reused: older ones are replaced.
    """
    beside = sorted(mark.parent for mark in job.path.parent.glob("*/run.json"))
    siblings = tuple(renewed) if options.overwrite else tuple(beside)
    own = dataclasses.replace(options, out=job.path, siblings=siblings)
    try:
        run(job.spec, own)
    except StoreMismatch:
        if _locked_by_another(job.path):
            return False
        raise
    return True


def _locked_by_another(path: Path) -> bool:
    try:
        with RunFolder(path).locked():
            return False
    except StoreMismatch:
        return True


def _write_index(plan: Plan, name: str, command: str) -> bool:
    """Write the index of a figure; returns whether it changed."""
    path, wanted = plan.out / name / INDEX, figure_index(plan, name)
    if path.is_file():
        stored = read_json(path)
        if isinstance(stored, dict) and {**stored, "command": ""} == {**wanted, "command": ""}:
            return False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"Cannot write to {path.parent}: {error}. Choose another folder with --out."
        ) from error
    write_json(path, {**wanted, "command": command})
    return True


def figure_index(plan: Plan, name: str) -> dict[str, Any]:
    """A figure as plain JSON: panels with their curves, pages with their runs.

    Folders of runs are relative to the figure's folder.
    """
    figure, scale = plan.figures[name], plan.scale
    panels = [
        {
            "kind": panel.kind,
            "row": row,
            "column": column,
            "curves": [
                _curve(scale, setting, regime)
                for setting in panel.settings
                for regime in panel.regimes
            ],
        }
        for row, panels in enumerate(figure.rows)
        for column, panel in enumerate(panels)
    ]
    return {
        "figure": name,
        "scale": scale.name,
        "settings": list(scale.settings),
        "title": figure.title,
        "panels": panels,
        "pages": _pages(figure, scale),
    }


def _curve(scale: Scale, setting: Setting, regime: Regime) -> dict[str, Any]:
    spec = scale.spec(setting, regime)
    return {
        "run": f"../runs/{spec.hash()}",
        "label": regime.label,
        "personalization": regime.personalization,
    }


def _pages(figure: Figure, scale: Scale) -> list[dict[str, Any]]:
    """Runs that can be compared image by image: same data, clients and perturbation."""
    pages: dict[str, dict[str, str]] = {}
    for setting, regime in figure.curves():
        spec = scale.spec(setting, regime)
        sigma = str(setting.sigma).replace(".", "_")
        name = f"{spec.data.name}-{spec.clients.count}-clients-{setting.family}-{sigma}".lower()
        pages.setdefault(name, {}).setdefault(f"../runs/{spec.hash()}", regime.label)
    return [
        {"name": name, "runs": [{"run": run, "label": label} for run, label in runs.items()]}
        for name, runs in pages.items()
    ]


# Parallel runs of a study: helper processes that take free runs, as other terminals would.
#
# A helper computes runs of the plan until all are finished or taken. It writes run folders only:
# the main process writes figures and pages. It also repeats a run that fails in a helper, and
# reports the error.


def jobs_here(requested: int | None, plan: Plan, device: str, overwrite: bool) -> int:
    """Number of runs that are computed at a time.

    Args:
        requested: by the user; None = one for each core, up to the limit of the scale, on a CPU.
        plan: of the figures. device: as in `Options`.
        overwrite: replace finished runs; then one after the other, since a helper cannot know
            what was replaced already.

    Raises:
        InputError: more than one with `overwrite`.
    """
    if overwrite:
        if requested is not None and requested > 1:
            raise InputError(
                "--overwrite replaces runs one after the other. Leave --jobs out, or choose a new "
                "folder with --out."
            )
        return 1
    if requested is not None:
        return requested
    on_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    return min(os.cpu_count() or 1, plan.scale.jobs) if on_cpu else 1


@contextlib.contextmanager
def helped(plan: Plan, options: Options, jobs: int) -> Iterator[None]:
    """Run `jobs` - 1 helpers on the plan; torch's threads are shared among all processes.

    They end with the block, also after an error; if this process is killed, they end themselves.
    Their unfinished runs are resumed like any other.
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
    with contextlib.suppress(
        CertiflError
    ):  # the main process repeats the run, and reports the error
        compute_free(plan, options)
