"""How often intervals of claims miss a known truth; claims about runs certified by a scan."""

import dataclasses
import functools
import math
from typing import Any

import numpy as np
import pytest
from scipy import special, stats

from certifl.certification.scan import scan_from
from certifl.errors import InputError, StoreMismatch
from certifl.paper.claims import check_claims
from certifl.paper.claims import effects as statistics
from certifl.paper.claims.catalogue import check_runs
from certifl.paper.claims.effects import QUANTITIES, Effect, Sampler, change
from certifl.paper.claims.runs import StudyRun, find_runs, largest_radius, read_run
from certifl.report import intervals
from certifl.report.results import RunResults
from certifl.smoothing.laws import LAWS
from claims_factory import ALPHA, DRAWS, FEDAVG, LOCAL, ROTATION, N, results, spec, write

Shares = np.ndarray


@functools.cache
def template(name: str, clients: int, images: int) -> RunResults:
    """Made once: a simulation needs the run hundreds of times, with other radii."""
    return results(spec({"name": name}, clients=clients), 0.5, images=images)


def run_of(algorithm: dict[str, Any], shares: Shares) -> StudyRun:
    """A run with these shares of the largest radius, (clients, images); -1 = not correct."""
    clients, images = shares.shape
    whole = template(algorithm["name"], clients, images)
    held, reach = whole.certificates, shares.ravel()
    predicted = np.where(reach >= 0.0, held.label, (held.label + 1) % 10)
    radius = np.maximum(reach, 0.0) * largest_radius(whole)
    planted = dataclasses.replace(held, predicted=predicted, radius=radius)
    return read_run(dataclasses.replace(whole, certificates=planted))


def effect_of(name: str, first: Shares, second: Shares, draws: int = 1000) -> Effect:
    one, two = run_of(LOCAL, first), run_of(FEDAVG, second)
    return QUANTITIES[name].of(Sampler([one, two], draws), one, two)


def misses(effects: list[Effect], true: float, error: float = 0.05) -> int:
    ends = [effect.interval(error) for effect in effects]
    return sum(not low <= true <= high for low, high in ends)


STUDIES = 120


def test_images_are_unlike_by_a_quarter_from_what_most_of_their_client_show():
    values = [np.full(20, 0.5), np.full(20, -0.5)]
    values[0][:3] += 0.26
    values[1][:4] += 0.24
    assert intervals.unlike_images(values, 1.0) == 3
    assert intervals.unlike_images([own + 0.25 for own in values], 1.0) == 3


def alike_but_paired(rng: np.random.Generator, clients: int, images: int) -> tuple[Shares, Shares]:
    """Two runs with 30 % of radius 0 and the others between 0.3 and 1; they correlate by 0.7."""
    normal = rng.multivariate_normal([0.0, 0.0], [[1.0, 0.7], [0.7, 1.0]], (clients, images))
    level = special.ndtr(normal)
    shares = np.where(level < 0.3, -1.0, level)
    return shares[..., 0], shares[..., 1]


@pytest.mark.statistical
@pytest.mark.parametrize(("clients", "images"), [(4, 10), (10, 4)])
def test_with_images_enough_an_interval_misses_at_most_about_twice_as_often_as_it_says(
    clients, images
):
    rng, studies = np.random.default_rng([clients, images]), 250
    effects = [
        effect_of("acr", *alike_but_paired(rng, clients, images), 2000) for _ in range(studies)
    ]
    # Rates as long simulations gave them are in docs/claims.md; at twice the nominal rate more
    # misses than these have a probability below 0.1 %.
    for error in (0.05, 0.05 / 8):
        assert misses(effects, 0.0, error) <= stats.binom.ppf(0.999, studies, 2 * error)


@pytest.mark.parametrize(
    ("clients", "images", "enough"),
    [(4, 5, False), (10, 2, False), (10, 3, False), (4, 9, True), (10, 4, True), (30, 2, True)],
)
def test_an_interval_needs_thirty_images_beyond_one_of_each_client(clients, images, enough):
    shares = alike_but_paired(np.random.default_rng(0), clients, images)
    for name in ("acr", "accuracy", "largest gain"):
        effect = effect_of(name, *shares, 50)
        assert effect.enough is enough
        assert np.isfinite(effect.interval(0.05)[0]) == enough


def spreading(rng: np.random.Generator, images: int) -> tuple[Shares, Shares]:
    """Twenty clients: alike in the second run, in the first of accuracies from 10 to 90 %."""
    hard = rng.random((20, images))
    accuracy = np.linspace(0.1, 0.9, 20)[:, None]
    return np.where(hard < accuracy, 0.8, -1.0), np.where(hard < 0.5, 0.8, -1.0)


