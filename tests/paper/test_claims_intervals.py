"""Intervals of claims cover what they should, and verdicts follow, also next to no loss at all."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from certifl.paper.claims.catalogue import CLAIMS
from certifl.paper.claims.effects import (
    QUANTITIES,
    Effect,
    Means,
    ResampledMeans,
    Sampler,
    change,
    expected_range,
    over_seeds,
    resampled_means,
    resampled_spread,
)
from certifl.paper.claims.rules import (
    MARGIN,
    NOT_SUPPORTED,
    NOT_TESTED,
    SUPPORTED,
    UNDECIDED,
    Equivalence,
    MinimumEffect,
    Superiority,
    all_but_one,
    any_supported,
    every,
)
from certifl.paper.claims.runs import StudyRun, read_run
from certifl.report.intervals import Sample
from claims_factory import FEDAVG, LOCAL, claim, pair, results, run, spec


def test_seeds_that_disagree_widen_the_interval():
    def study(gains):
        return [
            one
            for seed, gain in enumerate(gains)
            for one in (run(spec(LOCAL, seed=seed), 0.4), run(spec(FEDAVG, seed=seed), 0.4 + gain))
        ]

    alike = claim(study((0.1, 0.1, 0.1)), "4.1 (ii)").judged[0]
    unlike = claim(study((0.25, 0.0, 0.05)), "4.1 (ii)").judged[0]
    assert alike.verdict == SUPPORTED
    assert unlike.verdict == UNDECIDED
    assert unlike.effect.seeds == 3
    assert unlike.effect.images == 1200


def test_the_interval_over_seeds_is_students():
    values, rng = (0.10, 0.34, 0.05, 0.23), np.random.default_rng(0)
    noise = [rng.choice([-0.5, 0.5], (40, 4)) for _ in values]
    means = [float(v + one.mean()) for v, one in zip(values, noise, strict=True)]
    parts = [effect_of_means(list((v + one).T)) for v, one in zip(values, noise, strict=True)]
    found = over_seeds(parts)
    expected = stats.t.interval(0.95, 3, np.mean(means), np.std(means, ddof=1) / 2)
    assert found.interval(0.05) == pytest.approx(expected)
    assert found.seeds == 4


@pytest.mark.parametrize("name", list(QUANTITIES))
def test_no_interval_is_wider_than_what_is_possible(name):
    gains = (0.6, -0.2)
    runs = [
        (
            run(spec(LOCAL, seed=seed), 0.2, images=20),
            run(spec(FEDAVG, seed=seed), 0.3 + gain, images=20),
        )
        for seed, gain in enumerate(gains)
    ]
    sampler = Sampler([one for pair in runs for one in pair], 100)
    effects = [QUANTITIES[name].of(sampler, two, one) for one, two in runs]
    both = over_seeds(effects)
    low, high = both.interval(0.005)  # with two seeds Student's t alone is much wider
    assert -both.limit <= low <= both.estimate <= high <= both.limit
    assert both.limit <= 1.0
    moved = over_seeds([change(one, one) for one in effects])
    assert max(abs(end) for end in moved.interval(0.005)) <= 2.0 * both.limit


REPEATS = 200


def covered_often_enough(hits: int) -> bool:
    """The percentile interval's own shortfall is of order 1 / images: 93 % are asked for.

    A procedure with 93 % or more fails this with probability below 1e-4.
    """
    return hits >= stats.binom.ppf(1e-4, REPEATS, 0.93)


def not_too_often(hits: int) -> bool:
    """An interval of 97.5 % or less exceeds this with probability below 1e-4."""
    return hits <= stats.binom.ppf(1 - 1e-4, REPEATS, 0.975)


def effect_of_means(differences: list[np.ndarray]) -> Effect:
    sizes = [len(own) for own in differences]
    source = Means((Sample.of(differences, new_images(sizes)),))
    return Effect(source, sum(sizes), (len(sizes),), 1, True)


_TAKEN = [0]


def new_images(sizes: list[int]) -> list[np.ndarray]:
    first = _TAKEN[0]
    _TAKEN[0] += sum(sizes)
    return np.split(np.arange(first, _TAKEN[0]), np.cumsum(sizes)[:-1])


def effect_of(values: list[np.ndarray]) -> Effect:
    """Mean over clients of column 0 minus column 1."""
    return effect_of_means([v[:, 0] - v[:, 1] for v in values])


def images_of(
    rng: np.random.Generator, clients: int, images: int, gain: float
) -> list[np.ndarray]:
    """Paired gains: an image is as hard for one run as for the other."""
    hard = rng.normal(0.5, 0.6, (clients, images))
    own = rng.normal(0.0, 0.3, (2, clients, images))
    one, two = hard + gain / 2 + own[0], hard - gain / 2 + own[1]
    return list(np.stack([one, two], axis=2))


@pytest.mark.statistical
def test_the_interval_of_a_difference_of_differences_covers():
    rng = np.random.default_rng(4)
    hits = 0
    for _ in range(REPEATS):
        few = effect_of(images_of(rng, 4, 30, 0.05))
        many = effect_of(images_of(rng, 20, 10, 0.12))
        low, high = change(many, few).interval(0.05)
        hits += low <= 0.07 <= high
    assert covered_often_enough(hits)
    assert not_too_often(hits)


@pytest.mark.statistical
def test_a_difference_of_spreads_covers_and_finds_no_spread_in_noise():
    rng = np.random.default_rng(5)
    hits = false = naive = 0
    for study in range(REPEATS):
        values = [
            np.stack([rng.random(30) < 0.6, rng.random(30) < 0.95], axis=1).astype(float)
            for _ in range(10)
        ]
        resampled = np.stack(
            [resampled_means(v, 400, study, c) for c, v in enumerate(values)], axis=1
        )
        means = np.stack([v.mean(axis=0) for v in values])
        one, two = (ResampledMeans(means[:, k], resampled[:, :, k]) for k in (0, 1))
        low, high = np.quantile(
            resampled_spread(one)[1] - resampled_spread(two)[1], [0.025, 0.975]
        )
        hits += low <= 0.0 <= high
        false += low > 0.0
        naive += (
            np.quantile(np.ptp(one.resampled, axis=1) - np.ptp(two.resampled, axis=1), 0.025) > 0.0
        )
    assert covered_often_enough(hits)
    assert false <= stats.binom.ppf(1 - 1e-4, REPEATS, 0.035)
    assert naive > 0.3 * REPEATS  # what the correction is for


@pytest.mark.statistical
def test_the_largest_gain_over_radii_is_covered_although_it_is_picked_after_looking():
    """The lower end may exceed the true largest gain in at most 2.5 % of the studies."""
    above = 0
    quantity = QUANTITIES["largest gain"]
    for study in range(40):
        runs = [
            run(spec(LOCAL, seed=study), 0.5, images=20, noise=0.1),
            run(spec(FEDAVG, seed=study), 0.5, images=20, noise=0.1),
        ]
        effect = quantity.of(Sampler(runs, 400), runs[1], runs[0])
        above += effect.interval(0.05)[0] > 0.0
    assert above <= stats.binom.ppf(1 - 1e-4, 40, 0.025)


def test_images_that_all_agree_do_not_make_an_interval_of_width_zero():
    agree = [np.full((10, 2), 0.7) for _ in range(4)]
    low, high = effect_of(agree).interval(0.05)
    # 40 images without a difference: the share that differs is below 1 - 0.025 ** (1 / 40).
    assert high == pytest.approx(1 - 0.025 ** (1 / 40))
    assert low == -high


def test_rare_images_of_one_client_may_hide_a_spread():
    """Each client has 40 perfect images: up to 1 - 0.025 ** (1 / 40) of one may be lost."""
    one, two = (results(spec(a, clients=4), 0.5, images=40) for a in (LOCAL, FEDAVG))
    runs = [read_run(r) for r in (one, dataclasses.replace(two, certificates=one.certificates))]
    found = QUANTITIES["spread"].of(Sampler(runs, 400), *runs)
    assert found.interval(0.05)[1] == pytest.approx(1 - 0.025 ** (1 / 40))
    grown = change(found, found).interval(0.05)
    assert grown[1] == pytest.approx(math.sqrt(2) * (1 - 0.025 ** (1 / 40)))


def test_runs_of_equal_certificates_are_equal_only_where_images_are_many():
    def twins(images: int):
        one, two = (results(spec(a, clients=4), 0.5, images=images) for a in (LOCAL, FEDAVG))
        return [read_run(one), read_run(dataclasses.replace(two, certificates=one.certificates))]

    few, many = claim(twins(10), "4.1 (i)"), claim(twins(100), "4.1 (i)")
    assert [t.effect.estimate for t in few.judged] == [0.0, 0.0]
    assert (few.verdict, many.verdict) == (UNDECIDED, SUPPORTED)


def test_equal_images_get_equal_draws_and_others_do_not():
    values = np.random.default_rng(0).random((12, 1))
    assert np.array_equal(
        resampled_means(values, 50, 0, 10, 3), resampled_means(values, 50, 0, 10, 3)
    )
    assert not np.array_equal(
        resampled_means(values, 50, 0, 10, 3), resampled_means(values, 50, 0, 10, 4)
    )


def test_draws_have_the_variance_of_a_mean():
    values = np.random.default_rng(1).random((6, 1))
    resampled = resampled_means(values, 200_000, 1)
    assert resampled.var() == pytest.approx(values.var(ddof=1) / 6, rel=0.02)
    assert resampled.mean() == pytest.approx(values.mean(), abs=2e-3)


@pytest.mark.parametrize(("clients", "known"), [(2, 2 / math.sqrt(math.pi)), (10, 3.07751)])
def test_the_expected_range_of_normal_values(clients, known):
    assert expected_range(clients) == pytest.approx(known, abs=1e-4)


ENDS = st.tuples(st.floats(-1, 1), st.floats(-1, 1)).map(sorted)


@given(ENDS)
def test_rules_agree_with_their_words(ends):
    low, high = ends
    about, above = (rule.judge(low, high) for rule in (Equivalence(), Superiority()))
    assert (about.verdict == SUPPORTED) == (max(abs(low), abs(high)) < 0.03)
    assert (above.verdict == SUPPORTED) == (low > 0)
    assert (MinimumEffect(0.2).judge(low, high).verdict == SUPPORTED) == (low > 0.2)
    if about.verdict == NOT_SUPPORTED:
        assert low > 0.03 or high < -0.03
    if above.verdict == NOT_SUPPORTED:
        assert high < 0 or (low <= 0 <= high and max(-low, high) < 0.03)


def test_an_endless_interval_decides_nothing():
    for rule in (Equivalence(), Superiority(), MinimumEffect(0.2)):
        judged = rule.judge(-math.inf, math.inf)
        assert judged.verdict == UNDECIDED
        assert "too few images" in judged.why


def test_verdicts_of_several_settings():
    yes, no, open_ = SUPPORTED, NOT_SUPPORTED, UNDECIDED
    found = [every(v) for v in ([yes, yes], [yes, no], [yes, open_], [no, open_], [])]
    assert found == [yes, no, open_, no, NOT_TESTED]
    assert all_but_one([yes, yes, no]) == yes
    assert all_but_one([yes, no]) == no
    assert all_but_one([yes, open_, no]) == open_
    assert all_but_one([no, yes, no]) == no
    found = [any_supported(v) for v in ([yes, no], [no, no], [no, open_], [])]
    assert found == [yes, no, open_, NOT_TESTED]


def test_many_comparisons_make_every_interval_wider():
    alone = claim(pair(0.4, 0.5), "4.1 (ii)").judged[0]
    both = [*pair(0.4, 0.5), *pair(0.4, 0.5, clients=20)]
    together = claim(both, "4.1 (ii)").judged[0]
    assert together.effect.estimate == alone.effect.estimate
    assert together.alone == alone.together
    assert together.together[0] < alone.together[0]
    assert together.together[1] > alone.together[1]


NEAR_ZERO, HALFWAY, NARROW = 0.042, 0.5, (-0.025, 0.02)


def test_near_zero_an_interval_must_lie_within_a_quarter_of_the_level():
    for rule in (Equivalence(), Superiority()):
        judged = rule.judge(*NARROW, NEAR_ZERO)
        assert judged.verdict == UNDECIDED
        assert "lies within 3 points of 0" in judged.why
        assert "1.1 points, a quarter of the 4.2 points of the better run" in judged.why
        assert rule.judge(-0.01, 0.01, 0.0).verdict == UNDECIDED  # nothing is certified
    about, above = (rule.judge(-0.01, 0.01, NEAR_ZERO) for rule in (Equivalence(), Superiority()))
    assert (about.verdict, above.verdict) == (SUPPORTED, NOT_SUPPORTED)
    assert about.why == "within 1.1 points, a quarter of the 4.2 points of the better run"
    assert above.why.startswith("no difference larger than 1.1 points, a quarter of")


def test_near_zero_less_than_3_points_is_a_difference():
    assert Equivalence().judge(-0.029, -0.012, NEAR_ZERO).verdict == NOT_SUPPORTED
    assert Equivalence().judge(-0.029, -0.012, HALFWAY).verdict == SUPPORTED
    assert Superiority().judge(0.002, 0.025, NEAR_ZERO).why == ""
    assert Superiority().judge(0.002, 0.025, HALFWAY).why == "but less than 3 points"
    assert Superiority().judge(0.002, 0.009, NEAR_ZERO).why.startswith("but less than 1.1 points")


@pytest.mark.parametrize("level", [0.12, HALFWAY, math.inf])
def test_away_from_zero_verdicts_are_what_they_were(level):
    assert Equivalence().judge(*NARROW, level).verdict == SUPPORTED
    judged = Superiority().judge(*NARROW, level)
    assert (judged.verdict, judged.why) == (NOT_SUPPORTED, "no difference larger than 3 points")
    assert Superiority().judge(-0.05, -0.01, level).why == "the other way"
    assert Equivalence().judge(0.031, 0.05, level).why == "ahead by more than 3 points"


@given(ENDS, st.floats(0.0, 1.0))
def test_both_directions_are_treated_alike(ends, level):
    low, high = ends
    one, other = Equivalence().judge(low, high, level), Equivalence().judge(-high, -low, level)
    assert one.verdict == other.verdict
    assert one.why.replace("ahead", "behind") == other.why.replace("ahead", "behind")
    small = "no difference larger"
    assert (small in Superiority().judge(low, high, level).why) == (
        small in Superiority().judge(-high, -low, level).why
    )


@given(ENDS, st.floats(0.0, 1.0))
def test_a_low_level_never_makes_for_an_equality(ends, level):
    for rule, word in ((Equivalence(), SUPPORTED), (Superiority(), NOT_SUPPORTED)):
        judged = rule.judge(*ends, level)
        if judged.verdict == word and ends[1] >= 0.0:
            assert rule.judge(*ends).verdict == word
    assert MinimumEffect(0.2).judge(*ends, level) == MinimumEffect(0.2).judge(*ends)


def test_rules_and_hypotheses_name_the_quarter():
    for one in CLAIMS:
        if not isinstance(one.judged_by, MinimumEffect):
            assert "a quarter of the better run's ACR or accuracy" in one.rule
        if isinstance(one.judged_by, Equivalence):
            assert "less than a quarter of the larger one" in " ".join(one.hypothesis.split())


def effect(name: str, local: float, fedavg: float, **more: float) -> Effect:
    one, two = pair(local, fedavg, **more)
    return QUANTITIES[name].of(Sampler([one, two], 200), one, two)


def test_the_level_of_a_comparison_is_that_of_the_better_run():
    for name in ("acr", "spread"):
        assert effect(name, 0.3, 0.5).level == pytest.approx(0.5, abs=0.05)
        assert effect(name, 0.5, 0.3).level == pytest.approx(0.5, abs=0.05)
    assert effect("accuracy", 0.3, 0.5, accuracy=0.8).level == pytest.approx(0.8, abs=0.06)
    assert effect("largest gain", 0.3, 0.5).level == math.inf


def test_the_level_of_a_change_is_the_lower_and_of_several_seeds_the_mean():
    low, high = effect("acr", 0.2, 0.2), effect("acr", 0.6, 0.6)
    assert change(low, high).level == change(high, low).level == low.level
    assert over_seeds([low, high]).level == pytest.approx((low.level + high.level) / 2)


def nearly_nothing(clients: int, images: int) -> list[StudyRun]:
    """Local and FedAvg alike, certifying hardly anything: one image in twenty is correct."""
    return [
        run(spec(a, clients=clients), 0.03, accuracy=0.06, images=images, noise=0.01)
        for a in (LOCAL, FEDAVG)
    ]


def test_two_runs_that_certify_nothing_refute_no_gain_and_prove_no_equality():
    (larger,) = claim(nearly_nothing(10, 60), "4.1 (ii)").judged
    assert max(np.abs(larger.together)) < MARGIN
    assert larger.verdict == UNDECIDED
    assert "so near 0 only" in larger.why
    alike = claim(nearly_nothing(4, 200), "4.1 (i)")
    assert all(max(np.abs(t.together)) < MARGIN for t in alike.judged)
    assert alike.verdict == UNDECIDED
