"""Confidence bounds on vote probabilities: exact binomial limits, rounded outward, checked.

A vote is one prediction on one noisy copy of an image. Out of n independent votes the count of a
fixed class is Binomial(n, p) with the unknown p this module bounds:

    L(k, n, a) = Beta.ppf(a; k, n - k + 1),      L(0, n, a) = 0
    U(k, n, a) = Beta.ppf(1 - a; k + 1, n - k),  U(n, n, a) = 1

Every returned number satisfies the inequality that defines it, P(X >= k | L) <= a or
P(X <= k | U) <= a, with a share `TAIL_MARGIN` of `a` to spare for the rounding of the tail itself.

Source: Clopper and Pearson 1934; Cohen, Rosenfeld and Kolter 2019 (top-class, PREDICT).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from certifl.errors import InputError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
BoundsRule = Callable[[ArrayLike, ArrayLike, ArrayLike, ArrayLike], tuple[Floats, Floats]]

# scipy's regularised incomplete beta is off by at most 1.5e-13 of its value at n = 1e5 and 1.3e-12
# at n = 1e7 (against sums in 50 digits), growing about like sqrt(n). 2**-30 = 9.3e-10 leaves a
# factor of several hundred up to _MOST_VOTES and costs nothing: a level smaller by 1e-9 of itself.
TAIL_MARGIN = 2.0**-30
RUNNER_UP_SHARE = 0.1
_MOST_VOTES = 10**8


def clopper_pearson_lower(k: ArrayLike, n: ArrayLike, level: ArrayLike) -> Floats:
    """Lower confidence limit of a binomial probability: p >= L with probability >= 1 - level.

    L(k, n, a) = Beta.ppf(a; k, n - k + 1), L(0, n, a) = 0.

    Args:
        k: successes, 0 <= k <= n; scalar or array, as are the others (they broadcast).
        n: trials, at least 1.
        level: the allowed probability of error, in (0, 1).

    Returns:
        float64, never above the exact limit: P(Binomial(n, L) >= k) <= level.

    Raises:
        InputError: counts that are not whole numbers or out of range, or a level outside (0, 1).
    """
    from scipy import special  # takes a while to import: when a bound is first computed

    k, n, level = _checked(k, n, level)
    some = k > 0
    a, b = np.where(some, k, 1.0), n - np.where(some, k, 1.0) + 1.0
    allowed = level * (1.0 - TAIL_MARGIN)
    limit = np.asarray(special.betaincinv(a, b, allowed), dtype=np.float64)
    limit = _move_until(limit, 0.0, lambda p: special.betainc(a, b, p) <= allowed)
    return np.where(some, limit, 0.0)[()]


def clopper_pearson_upper(k: ArrayLike, n: ArrayLike, level: ArrayLike) -> Floats:
    """Upper confidence limit of a binomial probability: p <= U with probability >= 1 - level.

    U(k, n, a) = Beta.ppf(1 - a; k + 1, n - k), U(n, n, a) = 1.

    Args and errors are those of `clopper_pearson_lower`.

    Returns:
        float64, never below the exact limit: P(Binomial(n, U) <= k) <= level.
    """
    from scipy import special

    k, n, level = _checked(k, n, level)
    some = k < n
    a, b = np.where(some, k, 0.0) + 1.0, n - np.where(some, k, 0.0)
    allowed = level * (1.0 - TAIL_MARGIN)
    limit = np.asarray(special.betainccinv(a, b, allowed), dtype=np.float64)
    limit = _move_until(limit, 1.0, lambda p: special.betaincc(a, b, p) <= allowed)
    return np.where(some, limit, 1.0)[()]


def top_class_bounds(k_top: ArrayLike, n: ArrayLike, level: ArrayLike) -> tuple[Floats, Floats]:
    """Bounds on the probabilities of c_A and of every other class from the count of c_A alone.

    p_lower = L(n_A, n, alpha), p_upper = 1 - p_lower (rounded up). Certifies above one half only.

    Args:
        k_top: votes for c_A, which was chosen from OTHER votes.
        n, level: as in `clopper_pearson_lower`, whose errors it raises.

    Returns:
        (p_lower, p_upper): with probability at least 1 - level both hold.

    Source: Cohen, Rosenfeld and Kolter 2019; the paper, section 4.
    """
    p_lower = clopper_pearson_lower(k_top, n, level)
    return p_lower, _one_minus_up(p_lower)


def runner_up_bounds(
    k_top: ArrayLike, k_runner: ArrayLike, n: ArrayLike, level: ArrayLike
) -> tuple[Floats, Floats]:
    """Bounds on c_A and on the most likely other class; certify wherever p_lower > p_upper.

    p_lower = L(n_A, n, 0.9 alpha), p_upper = min(U(M, n, 0.1 alpha), 1 - p_lower), M the largest
    count among the classes other than c_A. No factor for the number of classes is needed: the
    true runner-up is ONE fixed class, its count is at most M, and U increases with the count.

    Args:
        k_top: votes for c_A, which was chosen from other votes.
        k_runner: M, the largest count among the other classes (c_A need not have the most votes).
        n: votes in all.
        level: alpha, in (0, 1).

    Returns:
        (p_lower, p_upper): with probability at least 1 - level both hold at once.

    Raises:
        InputError: as `clopper_pearson_lower`, or k_top + k_runner > n.
    """
    tops, runners, totals, levels = _together(k_top, k_runner, n, level)
    _checked(tops, totals, levels)
    _checked(runners, totals, levels)
    if np.any(tops + runners > totals):
        raise InputError(
            "The votes for the predicted class and its runner-up add up to more than n. "
            "Give counts of the same n votes, with the runner-up among the OTHER classes."
        )
    # Rounding of the two products is far below the margin each bound leaves of its level.
    p_lower = clopper_pearson_lower(tops, totals, levels * (1.0 - RUNNER_UP_SHARE))
    p_runner = clopper_pearson_upper(runners, totals, levels * RUNNER_UP_SHARE)
    return p_lower, np.minimum(p_runner, _one_minus_up(p_lower))


def two_sided_sign_test(k_first: ArrayLike, k_second: ArrayLike) -> Floats:
    """How surprising the two largest counts are if their classes were equally likely (PREDICT).

    p = min(1, 2 P(Binomial(k1 + k2, 1/2) >= max(k1, k2))), rounded up; 1 where there are no votes.
    Predicting the first class only when p <= alpha returns a class other than the smoothed
    classifier's with probability at most alpha; it abstains otherwise.

    Args:
        k_first, k_second: votes for the two classes with the most, in any order. Negative or
            fractional votes are refused (InputError).

    Source: Hung and Fithian 2019; Cohen, Rosenfeld and Kolter 2019, PREDICT.
    """
    from scipy import special

    first, second = _together(k_first, k_second)
    total = np.maximum(first + second, 1.0)
    _checked(first, total, 0.5)
    _checked(second, total, 0.5)
    most = np.maximum(np.maximum(first, second), 1.0)
    tail = special.betainc(most, total - most + 1.0, 0.5)
    return np.where(first + second > 0, np.minimum(1.0, 2.0 * tail * (1.0 + TAIL_MARGIN)), 1.0)[()]


BOUNDS: dict[str, BoundsRule] = {
    "top-class": lambda k_top, _k_runner, n, level: top_class_bounds(k_top, n, level),
    "runner-up": runner_up_bounds,
}
"""Both rules in one signature: votes for c_A, for the runner-up, in all, and the level."""


def _one_minus_up(p: Floats) -> Floats:
    """1 - p, rounded up. The difference is exact for p >= 1/2 (Sterbenz), rounded below."""
    rest = 1.0 - np.asarray(p)
    return np.where(np.asarray(p) >= 0.5, rest, np.minimum(1.0, np.nextafter(rest, 2.0)))[()]


def _move_until(limit: Floats, end: float, holds: Callable[[Floats], NDArray[np.bool_]]) -> Floats:
    """Move limits towards `end`, one float first and twice as far each time, until they hold."""
    step = np.abs(np.nextafter(limit, end) - limit)
    for _ in range(1100):  # doubling from the smallest float spans [0, 1] in 1075 steps
        failing = ~holds(limit)
        if not failing.any():
            return limit
        moved = limit - step if end == 0.0 else limit + step
        limit = np.where(failing, np.clip(moved, 0.0, 1.0), limit)
        step = step * 2.0
    return np.where(holds(limit), limit, end)


def _together(*values: ArrayLike) -> tuple[Floats, ...]:
    """The values as float64 arrays of one shape, or an error that says what to do."""
    try:
        arrays = [np.asarray(value, dtype=np.float64) for value in values]
        return tuple(np.broadcast_arrays(*arrays))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"Vote counts and levels must be numbers of matching shapes: {error}."
        ) from error


def _checked(k: ArrayLike, n: ArrayLike, level: ArrayLike) -> tuple[Floats, Floats, Floats]:
    """The three arguments as float64 arrays of one shape, or an error that says what to do."""
    counts, totals, levels = _together(k, n, level)
    if not np.all((totals >= 1) & (totals <= _MOST_VOTES) & (totals == np.floor(totals))):
        raise InputError(f"n must be a whole number of votes between 1 and {_MOST_VOTES}.")
    if not np.all((counts >= 0) & (counts <= totals) & (counts == np.floor(counts))):
        raise InputError(
            "A vote count must be a whole number between 0 and n; count votes, not shares."
        )
    if not np.all((levels > 0) & (levels < 1)):
        raise InputError("The level (alpha) must lie strictly between 0 and 1; 0.001 is usual.")
    return counts, totals, levels
