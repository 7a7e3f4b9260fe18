"""Effects with intervals: differences between two runs, and differences of those.

Everything is in shares of 1: an average certified radius (ACR) counts as its share of the largest
possible radius, which is the mean of the certified accuracy over all radii up to that one. 0.01 is
one point.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special

from certifl.certification.settings import GRID_POINTS
from certifl.report.claims.facts import StudyRun
from certifl.report.claims.resampling import Sampled, Sampler, drawn_means
from certifl.report.intervals import FEWEST_UNLIKE, hidden_share
from certifl.streams import numpy_generator

__all__ = [
    "QUANTITIES",
    "Effect",
    "Quantity",
    "change",
    "expected_range",
    "leads",
    "over_seeds",
    "spread_draws",
]

Floats = NDArray[np.float64]

# With ten images of each of 20 clients a 95 % interval of spreads misses 15 % of the time: many
# clients have none or all correct, and no draw changes them. With twenty it misses 2 to 6 %.
_FEWEST_FOR_A_SPREAD = 20


@dataclass(frozen=True, eq=False)
class Effect:
    """An estimate and how far it may be off.

    Attributes:
        estimate: on the images at hand.
        low_draws, high_draws: draws of which the ends of an interval are quantiles; the same but
            for suprema.
        effective: numbers of images, one of each independent sample, that limit how narrow an
            interval can be; infinite where nothing does.
        images, clients: how many are behind it, of all samples.
        seeds: how many trainings.
        enough: whether there are enough images for any interval.
        level: of the better run, in what is compared or in what it is a spread of; next to a small
            one every difference is small. Infinite where there is none.
    """

    estimate: float
    low_draws: Floats
    high_draws: Floats
    effective: tuple[float, ...]
    images: int
    clients: tuple[int, ...]
    seeds: int
    enough: bool
    level: float = math.inf

    def interval(self, error: float) -> tuple[float, float]:
        """The interval that misses the true value with probability about `error`.

        Percentiles of the draws, taken outward. Where nearly all images agree, draws have hardly
        any scatter, and the interval is made no narrower than what m images could have hidden: if
        none of them is unlike, a share of up to `hidden_share` of all images may be, and no value
        exceeds 1.
        """
        if not self.enough:
            return -math.inf, math.inf
        hidden = math.hypot(*(hidden_share(m, error) for m in self.effective))
        low = float(np.quantile(self.low_draws, error / 2.0, method="lower"))
        high = float(np.quantile(self.high_draws, 1.0 - error / 2.0, method="higher"))
        return min(low, self.estimate - hidden), max(high, self.estimate + hidden)


@dataclass(frozen=True)
class Quantity:
    """Something to compare two runs of the same images by.

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
    sampler: Sampler,
    runs: tuple[StudyRun, StudyRun],
    estimate: float,
    low: Floats,
    high: Floats | None = None,
    by_radius: bool = True,
    level: float = math.inf,
) -> Effect:
    layout = sampler.layout(runs[0])
    agree = sampler.differing(*runs, by_radius) < FEWEST_UNLIKE
    return Effect(
        estimate=estimate,
        low_draws=low,
        high_draws=low if high is None else high,
        effective=(layout.effective if agree else math.inf,),
        images=layout.total,
        clients=(len(layout.sizes),),
        seeds=1,
        enough=layout.enough_for_intervals,
        level=level,
    )


def _mean_difference(one: Sampled, two: Sampled) -> tuple[float, Floats]:
    drawn = one.drawn.mean(axis=1, dtype=np.float64) - two.drawn.mean(axis=1, dtype=np.float64)
    return float(one.means.mean() - two.means.mean()), drawn


def _level(one: Sampled, two: Sampled) -> float:
    return max(float(one.means.mean()), float(two.means.mean()))


def _acr(sampler: Sampler, first: StudyRun, second: StudyRun) -> Effect:
    one, two = sampler.acr(first), sampler.acr(second)
    estimate, drawn = _mean_difference(one, two)
    return _effect(sampler, (first, second), estimate, drawn, level=_level(one, two))


def _accuracy(sampler: Sampler, first: StudyRun, second: StudyRun) -> Effect:
    one, two = sampler.accuracy(first), sampler.accuracy(second)
    estimate, drawn = _mean_difference(one, two)
    level = _level(one, two)
    return _effect(sampler, (first, second), estimate, drawn, by_radius=False, level=level)


def _largest_gain(sampler: Sampler, first: StudyRun, second: StudyRun) -> Effect:
    """Largest difference of mean certified accuracy over all radii, from a band around the curve.

    With probability 1 - error the whole true curve of differences lies in the band
    [D(R) - c, D(R) + c'], so its largest value lies in [max D - c, max D + c'].
    """
    shares = np.linspace(0.0, 1.0, GRID_POINTS)
    layout, ahead = sampler.curves(first, shares)
    _, behind = sampler.curves(second, shares)
    total = np.zeros((sampler.draws, len(shares)))
    curve = np.zeros(len(shares))
    for client, (one, two) in enumerate(zip(ahead, behind, strict=True)):
        ids = (layout.seed, layout.clients, client)
        total += drawn_means(one - two, sampler.draws, *ids)
        curve += (one - two).mean(axis=0)
    moved = total / len(ahead) - curve / len(ahead)
    largest = float(curve.max() / len(ahead))
    low, high = largest - moved.max(axis=1), largest - moved.min(axis=1)
    return _effect(sampler, (first, second), largest, low, high)


