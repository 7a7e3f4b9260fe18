"""Do certificates claim too much? Votes from known probabilities, 20 000 runs a cell.

A run over-claims when its radius (or bound) exceeds the true one. The tolerance: if a procedure
errs with probability at most alpha = 0.05, its over-claims in 20 000 independent runs are bounded
by Binomial(20 000, 0.05), so a count whose upper tail P(X >= count) is below 1e-3 is evidence
against it. With mean 1000 and standard deviation 30.8 that is 1098 and more, a share of 0.0549. A
defect that errs in a share of 0.06 or more is caught with probability 0.999.

The planted defects below are found in published code. Each must be rejected, or this harness
would not notice them in ours.
"""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import binom

from certifl.smoothing import (
    BOUNDS,
    GAUSSIAN,
    LAWS,
    UNIFORM,
    Law,
    clopper_pearson_lower,
    clopper_pearson_upper,
    floor_text,
    levels,
    looks,
    two_sided_sign_test,
)

pytestmark = pytest.mark.statistical
ALPHA = 0.05
RUNS = 20_000


def rejected(overclaims: np.ndarray, alpha: float = ALPHA) -> bool:
    """Whether so many over-claims would be a 1-in-1000 event for a procedure of level alpha."""
    assert overclaims.shape == (RUNS,)
    return bool(binom.sf(int(overclaims.sum()) - 1, RUNS, alpha) < 1e-3)


def generator(seed: int) -> np.random.Generator:
    return np.random.default_rng([20260, seed])


def true_radius(
    law: Law, shares: np.ndarray, chosen: np.ndarray, sigma: float = 1.0
) -> np.ndarray:
    p_top = shares[chosen]
    others = np.array([np.delete(shares, c).max() for c in range(len(shares))])
    return law.radius(sigma, p_top, others[chosen]) * (1 + 1e-12)


