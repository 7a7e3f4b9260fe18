"""A study folder: the distinct runs of some figures, and an index of each figure.

Every run is trained and certified once, whatever the number of figures that show it.

```
<out>/runs/<spec hash>/       one run folder per distinct spec, shared by all figures of the study
<out>/<figure>/figure.json    which run is which curve of which panel, and which runs share a page
```
Several processes may work in one folder at the same time; see `experiments.parallel`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from certifl.errors import StoreError, StoreMismatch
from certifl.experiments.parallel import Job, compute, jobs_of, processes_here
from certifl.experiments.run import Options
from certifl.paper.figures import Figure, Regime, Setting
from certifl.paper.scales import Scale
from certifl.runs.atomic import read_json, write_json

INDEX = "figure.json"


@dataclass(frozen=True)
class Plan:
    """The runs of some figures at one scale.

    Attributes:
        scale: of the study. out: the study folder.
        figures: by name.
        jobs: distinct runs; a training comes before those that continue it.
        shown: of each figure, the hashes of the specs of its runs.
    """

    scale: Scale
    out: Path
    figures: Mapping[str, Figure]
    jobs: tuple[Job, ...]
    shown: Mapping[str, frozenset[str]]

    def jobs_of(self, figure: str) -> tuple[Job, ...]:
        """The runs of one figure, in the plan's order, with trainings that they continue."""
        own = {job.path for job in self.jobs if job.path.name in self.shown[figure]}
        starts = {job.spec.training_hash(of_base=True) for job in self.jobs if job.path in own}
        return tuple(
            job
            for job in self.jobs
            if job.path in own or (job.support and job.spec.training_hash() in starts)
        )


def make_plan(figures: Mapping[str, Figure], scale: Scale, out: Path) -> Plan:
    """The distinct runs of some figures, in an order in which shared training is done once.

    Raises:
        StoreMismatch: the study folder contains figures of another scale.
        StoreError: a run in it is damaged.
    """
    _check_scale(out, scale)
    specs = {
        name: [scale.spec(setting, regime) for setting, regime in figure.curves()]
        for name, figure in figures.items()
    }
    shown = {name: frozenset(spec.hash() for spec in own) for name, own in specs.items()}
    return Plan(scale, out, figures, jobs_of(list(chain(*specs.values())), out), shown)


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
        RequestError: a spec does not fit the data. WorkError: a run failed; the others are saved.
    """
    renewed: list[Path] = []
    for name in plan.figures:
        jobs = [j for j in plan.jobs_of(name) if j.path not in renewed]
        pending = [job for job in jobs if options.overwrite or not job.done()]

        def named(text: str, name: str = name) -> None:
            if stage is not None:
                stage(f"{name} {text}")

        compute(pending, options, renewed, named)
        changed = _write_index(plan, name, options.command)
        yield plan.out / name, changed or bool(pending) or options.overwrite


def compute_free(plan: Plan, options: Options) -> None:
    """Compute the plan's runs beside another process, and write nothing else.

    Raises:
        CertiflError: a run failed; the rest is left to the other process.
    """
    compute([job for job in plan.jobs if not job.done()], options, [])


def _write_index(plan: Plan, name: str, command: str) -> bool:
    """Write the index of a figure; returns whether it changed."""
    path, index = plan.out / name / INDEX, figure_index(plan, name)
    if path.is_file():
        stored = read_json(path)
        if isinstance(stored, dict) and {**stored, "command": ""} == {**index, "command": ""}:
            return False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"Cannot write to {path.parent}: {error}. Choose another folder with --out."
        ) from error
    write_json(path, {**index, "command": command})
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


def jobs_here(requested: int | None, plan: Plan, device: str, overwrite: bool) -> int:
    """Number of runs that are computed at a time; see `processes_here`.

    Raises:
        InputError: more than one with `overwrite`.
    """
    return processes_here(requested, plan.scale.jobs, device, overwrite)
