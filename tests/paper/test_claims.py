"""Planted effects are found, absent ones are not, and nothing is claimed from unlike runs."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from certifl.paper.claims.catalogue import check_runs
from certifl.paper.claims.rules import NOT_SUPPORTED, NOT_TESTED, SUPPORTED, UNDECIDED
from certifl.paper.claims.runs import read_run
from claims_factory import (
    AFFINE,
    DRAWS,
    FEDAVG,
    LARGE_ROTATION,
    LARGE_TRANSLATION,
    LOCAL,
    PERSONALIZED,
    PIXEL,
    ROTATION,
    SIX,
    TRANSLATION,
    claim,
    mixture,
    pair,
    results,
    run,
    spec,
)

# Planted effects ---------------------------------------------------------------------------------


def test_a_planted_gain_is_supported_with_its_size():
    result = claim(pair(0.40, 0.55), "4.1 (ii)")
    assert result.verdict == SUPPORTED
    (tested,) = result.judged
    low, high = tested.together
    assert low < 0.15 < high
    assert tested.effect.images == 400
    assert tested.effect.clients == (10,)


def test_the_opposite_is_not_supported():
    result = claim(pair(0.55, 0.40), "4.1 (ii)")
    assert result.verdict == NOT_SUPPORTED
    assert result.judged[0].why == "the other way"


def test_no_effect_is_not_supported_where_there_are_images_enough_to_say_so():
    result = claim(pair(0.5, 0.5, images=200), "4.1 (ii)")
    assert result.verdict == NOT_SUPPORTED
    assert "no difference larger than 3 points" in result.judged[0].why


def test_few_images_leave_it_undecided():
    assert claim(pair(0.49, 0.5, images=3), "4.1 (ii)").verdict == UNDECIDED
    assert claim(pair(0.5, 0.5, clients=4, images=10), "4.1 (i)").verdict == UNDECIDED


def test_equal_regimes_are_shown_to_be_equal():
    result = claim(pair(0.5, 0.5, clients=4, images=400), "4.1 (i)")
    assert result.verdict == SUPPORTED
    assert len(result.judged) == 2  # ACR and accuracy
    assert claim(pair(0.4, 0.5, clients=4, images=400), "4.1 (i)").verdict == NOT_SUPPORTED


def test_over_20_points_is_a_claim_of_its_own():
    name = "4.1 (ii) by over 20 points"
    steep = [
        run(spec(LOCAL), 0.4, accuracy=0.5, images=100),
        run(spec(FEDAVG), 0.8, accuracy=0.9, images=100),
    ]
    result = claim(steep, name)
    assert result.verdict == SUPPORTED
    assert result.judged[0].together[0] > 0.2
    small = claim(pair(0.50, 0.52, images=100), name)
    assert small.verdict == NOT_SUPPORTED
    assert small.judged[0].together[1] < 0.2


def test_personalization_must_help_for_all_perturbations_and_sigmas():
    def both(perturbation, gain: float):
        return [
            run(spec(FEDAVG, perturbation, federated="none"), 0.3),
            run(spec(PERSONALIZED, perturbation, federated="none"), 0.3 + gain),
        ]

    name = "4.2 from nominal"
    runs = [one for perturbation in SIX for one in both(perturbation, 0.2)]
    assert claim(runs, name).verdict == SUPPORTED
    partly = claim(runs[:-2], name)
    assert partly.verdict == UNDECIDED
    assert partly.partly
    assert any("pixel noise σ = 0.5" in text for text in partly.missing)
    against = claim([*runs[:-2], *both(SIX[-1], -0.2)], name)
    assert against.verdict == NOT_SUPPORTED


def test_affine_starts_are_compared_with_the_same_affine_start():
    def study(start):
        return [
            run(spec(FEDAVG, ROTATION, federated=AFFINE), 0.3),
            run(spec(PERSONALIZED, ROTATION, federated=start), 0.5),
        ]

    assert len(claim(study(AFFINE), "4.2 from affine").judged) == 1
    other = claim(study({**AFFINE, "sigma": 0.5}), "4.2 from affine")
    assert other.verdict == NOT_TESTED


def test_small_and_large_sigma_belong_to_different_claims():
    runs = [
        one
        for perturbation, gain in ((TRANSLATION, 0.1), (LARGE_TRANSLATION, 0.0))
        for one in (
            run(spec(LOCAL, perturbation), 0.4, images=200),
            run(spec(PERSONALIZED, perturbation, federated="none"), 0.4 + gain, images=200),
        )
    ]
    small, large = claim(runs, "4.3 (i)"), claim(runs, "4.3 (ii)")
    assert (small.verdict, large.verdict) == (SUPPORTED, SUPPORTED)
    assert len(small.judged) == len(large.judged) == 1


@pytest.mark.parametrize(("late", "verdict"), [(0.25, SUPPORTED), (0.02, NOT_SUPPORTED)])
def test_a_gap_that_grows_with_the_clients(late, verdict):
    runs = [
        one
        for clients, gain, images in ((10, 0.1, 40), (60, late, 20))
        for one in (
            run(spec(LOCAL, clients=clients), 0.4, images=images),
            run(spec(PERSONALIZED, clients=clients, federated="none"), 0.4 + gain, images=images),
        )
    ]
    result = claim(runs, "A.2 growth")
    assert result.verdict == verdict
    (tested,) = result.judged
    assert tested.together[0] < late - 0.1 < tested.together[1]
    assert tested.effect.clients == (10, 60)


def test_a_spread_between_clients_is_found_and_grows():
    runs = [
        one
        for clients, wide in ((4, 0.0), (20, 0.3))
        for one in (
            run(
                spec(LOCAL, clients=clients),
                np.linspace(0.4 - wide / 2, 0.4 + wide / 2, clients),
                images=200,
            ),
            run(spec(FEDAVG, clients=clients), 0.5, images=200),
        )
    ]
    growth = claim(runs, "4.1 (iv) growth")
    assert growth.verdict == SUPPORTED
    assert growth.judged[0].together[0] < 0.3 < growth.judged[0].together[1]
    spreads = {t.effect.clients: t.verdict for t in claim(runs, "4.1 (iv) spread").judged}
    assert spreads[(20,)] == SUPPORTED
    assert spreads[(4,)] != SUPPORTED


def test_noisier_images_are_no_spread_between_clients():
    """A regime whose images vary more has a larger range of client means by chance alone."""
    found = 0
    for study in range(12):
        runs = [
            run(spec(LOCAL, seed=study), 0.4, accuracy=0.5, images=30),
            run(spec(FEDAVG, seed=study), 0.8, accuracy=0.95, images=30),
        ]
        found += claim(runs, "4.1 (iv) spread").verdict == SUPPORTED
    # At a rate of 2.5 % three or more of 12 have a probability below 0.4 %.
    assert found <= 2


# The mixture -------------------------------------------------------------------------------------


def mixtures(gains: dict[float, float], perturbations=(ROTATION,), **more):
    return [
        one
        for p in perturbations
        for one in (
            run(spec(FEDAVG, p), 0.5, images=100),
            *(run(spec(mixture(v), p, **more), 0.5 + g, images=100) for v, g in gains.items()),
        )
    ]


MOVES = (ROTATION, LARGE_ROTATION, TRANSLATION, LARGE_TRANSLATION)


def test_the_mixture_may_fail_for_one_lambda():
    assert claim(mixtures({0.1: 0.1, 0.5: 0.1, 0.9: -0.1}, MOVES), "4.4 (i)").verdict == SUPPORTED
    twice = mixtures({0.1: 0.1, 0.5: -0.1, 0.9: -0.1}, MOVES)
    assert claim(twice, "4.4 (i)").verdict == NOT_SUPPORTED


def test_one_setting_is_not_every_deformation():
    result = claim(mixtures({0.1: 0.1, 0.5: 0.1, 0.9: 0.1}), "4.4 (i)")
    assert (result.verdict, result.partly) == (UNDECIDED, True)
    assert all(t.verdict == SUPPORTED for t in result.judged)


def test_lambda_one_is_local_training_and_no_mixture():
    runs = [run(spec(FEDAVG), 0.5), run(spec(mixture(1.0)), 0.6)]
    assert claim(runs, "4.4 (i)").verdict == NOT_TESTED


def test_which_lambda_is_best_and_how_certainly():
    result = claim(mixtures({0.1: 0.2, 0.5: 0.1, 0.9: 0.0}), "4.4 (i) best")
    assert result.verdict == SUPPORTED
    assert "100 % of the draws" in result.judged[0].detail
    beaten = claim(mixtures({0.1: 0.0, 0.5: 0.1}), "4.4 (i) best")
    assert beaten.verdict == NOT_SUPPORTED
    assert "leads all others in 0 %" in beaten.judged[0].detail


def test_a_gain_is_split_into_pull_and_smaller_step():
    runs = [
        *mixtures({0.1: 0.15}),
        run(spec(mixture(0.1), lr=1.0), 0.5, images=100),
        run(spec(FEDAVG, lr=0.01), 0.65, images=100),
    ]
    result = claim(runs, "4.4 (i) matched steps")
    assert result.verdict == NOT_SUPPORTED  # all of the gain is the step's
    parts = {t.difference: t.effect.estimate for t in result.comparisons}
    pull, step, gain, pull_at_small, step_alone = parts.values()
    assert pull + step == pytest.approx(gain, abs=1e-12)
    assert pull_at_small + step_alone == pytest.approx(gain, abs=1e-12)
    assert abs(pull) < 0.03
    assert step > 0.1
    assert "are the pull and" in result.judged[0].detail


def test_matched_steps_show_a_pull_that_is_there():
    runs = [*mixtures({0.5: 0.15}), run(spec(mixture(0.5), lr=0.2), 0.63, images=100)]
    assert claim(runs, "4.4 (i) matched steps").verdict == SUPPORTED


def test_a_run_with_matched_steps_is_named_where_it_is_missing():
    missing = claim(mixtures({0.5: 0.15}), "4.4 (i) matched steps").missing
    assert any("Mixture λ = 0.5 with training.lr = 0.2" in text for text in missing)


# What must not be compared -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change_of", "named"),
    [
        ({"seed": 1}, "seed"),
        ({"alpha": 0.01}, "certification.alpha"),
        ({"lr": 0.2}, "training.lr"),
        ({"clients": 20}, "clients.count"),
        ({"precision": "int8"}, "certification.precision"),
    ],
)
def test_unlike_runs_are_not_compared_and_the_difference_is_named(change_of, named):
    runs = [run(spec(LOCAL), 0.4), run(spec(FEDAVG, **change_of), 0.6)]
    result = claim(runs, "4.1 (ii)")
    assert result.verdict == NOT_TESTED
    assert not result.comparisons
    assert any(named in text for text in result.missing)


def test_float32_and_bfloat16_are_arithmetics_of_one_network():
    runs = [
        run(spec(LOCAL, precision="float32"), 0.4),
        run(spec(FEDAVG, precision="bfloat16"), 0.6),
    ]
    assert claim(runs, "4.1 (ii)").comparisons


@pytest.mark.parametrize("change_of", [{"data": "mnist"}, {"certified": TRANSLATION}])
def test_other_data_and_perturbations_are_other_settings(change_of):
    runs = [run(spec(LOCAL), 0.4), run(spec(FEDAVG, **change_of), 0.6)]
    assert claim(runs, "4.1 (ii)").verdict == NOT_TESTED


def test_runs_of_other_images_are_not_compared():
    runs = [run(spec(LOCAL), 0.4), run(spec(FEDAVG), 0.6, first_image=7)]
    assert claim(runs, "4.1 (ii)").verdict == NOT_TESTED


def test_other_images_behind_the_same_name_are_not_compared():
    held = results(spec(FEDAVG), 0.6)
    data = {**held.manifest["data"], "fingerprint": "another"}
    other = dataclasses.replace(held, manifest={**held.manifest, "data": data})
    assert claim([run(spec(LOCAL), 0.4), read_run(other)], "4.1 (ii)").verdict == NOT_TESTED


def test_a_lone_run_names_its_missing_partner():
    missing = claim([run(spec(LOCAL), 0.4)], "4.1 (ii)").missing
    assert any(text.startswith("FedAvg: cifar10, rotation σ = 18°") for text in missing)
    assert any(text.startswith("FedAvg and Local: translation σ = 0.5") for text in missing)


def test_without_runs_every_claim_is_untested_and_names_runs():
    report = check_runs([run(spec(LOCAL, PIXEL, data="else"), 0.3, images=1)], DRAWS)
    assert {result.verdict for result in report.results} == {NOT_TESTED}
    assert all(result.missing for result in report.results)
    assert "left out" in report.notes[0]
