"""Runs of several seeds on one page, paired within a seed; units and rounding of radii."""

import dataclasses
import html
import re
import tomllib

import mpmath
import numpy as np
import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from certifl.report import summary_rows, write_report
from certifl.report.compare import compare
from certifl.report.page.recommendation import (
    headline,
    recommendations,
    why_clients_stay_undecided,
)
from certifl.report.results import RunResults, by_seed, load_runs
from certifl.report.summary import client_acr, largest_radius
from certifl.report.wording import RadiusScale, scales
from report_factory import PIXEL, ROTATION, make_certificates, make_run

DEGREES, RADIANS = scales(ROTATION, 0.31)
QUALITY = {"local": 0.62, "fedavg": 0.9}


def trained(regime: str, seed: int, images: int = 40, **facts: object) -> RunResults:
    """One training; every seed has test images of its own."""
    number = 10 * seed + len(regime)
    certificates = make_certificates(QUALITY[regime], 4, images, seed=number, spread=0.0)
    moved = dataclasses.replace(certificates, index=certificates.index + 10_000 * seed)
    return make_run(moved, regime, regime.title(), seed=seed, **facts)


def part_of(run: RunResults, images: int, first: int = 0) -> RunResults:
    place = run.certificates.index % 40
    chosen = (place >= first) & (place < first + images)
    return dataclasses.replace(run, certificates=run.certificates.select(chosen))


def test_one_row_for_each_algorithm_and_its_mean_over_seeds():
    runs = [trained(regime, seed) for regime in QUALITY for seed in (0, 1, 2)]
    rows = by_seed(runs)
    assert [row.label for row in rows] == ["Local", "Fedavg"]
    assert [[run.seed for run in row.runs] for row in rows] == [[0, 1, 2]] * 2
    found = compare(rows)
    for place in (0, 1):
        own = [client_acr(run).mean() for run in rows[place].runs]
        assert found.acr[place] == pytest.approx(np.mean(own))
    pair = found.pairs[0, 1]
    assert (pair.images, pair.seeds) == (480, 3)
    assert pair.estimate == pytest.approx(found.acr[0] - found.acr[1])
    assert pair.low < pair.estimate < pair.high < 0.0
    labels = [run.label for run in load_runs(runs)]
    assert labels[:2] == ["Local, seed 0", "Local, seed 1"]


def test_a_seed_in_int8_is_another_row():
    float32, int8 = trained("local", 0), trained("local", 1)
    assert len(by_seed([float32, int8])) == 1
    spec = tomllib.loads(int8.spec)
    spec.setdefault("certification", {})["precision"] = "int8"
    int8 = dataclasses.replace(int8, spec=tomli_w.dumps(spec))
    assert [[run.seed for run in row.runs] for row in by_seed([float32, int8])] == [[0], [1]]


def test_images_that_two_seeds_share_by_chance_do_not_matter():
    """Seeds that test other images: the intersection of all runs would be next to nothing."""
    runs = [trained(regime, seed) for regime in QUALITY for seed in (0, 1)]
    shifted = []
    for run in runs:
        index = run.certificates.index - 9_841 * (run.seed or 0)
        moved = dataclasses.replace(run.certificates, index=index)
        shifted.append(dataclasses.replace(run, certificates=moved))
    assert compare(by_seed(runs)).pairs[0, 1].images == 320
    assert compare(by_seed(shifted)).pairs[0, 1].images == 320


def test_seeds_of_one_algorithm_alone_count_for_it_and_not_for_the_difference():
    runs = [*(trained("local", seed) for seed in (0, 1)), *(trained("fedavg", s) for s in (1, 2))]
    found = compare(by_seed(runs))
    pair = found.pairs[0, 1]
    once = compare([runs[1], runs[2]]).pairs[0, 1]
    assert (pair.seeds, pair.estimate) == (1, pytest.approx(once.estimate))
    assert not found.whole


def without_statement(runs: list[RunResults], why: str) -> None:
    rows = by_seed(runs)
    found = compare(rows)
    assert not any(pair.stated for pair in found.pairs.values())
    sentence, support = headline(rows, found, DEGREES)
    assert why in sentence
    assert "°" not in sentence + " ".join(support)
    assert all(one.why for one in recommendations(rows, found))


def test_no_seed_in_common_states_no_difference():
    without_statement([trained("local", 0), trained("fedavg", 1)], "no seed in common")


def test_a_handful_of_common_images_states_nothing():
    local, fedavg = trained("local", 0), trained("fedavg", 0)
    without_statement([local, part_of(fedavg, 2)], "too few images in common (8;")
    least = fedavg.certificates
    one = (least.client > 0) | (least.index % 40 < 1)
    few = dataclasses.replace(fedavg, certificates=least.select(one))
    without_statement([local, few], "1 of some client")
    assert compare([local, part_of(fedavg, 3)]).pairs[0, 1].stated


