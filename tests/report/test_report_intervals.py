"""Intervals of means of few images miss as rarely as they say; planted mistakes do not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from certifl.report import compare as comparing
from certifl.report import intervals
from certifl.report.compare import compare
from certifl.report.intervals import even_images, hidden_share, mean_interval
from report_factory import make_certificates, make_run

Floats = NDArray[np.float64]
Draw = Callable[[np.random.Generator, int], Floats]

ERROR = 0.05
TRIALS = 1500


def two_radii(stream: np.random.Generator, images: int) -> Floats:
    """Differences of two regimes that are right on much the same images, with other radii."""
    right = stream.random(images) < 0.75
    one = right * stream.uniform(0.3, 1.0, images)
    two = (right ^ (stream.random(images) < 0.1)) * stream.uniform(0.3, 1.0, images)
    return one - two


def saturated(stream: np.random.Generator, images: int) -> Floats:
    """Every correct image has the largest radius, and nearly all are correct."""
    return (stream.random(images) < 0.96).astype(float)


def a_rare_loss(stream: np.random.Generator, images: int) -> Floats:
    """A little better on nearly all images, far worse on one in a hundred."""
    return np.where(stream.random(images) < 0.01, -0.9, 0.005)


MEANS = {two_radii: 0.65 * (0.75 - 0.70), saturated: 0.96, a_rare_loss: 0.99 * 0.005 - 0.01 * 0.9}


def misses(draw: Draw, sizes: tuple[int, ...], trials: int = TRIALS) -> int:
    stream, count = np.random.default_rng(7), 0
    for _ in range(trials):
        low, high = mean_interval([draw(stream, size) for size in sizes], ERROR, 1.0)
        count += not low <= MEANS[draw] <= high
    return count


def too_often(count: int, trials: int = TRIALS, error: float = ERROR) -> bool:
    return stats.binomtest(count, trials, error, alternative="greater").pvalue < 1e-3


@pytest.mark.statistical
@pytest.mark.parametrize("draw", list(MEANS))
@pytest.mark.parametrize("sizes", [(10,), (30,), (2,) * 10, (10,) * 4, (3, 40, 7)])
def test_intervals_miss_as_rarely_as_they_say(draw: Draw, sizes: tuple[int, ...]) -> None:
    assert not too_often(misses(draw, sizes))


@pytest.mark.statistical
def test_scatter_alone_says_nothing_of_what_was_not_met(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "FEWEST_UNLIKE", 0)
    assert too_often(misses(saturated, (30,), 300), 300)


@pytest.mark.statistical
def test_last_digits_make_no_image_unlike_another(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_digits(stream: np.random.Generator, images: int) -> Floats:
        return a_rare_loss(stream, images) + stream.uniform(-1e-6, 1e-6, images)

    monkeypatch.setitem(MEANS, with_digits, MEANS[a_rare_loss])
    assert not too_often(misses(with_digits, (40,) * 4))
    monkeypatch.setattr(intervals, "ALIKE", 0.0)
    assert too_often(misses(with_digits, (40,) * 4, 300), 300)


def told_apart(studies: int) -> int:
    """Studies of ten equally good clients in which some client's regimes are told apart."""
    count = 0
    for number in range(studies):
        seeds = (5000 + 2 * number, 5001 + 2 * number)
        made = [make_certificates(0.6, 10, 50, seed=seed, spread=0.0) for seed in seeds]
        pair = [make_run(one, label=str(place)) for place, one in enumerate(made)]
        count += any(one.pairs[0, 1].shown for one in compare(pair).clients)
    return count


@pytest.mark.statistical
def test_no_client_is_told_a_difference_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(intervals, "FEWEST_UNLIKE", 0)  # the floor alone would hide the mistake
    assert not too_often(told_apart(80), 80)
    whole = comparing._difference
    monkeypatch.setattr(
        comparing,
        "_difference",
        lambda at, couple, _, scale, client=None: whole(at, couple, ERROR, scale, client),
    )
    assert too_often(told_apart(80), 80)


def test_what_was_not_met_may_hide_that_much() -> None:
    assert (1 - hidden_share(30, 0.05)) ** 30 == pytest.approx(0.025)
    assert even_images((20, 20, 20)) == pytest.approx(60)
    assert even_images((2, 40)) < 42


def test_no_scatter_is_no_certainty() -> None:
    low, high = mean_interval([np.full(20, 0.4), np.full(20, 0.4)], 0.05, scale=2.0)
    assert high - 0.4 == pytest.approx(2.0 * hidden_share(40, 0.05))
    assert low == pytest.approx(0.8 - high)


def test_one_image_of_a_client_gives_no_interval() -> None:
    pair = [make_run(make_certificates(q, 12, 1), label=str(q)) for q in (0.2, 0.99)]
    found = compare(pair).pairs[0, 1]
    assert (found.low, found.high) == (-np.inf, np.inf)
    assert comparing.own_interval(pair[0]) is None
