"""Differences between runs image by image, and the bootstrap of clients' means.

Means and their differences have the intervals of `report.intervals`. Spreads between best and
worst client are not means, so images are resampled for them: with replacement within every client,
and with the SAME draw for runs that certified the same images, so that a difference between two
runs is paired image by image.

A client with m images contributes m - 1 of them to each draw, which makes the variance of a
stratum's mean unbiased where m draws would make it too small by the factor (m - 1) / m.

Source: Efron and Tibshirani 1993, chapter 13; Rao and Wu 1988 (strata of few units).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from certifl.paper.claims.runs import StudyRun, largest_radius
from certifl.report.intervals import Sample, too_few
from certifl.report.summary import image_numbers
from certifl.rng import numpy_generator
from certifl.smoothing.bounds import Floats, Ints

DRAWS = 10_000
_BATCH = 2_000
_SEED = 0
# Images beyond one of each client. A claim makes several comparisons at once, at levels so strict
# that fewer images have too little scatter too often (docs/claims.md).
_FEWEST_BEYOND = 30


@dataclass(frozen=True)
class Layout:
    """Which images a run certified; runs of equal layout are compared image by image.

    Attributes:
        seed, clients: of the study; they name the stream of the draws.
        sizes: images of each client.
        images: the clients, positions and labels of all images, as bytes.
    """

    seed: int
    clients: int
    sizes: tuple[int, ...]
    images: bytes

    @property
    def total(self) -> int:
        """All images."""
        return sum(self.sizes)

    @property
    def enough(self) -> bool:
        """Whether there are images enough for any statement: ten, and two of every client."""
        return not too_few(self.sizes)

    @property
    def enough_for_intervals(self) -> bool:
        """Whether an interval of a mean has about its nominal coverage."""
        return self.enough and self.total - len(self.sizes) >= _FEWEST_BEYOND


@dataclass(frozen=True, eq=False)
class ResampledMeans:
    """One quantity of one run.

    Attributes:
        means: (clients,) on the certified images.
        drawn: (draws, clients) on resampled images.
    """

    means: Floats
    resampled: NDArray[np.floating[Any]]


def _order(run: StudyRun) -> Ints:
    certificates = run.results.certificates
    return np.lexsort((certificates.index, certificates.client))


def layout_of(run: StudyRun) -> Layout:
    """Which images a run certified."""
    certificates, order = run.results.certificates, _order(run)
    columns = (certificates.client, certificates.index, certificates.label)
    _, sizes = np.unique(certificates.client, return_counts=True)
    images = b"".join(np.ascontiguousarray(c[order], np.int64).tobytes() for c in columns)
    return Layout(run.metadata.seed, run.metadata.clients, tuple(sizes.tolist()), images)


def _weights(stream: np.random.Generator, images: int, draws: int) -> Iterator[Floats]:
    """(some draws, images) shares of the images in each draw, in batches."""
    for start in range(0, draws, _BATCH):
        rows = min(_BATCH, draws - start)
        picked = stream.integers(0, images, size=(rows, images - 1))
        cells = (picked + images * np.arange(rows)[:, None]).ravel()
        counts = np.bincount(cells, minlength=rows * images).reshape(rows, images)
        yield counts / (images - 1)


def resampled_means(values: Floats, draws: int, *ids: int) -> Floats:
    """Means of one client's resampled images.

    Args:
        values: (images, columns), at least one image.
        draws: number of draws.
        ids: name the stream; equal ids and images give the same draws.

    Returns:
        (draws, columns). A single image has no spread: all its draws are equal.
    """
    if len(values) == 1:
        return np.repeat(values, draws, axis=0)
    stream = numpy_generator(_SEED, "claims-images", *ids)
    return np.concatenate([w @ values for w in _weights(stream, len(values), draws)])


def _split(values: NDArray[Any], layout: Layout) -> list[NDArray[Any]]:
    return np.split(values, np.cumsum(layout.sizes)[:-1])


class Sampler:
    """Draws for all runs of a study; runs of one layout are resampled together, once.

    Args:
        runs: of the study.
        draws: number of bootstrap draws.
    """

    def __init__(self, runs: Sequence[StudyRun], draws: int = DRAWS) -> None:
        self.draws = draws
        self._layouts = {id(run): layout_of(run) for run in runs}
        self._together: dict[Layout, list[StudyRun]] = {}
        for run in runs:
            self._together.setdefault(self._layouts[id(run)], []).append(run)
        self._acr: dict[int, ResampledMeans] = {}

    def layout(self, run: StudyRun) -> Layout:
        """Which images a run certified."""
        return self._layouts[id(run)]

    def paired(self, first: StudyRun, second: StudyRun) -> bool:
        """Whether two runs certified the same images of the same clients."""
        return self.layout(first) == self.layout(second)

    def acr(self, run: StudyRun) -> ResampledMeans:
        """Average certified radius as a share of the largest possible radius.

        It is the mean of the certified accuracy over all radii up to the largest.
        """
        self._resample(run)
        return self._acr[id(run)]

    def gains(self, first: StudyRun, second: StudyRun) -> Sample:
        """Radius times correct of one run minus another, as shares of the largest radius."""
        return self._sample(first, _gain(first) - _gain(second))

    def corrects(self, first: StudyRun, second: StudyRun) -> Sample:
        """Correct with a certificate in one run minus the same in another."""
        return self.curves(first, second, np.zeros(1))

    def curves(self, first: StudyRun, second: StudyRun, shares: Floats) -> Sample:
        """The same at radii that are these shares of the largest, a column for each.

        The shares are taken of the radius itself, so equal shares are equal radii in runs of equal
        perturbation, votes and alpha.
        """
        return self._sample(first, _certified(first, shares) - _certified(second, shares))

    def level(self, first: StudyRun, second: StudyRun, accuracy: bool) -> float:
        """Mean over clients of the better run: its certified accuracy, or ACR as a share."""
        values = [
            _certified(run, np.zeros(1))[:, 0] if accuracy else _gain(run)
            for run in (first, second)
        ]
        return max(float(self._sample(first, own).means[0]) for own in values)

    def _sample(self, run: StudyRun, values: Floats) -> Sample:
        layout = self.layout(run)
        numbers = image_numbers(run.results)[_order(run)]
        return Sample.of(_split(values, layout), _split(numbers, layout))

    def _resample(self, wanted: StudyRun) -> None:
        if id(wanted) in self._acr:
            return
        layout = self.layout(wanted)
        runs = self._together[layout]
        parts = _split(np.stack([_gain(run) for run in runs], axis=1), layout)
        means = np.stack([part.mean(axis=0) for part in parts])
        # Single precision halves the memory; seven digits are enough for an interval.
        resampled = np.empty((self.draws, len(parts), len(runs)), np.float32)
        for client, part in enumerate(parts):
            ids = (layout.seed, layout.clients, client)
            resampled[:, client] = resampled_means(part, self.draws, *ids)
        for at, run in enumerate(runs):
            self._acr[id(run)] = ResampledMeans(means[:, at], resampled[:, :, at])


def _radius(run: StudyRun) -> Floats:
    """(m,) radius where correct, -1 elsewhere, in the order of the layout."""
    certificates = run.results.certificates
    return np.where(certificates.correct, certificates.radius, -1.0)[_order(run)]


def _gain(run: StudyRun) -> Floats:
    return np.maximum(_radius(run), 0.0) / largest_radius(run.results)


def _certified(run: StudyRun, shares: Floats) -> Floats:
    """(m, radii) 1 where correct with at least these shares of the largest radius, else 0."""
    radius = _radius(run)[:, None]
    held = (radius >= shares * largest_radius(run.results)) & (radius >= 0.0)
    return held.astype(np.float64)
