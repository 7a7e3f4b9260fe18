"""A study folder: the distinct runs of some figures, and an index of each figure.

Every run is trained and certified once, whatever the number of figures that show it.

```
<out>/runs/<spec hash>/       one run folder per distinct spec, shared by all figures of the study
<out>/<figure>/figure.json    which run is which curve of which panel, and which runs share a page
```
Several processes may work in one folder at the same time; see `experiments.parallel`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from certifl.certification.counts import expected_votes
from certifl.certification.network import choose_device
from certifl.certification.settings import ESTIMATORS
from certifl.errors import StoreError, StoreMismatch
from certifl.experiments.parallel import Job, compute, jobs_of
from certifl.experiments.plan import EXPECTED_SHARE, KNOWN
from certifl.experiments.run import Options, device_names
from certifl.paper.figures import Figure, Regime, Setting
from certifl.paper.scales import Scale
from certifl.runs.atomic import read_json, write_json
from certifl.spec import Spec
from certifl.study.opened_run import OpenRun

INDEX = "figure.json"


@dataclass(frozen=True)
class Plan:
    """The runs of some figures at one scale.

    Attributes:
        scale: of the study. out: the study folder. figures: by name.
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
    specs = {
        name: [scale.spec(setting, regime) for setting, regime in figure.curves()]
        for name, figure in figures.items()
    }
    shown = {name: frozenset(spec.hash() for spec in own) for name, own in specs.items()}
    return Plan(scale, out, figures, jobs_of(list(chain(*specs.values())), out), shown)


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


def _write_index(plan: Plan, name: str, command: str) -> bool:
    """Write the index of a figure; returns whether it changed."""
    path, index = plan.out / name / INDEX, figure_index(plan, name)
    if path.is_file():
        stored = read_json(path)
        if isinstance(stored, dict) and {**stored, "command": ""} == {**index, "command": ""}:
            return False
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


# Remaining work of a study, and roughly how long it takes.
#
# Speeds are those of finished runs of the same study: images trained and votes cast per second,
# and the share of votes cast despite early stopping. Without finished runs a small table is used,
# which is rough: another processor may be several times faster or slower. It has no GPU.


@dataclass(frozen=True)
class Speed:
    """Speed of one network.

    Attributes:
        images: trained per second. votes: cast per second.
        share: votes cast, as a share of the maximum.
    """

    images: float
    votes: float
    share: float | None = None


ROUGH: Mapping[tuple[str, str], Speed] = {
    ("small_cnn", "cpu"): Speed(2_000, 5_000),
    ("small_resnet", "cpu"): Speed(600, 4_000),
    ("resnet18", "cpu"): Speed(40, 150),
}
"""By network and kind of device, for images up to 32 x 32; orders of magnitude only.

No GPU was measured: there, finished runs of the study say how fast it is, or nothing does."""
_BFLOAT16_TRAINS = 2.0  # times faster training, on a processor with AMX
_INT8_VOTES = 2.0  # times faster votes than those of the table


@dataclass(frozen=True)
class Cost:
    """Remaining work of some runs.

    Attributes:
        runs: number of distinct ones. done: number of finished ones.
        trainings: remaining, fine-tuning not counted. votes_at_most: remaining.
        seconds: remaining, roughly.
        measured: share of the remaining runs whose speed is known from finished runs.
        unknown: number of remaining runs whose speed nothing says; `seconds` leaves them out.
    """

    runs: int
    done: int
    trainings: int
    votes_at_most: int
    seconds: float
    measured: float
    unknown: int = 0


def costs(plan: Plan, device: str) -> dict[str, Cost]:
    """Cost of each figure alone, and under "all" of all figures together.

    Raises:
        InputError: the device is unknown or absent.
    """
    kind, speeds = choose_device(device_names(device)[0]).type, _measured(plan.out)
    parts = {name: plan.jobs_of(name) for name in plan.figures}
    done = {job.path: job.done() for job in plan.jobs}
    every = {**parts, "all": plan.jobs} if len(parts) > 1 else parts
    return {name: _cost(jobs, done, speeds, kind) for name, jobs in every.items()}


