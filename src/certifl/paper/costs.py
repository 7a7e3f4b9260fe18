"""Remaining work of a study, and roughly how long it takes.

Speeds are those of finished runs of the same study: images trained and votes cast per second, and
the share of votes cast despite early stopping. Without finished runs a small table is used, which
is rough: another processor may be several times faster or slower. It has no GPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from certifl.certification.counts import expected_votes
from certifl.certification.network import choose_device
from certifl.certification.settings import ESTIMATORS
from certifl.errors import StoreError
from certifl.experiments.parallel import Job
from certifl.experiments.plan import EXPECTED_SHARE, KNOWN
from certifl.experiments.run import device_names
from certifl.paper.reproduce import Plan
from certifl.runs.folder import RunFolder
from certifl.safe_io import parse_json, read_text
from certifl.spec import Spec, load_stored


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
_BFLOAT16_TRAINS = 2.0
"""How many times faster training in bfloat16 is, on a processor with AMX."""
_INT8_VOTES = 2.0
"""How many times faster votes in int8 are than those of the table."""


@dataclass(frozen=True)
class Cost:
    """Remaining work of some runs.

    Attributes:
        runs: number of distinct ones. done: number of finished ones.
        trainings: remaining, fine-tuning not counted.
        votes_at_most: remaining.
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
        speed = speeds.get(_material(spec))
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


def _material(spec: Spec) -> tuple[str, str]:
    return spec.model.name, spec.data.name


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
        folder = RunFolder(mark.parent)
        try:
            if not folder.finished():
                continue
            spec, manifest = load_stored(folder.spec), folder.manifest()
            own = totals.setdefault(_material(spec), [0.0] * 5)
            if "base" not in spec.algorithm:
                own[0] += _images_trained(spec)
                # Of every round, including those computed by another run of the study.
                rounds = read_text(folder.path / "history.jsonl").splitlines()
                own[1] += sum(float(parse_json(line)["seconds"]) for line in rounds)
            own[2] += manifest["votes"]
            own[3] += manifest["certification_seconds"]
            own[4] += _votes_at_most(spec)
        except (KeyError, TypeError, ValueError, OSError, StoreError):
            continue  # a damaged run is reported when it is computed
    return {
        name: Speed(images / trained, votes / certified, votes / at_most)
        for name, (images, trained, votes, certified, at_most) in totals.items()
        if min(images, trained, votes, certified) > 0
    }
