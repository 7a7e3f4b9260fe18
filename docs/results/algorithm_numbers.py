"""Numbers of the runs of docs/results/algorithms.md, and their differences to the baseline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import numpy as np
from numpy.typing import NDArray

from algorithm_intervals import Observed, Paired, holm, paired
from algorithm_runs import CLEAN, ready
from algorithm_study import BASELINE, PERTURBATIONS, SEEDS, Study
from certifl.errors import StoreMismatch
from certifl.federated import ALGORITHMS
from certifl.report import RunResults, load_run
from certifl.report.compare import paired_differences
from certifl.report.summary import client_acr, gains, largest_radius
from certifl.rng import numpy_generator
from certifl.runs.atomic import read_json

__all__ = ["Numbers", "Row", "Section", "section"]

Floats = NDArray[np.float64]
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

    def certified(run: RunResults) -> Floats:
        certificates = run.certificates
        return (certificates.correct & (certificates.radius >= radius)).astype(np.float64)

    def observed(value: Callable[[RunResults], Floats]) -> Observed:
        clients, sample = paired_differences(one, base, value)
        owners = np.repeat(clients, [len(own) for own in sample.images])
        values, images = np.concatenate(sample.values)[:, 0], np.concatenate(sample.images)
        if not len(images) == len(one.certificates) == len(base.certificates):
            raise StoreMismatch(f"{one.folder} and {base.folder} certified different images.")
        return Observed(values, owners, images)

    return observed(gains), observed(certified)
