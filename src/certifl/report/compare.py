"""Which regime is better, and whether the images at hand can tell: paired comparisons of ACR.

Regimes are certified on the same test images, so they are compared image by image. Images are
drawn again with replacement within every client, the SAME draw for all regimes, and the mean over
clients of the average certified radius (ACR) is taken anew; the spread of the differences is what
another choice of test images would have done to them. It says nothing about training again with
another seed.

A client with m images gives m - 1 of them to each draw, which makes the variance of a stratum's
mean unbiased where m draws would make it too small by the factor (m - 1) / m.

Source: Efron and Tibshirani 1993, chapter 13; Rao and Wu 1988 (strata of few units).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from certifl.errors import StoreMismatch
from certifl.report.results import RunResults
from certifl.report.summary import CONFIDENCE, gains
from certifl.streams import numpy_generator

__all__ = [
    "DRAWS",
    "FEWEST_IMAGES",
    "ClientComparison",
    "Comparison",
    "Difference",
    "Standing",
    "compare",
    "own_interval",
    "paired_gains",
    "paired_values",
    "resampled_means",
    "standing",
]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

DRAWS = 5000
FEWEST_IMAGES = 10
_DRAWS_AT_ONCE = 500
_SEED = 0


@dataclass(frozen=True)
class Difference:
    """Average certified radius of one run minus that of another, on the same images.

    Attributes:
        first, second: positions of the two runs.
        estimate: the difference on the images at hand.
        low, high: its interval; infinite where there are too few images to give one.
    """

    first: int
    second: int
    estimate: float
    low: float
    high: float

    @property
    def shown(self) -> bool:
        """Whether the images show a difference: the interval does not contain 0."""
        return self.low > 0.0 or self.high < 0.0

    def seen_from(self, run: int) -> Difference:
        """The same difference as `run` minus the other one."""
        if run == self.first:
            return self
        return Difference(self.second, self.first, -self.estimate, -self.high, -self.low)


Pairs = Mapping[tuple[int, int], Difference]


@dataclass(frozen=True)
class ClientComparison:
    """The regimes on one client's test images.

    Attributes:
        client: number of the client.
        images: how many of its images all runs certified.
        acr: (runs,) average certified radius.
        pairs: differences, keyed by positions (first < second).
    """

    client: int
    images: int
    acr: tuple[float, ...]
    pairs: Pairs


@dataclass(frozen=True)
class Comparison:
    """The regimes on the test images that all of them certified.

    Attributes:
        images: how many they are. whole: whether these are all images of every run.
        acr: (runs,) mean over clients of the average certified radius.
        pairs: differences of the mean over clients; all of them hold together with 95 %.
        clients: the same for every client by itself; for one client all pairs hold together.
        paired: whether images were compared one by one. Where clients kept their certificates
            they cannot be: differences then have no intervals, and no client has an answer.
    """

    images: int
    whole: bool
    acr: tuple[float, ...]
    pairs: Pairs
    clients: tuple[ClientComparison, ...]
    paired: bool = True


@dataclass(frozen=True)
class Standing:
    """Who leads, and who cannot be told from the leader.

    Attributes:
        best: position of the run with the largest average certified radius.
        tied: the other runs of which no difference to it is shown.
        margin: to the next best run; None where there is no other.
    """

    best: int
    tied: tuple[int, ...]
    margin: Difference | None


def compare(runs: Sequence[RunResults], draws: int = DRAWS) -> Comparison:
    """Compare the average certified radius of runs, image by image.

    Args:
        runs: in the order of the report.
        draws: how often the images are drawn again.

    Returns:
        Differences with intervals at 95 % together: each of the p pairs is given 1 - 0.05 / p
        (Bonferroni), since the leader is picked after looking.

    Raises:
        StoreMismatch: the runs have no test image (clients who told curves alone: no client) in
            common, or disagree about a label.
    """
    if len(runs) > 1 and any(run.told for run in runs):
        return _of_curves(runs)
    clients, values = paired_gains(runs)
    drawn = [
        resampled_means(rows, draws, client) for client, rows in zip(clients, values, strict=True)
    ]
    means = np.stack([rows.mean(axis=0) for rows in values])
    total = sum(len(rows) for rows in values)
    together = np.mean(drawn, axis=0)
    enough = total >= FEWEST_IMAGES
    return Comparison(
        images=total,
        whole=all(total == len(run.certificates) for run in runs),
        acr=tuple(float(a) for a in means.mean(axis=0)),
        pairs=_pairs(means.mean(axis=0), together, enough),
        clients=tuple(
            _client(int(client), values[i], means[i], drawn[i]) for i, client in enumerate(clients)
        ),
    )


def _of_curves(runs: Sequence[RunResults]) -> Comparison:
    """Average radii side by side where single images are not known: numbers without intervals.

    Which image is which was not told, so nothing can be drawn again for all runs alike, and rows
    made from curves must never be paired.
    """
    shared = sorted(set.intersection(*(set(run.clients.tolist()) for run in runs)))
    if not shared:
        raise StoreMismatch(
            "The runs have no client in common, so they cannot be compared. Report them "
            "separately."
        )
    radii = [[_own_acr(run, client) for client in shared] for run in runs]
    means: Floats = np.asarray(radii, np.float64).mean(axis=1)
    none = np.empty((0, len(runs)))
    return Comparison(
        images=0,
        whole=all(len(run.clients) == len(shared) for run in runs),
        acr=tuple(float(mean) for mean in means),
        pairs=_pairs(means, none, enough=False),
        clients=(),
        paired=False,
    )


def _own_acr(run: RunResults, client: int) -> float:
    return run.certificates.of_client(client).average_certified_radius()


def own_interval(run: RunResults, draws: int = DRAWS) -> tuple[float, float] | None:
    """95 % interval over images of one run's average certified radius, the mean over clients.

    Returns:
        The two ends, or None where there are too few images for an interval.
    """
    clients, values = paired_gains([run])
    if len(run.certificates) < FEWEST_IMAGES:
        return None
    drawn = [resampled_means(v, draws, client) for client, v in zip(clients, values, strict=True)]
    return _interval(np.mean(drawn, axis=0)[:, 0], 1.0 - CONFIDENCE, enough=True)


def standing(acr: Sequence[float], pairs: Pairs) -> Standing:
    """The leader of some runs, those tied with it, and its margin over the next best."""
    order = sorted(range(len(acr)), key=lambda i: (-acr[i], i))
    best = order[0]
    to_others = {i: pairs[min(best, i), max(best, i)].seen_from(best) for i in order[1:]}
    tied = tuple(i for i in order[1:] if not to_others[i].shown)
    return Standing(best, tied, to_others[order[1]] if len(order) > 1 else None)


def paired_gains(runs: Sequence[RunResults]) -> tuple[Ints, list[Floats]]:
    """Radius times correct on the images that all runs certified; see `paired_values`."""
    return paired_values(runs, gains)


def paired_values(
    runs: Sequence[RunResults], value: Callable[[RunResults], Floats]
) -> tuple[Ints, list[Floats]]:
    """One number per image on the images that all runs certified.

    Args:
        runs: in the order of the report.
        value: of a run's images, in the order of its certificates.

    Returns:
        (clients, values): clients in order, and for each an array (its images, runs).

    Raises:
        StoreMismatch: no image in common, or one image with two labels.
    """
    tables = [_rows_by_image(run) for run in runs]
    common = sorted(set(tables[0]).intersection(*tables[1:]))
    if not common:
        raise StoreMismatch(
            "The runs certified no test image in common, so they cannot be compared image by "
            "image. Report them separately, or run them with the same data, clients and seed."
        )
    rows = [np.array([table[image] for image in common]) for table in tables]
    labels = np.stack([r.certificates.label[at] for r, at in zip(runs, rows, strict=True)])
    if np.any(labels != labels[0]):
        raise StoreMismatch(
            "The runs give the same test image different labels: they were made from different "
            "data. Report them separately."
        )
    values = np.stack([value(r)[at] for r, at in zip(runs, rows, strict=True)], axis=1)
    owner = np.array([client for client, _ in common], np.int64)
    clients = np.unique(owner)
    return clients, [values[owner == client] for client in clients]


def _rows_by_image(run: RunResults) -> dict[tuple[int, int], int]:
    certificates = run.certificates
    images = zip(certificates.client.tolist(), certificates.index.tolist(), strict=True)
    return {image: row for row, image in enumerate(images)}


def resampled_means(values: Floats, draws: int, client: int) -> Floats:
    """Means of images drawn again with replacement, the same draws for every run.

    Args:
        values: (images, runs) of one client.
        draws: how often.
        client: names the stream of the draws, so that clients are drawn independently.

    Returns:
        (draws, runs). A single image has no spread: all its draws are equal.
    """
    images = len(values)
    if images == 1:
        return np.repeat(values, draws, axis=0)
    stream = numpy_generator(_SEED, "report-images", int(client))
    means = np.empty((draws, values.shape[1]))
    for start in range(0, draws, _DRAWS_AT_ONCE):
        stop = min(start + _DRAWS_AT_ONCE, draws)
        picked = stream.integers(0, images, size=(stop - start, images - 1), dtype=np.int32)
        for run in range(values.shape[1]):
            means[start:stop, run] = values[:, run][picked].mean(axis=1)
    return means


def _client(client: int, values: Floats, means: Floats, drawn: Floats) -> ClientComparison:
    pairs = _pairs(means, drawn, len(values) >= FEWEST_IMAGES)
    return ClientComparison(client, len(values), tuple(float(m) for m in means), pairs)


def _pairs(means: Floats, drawn: Floats, enough: bool) -> dict[tuple[int, int], Difference]:
    """All differences first - second, first < second, at a level that makes them hold together."""
    couples = list(itertools.combinations(range(len(means)), 2))
    error = (1.0 - CONFIDENCE) / max(1, len(couples))
    found = {}
    for i, j in couples:
        low, high = _interval(drawn[:, i] - drawn[:, j], error, enough)
        found[i, j] = Difference(i, j, float(means[i] - means[j]), low, high)
    return found


def _interval(drawn: Floats, error: float, enough: bool) -> tuple[float, float]:
    """Percentiles of the draws, taken outward; everything is possible with too few images."""
    if not enough:
        return -np.inf, np.inf
    low = np.quantile(drawn, error / 2.0, method="lower")
    high = np.quantile(drawn, 1.0 - error / 2.0, method="higher")
    return float(low), float(high)
