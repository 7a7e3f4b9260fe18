"""Numbers of the runs of docs/results/algorithms.md, and their differences to the baseline.

A training seed draws everything anew here: the training and test images, who holds them, the
first weights, the order of batches, the noise. One seed's mean difference on the images that two
algorithms share is therefore one independent observation. The intervals are those of report pages
and claims (`certifl.report.intervals`), over images instead of clients, since a client of a skewed
split may hold a single image.

Sources: Student's paired t; Holm, A Simple Sequentially Rejective Multiple Test Procedure, 1979.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import cast

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

from algorithm_study import BASELINE, CLEAN, PERTURBATIONS, SEEDS, Study, ready
from certifl.errors import StoreMismatch
from certifl.federated import ALGORITHMS
from certifl.report import RunResults, load_run
from certifl.report.compare import paired_differences
from certifl.report.intervals import (
    FEWEST_UNLIKE,
    Sample,
    Scatter,
    rule_of_three_margin,
    scatter_of,
    unlike_images,
)
from certifl.report.summary import certified_at, client_acr, gains, largest_radius
from certifl.rng import numpy_generator
from certifl.runs.atomic import read_json

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_SHUFFLES = 400


@dataclass(frozen=True, eq=False)
class Numbers:
    """What one run gives; radii as certificates hold them.

    Attributes:
        clean: accuracy of the deployed networks on undisturbed images.
        certified: accuracy of the smoothed networks at each radius of the table.
        acr: average certified radius, over images.
        spread: ACR of the best minus that of the worst client.
        chance: the average spread if images were assigned to clients at random.
        run: the certificates themselves.
    """

    clean: float
    certified: tuple[float, ...]
    acr: float
    spread: float
    chance: float
    run: RunResults


@dataclass(frozen=True, eq=False)
class Row:
    """One algorithm in one table.

    Attributes:
        algorithm: its name. runs: one of each seed.
        acr: ACR minus the baseline's; None for the baseline itself. middle: the same of the
            certified accuracy at the middle radius.
        acr_shown, middle_shown: whether the difference is shown among all of the column.
    """

    algorithm: str
    runs: tuple[Numbers, ...]
    acr: Paired | None = None
    middle: Paired | None = None
    acr_shown: bool = False
    middle_shown: bool = False

    @property
    def mean_acr(self) -> float:
        """Over the seeds."""
        return mean(one.acr for one in self.runs)


@dataclass(frozen=True, eq=False)
class Section:
    """One perturbation and split: the seeds with which all algorithms are finished, best first."""

    perturbation: str
    split: str
    seeds: tuple[int, ...]
    rows: tuple[Row, ...]


def section(
    runs: Path,
    perturbation: str,
    split: str,
    seeds: Sequence[int] = SEEDS,
    algorithms: Sequence[str] = tuple(ALGORITHMS),
) -> Section:
    """One table's numbers, the largest mean ACR first; no rows while no seed is finished.

    Raises:
        StoreMismatch: a folder holds something else, or runs of a seed have other images.
    """
    whole = [
        seed
        for seed in seeds
        if all(ready(Study(perturbation, a, split, seed), runs) for a in algorithms)
    ]
    if not whole:
        return Section(perturbation, split, (), ())
    found = {
        algorithm: tuple(
            _numbers(Study(perturbation, algorithm, split, seed), runs) for seed in whole
        )
        for algorithm in algorithms
    }
    rows = _compared(found, PERTURBATIONS[perturbation].middle)
    rows.sort(key=lambda row: -row.mean_acr)
    return Section(perturbation, split, tuple(whole), tuple(rows))


def _numbers(study: Study, runs: Path) -> Numbers:
    folder = study.folder(runs)
    results, counts = load_run(folder), read_json(folder / CLEAN)
    certificates, by_client = results.certificates, client_acr(results)
    disturbance = PERTURBATIONS[study.perturbation]
    radii = [radius * disturbance.size for radius in disturbance.radii]
    return Numbers(
        clean=counts["right"] / counts["images"],
        certified=tuple(certificates.certified_accuracy(radii).tolist()),
        acr=certificates.average_certified_radius(),
        spread=float(np.ptp(by_client)),
        chance=chance_spread(gains(results), certificates.client, study.seed),
        run=results,
    )


def chance_spread(values: Floats, clients: NDArray[np.int64], seed: int) -> float:
    """Best minus worst client's mean, on average, if images were assigned at random."""
    generator = numpy_generator(seed, "algorithms-page-chance")
    names, owner = np.unique(clients, return_inverse=True)
    sizes = np.bincount(owner, minlength=len(names))
    spreads = [
        np.ptp(np.bincount(owner, generator.permutation(values)) / sizes) for _ in range(_SHUFFLES)
    ]
    return float(np.mean(spreads))


