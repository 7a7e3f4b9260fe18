"""Differences between two runs with intervals, and differences of those.

Everything is in shares of 1: an average certified radius (ACR) counts as its share of the largest
possible radius, which is the mean of the certified accuracy over all radii up to that one. 0.01 is
one point.

Means and their differences have the intervals of `report.intervals`. Spreads between best and
worst client are not means, so images are resampled for them: with replacement within every client,
and with the SAME draw for runs that certified the same images, so that a difference between two
runs is paired image by image. A client with m images contributes m - 1 of them to each draw, which
makes the variance of its mean unbiased where m draws would make it too small by (m - 1) / m.

Source: Efron and Tibshirani 1993, chapter 13; Rao and Wu 1988 (strata of few units).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from scipy import special

from certifl.certification.settings import GRID_POINTS
from certifl.paper.claims.runs import StudyRun, largest_radius
from certifl.report.intervals import Sample, interval_over_seeds, rule_of_three_margin, too_few
from certifl.report.summary import image_numbers
from certifl.rng import numpy_generator
from certifl.smoothing.bounds import Floats, Ints

DRAWS = 10_000
_BATCH = 2_000
_SEED = 0
# Images beyond one of each client. A claim makes several comparisons at once, at levels so strict
# that fewer images have too little scatter too often (docs/claims.md).
_FEWEST_BEYOND = 30
# With ten images of each of 20 clients a 95 % interval of spreads misses 15 % of the time: many
# clients have none or all correct, and resampling changes nothing. With twenty it misses 2 to 6 %.
_FEWEST_FOR_A_SPREAD = 20


@dataclass(frozen=True)
class Layout:
    """Which images a run certified; runs of equal layout are compared image by image.

    Attributes:
        seed, clients: of the study; they name the stream of the draws. sizes: images of each
            client. images: clients, positions and labels of all images, as bytes.
    """

    seed: int
    clients: int
    sizes: tuple[int, ...]
    images: bytes


@dataclass(frozen=True, eq=False)
class ResampledMeans:
    """One quantity of one run: (clients,) as certified and (draws, clients) resampled."""

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


def resampled_means(values: Floats, draws: int, *ids: int) -> Floats:
    """(draws, columns) means of one client's resampled images.

    A single image has no spread: all its draws are equal.

    Args:
        values: (images, columns), at least one image. draws: number of draws.
        ids: name the stream; equal ids and images give the same draws.
    """
    images = len(values)
    if images == 1:
        return np.repeat(values, draws, axis=0)
    stream, means = numpy_generator(_SEED, "claims-images", *ids), []
    for start in range(0, draws, _BATCH):
        rows = min(_BATCH, draws - start)
        picked = stream.integers(0, images, size=(rows, images - 1))
        cells = (picked + images * np.arange(rows)[:, None]).ravel()
        counts = np.bincount(cells, minlength=rows * images).reshape(rows, images)
        means.append((counts / (images - 1)) @ values)
    return np.concatenate(means)


def _split(values: NDArray[Any], layout: Layout) -> list[NDArray[Any]]:
    return np.split(values, np.cumsum(layout.sizes)[:-1])


class Sampler:
    """Compares the runs of a study; those of one layout are resampled together, once."""

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
        if id(run) not in self._acr:
            layout = self.layout(run)
            runs = self._together[layout]
            parts = _split(np.stack([_gain(one) for one in runs], axis=1), layout)
            means = np.stack([part.mean(axis=0) for part in parts])
            # Single precision halves the memory; seven digits are enough for an interval.
            resampled = np.empty((self.draws, len(parts), len(runs)), np.float32)
            for client, part in enumerate(parts):
                ids = (layout.seed, layout.clients, client)
                resampled[:, client] = resampled_means(part, self.draws, *ids)
            for at, one in enumerate(runs):
                self._acr[id(one)] = ResampledMeans(means[:, at], resampled[:, :, at])
        return self._acr[id(run)]

    def gains(self, first: StudyRun, second: StudyRun) -> Sample:
        """Radius times correct of one run minus another, as shares of the largest radius."""
        return self._sample(first, _gain(first) - _gain(second))

    def curves(self, first: StudyRun, second: StudyRun, shares: Floats) -> Sample:
        """Correct with at least a radius in one run minus the same in another.

        A column for each of these shares of the largest radius. Equal shares are equal radii in
        runs of equal perturbation, votes and alpha.
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


