"""Planted effects are found, absent ones are not, and nothing is claimed from unlike runs."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from typer.testing import CliRunner

from certifl.cli import app
from certifl.errors import InputError, StoreError, StoreMismatch
from certifl.report import check_claims, write_claims
from certifl.report.claims import CLAIMS
from certifl.report.claims.facts import read_run
from certifl.report.claims.render import as_json, as_markdown, claim_rows, explanation
from certifl.report.claims.resampling import Sampled, Sampler, drawn_means
from certifl.report.claims.rules import (
    NOT_SUPPORTED,
    NOT_TESTED,
    SUPPORTED,
    UNDECIDED,
    About,
    Above,
    Beyond,
    all_but_one,
    every,
    some,
)
from certifl.report.claims.statistics import (
    QUANTITIES,
    Effect,
    change,
    expected_range,
    over_seeds,
    spread_draws,
)
from certifl.report.claims.testing import check_runs
from claims_factory import (
    AFFINE,
    FEDAVG,
    LARGE_ROTATION,
    LARGE_TRANSLATION,
    LOCAL,
    PERSONALIZED,
    PIXEL,
    ROTATION,
    SIX,
    TRANSLATION,
    mixture,
    results,
    run,
    spec,
    write,
)

DRAWS = 2000


def claim(runs, name: str):
    """The result of one claim."""
    report = check_runs(runs, DRAWS)
    return next(result for result in report.results if result.claim.name == name)


def pair(local: float, fedavg: float, clients: int = 10, images: int = 40, **more):
    return [
        run(spec(LOCAL, clients=clients), local, images=images, **more),
        run(spec(FEDAVG, clients=clients), fedavg, images=images, **more),
    ]


# Planted effects ---------------------------------------------------------------------------------


def test_a_planted_gain_is_supported_with_its_size():
    result = claim(pair(0.40, 0.55), "4.1 (ii)")
    assert result.verdict == SUPPORTED
    (tested,) = result.judged
    low, high = tested.together
    assert low < 0.15 < high
    assert tested.finding.effect.images == 400
    assert tested.finding.effect.clients == (10,)


def test_the_opposite_is_not_supported():
    result = claim(pair(0.55, 0.40), "4.1 (ii)")
    assert result.verdict == NOT_SUPPORTED
    assert result.judged[0].judged.why == "the other way"


def test_no_effect_is_not_supported_where_there_are_images_enough_to_say_so():
    result = claim(pair(0.5, 0.5, images=200), "4.1 (ii)")
    assert result.verdict == NOT_SUPPORTED
    assert "no difference larger than 3 points" in result.judged[0].judged.why


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


def test_personalisation_must_help_for_all_perturbations_and_sigmas():
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
    assert tested.finding.effect.clients == (10, 60)


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
    spreads = {
        t.finding.effect.clients: t.judged.verdict for t in claim(runs, "4.1 (iv) spread").judged
    }
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
    assert all(t.judged.verdict == SUPPORTED for t in result.judged)


def test_lambda_one_is_local_training_and_no_mixture():
    runs = [run(spec(FEDAVG), 0.5), run(spec(mixture(1.0)), 0.6)]
    assert claim(runs, "4.4 (i)").verdict == NOT_TESTED


def test_which_lambda_is_best_and_how_certainly():
    result = claim(mixtures({0.1: 0.2, 0.5: 0.1, 0.9: 0.0}), "4.4 (i) best")
    assert result.verdict == SUPPORTED
    assert "100 % of the draws" in result.judged[0].finding.detail
    beaten = claim(mixtures({0.1: 0.0, 0.5: 0.1}), "4.4 (i) best")
    assert beaten.verdict == NOT_SUPPORTED
    assert "leads all others in 0 %" in beaten.judged[0].finding.detail


def test_a_gain_is_split_into_pull_and_smaller_step():
    runs = [
        *mixtures({0.1: 0.15}),
        run(spec(mixture(0.1), lr=1.0), 0.5, images=100),
        run(spec(FEDAVG, lr=0.01), 0.65, images=100),
    ]
    result = claim(runs, "4.4 (i) matched steps")
    assert result.verdict == NOT_SUPPORTED  # all of the gain is the step's
    parts = {t.finding.difference: t.finding.effect.estimate for t in result.comparisons}
    pull, step, gain, pull_at_small, step_alone = parts.values()
    assert pull + step == pytest.approx(gain, abs=1e-12)
    assert pull_at_small + step_alone == pytest.approx(gain, abs=1e-12)
    assert abs(pull) < 0.03
    assert step > 0.1
    assert "are the pull and" in result.judged[0].finding.detail


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
    ],
)
def test_unlike_runs_are_not_compared_and_the_difference_is_named(change_of, named):
    runs = [run(spec(LOCAL), 0.4), run(spec(FEDAVG, **change_of), 0.6)]
    result = claim(runs, "4.1 (ii)")
    assert result.verdict == NOT_TESTED
    assert not result.comparisons
    assert any(named in text for text in result.missing)


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


# Several seeds -----------------------------------------------------------------------------------


def test_seeds_that_disagree_widen_the_interval():
    def study(gains):
        return [
            one
            for seed, gain in enumerate(gains)
            for one in (run(spec(LOCAL, seed=seed), 0.4), run(spec(FEDAVG, seed=seed), 0.4 + gain))
        ]

    alike = claim(study((0.1, 0.1, 0.1)), "4.1 (ii)").judged[0]
    unlike = claim(study((0.25, 0.0, 0.05)), "4.1 (ii)").judged[0]
    assert alike.judged.verdict == SUPPORTED
    assert unlike.judged.verdict == UNDECIDED
    assert unlike.finding.effect.seeds == 3
    assert unlike.finding.effect.images == 1200


def test_the_interval_over_seeds_is_at_least_students():
    values = (0.10, 0.14, 0.09, 0.13)
    still = np.zeros(20_000)
    parts = [Effect(v, v + still, v + still, (1e9,), 400, (10,), 1, True) for v in values]
    low, high = over_seeds(parts).interval(0.05)
    mean, error = np.mean(values), np.std(values, ddof=1) / 2
    expected = stats.t.interval(0.95, 3, mean, error)
    assert (low, high) == pytest.approx(expected, abs=1e-3)


# Coverage ----------------------------------------------------------------------------------------

REPEATS = 400


def covered_often_enough(hits: int) -> bool:
    """The percentile interval's own shortfall is of order 1 / images: 93 % are asked for.

    A procedure with 93 % or more fails this with probability below 1e-4.
    """
    return hits >= stats.binom.ppf(1e-4, REPEATS, 0.93)


def not_too_often(hits: int) -> bool:
    """An interval of 97.5 % or less exceeds this with probability below 1e-4."""
    return hits <= stats.binom.ppf(1 - 1e-4, REPEATS, 0.975)


def effect_of(values: list[np.ndarray], study: int, draws: int = 400) -> Effect:
    """Mean over clients of column 0 minus column 1, each client's images drawn again."""
    drawn = np.stack([drawn_means(v, draws, study, c) for c, v in enumerate(values)], axis=1)
    means = np.stack([v.mean(axis=0) for v in values])
    estimate = float((means[:, 0] - means[:, 1]).mean())
    total = sum(len(v) for v in values)
    both = (drawn[:, :, 0] - drawn[:, :, 1]).mean(axis=1)
    agree = all(np.array_equal(v[:, 0], v[:, 1]) for v in values)
    limit = total if agree else math.inf
    return Effect(estimate, both, both, (limit,), total, (len(values),), 1, True)


