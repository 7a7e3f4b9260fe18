"""Stored runs are read back whole or refused; what is concluded from them is true."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from certifl.errors import StoreError, StoreMismatch
from certifl.report import load_run, load_runs, summary_rows
from certifl.report.compare import compare, own_interval, standing
from certifl.report.page.context import share_cell
from certifl.report.page.recommendation import by_margin, grouped, headline, recommendations
from certifl.report.style import LOOKS, looks_of
from certifl.report.summary import (
    accuracy_share,
    client_acr,
    client_curves,
    largest_radius,
    measure_curves,
    measures_of,
    radius_grid,
    selected_radii,
    share,
    spread,
    vote_cost,
)
from certifl.report.wording import client_list, percent, scales
from report_factory import (
    PIXEL,
    REGIMES,
    ROTATION,
    blank_certificates,
    make_certificates,
    make_history,
    make_manifest,
    make_run,
    write_run,
    write_study,
)

DEGREES = scales(ROTATION, 0.31)[0]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_study(tmp_path_factory.mktemp("study"), clients=4, images=30)


@pytest.fixture(scope="module")
def runs(study: list[Path]):
    return load_runs(study)


def test_a_run_is_read_back_whole(study):
    run = load_run(study[1])
    assert (run.label, run.algorithm) == ("FedAvg", "fedavg")
    assert run.clients.tolist() == [0, 1, 2, 3]
    assert len(run.certificates) == 120
    assert len(run.history) == 12
    assert "fedavg" in run.spec


@pytest.fixture
def one(tmp_path: Path) -> Path:
    certificates = make_certificates(0.8, clients=2, images=12)
    return write_run(tmp_path / "run", certificates, make_manifest("fedavg", "FedAvg"))


def test_a_folder_without_run_is_refused(tmp_path):
    with pytest.raises(StoreMismatch, match=r"no run\.json"):
        load_run(tmp_path)


def test_an_unfinished_run_is_refused_with_the_command_that_resumes_it(one):
    manifest = json.loads((one / "run.json").read_text()) | {"status": "running"}
    (one / "run.json").write_text(json.dumps(manifest))
    with pytest.raises(StoreMismatch, match=r"not finished.*certifl run spec\.toml"):
        load_run(one)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("run.json", "{", r"run\.json"),
        ("run.json", "[]", r"run\.json"),
        ("run.json", '{"label": "x"}', r"run\.json"),
        ("certificates.parquet", None, r"certificates\.parquet"),
        ("certificates.parquet", "no table", r"certificates\.parquet"),
        ("history.jsonl", '{"round": 0}\n{"round": ', r"history\.jsonl, line 2"),
        ("spec.toml", None, r"spec\.toml"),
    ],
)
def test_a_missing_or_damaged_file_is_named(one, name, content, says):
    if content is None:
        (one / name).unlink()
    else:
        (one / name).write_text(content)
    with pytest.raises(StoreError, match=says):
        load_run(one)


def test_labels_of_0_1_0_are_american(one):
    manifest = json.loads((one / "run.json").read_text()) | {"label": "Personalised"}
    (one / "run.json").write_text(json.dumps(manifest))
    assert load_run(one).label == "Personalized"


def test_certificates_that_cannot_be_summarized_are_refused(one):
    good = make_certificates(0.8, clients=2, images=12)
    broken = {
        "not a finite number": dataclasses.replace(good, radius=np.full(24, np.nan)),
        "no label": dataclasses.replace(good, label=np.full(24, -1)),
        "twice": dataclasses.replace(good, index=np.zeros(24, np.int64)),
        "do not name unit": dataclasses.replace(
            good, conditions={k: v for k, v in good.conditions.items() if k != "unit"}
        ),
        "no image|no certificates": good.select(np.zeros(24, bool)),
    }
    for reason, certificates in broken.items():
        certificates.save(one / "certificates.parquet")
        with pytest.raises(StoreError, match=reason):
            load_run(one)


def test_runs_of_another_perturbation_or_data_are_not_compared(runs):
    pixel = make_run(make_certificates(0.8, 4, 30, PIXEL))
    with pytest.raises(StoreMismatch, match="differ in family"):
        load_runs([runs[0], pixel])
    other = make_run(runs[0].certificates, data={"name": "mnist"})
    with pytest.raises(StoreMismatch, match="differ in data"):
        load_runs([runs[0], other])
    with pytest.raises(StoreMismatch, match="at least one"):
        load_runs([])


def test_equal_labels_are_distinguished():
    certificates = make_certificates(0.8, 2, 12)
    named = [make_run(certificates, "mixture", "Mixture", name=f"lambda {v}") for v in (0.1, 0.5)]
    assert [r.label for r in load_runs(named)] == ["Mixture (lambda 0.1)", "Mixture (lambda 0.5)"]
    equal = [make_run(certificates, "mixture", "Mixture") for _ in range(2)]
    assert [r.label for r in load_runs(equal)] == ["Mixture (1)", "Mixture (2)"]


def test_curves_and_acr_are_those_of_plain_loops(runs):
    run, radii = runs[0], radius_grid(runs)
    c = run.certificates
    curves, acr = client_curves(run, radii), client_acr(run)
    for place, client in enumerate(run.clients):
        rows = [i for i in range(len(c)) if c.client[i] == client]
        held = [c.radius[i] if c.predicted[i] == c.label[i] else -1.0 for i in rows]
        for j in (0, 7, 33, len(radii) - 1):
            assert curves[place, j] == pytest.approx(np.mean([h >= radii[j] for h in held]))
        assert acr[place] == pytest.approx(np.mean([max(h, 0.0) for h in held]))
    best, worst, gap = spread(run)
    assert acr[best] == acr.max()
    assert acr[worst] == acr.min()
    assert gap == acr.max() - acr.min()


def test_shares_have_exact_limits(runs):
    run = runs[1]
    for radius in (0.0, 0.1, 0.25, 1.0):
        got = accuracy_share(run, radius)
        count = int((run.certificates.correct & (run.certificates.radius >= radius)).sum())
        exact = stats.binomtest(count, len(run.certificates)).proportion_ci(0.95, "exact")
        assert got.value == count / len(run.certificates)
        assert (got.low, got.high) == (
            pytest.approx(exact.low, abs=1e-9),
            pytest.approx(exact.high, abs=1e-9),
        )


def test_the_grid_is_that_of_the_certification():
    fine = tuple(np.linspace(0.0, 0.3, 31))
    certificates = make_certificates(0.8, 2, 12)
    named = dataclasses.replace(
        certificates, conditions={**certificates.conditions, "radii": list(fine)}
    )
    assert radius_grid([make_run(named)]).tolist() == pytest.approx(list(fine))
    usual = radius_grid([make_run(certificates)])
    assert len(usual) == 50
    assert usual[0] == 0.0
    assert usual[-1] < ROTATION["sigma"]


def test_selected_radii_are_round_and_reached(runs):
    chosen = selected_radii(runs, DEGREES)
    assert [text for text, _ in chosen] == ["0°", "5°", "10°", "15°"]
    assert [math.degrees(radius) for _, radius in chosen] == pytest.approx([0, 5, 10, 15])
    largest = max(run.certificates.radius[run.certificates.correct].max() for run in runs)
    assert chosen[-1][1] <= largest


def test_votes_are_counted_and_compared_with_a_fixed_number(runs):
    votes = vote_cost(runs[0])
    assert votes.spent == votes.fixed == 120 * 1100
    assert votes.saved == 0.0
    assert votes.per_image == 1000
    c = runs[0].certificates
    half = dataclasses.replace(c, counts=c.counts // 2)
    saved = vote_cost(make_run(half)).saved
    assert saved == pytest.approx(1 - (half.counts.sum() + 12000) / 132000)


def test_history_reads_rows_and_mappings_alike():
    run = make_run(make_certificates(0.8, 2, 12))
    mappings = make_history(2, 0.8, rounds=3)
    rows = []
    for e in mappings:
        known = [{"client": int(c), "seconds": 1.0, **m} for c, m in e["clients"].items()]
        rows.append({**e, "clients": known})
    for history in (mappings, rows):
        trained = dataclasses.replace(run, history=tuple(history))
        assert measures_of([trained]) == ["loss", "accuracy"]
        curve = measure_curves(trained, "loss")
        assert curve.rounds.tolist() == [1, 2, 3]
        values = [m["loss"] for m in mappings[2]["clients"].values()]
        assert curve.mean[2] == pytest.approx(np.mean(values))
        assert (curve.low[2], curve.high[2]) == (min(values), max(values))
    assert measures_of([run]) == []
    assert measure_curves(run, "loss") is None


def test_summary_rows_hold_the_numbers_of_the_page(study, runs):
    rows = summary_rows(study)
    assert [row["label"] for row in rows] == [label for label, _ in REGIMES.values()]
    for row, run in zip(rows, runs, strict=True):
        assert row["acr"] == pytest.approx(client_acr(run).mean())
        assert row["acr_low"] < row["acr"] < row["acr_high"]
        assert row["accuracy"][0]["value"] == pytest.approx(run.certificates.correct.mean())
        assert row["acr_text"].endswith("°")
    assert json.loads(json.dumps(rows)) == rows


def test_equal_runs_show_no_difference(runs):
    twins = [runs[1], make_run(runs[1].certificates, "personalized", "Twin")]
    found = compare(twins)
    pair = found.pairs[0, 1]
    assert pair.estimate == 0.0
    hidden = 1 - 0.025 ** (1 / 120)  # of other images that many might differ
    assert pair.high == -pair.low == pytest.approx(largest_radius(twins) * hidden)
    assert not pair.shown
    assert headline(twins, found, DEGREES)[0] == "No difference shown between FedAvg and Twin."
    assert all(one.tied == (1,) for one in recommendations(twins, found))
    three = [runs[0], *twins]
    sentence, _ = headline(three, compare(three), DEGREES)
    assert sentence.startswith("FedAvg has the largest average certified radius, ")
    assert sentence.endswith("°; no difference shown from Twin.")


def test_a_clear_difference_is_shown_and_has_its_sign(runs):
    local, fedavg = runs[0], runs[1]
    found = compare([local, fedavg])
    pair = found.pairs[0, 1]
    assert pair.high < 0
    assert pair.low < pair.estimate < pair.high
    assert pair.seen_from(1).low == -pair.high
    assert standing(found.acr, found.pairs).best == 1
    sentence, support = headline([local, fedavg], found, DEGREES)
    assert sentence.startswith("FedAvg gives the largest average certified radius: ")
    assert "ahead of Local" in support[0]
    everyone = recommendations([local, fedavg], found)
    assert sum(len(clients) for _, clients in grouped(everyone)) == 4
    assert all(one.part.pairs[0, 1].stated for one in everyone if one.result.best == 1)


def test_the_order_of_rows_and_of_runs_does_not_matter(runs):
    c = runs[1].certificates
    order = np.random.default_rng(5).permutation(len(c))
    shuffled = make_run(c.select(order), "fedavg", "FedAvg")
    straight, mixed = compare([runs[0], runs[1]]), compare([runs[0], shuffled])
    assert mixed.pairs == straight.pairs
    back = compare([runs[1], runs[0]]).pairs[0, 1]
    assert back.estimate == pytest.approx(-straight.pairs[0, 1].estimate)


def test_only_common_images_are_compared(runs):
    c = runs[1].certificates
    fewer = make_run(c.select(np.arange(len(c)) % 3 > 0), "fedavg", "FedAvg")
    found = compare([runs[0], fewer])
    assert (found.images, found.whole) == (80, False)
    assert compare([runs[0], runs[1]]).whole


def test_other_images_or_other_labels_cannot_be_compared(runs):
    c = runs[1].certificates
    elsewhere = make_run(dataclasses.replace(c, index=c.index + 10_000))
    with pytest.raises(StoreMismatch, match="no test image in common"):
        compare([runs[0], elsewhere])
    relabelled = make_run(dataclasses.replace(c, label=(c.label + 1) % 10))
    with pytest.raises(StoreMismatch, match="different labels"):
        compare([runs[0], relabelled])


def test_too_few_images_show_nothing():
    few = [make_run(make_certificates(q, 1, 8), label=str(q)) for q in (0.2, 0.99)]
    pair = compare(few).pairs[0, 1]
    assert (pair.low, pair.high) == (-math.inf, math.inf)
    assert not pair.shown
    assert own_interval(few[0]) is None
    assert "too few images" in by_margin(pair, DEGREES)


def test_a_single_run_is_described(runs):
    sentence, support = headline(runs[1:2], compare(runs[1:2]), DEGREES)
    share = percent(float(runs[1].certificates.correct.mean()))
    assert sentence == f"FedAvg certifies {share} of the test images correctly."
    assert DEGREES.text(float(client_acr(runs[1]).mean())) in support[0]


def test_limits_of_shares_are_rounded_outward():
    assert "0.0 to 4.6" in share_cell(share(0, 80))  # 4.507 %
    assert "95.4 to 100.0" in share_cell(share(80, 80))


def test_best_and_worst_of_equal_clients_are_two():
    equal = blank_certificates(6, client=np.repeat(np.arange(3), 2), conditions=ROTATION)
    best, worst, gap = spread(make_run(equal))
    assert gap == 0.0
    assert best != worst


def test_lists_of_clients_are_short():
    assert client_list([3]) == "client 3"
    assert client_list([7, 0, 1, 2, 3, 9, 10]) == "clients 0–3, 7, 9, 10"


def test_an_algorithm_keeps_its_look_and_no_two_look_alike(runs):
    alone, together = looks_of([runs[1]]), looks_of(runs)
    assert alone[0] == together[1]
    mixtures = [make_run(runs[1].certificates, "mixture", str(i)) for i in range(len(LOOKS) + 3)]
    looks = looks_of(mixtures)
    assert len({(look.color, look.dash, look.marker) for look in looks}) == len(looks)
    assert len({look.dash for look in LOOKS}) == len({look.marker for look in LOOKS}) == 8