def _radius(run: StudyRun) -> Floats:
    """(m,) radius where correct, -1 elsewhere, in the order of the layout."""
    certificates = run.results.certificates
    return np.where(certificates.correct, certificates.radius, -1.0)[_order(run)]


def _gain(run: StudyRun) -> Floats:
    return np.maximum(_radius(run), 0.0) / largest_radius(run.results)


def _certified(run: StudyRun, shares: Floats) -> Floats:
    """(m, radii) 1 where correct with at least these shares of the largest radius, else 0."""
    radius = _radius(run)[:, None]
    certified = (radius >= shares * largest_radius(run.results)) & (radius >= 0.0)
    return certified.astype(np.float64)


@dataclass(frozen=True, eq=False)
class Means:
    """A mean of one number per image, or the largest of several; one sample of each seed."""

    samples: tuple[Sample, ...]

    @property
    def estimate(self) -> float:
        """Mean over seeds; of several columns the largest."""
        return float(np.mean([sample.means for sample in self.samples], axis=0).max())

    def ends(self, error: float) -> tuple[float, float]:
        """Of several columns the intervals hold together (Bonferroni), and so for the largest.

        If every true value lies in [low, high], the largest one lies in [max low, max high].
        """
        columns = self.samples[0].values[0].shape[1]
        low, high = interval_over_seeds(self.samples, error / columns, 1.0)
        return float(low.max()), float(high.max())

    @classmethod
    def over_seeds(cls, every: Sequence[Means]) -> Means:
        """The mean over the seeds of all of them."""
        return cls(tuple(sample for one in every for sample in one.samples))

    def minus(self, earlier: Means) -> Means:
        """The change from an earlier one, seed by seed."""
        pairs = zip(self.samples, earlier.samples, strict=True)
        return Means(tuple(dataclasses.replace(one, earlier=before) for one, before in pairs))


@dataclass(frozen=True, eq=False)
class ResampledStatistic:
    """A statistic of clients' means that is not a mean itself, on resampled images.

    Attributes:
        values: of each seed, on the certified images.
        draws: of each seed, those of every independent part with its sign.
        floors: of each seed, how many images limit how narrow an interval is, of every independent
            part.
        unit: one unit of the statistic in shares.
    """

    values: tuple[float, ...]
    draws: tuple[tuple[tuple[float, Floats], ...], ...]
    floors: tuple[Floats, ...]
    unit: float = 1.0

    @property
    def estimate(self) -> float:
        """Mean over seeds."""
        return float(np.mean(self.values))

    def ends(self, error: float) -> tuple[float, float]:
        """Percentiles of the draws; parts, and seeds beside images, add as squares.

        The variation between seeds is Student's t. Images count as if all seeds had been tested on
        the same ones, which makes the interval too wide rather than too narrow.

        Source: Zou and Donner 2008 (limits of a difference from limits of its parts).
        """
        seeds, between = len(self.values), 0.0
        if seeds > 1:
            scatter = float(np.std(self.values, ddof=1)) / math.sqrt(seeds)
            between = -float(special.stdtrit(seeds - 1, error / 2.0)) * scatter
        sides = [[_margins(parts, error)[side] for parts in self.draws] for side in (0, 1)]
        hidden = float(rule_of_three_margin(self.floors, error)[0]) / self.unit
        down, up = (
            max(hidden, math.hypot(between, math.sqrt(float(np.mean(np.square(side))))))
            for side in sides
        )
        return self.estimate - down, self.estimate + up

    @classmethod
    def over_seeds(cls, every: Sequence[ResampledStatistic]) -> ResampledStatistic:
        """The mean over the seeds of all of them."""
        return cls(
            tuple(value for one in every for value in one.values),
            tuple(parts for one in every for parts in one.draws),
            tuple(floors for one in every for floors in one.floors),
            every[0].unit,
        )

    def minus(self, earlier: ResampledStatistic) -> ResampledStatistic:
        """The change from an earlier one of independent images, seed by seed."""
        values = tuple(a - b for a, b in zip(self.values, earlier.values, strict=True))
        draws = tuple(
            (*later, *((-sign, resampled) for sign, resampled in before))
            for later, before in zip(self.draws, earlier.draws, strict=True)
        )
        floors = tuple(map(np.concatenate, zip(self.floors, earlier.floors, strict=True)))
        return ResampledStatistic(values, draws, floors, min(self.unit, earlier.unit))