def test_the_page_says_why_and_the_terminal_agrees(bare, tmp_path):
    runs = [trained("local", 0), part_of(trained("fedavg", 0), 2)]
    page = html.unescape(write_report(runs, tmp_path / "a.html", figures=False).read_text())
    text = re.sub(r"<[^>]+>", " ", re.sub(r"(?s)<(script|style).*?</\1>", "", page))
    assert "Local and Fedavg are not compared: too few images in common" in text
    assert "No recommendation for any client: too few images" in text
    assert "not stated: too few images in common" in text
    several = [trained(regime, seed) for regime in QUALITY for seed in (0, 1)]
    page = html.unescape(write_report(several, tmp_path / "b.html", figures=False).read_text())
    rows = summary_rows(several)
    assert [(row["label"], row["seeds"]) for row in rows] == [
        ("Local", [0, 1]),
        ("Fedavg", [0, 1]),
    ]
    for row in rows:
        assert f"<b>{row['acr_text']}</b>" in page


def test_another_setting_and_a_second_run_of_a_seed_are_rows_of_their_own():
    spec = "seed = {}\n[training]\nlr = {}\n"
    runs = [
        dataclasses.replace(trained("fedavg", seed, name=f"{lr}"), spec=spec.format(seed, lr))
        for lr in (0.1, 0.2)
        for seed in (0, 1)
    ]
    assert [[run.seed for run in row.runs] for row in by_seed(runs)] == [[0, 1], [0, 1]]
    assert [row.label for row in by_seed(runs)] == ["Fedavg (0.1)", "Fedavg (0.2)"]
    again = [*runs[:2], runs[0]]
    assert [[run.seed for run in row.runs] for row in by_seed(again)] == [[0, 1], [0]]


def test_no_printed_end_lies_beyond_what_is_possible():
    runs = [trained(regime, seed, 3) for regime in QUALITY for seed in (0, 1)]
    found = compare(by_seed(runs))
    scale = largest_radius(runs)
    for pairs in (found.pairs, *(client.pairs for client in found.clients)):
        for pair in pairs.values():
            assert not pair.stated or -scale <= pair.low <= pair.high <= scale
    for row in summary_rows(runs):
        assert 0.0 <= row["acr_low"] <= row["acr_high"] <= scale
        assert all(0.0 <= one["low"] <= one["high"] <= 1.0 for one in row["accuracy"])


def test_ahead_on_average_beside_no_difference_for_a_client_is_explained():
    runs = by_seed([trained("local", 0, 12), trained("fedavg", 0, 12)])
    found = compare(runs)
    answers = recommendations(runs, found)
    assert found.pairs[0, 1].shown
    assert any(one.tied for one in answers)
    words = why_clients_stay_undecided(runs, found, answers) or ""
    assert "Fedavg is ahead of Local on average over all clients" in words
    assert "of 4 clients no difference is shown" in words
    assert "A client has 12 test images, the average over clients is based on 48" in words
    three = [*runs, runs[0]]
    found = compare(three)
    words = why_clients_stay_undecided(three, found, recommendations(three, found)) or ""
    assert "no difference from at least one of them is shown" in words


@given(st.floats(0.0, 10.0))
def test_a_shown_radius_never_exceeds_the_stored_one(radius):
    with mpmath.workdps(60):
        exact = mpmath.mpf(radius) * 180 / mpmath.pi
        shown = DEGREES.number(radius)
        assert mpmath.mpf(shown) <= exact
        assert exact - mpmath.mpf(shown) < mpmath.mpf(10) ** -DEGREES.digits * 1.001
    assert float(RADIANS.number(radius)) <= radius


@given(st.floats(-10.0, 10.0))
def test_intervals_are_rounded_outward(value):
    with mpmath.workdps(60):
        exact = mpmath.mpf(value) * 180 / mpmath.pi
        assert mpmath.mpf(DEGREES.down(value)) <= exact <= mpmath.mpf(DEGREES.up(value))
    assert float(RADIANS.down(value)) <= value <= float(RADIANS.up(value))


@given(st.integers(1, 180))
def test_a_radius_chosen_in_degrees_is_asked_for_in_full(degrees):
    with mpmath.workdps(60):
        assert mpmath.mpf(DEGREES.stored(float(degrees))) * 180 / mpmath.pi >= degrees


def test_other_families_have_their_own_unit_only():
    (only,) = scales(PIXEL, 0.9)
    assert only == RadiusScale("intensity", " intensity", 1.0, 4)
    assert only.text(0.25) == "0.2500 intensity"


def test_zero_and_negative_ends_read_well():
    assert RADIANS.up(0.0) == "0.0000"
    assert RADIANS.up(-0.00001) == "0.0000"
    assert RADIANS.up(-0.5) == "-0.5000"
    assert RADIANS.down(-0.00001) == "-0.0001"
    assert RADIANS.up(0.00001) == "0.0001"
