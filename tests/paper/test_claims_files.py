"""Claims about run folders: what is read, refused, written and shown."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

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
from certifl.report.results import LATER, decisive_settings
from certifl.spec import with_settings
from claims_factory import DRAWS, pair, write
from tiny_study import spec

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


def test_a_key_that_came_later_tells_no_two_runs_apart() -> None:
    newer = spec().model_dump(exclude_none=True)
    older = {**newer, "training": dict(newer["training"])}
    for name, default in LATER.items():
        section, _, key = name.partition(".")
        assert older[section].pop(key, default) == default
    assert decisive_settings(older) == decisive_settings(newer)
    between = {**newer, "training": {**newer["training"], "steps": "plain"}}  # as 0.1.0 wrote it
    assert decisive_settings(between) == decisive_settings(newer)


def test_what_was_chosen_still_tells_runs_apart() -> None:
    plain = spec().model_dump(exclude_none=True)
    for choice in ("training.precision=bfloat16", "training.lr=0.007", "certification.n=999"):
        other = with_settings(plain, [choice]).model_dump(exclude_none=True)
        key, _, value = choice.partition("=")
        assert str(decisive_settings(other)[key]) == value
        assert decisive_settings(other) != decisive_settings(plain)