def _margins(parts: Sequence[tuple[float, Floats]], error: float) -> tuple[float, float]:
    """How far the interval over images extends below and above the value of one seed."""
    down, up = [], []
    for sign, resampled in parts:  # draws are deviations from the observed value
        low = -float(np.quantile(resampled, error / 2.0, method="lower"))
        high = float(np.quantile(resampled, 1.0 - error / 2.0, method="higher"))
        low, high = max(low, 0.0), max(high, 0.0)
        down.append(low if sign > 0 else high)
        up.append(high if sign > 0 else low)
    return math.hypot(*down), math.hypot(*up)


@dataclass(frozen=True, eq=False)
class Effect:
    """An estimate with its interval.

    Attributes:
        source: what its interval is computed from.
        images, clients: their numbers, of all samples. seeds: number of trainings.
        enough: whether there are enough images for any interval.
        level: of the better run, in the compared quantity or the one it is a spread of; at a small
            level every difference is small. Infinite where there is none.
        limit: no value is farther from 0; intervals end there.
    """

    source: Means | ResampledStatistic
    images: int
    clients: tuple[int, ...]
    seeds: int
    enough: bool
    level: float = math.inf
    limit: float = 1.0

    @property
    def estimate(self) -> float:
        """On the certified images."""
        return self.source.estimate

    def interval(self, error: float) -> tuple[float, float]:
        """The interval that misses the true value with probability about `error`."""
        if not self.enough:
            return -math.inf, math.inf
        low, high = self.source.ends(error)
        return max(low, -self.limit), min(high, self.limit)


@dataclass(frozen=True)
class Quantity:
    """A quantity in which two runs of the same images are compared.

    Attributes:
        name: for files. words: for people.
        of: (sampler, first, second) -> first minus second.
        detail: further words about one pair.
    """

    name: str
    words: str
    of: Callable[[Sampler, StudyRun, StudyRun], Effect]
    detail: Callable[[Sampler, StudyRun, StudyRun], str] | None = None


def _effect(
    sampler: Sampler, run: StudyRun, source: Means | ResampledStatistic, level: float = math.inf
) -> Effect:
    sizes = sampler.layout(run).sizes
    # With fewer, an interval of a mean does not have about its nominal coverage.
    enough = not too_few(sizes) and sum(sizes) - len(sizes) >= _FEWEST_BEYOND
    return Effect(source, sum(sizes), (len(sizes),), 1, enough, level)


def _acr(sampler: Sampler, first: StudyRun, second: StudyRun) -> Effect:
    source = Means((sampler.gains(first, second),))
    return _effect(sampler, first, source, sampler.level(first, second, accuracy=False))


def _accuracy(sampler: Sampler, first: StudyRun, second: StudyRun) -> Effect:
    source = Means((sampler.curves(first, second, np.zeros(1)),))
    return _effect(sampler, first, source, sampler.level(first, second, accuracy=True))


def _largest_gain(sampler: Sampler, first: StudyRun, second: StudyRun) -> Effect:
    """Largest difference of mean certified accuracy over all radii, which are all tested."""
    shares = np.linspace(0.0, 1.0, GRID_POINTS)
    return _effect(sampler, first, Means((sampler.curves(first, second, shares),)))


def resampled_spread(sampled: ResampledMeans) -> tuple[float, Floats]:
    """Best minus worst client, corrected for the choice of few images.

    Noise of the clients' means makes the largest larger and the smallest smaller. With
    S^2 the observed squared spread and E[S*^2] that of resampled images, which have the noise
    twice, 2 S^2 - E[S*^2] is free of it where the noise is like the variation of the clients.
    Without this an algorithm whose images vary more would seem to treat its clients less alike.

    Returns:
        (estimate, draws), both at least 0.
    """
    observed = float(np.ptp(sampled.means)) ** 2
    resampled = np.ptp(sampled.resampled, axis=1).astype(np.float64) ** 2
    noise = float(resampled.mean()) - observed
    return math.sqrt(max(observed - noise, 0.0)), np.sqrt(np.maximum(resampled - 2.0 * noise, 0.0))


