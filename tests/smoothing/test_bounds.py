"""Bounds on probabilities and the radii of noise laws, held against exact arithmetic."""

from fractions import Fraction
from math import comb

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from certifl.errors import InputError
from certifl.smoothing import (
    BOUNDS,
    EXPONENTIAL,
    GAUSSIAN,
    LAWS,
    UNIFORM,
    clopper_pearson_lower,
    clopper_pearson_upper,
    floor_text,
    runner_up_bounds,
    top_class_bounds,
    two_sided_sign_test,
)
from certifl.smoothing.laws import drawn_width

exact = settings(max_examples=50, derandomize=True)
levels = st.floats(1e-7, 0.5)


@st.composite
def counts(draw, most=300):
    n = draw(st.integers(1, most))
    return draw(st.integers(0, n)), n


def tail_at_least(k: int, n: int, p: float) -> Fraction:
    """P(Binomial(n, p) >= k) for the very float p, in rational arithmetic."""
    q = Fraction(p)
    return sum(
        (comb(n, i) * q**i * (1 - q) ** (n - i) for i in range(k, n + 1)), start=Fraction(0)
    )


@exact
@given(counts(60), levels)
def test_bounds_satisfy_the_inequality_that_defines_them_exactly(kn, level):
    k, n = kn
    low, high = clopper_pearson_lower(k, n, level), clopper_pearson_upper(k, n, level)
    if k > 0:
        assert tail_at_least(k, n, float(low)) <= Fraction(level)
    if k < n:
        assert 1 - tail_at_least(k + 1, n, float(high)) <= Fraction(level)


def mp_tail(k: int, n: int, p: mpmath.mpf) -> mpmath.mpf:
    """P(Binomial(n, p) >= k) in 50 digits, summed upwards until the terms vanish."""
    term = mpmath.binomial(n, k) * p**k * (1 - p) ** (n - k)
    total = mpmath.mpf(0)
    for i in range(k, n + 1):
        total += term
        if term < total * mpmath.mpf(10) ** -45:
            break
        term = term * (n - i) / (i + 1) * p / (1 - p)
    return total


@exact
@given(st.sampled_from([1_000, 100_000, 10_000_000]), st.floats(0, 1), st.booleans(), levels)
def test_large_counts_are_safe_and_tight_in_50_digits(n, share, near_one, level):
    k = max(1, round(n * share)) if not near_one else max(1, n - round(1000 * share))
    low = float(clopper_pearson_lower(k, n, level))
    high = float(clopper_pearson_upper(n - k, n, level))  # by symmetry 1 - high is a lower limit
    with mpmath.workdps(50):
        reached = mp_tail(k, n, mpmath.mpf(low))
        # P(Binomial(n, high) <= n - k) = P(Binomial(n, 1 - high) >= k), with 1 - high exact.
        mirrored = mp_tail(k, n, 1 - mpmath.mpf(high))
        assert reached <= mpmath.mpf(level)
        assert mirrored <= mpmath.mpf(level)
        # Outward by no more than the margin and the spacing of floats near p (1e-16 n / k at most)
        assert reached >= mpmath.mpf(level) * (1 - 3e-9 - 1e-14 * n)


def test_unanimous_votes_have_a_closed_form():
    low = clopper_pearson_lower(100_000, 100_000, 1e-3)
    with mpmath.workdps(50):
        root = mpmath.mpf(1e-3) ** (mpmath.mpf(1) / 100_000)
        assert 0 <= root - mpmath.mpf(float(low)) < 1e-13
    assert low == pytest.approx(0.99993092, abs=1e-8)


def test_edges():
    assert clopper_pearson_lower(0, 50, 0.01) == 0.0
    assert clopper_pearson_upper(50, 50, 0.01) == 1.0
    low, high = top_class_bounds(0, 50, 0.01)
    assert (low, high) == (0.0, 1.0)