@pytest.mark.parametrize(("images", "enough"), [(19, False), (20, True)])
@pytest.mark.parametrize("name", ["spread", "scatter"])
def test_a_spread_needs_twenty_images_of_every_client(name, images, enough):
    effect = effect_of(name, *spreading(np.random.default_rng(0), images), 50)
    assert effect.enough is enough
    assert change(effect, effect).enough is enough


@pytest.mark.statistical
def test_with_twenty_images_of_every_client_a_spread_is_covered(monkeypatch):
    rng = np.random.default_rng(2)
    effects = [effect_of("spread", *spreading(rng, 20), 400) for _ in range(STUDIES)]
    assert misses(effects, 0.8 * 0.8) <= stats.binom.ppf(0.999, STUDIES, 0.06)
    monkeypatch.setattr(statistics, "_FEWEST_FOR_A_SPREAD", 10)
    few = [effect_of("spread", *spreading(rng, 10), 400) for _ in range(STUDIES)]
    assert misses(few, 0.8 * 0.8) > stats.binom.ppf(0.999, STUDIES, 0.06)


ALL_ROUND = {"low": -math.pi, "high": math.pi, "periodic": True, "passes": [500, 500]}
PART = {"low": -1.0, "high": 1.4, "periodic": False, "passes": [500, 500]}


def scanned(
    algorithm: dict[str, Any], scan: dict[str, Any] | None, share: float = 0.5
) -> StudyRun:
    """A run whose radii are this share of all that a scan of half a turn can give, on average."""
    return read_run(scanned_results(algorithm, scan, share))


def scanned_results(algorithm: dict[str, Any], scan: dict[str, Any] | None, share: float):
    whole = results(spec(algorithm), share)
    held = whole.certificates
    metadata = {**held.conditions, "estimator": "scan"} | ({} if scan is None else {"scan": scan})
    far = largest_radius(whole)
    radius = held.radius / far * math.pi
    return dataclasses.replace(
        whole, certificates=dataclasses.replace(held, radius=radius, conditions=metadata)
    )


def test_shares_are_of_the_farthest_that_the_scan_looks():
    one = scanned(LOCAL, ALL_ROUND)
    beyond = LAWS["uniform"].largest_radius(ROTATION["sigma"], N, ALPHA)
    assert one.results.certificates.radius.max() > 2.31 * beyond
    means = Sampler([one], 50).acr(one).means
    assert 0.0 <= means.min() <= means.max() <= 1.0
    assert means.mean() == pytest.approx(0.5, abs=0.05)


def test_gains_at_large_radii_are_seen():
    report = check_runs([scanned(LOCAL, ALL_ROUND, 0.4), scanned(FEDAVG, ALL_ROUND, 0.6)], DRAWS)
    for result in report.results:
        for tested in result.comparisons:
            assert abs(tested.effect.estimate) <= 1.0
            assert tested.effect.level <= 1.0 or math.isinf(tested.effect.level)
    gain = next(r for r in report.results if r.claim.name == "4.1 (ii)").judged[0]
    assert gain.effect.estimate == pytest.approx(0.2, abs=0.06)


@pytest.mark.parametrize("scan", [ALL_ROUND, PART])
def test_the_largest_radius_is_the_shorter_side_of_the_scan(scan):
    whole = scanned_results(LOCAL, scan, 0.5)
    low, high = scan_from(whole.conditions).ends
    assert largest_radius(whole) == min(-low, high)


@pytest.mark.parametrize(
    "scan", [None, {"low": -1.0}, {**PART, "high": "far"}, {**PART, "high": 0.1, "low": -0.1}]
)
def test_a_scan_of_unknown_length_is_refused(scan, tmp_path):
    whole = scanned_results(LOCAL, scan, 0.5)
    with pytest.raises(InputError):
        largest_radius(whole)
    with pytest.raises(StoreMismatch, match="do not say where it looked"):
        read_run(whole)


def test_a_scan_of_unknown_length_in_a_study_is_left_out_and_named(tmp_path):
    known = scanned(LOCAL, ALL_ROUND)
    place = write(tmp_path, known)
    lost = write(tmp_path, StudyRun(known.metadata, scanned_results(FEDAVG, None, 0.5)))
    runs, notes = find_runs([tmp_path])
    assert [run.results.folder for run in runs] == [place]
    assert any(str(lost) in note and "where it looked" in note for note in notes)
    assert check_claims([tmp_path], DRAWS).runs == 1
    with pytest.raises(StoreMismatch, match="do not say where it looked"):
        find_runs([lost])


def test_other_runs_keep_the_radius_of_unanimous_votes():
    whole = results(spec(LOCAL), 0.5)
    assert largest_radius(whole) == LAWS["uniform"].largest_radius(ROTATION["sigma"], N, ALPHA)
    assert np.all(whole.certificates.radius <= largest_radius(whole))