def _compared(found: dict[str, tuple[Numbers, ...]], middle: float) -> list[Row]:
    """Every algorithm beside the baseline, seed by seed and image by image."""
    if len(found[BASELINE]) < 2:
        return [Row(algorithm, runs) for algorithm, runs in found.items()]
    others = [algorithm for algorithm in found if algorithm != BASELINE]
    pairs = {a: list(zip(found[a], found[BASELINE], strict=True)) for a in others}
    acr, share = [], []
    for couples in pairs.values():
        drawn = [differences(one.run, base.run, middle) for one, base in couples]
        scale = largest_radius([run.run for couple in couples for run in couple])
        acr.append(paired([gained for gained, _ in drawn], scale=scale).within(scale))
        share.append(paired([held for _, held in drawn]).within(1.0))
    marks = zip(holm([one.p for one in acr]), holm([one.p for one in share]), strict=True)
    rows = [
        Row(a, found[a], *columns, *mark)
        for a, columns, mark in zip(others, zip(acr, share, strict=True), marks, strict=True)
    ]
    return [*rows, Row(BASELINE, found[BASELINE])]


def differences(one: RunResults, base: RunResults, radius: float) -> tuple[Observed, Observed]:
    """Image by image, radius gained and certified at `radius` (1 or 0), minus the baseline's.

    Raises:
        StoreMismatch: the two did not certify the same images.
    """

    def observed(value: Callable[[RunResults], Floats]) -> Observed:
        clients, sample = paired_differences(one, base, value)
        owners = np.repeat(clients, [len(own) for own in sample.images])
        values, images = np.concatenate(sample.values)[:, 0], np.concatenate(sample.images)
        if not len(images) == len(one.certificates) == len(base.certificates):
            raise StoreMismatch(f"{one.folder} and {base.folder} certified different images.")
        return Observed(values, owners, images)

    return observed(gains), observed(lambda run: certified_at(run, radius).astype(np.float64))


# Paired intervals over a few trainings, and Holm's marks.


ERROR = 0.05
_LEAST = 1e-12


@dataclass(frozen=True, eq=False)
class Observed:
    """One seed's differences.

    Attributes:
        values: (images,) one algorithm minus the other on the same image.
        clients: (images,) who holds them. images: (images,) which they are.
    """

    values: Floats
    clients: Ints
    images: Ints

    def by_client(self) -> list[Floats]:
        """The values of each client."""
        return [self.values[self.clients == client] for client in np.unique(self.clients)]


@dataclass(frozen=True)
class Paired:
    """A mean difference over seeds.

    Attributes:
        estimate: each seed counts once.
        low, high: its 95 % interval.
        p: the largest error at which the interval contains 0.
    """

    estimate: float
    low: float
    high: float
    p: float

    def within(self, scale: float) -> Paired:
        """The same with ends that are possible: no difference exceeds the scale."""
        return replace(self, low=max(-scale, self.low), high=min(scale, self.high))

    @property
    def apart(self) -> bool:
        """Whether the interval, by itself, excludes 0."""
        return self.low > 0.0 or self.high < 0.0


def paired(
    differences: Sequence[Observed | Floats], error: float = ERROR, scale: float = 1.0
) -> Paired:
    """Interval of the mean over seeds, no narrower than the images would make it.

    Args:
        differences: what was observed with each seed; values alone are of one client and of
            images that no two seeds share.
        error: probability of missing the true value.
        scale: how far one image can lie from another.

    Raises:
        ValueError: fewer than two seeds, or than two images of a seed.
    """
    seeds = [_observed(one, at) for at, one in enumerate(differences)]
    if len(seeds) < 2 or min(len(one.values) for one in seeds) < 2:
        raise ValueError("An interval needs two seeds and two images of each.")
    samples = [Sample.of([one.values], [one.images]) for one in seeds]
    found, floors = scatter_of(samples, scale), [_floor(one, scale) for one in seeds]
    estimate = float(found.mean[0])

    half = max(
        float(found.half_width(error)[0]), float(rule_of_three_margin(floors, error)[0]) * scale
    )
    p = _largest_error(found, floors, abs(estimate))
    return Paired(estimate, estimate - half, estimate + half, p)


def _observed(one: Observed | Floats, seed: int) -> Observed:
    if isinstance(one, Observed):
        return one
    own = np.arange(len(one)) + seed * len(one)
    return Observed(one, np.zeros(len(one), np.int64), own)


def _floor(one: Observed, scale: float) -> Floats:
    """How many images limit an interval, judged by the median of every client's own images."""
    shown = unlike_images(one.by_client(), scale) >= FEWEST_UNLIKE
    return np.array([[math.inf if shown else len(one.values)]])


def _largest_error(found: Scatter, floors: Sequence[Floats], size: float) -> float:
    """At which error an interval just reaches 0; it is narrower the larger the error."""

    def beyond(log: float) -> float:
        error = math.exp(log)
        hidden = float(rule_of_three_margin(floors, error)[0]) * found.scale
        return max(float(found.half_width(error)[0]), hidden) - size

    if beyond(0.0) >= 0.0:
        return 1.0
    least = math.log(_LEAST)
    return _LEAST if beyond(least) <= 0.0 else math.exp(cast(float, brentq(beyond, least, 0.0)))


def holm(p: Sequence[float], error: float = ERROR) -> list[bool]:
    """Which of several differences are shown, none of them wrongly with 95 % for all together.

    The smallest p is held against error / m, the next against error / (m - 1), and so on until
    one is too large; the differences may depend on each other in any way.
    """
    shown = [False] * len(p)
    for rank, place in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        if p[place] > error / (len(p) - rank):
            break
        shown[place] = True
    return shown
