"""Intervals of means over clients, images and trainings: for report pages and for claims.

One set of rules for every mean of one number per image: average certified radii, certified
accuracies, and differences of these between two trainings on the same images. Three things widen
an interval: variation between the images of a client, variation between trainings with different
seeds, and kinds of images so rare that none was sampled. docs/mathematics.md derives the rules,
and tests/report/test_coverage.py tests their coverage in simulated studies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

from certifl.smoothing.bounds import Floats, Ints

# As a share of the scale. An image counts as unlike the others of its client only if it is far
# enough away to show what a rare image can do. Images that differ by a few points, however many,
# say nothing about images that lose nearly all of their radius.
ALIKE = 0.25
FEWEST_UNLIKE = 10  # with so many, the sample variance itself shows how far a mean may be off
# With fewer images than these no interval is given.
FEWEST_IMAGES = 10
FEWEST_OF_A_CLIENT = 2


def hidden_share(images: float | Floats, error: float) -> Any:
    """Largest share of all images that may be unlike every sampled one (rule of three).

    With probability error / 2 or more, none of `images` drawn is of a kind whose share is at most
    1 - (error / 2) ** (1 / images).

    Source: Hanley and Lippman-Hand, If nothing goes wrong, is everything all right?, 1983.
    """
    return 1.0 - (error / 2.0) ** (1.0 / images)


def unlike_images(values: Sequence[Floats] | Floats, scale: float) -> int:
    """Number of images that are far from the median of THEIR client.

    Clients that differ from each other, each alike within, must not count: none of their images
    shows what a rare one can do.

    Args:
        values: of each client, of its own images (m,).
        scale: largest possible distance between two images.
    """
    return int(np.sum(_unlike([np.atleast_1d(own) for own in values], scale)))


def _unlike(values: Sequence[Floats], scale: float) -> Ints:
    """(clients, ...) the same for every client and column; of each client (its images, ...)."""
    far = [np.abs(own - np.median(own, axis=0)) > ALIKE * scale for own in values]
    return np.stack([own.sum(axis=0) for own in far])


def even_images(sizes: Sequence[int]) -> int:
    """Number of images that limits what may be hidden from a mean over clients.

    Rare images may all be of one client, and are missed most easily where images are few. With
    s_j the share of client j that was not sampled, (1 - s_1)^m_1 ... (1 - s_C)^m_C >= error / 2
    implies that the mean of the s_j is at most `hidden_share` of C times the smallest m_j.
    """
    return len(sizes) * min(sizes)


def too_few(sizes: Sequence[int]) -> bool:
    """Whether there are too few images, so many of each client, for any interval."""
    return sum(sizes) < FEWEST_IMAGES or min(sizes) < FEWEST_OF_A_CLIENT


@dataclass(frozen=True, eq=False)
class Sample:
    """The images of one training with some numbers of each.

    Attributes:
        values: of each client, (its images, columns). Every column is a separate quantity.
        images: of each client, (its images,). Equal numbers in two samples are the same image.
        earlier: a sample of other clients whose mean is subtracted (difference of differences).
    """

    values: tuple[Floats, ...]
    images: tuple[Ints, ...]
    earlier: Sample | None = None

    @classmethod
    def of(cls, values: Sequence[NDArray[Any]], images: Sequence[Ints] | None = None) -> Sample:
        """A sample of one quantity; images without numbers belong to this sample alone."""
        columns = [np.asarray(own, np.float64) for own in values]
        columns = [own[:, None] if own.ndim == 1 else own for own in columns]
        if images is None:
            images = np.split(np.arange(sum(map(len, columns))), np.cumsum([*map(len, columns)]))
        return cls(tuple(columns), tuple(images[: len(columns)]))

    @property
    def means(self) -> Floats:
        """(columns,) mean over clients of each client's mean."""
        own = np.mean([part.mean(axis=0) for part in self.values], axis=0)
        return own if self.earlier is None else own - self.earlier.means

    def variances(self) -> list[tuple[Floats, int]]:
        """Of each client: (columns,) its part of the variance of the mean, and its image count."""
        count = len(self.values)
        own = [(v.var(axis=0, ddof=1) / len(v) / count**2, len(v)) for v in self.values]
        return own if self.earlier is None else own + self.earlier.variances()

    def floors(self, scale: float) -> Floats:
        """(independent sets of images, columns): how many images limit how narrow an interval is.

        Infinite where so many are unlike that the sample variance is enough. An image counts by
        the square of its weight in the mean, as in the variance: those of a client with many
        images say nothing about one with few, whose images move the mean most.
        """
        sizes = np.array([len(v) for v in self.values])
        shown = (sizes.min() / sizes) ** 2 @ _unlike(self.values, scale) >= FEWEST_UNLIKE
        own = np.where(shown, np.inf, even_images(sizes.tolist()))[None]
        return own if self.earlier is None else np.concatenate([own, self.earlier.floors(scale)])

    def client_floors(self, scale: float) -> Floats:
        """(1, columns) as `floors`, for a statistic that one client alone may move by so much."""
        shown = _unlike(self.values, scale) >= FEWEST_UNLIKE
        sizes = np.array([[len(v)] for v in self.values])
        return np.where(shown, np.inf, sizes).min(axis=0)[None]

    def weights(self) -> tuple[Ints, Floats]:
        """Every image and (images, columns) how far it moves the mean; squares sum to `spans`."""
        count = len(self.values)
        moved = [
            (v - v.mean(axis=0)) / (count * math.sqrt(len(v) * (len(v) - 1))) for v in self.values
        ]
        images, moves = np.concatenate(self.images), np.concatenate(moved)
        if self.earlier is None:
            return images, moves
        # The two sets of images are taken as independent, within a seed and between seeds.
        before, taken = self.earlier.weights()
        return np.concatenate([images, -1 - before]), np.concatenate([moves, -taken])