def _cost(
    jobs: Sequence[Job],
    done: Mapping[Path, bool],
    speeds: Mapping[tuple[str, str], Speed],
    kind: str,
) -> Cost:
    remaining = [job.spec for job in jobs if not done[job.path]]
    trained = {job.spec.training_hash() for job in jobs if done[job.path]}
    trainings = votes = 0
    seconds, measured, unknown = 0.0, 0, 0
    for spec in remaining:
        speed = speeds.get((spec.model.name, spec.data.name))
        measured += speed is not None
        if speed is None and kind == "cpu":
            speed = _rough(spec)
        at_most = _votes_at_most(spec)
        votes += at_most
        new = spec.training_hash() not in trained
        if new:
            trained.add(spec.training_hash())
            trainings += "base" not in spec.algorithm
        if speed is None:
            unknown += 1
            continue
        share = EXPECTED_SHARE if speed.share is None else speed.share
        if not ESTIMATORS[spec.certification.estimator].stops_early:
            share = 1.0
        seconds += at_most * share / speed.votes
        seconds += _images_trained(spec) / speed.images if new else 0.0
    known = measured / len(remaining) if remaining else 1.0
    done_runs = len(jobs) - len(remaining)
    return Cost(len(jobs), done_runs, trainings, votes, seconds, known, unknown)


def _rough(spec: Spec) -> Speed:
    """The table's speed of a spec on a processor, in its arithmetic."""
    speed = ROUGH.get((spec.model.name, "cpu"), ROUGH["resnet18", "cpu"])
    trains = _BFLOAT16_TRAINS if spec.training.precision == "bfloat16" else 1.0
    votes = _INT8_VOTES if spec.certification.precision == "int8" else 1.0
    return Speed(speed.images * trains, speed.votes * votes, speed.share)


def _votes_at_most(spec: Spec) -> int:
    available = (spec.data.test_images or KNOWN[spec.data.name].test) // spec.clients.count
    certified = sum(perturbation is not None for perturbation in spec.perturbations())
    images = certified * min(available, spec.certification.images or available)
    return expected_votes(images, spec.certification.settings())


def _images_trained(spec: Spec) -> int:
    """Images seen in training; the base of a personalized run is another run's work."""
    images = spec.data.train_images or KNOWN[spec.data.name].train
    if "base" in spec.algorithm:
        return images * spec.algorithm["epochs"]
    taking_part = spec.clients.participants / spec.clients.count
    return round(images * spec.training.rounds * spec.training.local_epochs * taking_part)


def _measured(out: Path) -> dict[tuple[str, str], Speed]:
    """Speeds of the finished runs of a study, by network and data."""
    totals: dict[tuple[str, str], list[float]] = {}
    for mark in sorted(out.glob("runs/*/run.json")):
        run = OpenRun(mark.parent)
        try:
            if not run.folder.finished():
                continue
            spec, manifest = run.spec, run.manifest
            own = totals.setdefault((spec.model.name, spec.data.name), [0.0] * 5)
            if "base" not in spec.algorithm:
                own[0] += _images_trained(spec)
                # Of every round, including those computed by another run of the study.
                own[1] += sum(float(entry["seconds"]) for entry in run.history)
            own[2] += manifest["votes"]
            own[3] += manifest["certification_seconds"]
            own[4] += _votes_at_most(spec)
        except (KeyError, TypeError, ValueError, StoreError):
            continue  # a damaged run is reported when it is computed
    return {
        name: Speed(images / trained, votes / certified, votes / at_most)
        for name, (images, trained, votes, certified, at_most) in totals.items()
        if min(images, trained, votes, certified) > 0
    }
