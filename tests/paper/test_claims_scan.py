"""Runs certified by a scan: radii go farther than unanimous votes, up to where the scan ends."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from certifl.certification.scan import scan_from
from certifl.errors import InputError, StoreMismatch
from certifl.paper.claims import check_claims
from certifl.paper.claims.catalogue import check_runs
from certifl.paper.claims.effects import Sampler
from certifl.paper.claims.runs import StudyRun, find_runs, largest_radius, read_run
from certifl.smoothing.laws import LAWS
from claims_factory import ALPHA, DRAWS, FEDAVG, LOCAL, ROTATION, N, results, spec, write

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