def images_of(
    rng: np.random.Generator, clients: int, images: int, gain: float
) -> list[np.ndarray]:
    """Paired gains in [0, 1]: an image is as hard for one run as for the other."""
    hard = rng.normal(0.5, 0.2, (clients, images))
    own = rng.normal(0.0, 0.1, (2, clients, images))
    one, two = hard + gain / 2 + own[0], hard - gain / 2 + own[1]
    return list(np.stack([one, two], axis=2))


@pytest.mark.statistical
def test_the_paired_interval_covers_the_planted_difference():
    rng = np.random.default_rng(3)
    hits = wrong_pairing = 0
    for study in range(REPEATS):
        values = images_of(rng, 5, 8, 0.1)
        low, high = effect_of(values, study).interval(0.05)
        hits += low <= 0.1 <= high
        apart = [np.stack([v[:, 0], rng.permutation(v[:, 1])], axis=1) for v in values]
        low, high = effect_of(apart, study).interval(0.05)
        wrong_pairing += low <= 0.1 <= high
    assert covered_often_enough(hits)
    assert wrong_pairing > hits  # the pairing is what makes the interval this narrow


@pytest.mark.statistical
def test_the_interval_of_a_difference_of_differences_covers():
    rng = np.random.default_rng(4)
    hits = 0
    for study in range(REPEATS):
        few = effect_of(images_of(rng, 4, 30, 0.05), 2 * study)
        many = effect_of(images_of(rng, 20, 10, 0.12), 2 * study + 1)
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
        drawn = np.stack([drawn_means(v, 400, study, c) for c, v in enumerate(values)], axis=1)
        means = np.stack([v.mean(axis=0) for v in values])
        one, two = (Sampled(means[:, k], drawn[:, :, k]) for k in (0, 1))
        low, high = np.quantile(spread_draws(one)[1] - spread_draws(two)[1], [0.025, 0.975])
        hits += low <= 0.0 <= high
        false += low > 0.0
        naive += np.quantile(np.ptp(one.drawn, axis=1) - np.ptp(two.drawn, axis=1), 0.025) > 0.0
    assert covered_often_enough(hits)
    assert false <= stats.binom.ppf(1 - 1e-4, REPEATS, 0.035)
    assert naive > 0.3 * REPEATS  # what the correction is for