def _spread(sampler: Sampler, first: StudyRun, second: StudyRun) -> Effect:
    (one, one_drawn), (two, two_drawn) = (
        resampled_spread(sampler.acr(run)) for run in (first, second)
    )
    deviations = one_drawn - two_drawn - (one - two)
    floors = sampler.gains(first, second).client_floors(1.0)
    source = ResampledStatistic((one - two,), (((1.0, deviations),),), (floors,))
    # Clients whose ACRs are all near 0 lie close together for that reason alone. A spread near 0
    # is no such reason: clients may be alike at any ACR.
    effect = _effect(sampler, first, source, sampler.level(first, second, accuracy=False))
    few = min(sampler.layout(first).sizes) < _FEWEST_FOR_A_SPREAD
    return dataclasses.replace(effect, enough=effect.enough and not few)


def _spread_detail(sampler: Sampler, first: StudyRun, second: StudyRun) -> str:
    both = sampler.acr(first), sampler.acr(second)
    one, two = (100 * float(np.ptp(sampled.means)) for sampled in both)
    corrected = [100 * resampled_spread(sampled)[0] for sampled in both]
    return (
        f"{one:.1f} and {two:.1f} points observed, {corrected[0]:.1f} and {corrected[1]:.1f} "
        "beyond chance"
    )


def expected_range(clients: int) -> float:
    """Largest minus smallest of so many independent standard normal values, on average."""
    grid = np.linspace(-9.0, 9.0, 20_001)
    below = special.ndtr(grid)
    inside = 1.0 - below**clients - (1.0 - below) ** clients
    return float(inside.sum() * (grid[1] - grid[0]))


def _scatter(sampler: Sampler, first: StudyRun, second: StudyRun) -> Effect:
    """The spread in units of that of as many clients with equal variation."""
    whole = _spread(sampler, first, second)
    unit = expected_range(max(2, whole.clients[0]))
    spread = cast(ResampledStatistic, whole.source)
    values = tuple(value / unit for value in spread.values)
    draws = tuple(tuple((s, resampled / unit) for s, resampled in parts) for parts in spread.draws)
    return dataclasses.replace(
        whole,
        source=ResampledStatistic(values, draws, spread.floors, unit),
        level=whole.level / unit,
        limit=1.0 / unit,
    )


_LISTED = (
    Quantity("acr", "ACR, share of the largest radius", _acr),
    Quantity("accuracy", "certified accuracy at radius 0", _accuracy),
    Quantity("largest gain", "largest gain in certified accuracy at any radius", _largest_gain),
    Quantity("spread", "best minus worst client, ACR", _spread, _spread_detail),
    Quantity("scatter", "best minus worst client over what chance scatter gives", _scatter),
)
QUANTITIES: dict[str, Quantity] = {quantity.name: quantity for quantity in _LISTED}


def change(later: Effect, earlier: Effect) -> Effect:
    """One effect minus another of independent images: a difference of differences.

    Its level is the lower one: where one difference can only be small, so can the change.
    """
    return Effect(
        source=later.source.minus(cast(Any, earlier.source)),
        images=later.images + earlier.images,
        clients=earlier.clients + later.clients,
        seeds=min(later.seeds, earlier.seeds),
        enough=later.enough and earlier.enough,
        level=min(later.level, earlier.level),
        limit=later.limit + earlier.limit,
    )


def over_seeds(effects: Sequence[Effect]) -> Effect:
    """The mean over trainings with different seeds.

    With one seed an interval is about the models trained, over images. With several it contains
    the variation between seeds, by Student's t with one degree of freedom fewer than seeds.
    """
    first = effects[0]
    if len(effects) == 1:
        return first
    return Effect(
        source=type(first.source).over_seeds(cast(Any, [effect.source for effect in effects])),
        images=sum(effect.images for effect in effects),
        clients=first.clients,
        seeds=len(effects),
        enough=all(effect.enough for effect in effects),
        level=float(np.mean([effect.level for effect in effects])),
        limit=first.limit,
    )


def share_of_draws_led(sampler: Sampler, run: StudyRun, others: Sequence[StudyRun]) -> float:
    """Share of the draws in which a run has the largest ACR of all."""
    mine = sampler.acr(run).resampled.mean(axis=1)
    best = np.max([sampler.acr(other).resampled.mean(axis=1) for other in others], axis=0)
    return float((mine > best).mean())