@exact
@given(counts(), levels)
def test_bounds_bracket_the_share_and_mirror_each_other(kn, level):
    k, n = kn
    low, high = (
        float(clopper_pearson_lower(k, n, level)),
        float(clopper_pearson_upper(k, n, level)),
    )
    assert 0 <= low <= k / n <= high <= 1  # the median of Binomial(n, k / n) is k
    assert high == pytest.approx(1 - float(clopper_pearson_lower(n - k, n, level)), abs=1e-9)


@exact
@given(counts(), levels)
def test_bounds_grow_with_the_count_and_with_the_level(kn, level):
    k, n = kn
    lows = clopper_pearson_lower(np.arange(n + 1), n, level)
    assert np.all(np.diff(lows) > 0)
    assert clopper_pearson_lower(k, n, level / 10) <= lows[k]
    assert np.all(np.diff(clopper_pearson_upper(np.arange(n + 1), n, level)) > 0)


def test_arrays_equal_scalars_and_broadcast():
    k, n, level = np.array([[3], [90]]), np.array([100, 1000, 90]), 1e-3
    table = clopper_pearson_lower(k, n, level)
    assert table.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            assert table[i, j] == clopper_pearson_lower(int(k[i, 0]), int(n[j]), level)


@exact
@given(counts(), levels)
def test_one_minus_is_rounded_up(kn, level):
    low, high = top_class_bounds(*kn, level)
    assert Fraction(float(high)) >= 1 - Fraction(float(low)) or float(high) == 1.0
    assert float(high) - (1 - float(low)) <= 1e-15


@exact
@given(counts(), st.floats(0, 1), levels)
def test_runner_up_splits_the_level_nine_to_one(kn, share, level):
    k, n = kn
    runner = int((n - k) * share)
    low, high = runner_up_bounds(k, runner, n, level)
    assert low == clopper_pearson_lower(k, n, level * (1 - 0.1))
    assert high == min(clopper_pearson_upper(runner, n, level * 0.1), top_class_upper(low))
    assert high <= top_class_upper(low)


def top_class_upper(low) -> float:
    rest = 1.0 - float(low)
    return rest if low >= 0.5 else min(1.0, float(np.nextafter(rest, 2.0)))


def test_runner_up_certifies_below_one_half():
    low, high = runner_up_bounds(40_000, 30_000, 100_000, 1e-3)
    assert 0.3 < high < low < 0.5
    low, high = top_class_bounds(40_000, 100_000, 1e-3)
    assert low < high


def test_rules_share_one_signature():
    for rule in BOUNDS.values():
        low, high = rule(np.array([90, 10]), np.array([5, 80]), 100, 0.01)
        assert low.shape == high.shape == (2,)
        assert low[0] > high[0]
        assert low[1] < high[1]


@exact
@given(st.integers(0, 80), st.integers(0, 80))
def test_sign_test_is_the_exact_two_sided_tail(first, second):
    value = float(two_sided_sign_test(first, second))
    total, most = first + second, max(first, second)
    tail = 2 * Fraction(sum(comb(total, i) for i in range(most, total + 1)), 2**total)
    want = min(Fraction(1), tail) if total else Fraction(1)
    assert Fraction(value) >= want
    assert value == pytest.approx(float(want), rel=1e-8)
    assert value == two_sided_sign_test(second, first)


def test_sign_test_takes_arrays():
    values = two_sided_sign_test([10, 5, 0], [0, 5, 0])
    assert values == pytest.approx([2 / 1024, 1.0, 1.0], rel=1e-8)


@pytest.mark.parametrize(
    ("k", "n", "level"),
    [
        (-1, 10, 0.1),
        (11, 10, 0.1),
        (2.5, 10, 0.1),
        (np.nan, 10, 0.1),
        (0, 0, 0.1),
        (1, 2.5, 0.1),
        (1, 10, 0.0),
        (1, 10, 1.0),
        (1, 10, np.nan),
        ([1, 2], [10, 10, 10], 0.1),
        ("many", 10, 0.1),
        (1, 10**12, 0.1),
    ],
)
def test_bad_counts_and_levels_are_refused(k, n, level):
    for bound in (clopper_pearson_lower, clopper_pearson_upper, top_class_bounds):
        with pytest.raises(InputError):
            bound(k, n, level)
    with pytest.raises(InputError):
        runner_up_bounds(k, 0, n, level)