def top_and_runner(counts: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mine = np.arange(counts.shape[-1]) == chosen[:, None]
    return np.where(mine, counts, 0).sum(-1), np.where(mine, -1, counts).max(-1)


OfCounts = Callable[[np.ndarray, np.ndarray], np.ndarray]


def radius_at(law: Law, rule: str, n: int, level: float) -> OfCounts:
    return lambda top, runner: law.radius(1.0, *BOUNDS[rule](top, runner, n, level))


def each_once(of_counts: OfCounts, top: np.ndarray, runner: np.ndarray) -> np.ndarray:
    """A function of both counts, computed once for every pair that occurs."""
    pairs, where = np.unique(top * (1 << 20) + runner, return_inverse=True)
    return of_counts(pairs >> 20, pairs & ((1 << 20) - 1))[where]


def lower_limit(k: np.ndarray, n: int, level: float) -> np.ndarray:
    return each_once(lambda k, _: clopper_pearson_lower(k, n, level), k, 0 * k)


def paths(
    schedule: tuple[int, ...], shares: np.ndarray, rng: np.random.Generator
) -> list[np.ndarray]:
    """Counts at every look, (RUNS, classes) each, of one stream of votes a run."""
    counts, made, before = np.zeros((RUNS, len(shares)), np.int64), [], 0
    for votes in schedule:
        counts = counts + rng.multinomial(votes - before, shares, size=RUNS)
        made.append(counts)
        before = votes
    return made


@pytest.mark.parametrize("n", [1, 20, 1000, 100_000])
@pytest.mark.parametrize("p", [0.02, 0.5, 0.9, 0.999])
def test_binomial_bounds_hold(n, p):
    k = generator(n).binomial(n, p, RUNS)
    assert not rejected(lower_limit(k, n, ALPHA) > p)
    assert not rejected(each_once(lambda k, _: clopper_pearson_upper(k, n, ALPHA), k, 0 * k) < p)


def test_the_harness_has_an_edge():
    """Just below the limit of a unanimous vote the error rate IS the level, and 0.06 must fail."""
    n = 20
    p = ALPHA ** (1 / n) * (1 - 1e-6)
    k = generator(0).binomial(n, p, RUNS)
    wrong = clopper_pearson_lower(k, n, ALPHA) > p
    assert 0.0453 < wrong.mean() < 0.0549  # both 1e-3 ends of Binomial(20 000, 0.05)
    assert not rejected(wrong)
    p = 0.06 ** (1 / n) * (1 - 1e-6)
    k = generator(1).binomial(n, p, RUNS)
    assert rejected(clopper_pearson_lower(k, n, 0.06) > p)


MIXES = {
    "clear": [0.9, 0.06, 0.04],
    "half": [0.5, 0.5],
    "half among many": [0.5, 0.1, 0.1, 0.1, 0.1, 0.1],
    "below half": [0.4, 0.35, 0.25],
    "below half, tie of runners": [0.4, 0.3, 0.3],
    "tie at the top": [0.4, 0.4, 0.2],
    "tie of four": [0.25] * 4,
    "tie of ten": [0.1] * 10,
    "almost certain": [0.9999, 0.0001],
}


@pytest.mark.parametrize("mix", MIXES)
def test_radii_of_fixed_n_hold(mix):
    """Selection votes choose c_A, fresh votes bound it, whatever class was chosen."""
    rng, shares, n = generator(2), np.array(MIXES[mix]), 1000
    chosen = rng.multinomial(20, shares, size=RUNS).argmax(1)
    counts = top_and_runner(rng.multinomial(n, shares, size=RUNS), chosen)
    for rule, law in itertools.product(BOUNDS, LAWS.values()):
        radius = each_once(radius_at(law, rule, n, ALPHA), *counts)
        assert not rejected(radius > true_radius(law, shares, chosen)), (rule, law)


@pytest.mark.parametrize("mix", MIXES)
def test_both_bounds_of_the_runner_up_rule_hold_at_once(mix):
    rng, shares, n = generator(3), np.array(MIXES[mix]), 1000
    chosen = np.zeros(RUNS, int)
    counts = top_and_runner(rng.multinomial(n, shares, size=RUNS), chosen)
    low, high = BOUNDS["runner-up"](*counts, n, ALPHA)
    assert not rejected((low > shares[0]) | (high < shares[1:].max()))


@pytest.mark.parametrize("mix", ["half", "tie at the top", "tie of ten", "below half"])
def test_prediction_by_the_sign_test_holds(mix):
    """Returning a class that is not among the most likely ones, or any class of a tie for one."""
    shares = np.array(MIXES[mix])
    counts = generator(4).multinomial(200, shares, size=RUNS)
    ordered = np.sort(counts, axis=1)
    predicted = two_sided_sign_test(ordered[:, -1], ordered[:, -2]) <= ALPHA
    wrong = predicted & (counts.argmax(1) != 0)  # the smoothed classifier's class: one, fixed
    assert not rejected(wrong)


SEQUENTIAL = {
    "at a grid step": (UNIFORM, [0.75, 0.25]),
    "at a grid step, gaussian": (GAUSSIAN, [0.6914624612740131, 0.3085375387259869]),
    "at zero": (UNIFORM, [0.5, 0.5]),
    "tie below half": (UNIFORM, [0.4, 0.4, 0.2]),
    "below half, at a step": (UNIFORM, [0.45, 0.2, 0.2, 0.15]),
}


@pytest.mark.parametrize("cell", SEQUENTIAL)
def test_no_stopping_rule_can_break_the_level(cell):
    """The worst rule of all: it knows the truth and stops at the first look that over-claims."""
    law, shares = SEQUENTIAL[cell][0], np.array(SEQUENTIAL[cell][1])
    rng, schedule = generator(6), looks(1600, first=50)
    chosen = rng.multinomial(20, shares, size=RUNS).argmax(1)
    truth, wrong = (
        true_radius(law, shares, chosen),
        {rule: np.zeros(RUNS, bool) for rule in BOUNDS},
    )
    each = levels(ALPHA, schedule, early_share=1 / 6.01)  # equal levels: the union bound's worst
    for j, counts in enumerate(paths(schedule, shares, rng)):
        at = top_and_runner(counts, chosen)
        for rule in BOUNDS:
            wrong[rule] |= each_once(radius_at(law, rule, schedule[j], each[j]), *at) > truth
    assert not any(map(rejected, wrong.values()))


def recomputed_after_every_batch(rng: np.random.Generator) -> np.ndarray:
    """Full level at every batch of 50, stop at the first success; p is at the threshold."""
    k, claimed = np.zeros(RUNS, int), np.zeros(RUNS, bool)
    for batch in range(1, 21):
        k = k + rng.binomial(50, 0.75, RUNS)
        claimed |= lower_limit(k, 50 * batch, ALPHA) > 0.75
    return claimed


def pooled_selection(rng: np.random.Generator) -> np.ndarray:
    """The votes that chose c_A are counted again in its estimate; nothing can be certified."""
    first = rng.binomial(100, 0.5, RUNS)
    chosen_votes = np.maximum(first, 100 - first)
    k = chosen_votes + rng.binomial(100, 0.5, RUNS)
    return lower_limit(k, 200, ALPHA) > 0.5


def n_from_reused_votes(rng: np.random.Generator) -> np.ndarray:
    """A pilot of 200 votes decides whether 800 more are needed, and stays in the estimate."""
    pilot = rng.binomial(200, 0.75, RUNS)
    n = np.where(clopper_pearson_lower(pilot, 200, ALPHA) > 0.75, 200, 1000)
    k = np.where(n == 200, pilot, pilot + rng.binomial(800, 0.75, RUNS))
    return clopper_pearson_lower(k, n, ALPHA) > 0.75


def printed_radius(rng: np.random.Generator, text: Callable[[float], str]) -> np.ndarray:
    """Printed with two decimals; the true radius lies just below a printed value, 1.91."""
    n, p = 100_000, 0.971926  # PhiInv(p) = 1.90989
    k = rng.binomial(n, p, RUNS)
    radius = each_once(radius_at(GAUSSIAN, "top-class", n, ALPHA), k, 0 * k)
    values, where = np.unique(radius, return_inverse=True)
    printed = np.array([float(text(value)) for value in values])[where]
    return printed > GAUSSIAN.radius(1.0, p, 1 - p)


def rounded_to_nearest(rng: np.random.Generator) -> np.ndarray:
    return printed_radius(rng, lambda radius: f"{radius:.2f}")


def betting_test(rng: np.random.Generator, threshold: float) -> np.ndarray:
    """Bet on p = 0.55 against p <= 1/2, which is true: wealth is a martingale of mean 1.

    By Ville's inequality it ever reaches 1 / a with probability at most a, and with small bets
    hardly less.
    """
    votes = rng.integers(0, 2, size=(RUNS, 800), dtype=np.int8)
    wins = np.cumsum(votes, axis=1, dtype=np.int16)
    losses = np.arange(1, 801, dtype=np.int16) - wins
    wealth = wins * np.float32(np.log(1.1)) + losses * np.float32(np.log(0.9))
    return wealth.max(axis=1) >= threshold


def betting_at_twice_the_level(rng: np.random.Generator) -> np.ndarray:
    return betting_test(rng, np.log(1 / (2 * ALPHA)))


DEFECTS = [recomputed_after_every_batch, pooled_selection, n_from_reused_votes]
DEFECTS += [rounded_to_nearest, betting_at_twice_the_level]


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.__name__)
def test_planted_defects_are_caught(defect):
    assert rejected(defect(generator(7)))


def test_the_sound_twins_of_the_defects_pass():
    rng = generator(8)
    assert not rejected(printed_radius(rng, lambda radius: floor_text(radius, 2)))
    assert not rejected(betting_test(rng, np.log(1 / ALPHA)))
    fresh = rng.binomial(200, 0.5, RUNS)  # whichever class was selected, its fresh votes are these
    assert not rejected(clopper_pearson_lower(fresh, 200, ALPHA) > 0.5)
    unused_pilot_n = np.where(rng.binomial(200, 0.75, RUNS) > 155, 200, 1000)
    k = rng.binomial(unused_pilot_n, 0.75)
    assert not rejected(clopper_pearson_lower(k, unused_pilot_n, ALPHA) > 0.75)


def test_recomputing_at_the_level_of_the_paper_errs_many_times_over():
    """alpha = 0.001 claimed, ten times that and more delivered: what adaptive code must not do."""
    rng, alpha = generator(9), 1e-3
    k, claimed = np.zeros(RUNS, int), np.zeros(RUNS, bool)
    for batch in range(1, 101):
        k = k + rng.binomial(1000, 0.5, RUNS)
        claimed |= lower_limit(k, 1000 * batch, alpha) > 0.5
    assert claimed.mean() > 10 * alpha
