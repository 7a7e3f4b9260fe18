"""Test images drawn again: what another choice of images would have done to each client's mean.

Images are drawn with replacement within every client, and runs that certified the same images get
the SAME draw, so a difference between two runs is paired image by image. Draws of another number
of clients or of another seed are independent; where two such runs share images all the same, their
differences usually go up and down together, and the change from one to the other varies less than
the draws say. Its interval is then too wide; if they went opposite ways it would be too narrow.

A client with m images gives m - 1 of them to each draw, which makes the variance of a stratum's
mean unbiased where m draws would make it too small by the factor (m - 1) / m.

Source: Efron and Tibshirani 1993, chapter 13; Rao and Wu 1988 (strata of few units).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from certifl.report.claims.facts import StudyRun
from certifl.report.claims.radii import largest_radius
from certifl.report.intervals import even_images, unlike_images
from certifl.streams import numpy_generator

__all__ = ["DRAWS", "Layout", "Sampled", "Sampler", "drawn_means", "layout_of"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

DRAWS = 10_000
_DRAWS_AT_ONCE = 2_000
_SEED = 0
_FEWEST_IMAGES = 10
_FEWEST_OF_A_CLIENT = 2
# Images beyond one of each client. With fewer the tails of the draws are too short: intervals for
# several comparisons at once miss more than twice as often as they say (docs/claims.md).
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
    def effective(self) -> float:
        """As many images, spread evenly over the clients, would bound the mean as well."""
        return even_images(self.sizes)

    @property
    def enough(self) -> bool:
        """Whether the images can say anything: ten at least, and two of every client."""
        return self.total >= _FEWEST_IMAGES and min(self.sizes) >= _FEWEST_OF_A_CLIENT

    @property
    def enough_for_intervals(self) -> bool:
        """Whether an interval of a mean misses about as often as it says."""
        return self.enough and self.total - len(self.sizes) >= _FEWEST_BEYOND


@dataclass(frozen=True, eq=False)
class Sampled:
    """One quantity of one run.

    Attributes:
        means: (clients,) on the images at hand.
        drawn: (draws, clients) on images drawn again.
    """

    means: Floats
    drawn: NDArray[np.floating[Any]]


def _order(run: StudyRun) -> Ints:
    certificates = run.results.certificates
    return np.lexsort((certificates.index, certificates.client))


def layout_of(run: StudyRun) -> Layout:
    """Which images a run certified."""
    certificates, order = run.results.certificates, _order(run)
    columns = (certificates.client, certificates.index, certificates.label)
    _, sizes = np.unique(certificates.client, return_counts=True)
    images = b"".join(np.ascontiguousarray(c[order], np.int64).tobytes() for c in columns)
    return Layout(run.facts.seed, run.facts.clients, tuple(sizes.tolist()), images)


def _weights(stream: np.random.Generator, images: int, draws: int) -> Iterator[Floats]:
    """(some draws, images) shares of the images in each draw, until all draws are made."""
    for start in range(0, draws, _DRAWS_AT_ONCE):
        rows = min(_DRAWS_AT_ONCE, draws - start)
        picked = stream.integers(0, images, size=(rows, images - 1))
        cells = (picked + images * np.arange(rows)[:, None]).ravel()
        counts = np.bincount(cells, minlength=rows * images).reshape(rows, images)
        yield counts / (images - 1)


def drawn_means(values: Floats, draws: int, *ids: int) -> Floats:
    """Means of one client's images drawn again.

    Args:
        values: (images, columns), at least one image.
        draws: how often.
        ids: name the stream; equal ids and images give the same draws.

    Returns:
        (draws, columns). A single image has no spread: all its draws are equal.
    """
    if len(values) == 1:
        return np.repeat(values, draws, axis=0)
    stream = numpy_generator(_SEED, "claims-images", *ids)
    return np.concatenate([w @ values for w in _weights(stream, len(values), draws)])


def _split(values: Floats, layout: Layout) -> list[Floats]:
    return np.split(values, np.cumsum(layout.sizes)[:-1])


class Sampler:
    """Draws for all runs of a study; runs of one layout are drawn together, once.

    Args:
        runs: of the study.
        draws: how often images are drawn again.
    """

    def __init__(self, runs: Sequence[StudyRun], draws: int = DRAWS) -> None:
        self.draws = draws
        self._layouts = {id(run): layout_of(run) for run in runs}
        self._together: dict[Layout, list[StudyRun]] = {}
        for run in runs:
            self._together.setdefault(self._layouts[id(run)], []).append(run)
        self._acr: dict[int, Sampled] = {}
        self._accuracy: dict[int, Sampled] = {}

    def layout(self, run: StudyRun) -> Layout:
        """Which images a run certified."""
        return self._layouts[id(run)]

    def paired(self, first: StudyRun, second: StudyRun) -> bool:
        """Whether two runs certified the same images of the same clients."""
        return self.layout(first) == self.layout(second)

    def acr(self, run: StudyRun) -> Sampled:
        """Average certified radius as a share of the largest possible radius.

        It is the mean of the certified accuracy over all radii up to the largest.
        """
        self._draw(run)
        return self._acr[id(run)]

    def accuracy(self, run: StudyRun) -> Sampled:
        """Certified accuracy at radius 0."""
        self._draw(run)
        return self._accuracy[id(run)]

    def curves(self, run: StudyRun, shares: Floats) -> tuple[Layout, list[Floats]]:
        """Per client, (images, radii): correct with at least these shares of the largest radius.

        The shares are taken of the radius itself, so equal shares are equal radii in runs of equal
        perturbation, votes and alpha.
        """
        layout, reach = self.layout(run), _reach(run)
        held = (reach[:, None] >= shares * largest_radius(run.results)) & (reach[:, None] >= 0.0)
        return layout, _split(held.astype(np.float64), layout)

    def differing(self, first: StudyRun, second: StudyRun, by_radius: bool) -> int:
        """How many images are unlike: correct or not, or by radius.

        By radius those count that `unlike_images` counts, of differences in shares.
        """
        if not by_radius:
            return int(((_reach(first) >= 0.0) != (_reach(second) >= 0.0)).sum())
        return unlike_images(_gain(first) - _gain(second), scale=1.0)

    def _draw(self, wanted: StudyRun) -> None:
        if id(wanted) in self._acr:
            return
        layout = self.layout(wanted)
        runs = self._together[layout]
        columns = [c for run in runs for c in (_gain(run), (_reach(run) >= 0.0).astype(float))]
        parts = _split(np.stack(columns, axis=1), layout)
        means = np.stack([part.mean(axis=0) for part in parts])
        # Single precision halves the memory; an interval needs no more than seven digits.
        drawn = np.empty((self.draws, len(parts), len(columns)), np.float32)
        for client, part in enumerate(parts):
            ids = (layout.seed, layout.clients, client)
            drawn[:, client] = drawn_means(part, self.draws, *ids)
        for place, run in enumerate(runs):
            one, two = 2 * place, 2 * place + 1
            self._acr[id(run)] = Sampled(means[:, one], drawn[:, :, one])
            self._accuracy[id(run)] = Sampled(means[:, two], drawn[:, :, two])


def _reach(run: StudyRun) -> Floats:
    """(m,) radius where correct, -1 elsewhere, in the order of the layout."""
    certificates = run.results.certificates
    return np.where(certificates.correct, certificates.radius, -1.0)[_order(run)]


def _gain(run: StudyRun) -> Floats:
    return np.maximum(_reach(run), 0.0) / largest_radius(run.results)
