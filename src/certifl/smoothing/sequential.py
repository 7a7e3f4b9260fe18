"""Sequential certification by a union bound: the rule of version 0.1, by which records verify.

New certificates use exact boundaries (`group_sequential`), which share the looks, the grid steps
and the forecast of counts.

The counts are looked at after n_1 < n_2 < ... < n_m = n votes. The level a_j of each look is fixed
BEFORE any vote and the levels sum to at most alpha, so with probability at least 1 - alpha the
bounds of ALL looks hold at once (union bound). Hence the bounds of whichever look an image stops
at are valid, for ANY stopping rule. What follows about the rule saves votes, and does not concern
soundness.

The rule. Reported radii are floored to a grid, whose first step is "certified at all". An image
stopped when its next step was out of reach: when the chance that the last look certifies it,
predicted from the votes so far, was below

    futility * n_j / n .

The next look costs about n_j votes, so `futility` is the price of n votes in steps. The limit is
put on the FINAL counts rather than on p, for votes are still to come and the last look needs its
own margin; the best case (all votes to come are for c_A) caps it.

Each early look got alpha / 50: alpha / 20 saved 4 % of the votes on CIFAR-10 vote distributions
and lost twice as many certificates, because the last look pays.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from certifl.errors import InputError
from certifl.smoothing.bounds import BoundsRule, Floats, Ints
from certifl.smoothing.laws import Law

# A chance above this would stop images that more likely than not still improve at every look.
LARGEST_CHANCE = 0.9


def looks(n: int, first: int = 100, per_doubling: int = 1) -> tuple[int, ...]:
    """The vote counts at which an image may stop: first, 2 first, 4 first, ..., and n.

    Early looks are multiples of `first`, so votes drawn in chunks of that size always end on one:
    (100, 200, ..., 51200, 100000) for n = 100 000.

    Args:
        n: the most votes an image gets, at least 1 (as all arguments, or InputError).
        first: votes before the first look; (n,) where it is n or more.
        per_doubling: looks a doubling; 2 gives 100, 200, 300, 400, 600, 800, 1100, ...
    """
    if min(n, first, per_doubling) < 1:
        raise InputError("n, the first look and the looks a doubling must all be at least 1.")
    early: list[int] = []
    step = 0
    while (count := first * round(2.0 ** (step / per_doubling))) < n:
        if not early or count > early[-1]:
            early.append(count)
        step += 1
    return (*early, n)


def levels(alpha: float, looks: Sequence[int], early_share: float = 0.02) -> tuple[float, ...]:
    """The level of each look: `early_share` * alpha at every early look, the rest at the last.

    Their exact sum does not exceed alpha, also after rounding.

    Args:
        alpha: the probability of a false certificate allowed for one image, in (0, 1).
        looks: as from `looks`; only their number matters.
        early_share: share of alpha spent at each early look (InputError if nothing is left).
    """
    if not 0.0 < alpha < 1.0:
        raise InputError(f"alpha must lie strictly between 0 and 1, not {alpha}; 0.001 is usual.")
    early = len(looks) - 1
    if early < 0:
        raise InputError("At least one look is needed; `looks(n)` gives them.")
    if early and not (early_share > 0.0 and early * early_share < 1.0):
        raise InputError(
            f"{early} early looks at {early_share} of alpha each leave nothing to the last look. "
            "Use a smaller positive early_share or fewer looks."
        )
    each = early_share * alpha
    # Products and difference are off by a few 2**-53 of alpha; 2**-49 of alpha covers them all.
    last = alpha - each * early - (2.0**-49 * alpha if early else 0.0)
    if last <= 0.0:
        raise InputError(
            "The early looks leave nothing to the last look; use a smaller early_share."
        )
    return (*([each] * early), last)


def grid_steps(radius: ArrayLike, grid: ArrayLike) -> NDArray[np.int64]:
    """How many steps of the reported grid a radius reaches; the first step is "certified at all".

    Args:
        radius: certified radii, 0 where abstained.
        grid: the radii that will be reported, in any order; zeros in it change nothing.

    Returns:
        0 for an abstention, else 1 + the number of distinct positive grid values <= radius.

    Raises:
        InputError: a grid value that is negative or not a number.
    """
    values = np.asarray(grid, dtype=np.float64).ravel()
    if not np.all(values >= 0):
        raise InputError("The radii that will be reported must be numbers of at least 0.")
    steps = np.unique(np.concatenate([[np.nextafter(0.0, 1.0)], values[values > 0]]))
    return np.asarray(np.searchsorted(steps, np.asarray(radius), side="right"), dtype=np.int64)


def reachable_radius(
    k_top: ArrayLike,
    k_runner: ArrayLike,
    look: int | NDArray[np.int64],
    looks: Sequence[int],
    levels: Sequence[float],
    law: Law,
    sigma: float,
    bounds_rule: BoundsRule,
    futility: float = 0.01,
) -> Floats:
    """The radius the last look may still give, exceeded with a chance of about futility * n_j / n.

    The last look's counts are predicted from those so far: an upper limit for c_A (never above the
    best case), a lower one for the runner-up (never below its votes so far). Given the final
    counts, those so far are a random sample of them without replacement; a Beta limit for a sample
    of effective size n_j n / (n - n_j) stands in for the exact hypergeometric one.

    Args:
        k_top: votes for c_A so far, one an image.
        k_runner: largest count among the other classes so far.
        look: the index of this look in `looks`, from 0, one for all images or one an image.
        looks: vote counts of the looks.
        levels: their levels.
        law: the smoothing law.
        sigma: its scale, in the family's unit.
        bounds_rule: a value of `BOUNDS`.
        futility: the price of n votes in grid steps; must be positive.

    Returns:
        float64, one an image; at the last look the radius itself.

    Raises:
        InputError: counts that do not fit the look, or a look, level or price out of range.
    """
    positions = np.asarray(look)
    if len(looks) != len(levels) or np.any(np.diff(np.asarray(looks)) <= 0):
        raise InputError("Give increasing looks and one level for each; `looks` and `levels` do.")
    if np.any(positions < 0) or np.any(positions >= len(looks)):
        raise InputError(f"A look is an index from 0 to {len(looks) - 1} into the looks.")
    if not futility > 0.0:
        raise InputError(
            f"futility must be positive, not {futility}; 0.01 keeps every certificate."
        )
    top, runner, index = np.broadcast_arrays(
        np.asarray(k_top, dtype=np.float64), np.asarray(k_runner, dtype=np.float64), look
    )
    n = float(looks[-1])
    spent = np.asarray(looks, dtype=np.float64)[index]
    if np.any(top + runner > spent):
        raise InputError(
            "More votes than this look has; give the counts of exactly looks[look] votes."
        )
    over = spent >= n
    chance = np.minimum(LARGEST_CHANCE, futility * spent / n)
    most = np.where(over, top, count_at_most(top, spent, n, chance))
    least = np.where(over, runner, n - count_at_most(spent - runner, spent, n, chance))
    return law.radius(sigma, *bounds_rule(most, np.minimum(least, n - most), n, levels[-1]))


def count_at_most(
    k: Floats | Ints, spent: Floats | Ints, n: float | Floats, chance: Floats
) -> Floats:
    """An upper limit of a count after n votes that was k after `spent`; best case included."""
    from scipy import special

    left = np.maximum(n - spent, 1.0)
    hits, misses = k * n / left, (spent - k) * n / left
    missed = special.betaincinv(np.where(misses > 0, misses, 1.0), hits + 1.0, chance)
    share = np.where(misses > 0, 1.0 - missed, 1.0)
    return np.clip(np.floor(n * share), k, k + n - spent)