def test_more_votes_than_n_are_refused():
    with pytest.raises(InputError, match="add up to more than n"):
        runner_up_bounds(60, 50, 100, 0.01)
    with pytest.raises(InputError):
        two_sided_sign_test(-1, 3)


probability = st.one_of(
    st.floats(0, 1, exclude_min=True, exclude_max=True),
    st.floats(1e-15, 1e-3).map(lambda small: 1 - small),
    st.floats(1e-300, 1e-3),
    st.floats(-1e-9, 1e-9).map(lambda small: 0.5 + small),
)
sigmas = st.floats(1e-3, 1e3)


def quantile(p: float) -> mpmath.mpf:
    """PhiInv of the very float p: Newton steps in 50 digits from a start good to eight."""
    target = mpmath.mpf(p)
    x = mpmath.mpf(float(np.clip(special_start(p), -40, 40)))
    for _ in range(6):
        x -= (mpmath.ncdf(x) - target) / mpmath.npdf(x)
    return x


def special_start(p: float) -> float:
    from statistics import NormalDist

    return NormalDist().inv_cdf(p)


@exact
@given(sigmas, probability, probability)
def test_gaussian_radius_is_never_above_the_formula_and_close_to_it(sigma, first, second):
    low, high = max(first, second), min(first, second)
    radius = float(GAUSSIAN.radius(sigma, low, high))
    with mpmath.workdps(50):
        a, b = quantile(low), quantile(high)
        formula = mpmath.mpf(sigma) / 2 * (a - b)
        assert radius <= formula
        assert formula - radius <= mpmath.mpf(sigma) * 1e-14 * (1 + abs(a) + abs(b))


@exact
@given(sigmas, st.floats(0, 1), st.floats(0, 1))
def test_uniform_radius_is_never_above_the_formula_and_close_to_it(sigma, first, second):
    low, high = max(first, second), min(first, second)
    radius = float(UNIFORM.radius(sigma, low, high))
    with mpmath.workdps(400):
        width = mpmath.mpf(float(drawn_width(sigma)))
        formula = width * (mpmath.mpf(low) - mpmath.mpf(high))
        assert radius <= formula
        assert formula - radius <= formula * 1e-14 + 3 * mpmath.mpf(5e-324)


@exact
@given(sigmas, probability, probability)
def test_exponential_radius_is_never_above_the_formula_and_close_to_it(sigma, first, second):
    low, high = max(first, second), min(first, second)
    radius = float(EXPONENTIAL.radius(sigma, low, high))
    with mpmath.workdps(400):
        formula = -mpmath.mpf(sigma) * mpmath.log(1 - mpmath.mpf(low) + mpmath.mpf(high))
        assert radius <= formula
        assert formula - radius <= formula * 1e-14 + mpmath.mpf(sigma) * 1e-14


@exact
@given(st.floats(1e-30, 1e300))
def test_the_drawn_width_is_the_largest_float32_not_above_sigma(sigma):
    width = np.float32(drawn_width(sigma))
    assert float(width) == drawn_width(sigma) <= sigma
    assert (
        width == np.finfo(np.float32).max or float(np.nextafter(width, np.float32(np.inf))) > sigma
    )


@pytest.mark.parametrize("law", LAWS.values(), ids=list(LAWS))
@exact
@given(first=st.floats(0, 1), second=st.floats(0, 1))
def test_nothing_is_certified_unless_the_top_class_is_ahead(law, first, second):
    low, high = min(first, second), max(first, second)
    assert law.radius(0.5, low, high) == 0.0
    assert law.radius(0.5, low, low) == 0.0


