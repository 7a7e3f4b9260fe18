"""Which regime is better, and whether the images at hand can tell: paired comparisons of ACR.

Regimes are certified on the same test images, so they are compared image by image: what counts is
the mean over clients of the difference between two average certified radii (ACR), and how the
differences of single images scatter around it within a client. The intervals say what another
choice of test images would have done, and nothing about training again with another seed. See
`intervals` for how they are made, and docs/mathematics.md for why.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from certifl.errors import StoreMismatch
from certifl.report.intervals import mean_interval
from certifl.report.results import RunResults
from certifl.report.summary import CONFIDENCE, gains, largest_radius

__all__ = [
    "FEWEST_IMAGES",
    "ClientComparison",
    "Comparison",
    "Difference",
    "Standing",
    "compare",
    "own_interval",
    "paired_gains",
    "paired_values",
    "standing",
]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

FEWEST_IMAGES = 10


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
        clients: the same for every client by itself; all pairs of all clients hold together.
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


def compare(runs: Sequence[RunResults]) -> Comparison:
    """Compare the average certified radius of runs, image by image.

    Args:
        runs: in the order of the report.

    Returns:
        Differences with intervals at 95 % together: each of the p pairs is given 1 - 0.05 / p
        (Bonferroni), since the leader is picked after looking; and each pair of each of the c
        clients 1 - 0.05 / (p c), since readers look for the clients that differ. They are infinite
        where there are fewer than ten images, or one image of a client.

    Raises:
        StoreMismatch: the runs have no test image (clients who told curves alone: no client) in
            common, or disagree about a label.
    """
    if len(runs) > 1 and any(run.told for run in runs):
        return _of_curves(runs)
    clients, values = paired_gains(runs)
    means = np.stack([rows.mean(axis=0) for rows in values])
    total, scale = sum(len(rows) for rows in values), largest_radius(runs)
    return Comparison(
        images=total,
        whole=all(total == len(run.certificates) for run in runs),
        acr=tuple(float(a) for a in means.mean(axis=0)),
        pairs=_pairs(values, scale),
        clients=tuple(
            ClientComparison(
                client=int(client),
                images=len(rows),
                acr=tuple(float(a) for a in own),
                pairs=_pairs([rows], scale, families=len(clients)),
            )
            for client, rows, own in zip(clients, values, means, strict=True)
        ),
    )


def _of_curves(runs: Sequence[RunResults]) -> Comparison:
    """Average radii side by side where single images are not known: numbers without intervals.

    Which image is which was not told, and rows made from curves must never be paired.
    """
    shared = sorted(set.intersection(*(set(run.clients.tolist()) for run in runs)))
    if not shared:
        raise StoreMismatch(
            "The runs have no client in common, so they cannot be compared. Report them "
            "separately."
        )
    radii = [[_own_acr(run, client) for client in shared] for run in runs]
    means: Floats = np.asarray(radii, np.float64).mean(axis=1)
    return Comparison(
        images=0,
        whole=all(len(run.clients) == len(shared) for run in runs),
        acr=tuple(float(mean) for mean in means),
        pairs=_unknown_pairs(means),
        clients=(),
        paired=False,
    )


def _own_acr(run: RunResults, client: int) -> float:
    return run.certificates.of_client(client).average_certified_radius()


def own_interval(run: RunResults) -> tuple[float, float] | None:
    """95 % interval over images of one run's average certified radius, the mean over clients.

    Returns:
        The two ends, not outside of what an average radius can be; None where there are too few
        images for an interval.
    """
    _, values = paired_gains([run])
    if not _enough(values):
        return None
    scale = largest_radius([run])
    low, high = mean_interval([rows[:, 0] for rows in values], 1.0 - CONFIDENCE, scale)
    return max(0.0, low), min(scale, high)


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


def _enough(values: Sequence[Floats]) -> bool:
    """Whether there are images for an interval: ten of all clients, and two of each."""
    sizes = [len(rows) for rows in values]
    return sum(sizes) >= FEWEST_IMAGES and min(sizes) >= 2


def _pairs(values: Sequence[Floats], scale: float, families: int = 1) -> Pairs:
    """All differences first - second, first < second, at a level that makes them hold together.

    Args:
        values: of each client (its images, runs).
        scale: how far one image can lie from another.
        families: how many such sets of pairs hold together.
    """
    runs = values[0].shape[1]
    couples = list(itertools.combinations(range(runs), 2))
    error = (1.0 - CONFIDENCE) / (max(1, len(couples)) * families)
    found = {}
    for i, j in couples:
        apart = [rows[:, i] - rows[:, j] for rows in values]
        ends = mean_interval(apart, error, scale) if _enough(values) else (-np.inf, np.inf)
        found[i, j] = Difference(i, j, float(np.mean([part.mean() for part in apart])), *ends)
    return found


def _unknown_pairs(means: Floats) -> Pairs:
    return {
        (i, j): Difference(i, j, float(means[i] - means[j]), -np.inf, np.inf)
        for i, j in itertools.combinations(range(len(means)), 2)
    }
