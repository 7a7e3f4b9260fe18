"""Planted effects are found, absent ones are not; what claims read, refuse, write and show."""

import dataclasses
import json

import numpy as np
import pytest
from typer.testing import CliRunner

import tiny_study as tiny
from certifl.cli import app
from certifl.errors import InputError, StoreError, StoreMismatch
from certifl.paper.claims import CLAIMS, check_claims, write_claims
from certifl.paper.claims.catalogue import check_runs
from certifl.paper.claims.render import (
    COMPARISON_HEAD,
    as_json,
    as_markdown,
    claim_rows,
    comparison_row,
    explanation,
)
from certifl.paper.claims.rules import NOT_SUPPORTED, NOT_TESTED, SUPPORTED, UNDECIDED
from certifl.paper.claims.runs import read_run
from certifl.report.results import LATER, decisive_settings
from certifl.spec import with_settings
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
    write,
)


def test_a_planted_gain_is_supported_with_its_size():
    result = claim(pair(0.40, 0.55), "4.1 (ii)")
    assert result.verdict == SUPPORTED
    (tested,) = result.judged
    low, high = tested.together
    assert low < 0.15 < high
    assert tested.effect.images == 400
    assert tested.effect.clients == (10,)


@pytest.mark.parametrize(
    ("planted", "why"),
    [
        (pair(0.55, 0.40), "the other way"),
        (pair(0.5, 0.5, images=200), "no difference larger than 3 points"),
    ],
)
def test_the_opposite_and_no_effect_are_not_supported(planted, why):
    result = claim(planted, "4.1 (ii)")
    assert result.verdict == NOT_SUPPORTED
    assert why in result.judged[0].why


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


def test_matched_steps_show_a_pull_that_is_there_or_name_the_run_that_is_missing():
    name, runs = "4.4 (i) matched steps", mixtures({0.5: 0.15})
    there = run(spec(mixture(0.5), lr=0.2), 0.63, images=100)
    assert claim([*runs, there], name).verdict == SUPPORTED
    missing = claim(runs, name).missing
    assert any("Mixture λ = 0.5 with training.lr = 0.2" in text for text in missing)


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


@pytest.mark.parametrize(
    ("change_of", "planted"),
    [({"data": "mnist"}, {}), ({"certified": TRANSLATION}, {}), ({}, {"first_image": 7})],
)
def test_other_data_perturbations_and_images_are_not_compared(change_of, planted):
    runs = [run(spec(LOCAL), 0.4), run(spec(FEDAVG, **change_of), 0.6, **planted)]
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
    with pytest.raises(StoreError, match="does not describe the run"):
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


def test_an_interval_that_holds_alone_is_marked_as_that(tmp_path):
    both = [*pair(0.4, 0.5), *pair(0.4, 0.5, clients=20)]
    report = check_runs(both, DRAWS)
    result = next(one for one in report.results if one.claim.name == "4.1 (ii)")
    assert [one.verdict == "" for one in result.comparisons] == [False, True, False, True]
    ends = COMPARISON_HEAD.index("95 % together")
    for one in result.comparisons:
        assert comparison_row(one)[ends].endswith(" (alone)") == (one.verdict == "")
    assert "marked (alone)" in " ".join(explanation(report))
    held = next(one for one in as_json(report)["claims"] if one["claim"] == "4.1 (ii)")
    for one in held["comparisons"]:
        reported = one["verdict"] is None
        assert one["low_and_high_hold"] == ("alone" if reported else "together")
        assert (one["low"] == one["low_alone"]) == reported


def test_the_verdict_says_that_some_comparisons_have_too_few_images():
    runs = [*pair(0.4, 0.5, images=40), *pair(0.4, 0.5, clients=20, images=10)]
    report = check_runs(runs, DRAWS)
    rows = {row["claim"]: row["words"] for row in claim_rows(report)}
    assert "undecided in 2" in rows["4.1 (iv) spread"]
    assert "1 with too few images for an interval" in rows["4.1 (iv) spread"]


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


# Older versions: their specs lack keys that came later ----------------------------------------


def test_a_key_that_came_later_tells_no_two_runs_apart():
    newer = tiny.spec().model_dump(exclude_none=True)
    older = {**newer, "training": dict(newer["training"])}
    for name, default in LATER.items():
        section, _, key = name.partition(".")
        assert older[section].pop(key, default) == default
    assert decisive_settings(older) == decisive_settings(newer)
    between = {**newer, "training": {**newer["training"], "steps": "plain"}}  # as 0.1.0 wrote it
    assert decisive_settings(between) == decisive_settings(newer)


def test_what_was_chosen_still_tells_runs_apart():
    plain = tiny.spec().model_dump(exclude_none=True)
    for choice in ("training.precision=bfloat16", "training.lr=0.007", "certification.n=999"):
        other = with_settings(plain, [choice]).model_dump(exclude_none=True)
        key, _, value = choice.partition("=")
        assert str(decisive_settings(other)[key]) == value
        assert decisive_settings(other) != decisive_settings(plain)