def test_unanimous_votes():
    assert GAUSSIAN.largest_radius(1.0, 100_000, 1e-3) == pytest.approx(3.8115, abs=5e-5)
    assert GAUSSIAN.largest_radius(0.25, 100_000, 1e-3) == pytest.approx(0.25 * 3.81146, abs=1e-5)
    assert UNIFORM.largest_radius(1.0, 10_000, 1e-3) == pytest.approx(0.9986, abs=5e-5)
    assert UNIFORM.largest_radius(1.0, 100_000, 1e-3) == pytest.approx(0.9999, abs=5e-5)
    for law in LAWS.values():
        best = law.radius(0.3, *top_class_bounds(np.arange(101), 100, 0.01))
        assert np.all(best <= law.largest_radius(0.3, 100, 0.01))
        assert best[-1] == law.largest_radius(0.3, 100, 0.01)


def test_certain_classes():
    assert GAUSSIAN.radius(1.0, 1.0, 0.2) == np.inf
    assert GAUSSIAN.radius(1.0, 0.3, 0.0) == np.inf
    assert EXPONENTIAL.radius(1.0, 1.0, 0.0) == np.inf
    assert EXPONENTIAL.radius(2.0, 1.0, 0.25) == pytest.approx(2 * np.log(4), rel=1e-12)
    assert UNIFORM.radius(0.5, 1.0, 0.0) == pytest.approx(0.5, rel=1e-12)
    assert UNIFORM.radius(0.5, 1.0, 0.0) <= 0.5


def test_arrays_equal_scalars():
    low, high = np.array([0.9, 0.4, 0.2]), np.array([0.1, 0.3, 0.3])
    for law in LAWS.values():
        rows = law.radius(0.25, low, high)
        assert rows.shape == (3,)
        assert [float(law.radius(0.25, a, b)) for a, b in zip(low, high, strict=True)] == list(
            rows
        )


def test_names_and_norms():
    assert {name: (law.name, law.norm) for name, law in LAWS.items()} == {
        "gaussian": ("gaussian", "l2"),
        "uniform": ("uniform", "l1"),
        "exponential": ("exponential", "l1"),
    }


@pytest.mark.parametrize("law", LAWS.values(), ids=list(LAWS))
@pytest.mark.parametrize(
    ("sigma", "low", "high"),
    [
        (0.0, 0.9, 0.1),
        (-1.0, 0.9, 0.1),
        (np.inf, 0.9, 0.1),
        (np.nan, 0.9, 0.1),
        (1.0, 1.1, 0.1),
        (1.0, 0.9, -0.1),
        (1.0, np.nan, 0.1),
    ],
)
def test_bad_numbers_are_refused(law, sigma, low, high):
    with pytest.raises(InputError):
        law.radius(sigma, low, high)


@exact
@given(st.floats(0, 1e12), st.integers(0, 17))
def test_text_is_rounded_down_and_stable(value, digits):
    text = floor_text(value, digits)
    assert float(text) <= value
    assert floor_text(float(text), digits) == text
    assert len(text.partition(".")[2]) == digits
    with mpmath.workdps(60):
        assert mpmath.mpf(text) + mpmath.mpf(10) ** -digits > mpmath.mpf(value) * (1 - 1e-16)


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (1.9057, 2, "1.90"),
        (1.9057, 3, "1.905"),
        (0.3, 3, "0.300"),
        (0.1 + 0.2, 1, "0.3"),
        (np.nextafter(0.3, 0), 3, "0.299"),
        (0.0, 4, "0.0000"),
        (-0.0, 1, "0.0"),
        (2.0, 0, "2"),
        (float("inf"), 3, "inf"),
    ],
)
def test_text_examples(value, digits, text):
    assert floor_text(value, digits) == text


def test_text_of_nonsense_is_refused():
    with pytest.raises(InputError):
        floor_text(float("nan"), 3)
    with pytest.raises(InputError):
        floor_text(1.0, -1)
