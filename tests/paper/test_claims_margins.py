"""A margin of 3 points says something only where there is more than that to lose."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from certifl.paper.claims.catalogue import CLAIMS
from certifl.paper.claims.effects import QUANTITIES, Effect, Sampler, change, over_seeds
from certifl.paper.claims.rules import (
    MARGIN,
    NOT_SUPPORTED,
    SUPPORTED,
    UNDECIDED,
    Equivalence,
    MinimumEffect,
    Superiority,
)
from certifl.paper.claims.runs import StudyRun
from claims_factory import FEDAVG, LOCAL, claim, pair, run, spec

NEAR_ZERO, HALFWAY, NARROW = 0.042, 0.5, (-0.025, 0.02)
ENDS = st.tuples(st.floats(-1, 1), st.floats(-1, 1)).map(sorted)


@pytest.mark.parametrize("rule", [Equivalence(), Superiority()])
def test_near_zero_a_narrow_interval_is_no_equality(rule):
    judged = rule.judge(*NARROW, NEAR_ZERO)
    assert judged.verdict == UNDECIDED
    assert "lies within 3 points of 0" in judged.why
    assert "1.1 points, a quarter of the 4.2 points of the better run" in judged.why


def test_near_zero_an_interval_must_lie_within_a_quarter_of_the_level():
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


def test_where_nothing_is_certified_nothing_is_equal():
    assert Equivalence().judge(-0.01, 0.01, 0.0).verdict == UNDECIDED
    assert Superiority().judge(-0.01, 0.01, 0.0).verdict == UNDECIDED


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


# Levels ------------------------------------------------------------------------------------------


def effect(name: str, local: float, fedavg: float, **more: float) -> Effect:
    one, two = pair(local, fedavg, **more)
    return QUANTITIES[name].of(Sampler([one, two], 200), one, two)


@pytest.mark.parametrize("name", ["acr", "spread"])
def test_the_level_of_a_comparison_is_the_acr_of_the_better_run(name):
    assert effect(name, 0.3, 0.5).level == pytest.approx(0.5, abs=0.05)
    assert effect(name, 0.5, 0.3).level == pytest.approx(0.5, abs=0.05)


def test_the_level_of_accuracies_is_the_better_accuracy():
    assert effect("accuracy", 0.3, 0.5, accuracy=0.8).level == pytest.approx(0.8, abs=0.06)
    assert effect("largest gain", 0.3, 0.5).level == math.inf


def test_the_level_of_a_change_is_the_lower_and_of_several_seeds_the_mean():
    low, high = effect("acr", 0.2, 0.2), effect("acr", 0.6, 0.6)
    assert change(low, high).level == change(high, low).level == low.level
    assert over_seeds([low, high]).level == pytest.approx((low.level + high.level) / 2)


# Claims ------------------------------------------------------------------------------------------


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