def interval_over_seeds(
    samples: Sequence[Sample], error: float, scale: float
) -> tuple[Floats, Floats]:
    """Interval of the mean over trainings with different seeds.

    One sample: an interval over images, about the models trained. Several: Student's t of the
    means of the seeds, which include the variation of their images already; images that several
    seeds certified are not new ones each time, so their covariance is added. The interval is no
    narrower than the images alone make it, nor than unsampled kinds of images could move the mean;
    for these the seed with the fewest images counts.

    Args:
        samples: one of each seed; every client of each has two images at least.
        error: probability, about, of missing the true mean.
        scale: largest possible distance between two images.

    Returns:
        (low, high), each (columns,).
    """
    scatter = scatter_of(samples, scale)
    half = scatter.half_width(error)
    return scatter.mean - half, scatter.mean + half


@dataclass(frozen=True, eq=False)
class Scatter:
    """The parts of an interval of a mean over seeds; every array is (columns,).

    Attributes:
        mean: the estimate. seeds: how many.
        images: variance from the choice of images. common: the part that seeds share.
        degrees_of_freedom: of both.
        between: standard error from the variation between seeds; 0 for one seed.
        floors: of every independent set of images (sets, columns), how many limit the interval.
        scale: largest possible distance between two images.
    """

    mean: Floats
    seeds: int
    images: Floats
    common: Floats
    degrees_of_freedom: Floats
    between: Floats
    floors: Floats
    scale: float

    def half_width(self, error: float) -> Floats:
        """Half the width of the interval that misses with probability about `error`."""
        quantile = -special.stdtrit(self.degrees_of_freedom, error / 2.0)
        half = np.sqrt(self.images) * quantile
        if self.seeds > 1:
            between = self.between * -float(special.stdtrit(self.seeds - 1, error / 2.0))
            half = np.maximum(half, np.hypot(between, np.sqrt(self.common) * quantile))
        return np.maximum(half, rule_of_three_margin([self.floors], error) * self.scale)


def scatter_of(samples: Sequence[Sample], scale: float) -> Scatter:
    """Everything that widens the interval of a mean over seeds; see `interval_over_seeds`."""
    means = np.stack([sample.means for sample in samples])
    seeds, none = len(samples), np.zeros(means.shape[1])
    variance, common, degrees_of_freedom = _of_images(samples)
    return Scatter(
        mean=means.mean(axis=0),
        seeds=seeds,
        images=variance,
        common=common,
        degrees_of_freedom=degrees_of_freedom,
        between=means.std(axis=0, ddof=1) / math.sqrt(seeds) if seeds > 1 else none,
        floors=fewest_floors([sample.floors(scale) for sample in samples]),
        scale=scale,
    )


def fewest_floors(floors: Sequence[Floats]) -> Floats:
    """Over seeds the smallest number of images counts.

    One seed with many unlike images says nothing about what another one did not sample.
    """
    return np.min(floors, axis=0)


def rule_of_three_margin(floors: Sequence[Floats], error: float) -> Floats:
    """How far unsampled kinds of images may move a mean over seeds, as a share of the scale.

    Args:
        floors: of each seed, as `Sample.floors` gives them.
        error: probability of missing the true mean.
    """
    return np.sqrt((hidden_share(fewest_floors(floors), error) ** 2).sum(axis=0))


def _of_images(samples: Sequence[Sample]) -> tuple[Floats, Floats, Floats]:
    """The contribution of the choice of images to the variance of a mean over seeds.

    Returns:
        The variance, its part from images common to two seeds (the mean covariance of two seeds,
        at least 0), and the degrees of freedom of the seed that has the fewest.
    """
    own, degrees = zip(*(_welch(sample) for sample in samples), strict=True)
    seeds = len(samples)
    common = np.zeros_like(own[0])
    if seeds > 1:
        moved = [sample.weights() for sample in samples]
        pairs = [_covariance(moved[i], moved[j]) for j in range(seeds) for i in range(j)]
        common = np.maximum(np.mean(pairs, axis=0), 0.0)
    whole = np.sum(own, axis=0) / seeds**2 + common * (seeds - 1) / seeds
    return whole, common, np.min(degrees, axis=0)


def _welch(sample: Sample) -> tuple[Floats, Floats]:
    """Variance of the mean over images, and its degrees of freedom."""
    parts = sample.variances()
    variances, sizes = np.stack([span for span, _ in parts]), np.array([size for _, size in parts])
    total, squares = variances.sum(axis=0), (variances**2 / (sizes - 1)[:, None]).sum(axis=0)
    most = float((sizes - 1).sum())
    ratio = np.divide(total**2, squares, out=np.full_like(total, most), where=squares > 0.0)
    return total, ratio


def _covariance(first: tuple[Ints, Floats], second: tuple[Ints, Floats]) -> Floats:
    """Covariance of two seeds' means, by the images that both of them certified."""
    _, one, two = np.intersect1d(first[0], second[0], return_indices=True)
    return (first[1][one] * second[1][two]).sum(axis=0)


def mean_interval(values: Sequence[Floats], error: float, scale: float) -> tuple[float, float]:
    """Interval of the mean over clients of each client's mean over all its images.

    Student's t with the variances within clients and Welch and Satterthwaite's degrees of freedom,
    no narrower than unsampled kinds of images could have moved the mean.

    Args:
        values: of each client, of its own images (m,), m >= 2.
        error: probability, about, of missing the true mean.
        scale: largest possible distance between two images.

    Returns:
        The two ends.

    Source: Welch 1947; Satterthwaite 1946.
    """
    low, high = interval_over_seeds([Sample.of(values)], error, scale)
    return float(low[0]), float(high[0])