def _seen_spread(sampled: Sampled) -> float:
    return float(np.ptp(sampled.means))


def spread_draws(sampled: Sampled) -> tuple[float, Floats]:
    """Best minus worst client, without what the choice of few images adds to it.

    Noise of the clients' means makes the largest larger and the smallest smaller. With
    S^2 the squared spread seen and E[S*^2] that of images drawn again, which carry the noise a
    second time, 2 S^2 - E[S*^2] is free of it where the noise is like the scatter of the clients.
    Without this a regime whose images vary more would seem to treat its clients less alike.

    Returns:
        (estimate, draws), both at least 0.
    """
    seen = _seen_spread(sampled) ** 2
    drawn = np.ptp(sampled.drawn, axis=1).astype(np.float64) ** 2
    noise = float(drawn.mean()) - seen
    return math.sqrt(max(seen - noise, 0.0)), np.sqrt(np.maximum(drawn - 2.0 * noise, 0.0))


def _spread(sampler: Sampler, first: StudyRun, second: StudyRun) -> Effect:
    ahead, behind = sampler.acr(first), sampler.acr(second)
    (one, one_drawn), (two, two_drawn) = spread_draws(ahead), spread_draws(behind)
    # Clients whose ACRs are all near 0 lie close together for that reason alone. A spread near 0
    # is no such reason: clients may be alike at any ACR.
    level = _level(ahead, behind)
    effect = _effect(sampler, (first, second), one - two, one_drawn - two_drawn, level=level)
    few = min(sampler.layout(first).sizes) < _FEWEST_FOR_A_SPREAD
    return dataclasses.replace(effect, enough=effect.enough and not few)


def _spread_detail(sampler: Sampler, first: StudyRun, second: StudyRun) -> str:
    a, b = sampler.acr(first), sampler.acr(second)
    seen = f"{100 * _seen_spread(a):.1f} and {100 * _seen_spread(b):.1f} points seen"
    return (
        f"{seen}, {100 * spread_draws(a)[0]:.1f} and {100 * spread_draws(b)[0]:.1f} beyond chance"
    )


def expected_range(clients: int) -> float:
    """Largest minus smallest of so many independent standard normal values, on average."""
    grid = np.linspace(-9.0, 9.0, 20_001)
    below = special.ndtr(grid)
    inside = 1.0 - below**clients - (1.0 - below) ** clients
    return float(inside.sum() * (grid[1] - grid[0]))


def _scatter(sampler: Sampler, first: StudyRun, second: StudyRun) -> Effect:
    """The spread in units of what so many equally scattered clients have."""
    whole = _spread(sampler, first, second)
    unit = expected_range(max(2, whole.clients[0]))
    drawn = whole.low_draws / unit
    return dataclasses.replace(
        whole,
        estimate=whole.estimate / unit,
        low_draws=drawn,
        high_draws=drawn,
        level=whole.level / unit,
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
    """One effect minus another of independent draws: a difference of differences.

    Its level is the lower one: where one difference can only be small, so may be the change.
    """
    # Draws of two independent samples are paired by chance.
    shift = numpy_generator(0, "claims-change").permutation(len(earlier.low_draws))
    return Effect(
        estimate=later.estimate - earlier.estimate,
        low_draws=later.low_draws - earlier.high_draws[shift],
        high_draws=later.high_draws - earlier.low_draws[shift],
        effective=later.effective + earlier.effective,
        images=later.images + earlier.images,
        clients=earlier.clients + later.clients,
        seeds=min(later.seeds, earlier.seeds),
        enough=later.enough and earlier.enough,
        level=min(later.level, earlier.level),
    )


def over_seeds(effects: Sequence[Effect]) -> Effect:
    """The mean over trainings with different seeds.

    One seed: the interval holds for the models trained, over images. Several: Student's t of the
    scatter between the seeds, with one degree of freedom less than seeds, is added to the draws of
    images, as if all seeds were tested on the same images, which makes the interval too wide
    rather than too narrow.
    """
    if len(effects) == 1:
        return effects[0]
    values = np.array([effect.estimate for effect in effects])
    mean, seeds = float(values.mean()), len(effects)
    draws = len(effects[0].low_draws)
    levels = (numpy_generator(0, "claims-seeds").permutation(draws) + 0.5) / draws
    between = values.std(ddof=1) / math.sqrt(seeds) * special.stdtrit(seeds - 1, levels)
    turn = np.arange(draws) % seeds
    low = np.stack([e.low_draws - e.estimate for e in effects])[turn, np.arange(draws)]
    high = np.stack([e.high_draws - e.estimate for e in effects])[turn, np.arange(draws)]
    samples = zip(*(effect.effective for effect in effects), strict=True)
    return Effect(
        estimate=mean,
        low_draws=mean + between + low,
        high_draws=mean + between + high,
        effective=tuple(float(np.mean(sample)) for sample in samples),
        images=sum(effect.images for effect in effects),
        clients=effects[0].clients,
        seeds=seeds,
        enough=all(effect.enough for effect in effects),
        level=float(np.mean([effect.level for effect in effects])),
    )


def leads(sampler: Sampler, run: StudyRun, others: Sequence[StudyRun]) -> float:
    """Share of the draws in which a run has the largest ACR of all."""
    mine = sampler.acr(run).drawn.mean(axis=1)
    best = np.max([sampler.acr(other).drawn.mean(axis=1) for other in others], axis=0)
    return float((mine > best).mean())