@pytest.mark.statistical
def test_the_largest_gain_over_radii_is_covered_although_it_is_picked_after_looking():
    """The lower end may exceed the true largest gain in at most 2.5 % of the studies."""
    rng = np.random.default_rng(6)
    above = 0
    quantity = QUANTITIES["largest gain"]
    for study in range(60):
        runs = [
            run(spec(LOCAL, seed=study), 0.5, images=20, noise=0.1),
            run(spec(FEDAVG, seed=study), 0.5, images=20, noise=0.1),
        ]
        rng.random()
        effect = quantity.of(Sampler(runs, 400), runs[1], runs[0])
        above += effect.interval(0.05)[0] > 0.0
    assert above <= stats.binom.ppf(1 - 1e-4, 60, 0.025)


def test_images_that_all_agree_do_not_make_an_interval_of_width_zero():
    agree = [np.full((10, 2), 0.7) for _ in range(4)]
    low, high = effect_of(agree, 0).interval(0.05)
    # 40 images without a difference: the share that differs is below 1 - 0.025 ** (1 / 40).
    assert high == pytest.approx(1 - 0.025 ** (1 / 40))
    assert low == -high


def test_runs_of_equal_certificates_are_equal_only_where_images_are_many():
    def twins(images: int):
        one, two = (results(spec(a, clients=4), 0.5, images=images) for a in (LOCAL, FEDAVG))
        return [read_run(one), read_run(dataclasses.replace(two, certificates=one.certificates))]

    few, many = claim(twins(10), "4.1 (i)"), claim(twins(100), "4.1 (i)")
    assert [t.finding.effect.estimate for t in few.judged] == [0.0, 0.0]
    assert (few.verdict, many.verdict) == (UNDECIDED, SUPPORTED)


def test_equal_images_get_equal_draws_and_others_do_not():
    values = np.random.default_rng(0).random((12, 1))
    assert np.array_equal(drawn_means(values, 50, 0, 10, 3), drawn_means(values, 50, 0, 10, 3))
    assert not np.array_equal(drawn_means(values, 50, 0, 10, 3), drawn_means(values, 50, 0, 10, 4))


def test_draws_have_the_variance_of_a_mean():
    values = np.random.default_rng(1).random((6, 1))
    drawn = drawn_means(values, 200_000, 1)
    assert drawn.var() == pytest.approx(values.var(ddof=1) / 6, rel=0.02)
    assert drawn.mean() == pytest.approx(values.mean(), abs=2e-3)


@pytest.mark.parametrize(("clients", "known"), [(2, 2 / math.sqrt(math.pi)), (10, 3.07751)])
def test_the_expected_range_of_normal_values(clients, known):
    assert expected_range(clients) == pytest.approx(known, abs=1e-4)


# Rules -------------------------------------------------------------------------------------------

ENDS = st.tuples(st.floats(-1, 1), st.floats(-1, 1)).map(sorted)


@given(ENDS)
def test_rules_agree_with_their_words(ends):
    low, high = ends
    about, above, beyond = About().judge(low, high), Above().judge(low, high), Beyond(0.2)
    assert (about.verdict == SUPPORTED) == (max(abs(low), abs(high)) < 0.03)
    assert (above.verdict == SUPPORTED) == (low > 0)
    assert (beyond.judge(low, high).verdict == SUPPORTED) == (low > 0.2)
    if about.verdict == NOT_SUPPORTED:
        assert low > 0.03 or high < -0.03
    if above.verdict == NOT_SUPPORTED:
        assert high < 0 or (low <= 0 <= high and max(-low, high) < 0.03)


def test_an_endless_interval_decides_nothing():
    for rule in (About(), Above(), Beyond(0.2)):
        judged = rule.judge(-math.inf, math.inf)
        assert judged.verdict == UNDECIDED
        assert "too few images" in judged.why


