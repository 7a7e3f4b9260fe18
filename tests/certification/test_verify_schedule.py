"""Looks and levels that were chosen after the votes are found, however well they add up."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

import certifl
from certifl.certification import verify
from certifl.certification.counts import count_all, finalize, fresh
from certifl.certification.estimators import PRICES, UnionBound
from certifl.certification.metadata import requested_conditions
from certifl.certification.network import prepare
from certifl.certification.sampling import VoteCounter
from certifl.certification.settings import ESTIMATORS, Settings
from certifl.errors import InputError
from certifl.perturbations import Perturbation
from certifl.smoothing.bounds import BOUNDS
from certifl.smoothing.laws import LAWS, drawn_width
from known_models import HalfSpace


def certified(
    estimator: str,
    keep: str = "certificates",
    n: int = 2000,
    radii: Sequence[float] | None = None,
    noise: Perturbation | None = None,
) -> certifl.Certificates:
    model, images, own = problem(estimator)
    return certifl.certify(
        model, images, noise or own, n=n, estimator=estimator, keep=keep, radii=radii
    )


def problem(estimator: str) -> tuple[HalfSpace, torch.Tensor, Perturbation]:
    g = torch.Generator().manual_seed(0)
    images = torch.rand((8, 1, 8, 8), generator=g)
    model = HalfSpace(torch.randn(64, generator=g), 0.0).eval()
    scanned = estimator == "scan"
    noise = certifl.Rotation(0.2 * math.pi) if scanned else certifl.PixelNoise(0.5)
    return model, images, noise


@pytest.fixture(scope="module")
def made() -> certifl.Certificates:
    return certified("sequential")


def rewritten(made: certifl.Certificates, **metadata: Any) -> certifl.Certificates:
    """Other conditions, with level, bounds and radius of every row as they follow from them."""
    known = {**made.conditions, **metadata}
    looks, levels = np.array(known["look_votes"]), np.array(known["look_levels"], float)
    rows, last = np.arange(len(made)), np.minimum(made.looks, len(looks)) - 1
    level = levels[np.minimum(last, len(levels) - 1)]
    selected = made.selection_counts.argmax(axis=1)
    top, others = made.counts[rows, selected], made.counts.copy()
    others[rows, selected] = -1
    # No level at all counts as much as the most that a bound can be asked for.
    asked = np.where((level > 0) & (level < 0.5), level, 0.49)
    lower, upper = BOUNDS[known["bounds"]](top, others.max(axis=1), made.votes, asked)
    radius = LAWS[known["law"]].radius(known["sigma"], lower, upper)
    return dataclasses.replace(
        made,
        level=level,
        p_lower=lower,
        p_upper=upper,
        radius=np.where(lower > upper, radius, 0.0),
        predicted=np.where(lower > upper, selected, -1),
        conditions=known,
    )


def test_levels_of_which_one_is_negative_are_found():
    """They sum to less than alpha, and every radius follows from a level of one in five."""
    made = certified("sequential", radii=[0.1])
    count = len(made.conditions["look_votes"])
    made = made.select(made.looks < count)  # where the negative level was not asked
    assert len(made) > 2
    levels = [0.2] * (count - 1) + [-0.2 * (count - 1) + 0.0009]
    assert sum(levels) <= made.conditions["alpha"]
    tampered = rewritten(made, look_levels=levels)
    assert (tampered.radius > made.radius).any()
    assert (tampered.radius >= made.radius).all()
    findings = verify(tampered)
    assert {f.index for f in findings} == set(made.index.tolist())
    assert "positive" in findings[0].problem


def last_alone(levels: list[float]) -> list[float]:
    """All of alpha for the look at which most images stopped; next to nothing for the others."""
    return [sum(levels) - 1e-12 * len(levels), *[1e-12] * (len(levels) - 1)]


def test_levels_chosen_after_the_votes_are_found(made):
    levels = last_alone(made.conditions["look_levels"])
    findings = verify(rewritten(made, look_levels=levels))
    assert len(findings) == len(made)
    assert "look_levels" in findings[0].problem


def test_looks_chosen_after_the_votes_are_found(made):
    looks, levels = made.conditions["look_votes"], made.conditions["look_levels"]
    alpha = made.conditions["alpha"]
    planted = {
        "look_votes": [
            {"look_votes": [*looks[:-1], looks[-1] + 100]},
            {"look_votes": looks[:3], "look_levels": [alpha / 3] * 3},
            {"look_votes": [looks[0]], "look_levels": [alpha]},
            {"n": 1000},
        ],
        "rising": [
            {"look_votes": [looks[1], looks[0], *looks[2:]]},
            {"look_votes": [looks[0], looks[0], *looks[2:]]},
            {"look_votes": [-1, *looks[1:]]},
        ],
        "levels for": [{"look_levels": levels[:-1]}, {"look_levels": [*levels, 0.0]}],
        "positive": [
            {"look_levels": [0.0, *levels[1:]]},
            {"look_levels": [*levels[:-1], float("nan")]},
            {"look_levels": [*levels[:-1], None]},
        ],
        "more than alpha": [{"look_levels": [10 * level for level in levels]}],
        "boundaries": [{"boundaries": "exacter"}, {"boundaries": None}],
        "settings": [{"keep": "everything"}, {"alpha": 0.9}, {"n0": -100}, {"estimator": "none"}],
        "bounds": [{"bounds": "top-class"}],
    }
    for says, changes in planted.items():
        for change in changes:
            tampered = dataclasses.replace(made, conditions={**made.conditions, **change})
            findings = verify(tampered)
            assert len(findings) >= len(made), change
            assert any(says in f.problem for f in findings), (change, findings[0])


def test_what_names_no_estimator_cannot_be_verified(made):
    metadata = {k: v for k, v in made.conditions.items() if k != "estimator"}
    with pytest.raises(InputError, match="estimator"):
        verify(dataclasses.replace(made, conditions=metadata))


def test_passes_of_a_scan_chosen_after_the_votes_are_found():
    made = certified("scan", n=3000)
    scan, metadata = made.conditions["scan"], made.conditions
    assert verify(made) == []
    for change in (
        {"scan": {**scan, "passes": [1000, 500]}, "look_votes": [2000, 3000]},
        {"scan": {**scan, "passes": [500]}, "look_votes": [1000]},
        {"look_levels": [metadata["alpha"] / 2]},
        {"look_levels": [metadata["alpha"], 0.0]},
        {"look_votes": metadata["look_votes"][::-1]},
        {"n": 1000},
    ):
        assert len(verify(dataclasses.replace(made, conditions={**metadata, **change}))) >= 8, (
            change
        )


@pytest.mark.parametrize(
    ("estimator", "keep"),
    [
        (estimator, keep)
        for estimator, keep in itertools.product(ESTIMATORS, PRICES)
        if keep == "certificates" or "keep" in ESTIMATORS.rows[estimator].parameters.model_fields
    ],
)
@pytest.mark.parametrize("n", [130, 200, 3000])
def test_honest_schedules_pass_also_after_a_file(estimator, keep, n, tmp_path):
    made = certified(estimator, keep, n)
    made.save(tmp_path / "c.parquet")
    assert verify(made) == verify(certifl.Certificates.load(tmp_path / "c.parquet")) == []


def of_version(
    made: certifl.Certificates, version: str, radius: np.ndarray
) -> certifl.Certificates:
    versions = {**made.conditions["versions"], "certifl": version}
    return dataclasses.replace(
        made, radius=radius, conditions={**made.conditions, "versions": versions}
    )


@pytest.mark.parametrize("estimator", ["sequential", "runner-up", "top-class"])
@pytest.mark.parametrize("radii", [None, [0.1, 0.3]])
def test_radii_of_uniform_laws_by_the_rule_of_older_versions_still_verify(estimator, radii):
    """certifl 0.1 multiplied by sigma; noise is drawn on the float32 width below it."""
    sigma = float(np.nextafter(np.float32(0.75), np.float32(1.0))) - 1e-12  # nearly all is lost
    made = certified(estimator, radii=radii, noise=certifl.Rotation(sigma))
    old = made.radius * (sigma / drawn_width(sigma))
    assert (old > made.radius * (1 + 1e-8)).any()
    assert verify(of_version(made, "0.1.0", old)) == []
    assert verify(of_version(made, "0.1.3", made.radius)) == []
    certified_rows = set(made.index[made.radius > 0].tolist())
    for version in (certifl.__version__, "0.2.0", "0.10.0", "1.0.1.0", ""):
        findings = verify(of_version(made, version, old))
        assert {f.index for f in findings} == certified_rows
        assert all("larger" in f.problem for f in findings)


def test_records_of_older_versions_are_granted_a_float32_and_no_more():
    made = certified("runner-up", noise=certifl.Rotation(0.75))
    row, least = int(made.radius.argmax()), 2.0**-23
    for factor, passes in ((1 + least, True), (1 + 1.01 * least, False), (1 - least, False)):
        radius = made.radius.copy()
        radius[row] *= factor
        assert (verify(of_version(made, "0.1.0", radius)) == []) is passes, factor
    gaussian = certified("runner-up")
    assert len(verify(of_version(gaussian, "0.1.0", gaussian.radius * (1 + least / 2)))) > 0
    for versions in (None, "0.1.0", {"certifl": 0.1}, {}):
        metadata = {**made.conditions, "versions": versions}
        larger = dataclasses.replace(made, radius=made.radius * (1 + least), conditions=metadata)
        assert len(verify(larger)) > 0


def test_numbers_of_numpy_are_numbers_too():
    made = certified("sequential", n=np.int64(300))
    assert verify(made) == []


class Earlier(UnionBound):
    """`sequential` of version 0.1, which stopped where its own reading of records says so."""

    def finished(self, top: np.ndarray, runner_up: np.ndarray, look: np.ndarray) -> np.ndarray:
        low, high = self.limits(top, runner_up, look)
        radius = np.asarray(self.noise.law.radius(self.noise.sigma, low, high))
        return (look == len(self.looks) - 1) | ~self.gains(top, runner_up, look, radius, 0.0)


def of_earlier_version(keep: str, radii: tuple[float, ...] | None) -> certifl.Certificates:
    """The record that 0.1 wrote: the same columns, other looks and levels, no boundaries named."""
    model, images, noise = problem("sequential")
    settings = Settings("sequential", n=2000, keep=keep, radii=radii)
    network = prepare(model, images, "cpu", "float32")
    votes, estimator = fresh(len(images), 2), Earlier(settings, noise)
    counter = VoteCounter(network, noise, 0)
    count_all(counter, images, None, estimator, votes)
    known = requested_conditions(noise, settings, 0)
    del known["boundaries"]
    known |= {"look_votes": list(estimator.looks), "look_levels": list(estimator.levels)}
    return finalize(votes, estimator, conditions=known)


@pytest.mark.parametrize("keep", PRICES)
@pytest.mark.parametrize("radii", [None, (0.0, 0.1, 0.3)])
def test_records_of_the_union_bound_still_verify_and_name_no_boundaries(keep, radii):
    old = of_earlier_version(keep, radii)
    assert radii is None or (old.votes < 2000).any()
    assert verify(old) == []
    exact = dataclasses.replace(old, conditions={**old.conditions, "boundaries": "exact"})
    assert len(verify(exact)) >= len(old)
    larger = dataclasses.replace(old, radius=old.radius * 1.001)
    assert {f.index for f in verify(larger)} == set(old.index[old.radius > 0].tolist())


def test_records_of_exact_boundaries_are_not_read_by_the_union_bound(made):
    metadata = {k: v for k, v in made.conditions.items() if k != "boundaries"}
    assert len(verify(dataclasses.replace(made, conditions=metadata))) >= len(made)


def test_records_older_than_the_choice_of_what_to_keep_still_verify():
    old = of_earlier_version("certificates", None)
    metadata = {k: v for k, v in old.conditions.items() if k != "keep"}
    assert verify(dataclasses.replace(old, conditions=metadata)) == []
    curve = of_earlier_version("curve", None)
    hidden = {k: v for k, v in curve.conditions.items() if k != "keep"}
    assert len(verify(dataclasses.replace(curve, conditions=hidden))) == len(curve)