def test_verdicts_of_several_settings():
    yes, no, open_ = SUPPORTED, NOT_SUPPORTED, UNDECIDED
    assert [every(v) for v in ([yes, yes], [yes, no], [yes, open_], [no, open_], [])] == [
        yes,
        no,
        open_,
        no,
        NOT_TESTED,
    ]
    assert all_but_one([yes, yes, no]) == yes
    assert all_but_one([yes, no]) == no
    assert all_but_one([yes, open_, no]) == open_
    assert all_but_one([no, yes, no]) == no
    assert [some(v) for v in ([yes, no], [no, no], [no, open_], [])] == [
        yes,
        no,
        open_,
        NOT_TESTED,
    ]


def test_many_comparisons_make_every_interval_wider():
    alone = claim(pair(0.4, 0.5), "4.1 (ii)").judged[0]
    both = [*pair(0.4, 0.5), *pair(0.4, 0.5, clients=20)]
    together = claim(both, "4.1 (ii)").judged[0]
    assert together.finding.effect.estimate == alone.finding.effect.estimate
    assert together.alone == alone.together
    assert together.together[0] < alone.together[0]
    assert together.together[1] > alone.together[1]


# Folders and files -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    place = tmp_path_factory.mktemp("study")
    for one in pair(0.4, 0.55):
        write(place, one)
    return place


def test_a_study_folder_and_its_runs_give_the_same_report(study):
    whole = as_json(check_claims([study], DRAWS))
    named = as_json(check_claims(sorted((study / "runs").iterdir()), DRAWS))
    assert whole == named
    assert whole["runs"] == 2
    again = as_json(check_claims([study, study], DRAWS))
    assert again == whole  # a run that is named twice counts once, and nothing is random


def test_unfinished_runs_of_a_study_are_left_out_and_named(tmp_path):
    one, two = pair(0.4, 0.55)
    write(tmp_path, one)
    place = write(tmp_path, two, status="running")
    report = check_claims([tmp_path], DRAWS)
    assert report.runs == 1
    assert any(str(place) in note for note in report.notes)
    with pytest.raises(StoreMismatch, match="not finished"):
        check_claims([place], DRAWS)


def test_a_folder_without_runs_and_a_damaged_spec_are_refused(tmp_path):
    with pytest.raises(StoreMismatch, match="holds no run"):
        check_claims([tmp_path])
    place = write(tmp_path, pair(0.4, 0.5)[0])
    (place / "spec.toml").write_text("seed = 0\n")
    with pytest.raises(StoreError, match="does not say what the run was"):
        check_claims([place])


def test_json_and_markdown_hold_every_claim(study, tmp_path):
    report = check_claims([study], DRAWS)
    held = json.loads(write_claims(report, tmp_path / "claims.json").read_text())
    assert [one["claim"] for one in held["claims"]] == [one.name for one in CLAIMS]
    text = write_claims(report, tmp_path / "claims.md").read_text()
    assert text == as_markdown(report)
    assert all(f"## {one.name}: " in text for one in CLAIMS)
    tested = next(one for one in held["claims"] if one["claim"] == "4.1 (ii)")
    comparison = tested["comparisons"][0]
    assert comparison["low"] < comparison["estimate"] < comparison["high"]
    assert comparison["verdict"] == "supported"
    with pytest.raises(InputError, match=r"\.json or \.md"):
        write_claims(report, tmp_path / "claims.txt")


def test_rows_say_how_sure_and_how_many(study):
    report = check_claims([study], DRAWS)
    row = next(r for r in claim_rows(report) if r["claim"] == "4.1 (ii)")
    assert (row["images"], row["clients"], row["comparisons"]) == ("400", "10", 1)
    assert row["words"].startswith("Supported: FedAvg minus Local is +")
    assert "say nothing about training again" in " ".join(explanation(report))


def test_printed_intervals_hold_the_numbers_they_stand_for(study):
    report = check_claims([study], DRAWS)
    for row, result in zip(claim_rows(report), report.results, strict=True):
        if len(result.judged) == 1:
            low, high = (float(end) / 100 for end in row["interval"].split(" to "))
            assert low <= result.judged[0].together[0] + 1e-9
            assert high >= result.judged[0].together[1] - 1e-9


def test_the_command_shows_verdicts_and_writes_them(study, tmp_path):
    target = tmp_path / "claims.json"
    done = CliRunner().invoke(app, ["claims", str(study), "--out", str(target)])
    assert done.exit_code == 0, done.output
    assert "4.1 (ii)" in done.output
    assert "supported" in done.output
    assert json.loads(target.read_text())["runs"] == 2


def test_every_claim_says_what_it_measures_and_when_it_holds():
    assert len({one.name for one in CLAIMS}) == len(CLAIMS) == 17
    for one in CLAIMS:
        assert one.sentence
        assert one.hypothesis
        assert one.rule.startswith("supported if")
