"""What every estimator promises; a new one is a file and a row."""

from functools import cached_property
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import certifl
from certifl.certification import verify
from certifl.certification.counts import Votes, advance, finalize, fresh
from certifl.certification.estimators import Estimator
from certifl.certification.network import prepare
from certifl.certification.sampling import VoteCounter
from certifl.certification.settings import ESTIMATORS, EstimatorRow, Settings
from certifl.errors import InputError
from certifl.registry import parameters
from certifl.rng import image_key
from certifl.spec import with_settings

NOISE = certifl.Rotation("36deg")
N = 3000


class TwoLooks(Estimator):
    """The example of CONTRIBUTING.md: bounds after half of the votes and after all of them."""

    stops_early = True

    @cached_property
    def looks(self) -> tuple[int, ...]:
        return (self.settings.n // 2, self.settings.n)

    @cached_property
    def levels(self) -> tuple[float, ...]:
        return (self.settings.alpha / 2, self.settings.alpha / 2)


@pytest.fixture(params=[*ESTIMATORS, "two-looks"])
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    row = EstimatorRow(f"{__name__}:TwoLooks", parameters(), "two looks")
    monkeypatch.setitem(ESTIMATORS.rows, "two-looks", row)
    return request.param


def images() -> Tensor:
    """Ramps of different slopes: some are certified far, some hardly."""
    line = torch.linspace(-1, 1, 8)
    slopes = torch.linspace(0.02, 0.5, 5)[:, None, None]
    return (0.5 + slopes * line[None, None, :] * torch.ones(8, 1))[:, None].clamp(0, 1)


def model(batch: Tensor) -> Tensor:
    """Class 0 where the right half is brighter by a margin, else 1; never 2."""
    margin = batch[..., 4:].mean((1, 2, 3)) - batch[..., :4].mean((1, 2, 3)) - 0.1
    return torch.stack([margin, -margin, torch.full_like(margin, -9.0)], dim=1)


def certified(name: str, **options: Any) -> certifl.Certificates:
    return certifl.certify(
        model, images(), NOISE, estimator=name, **{"n": N, "precision": "float32", **options}
    )


def test_certificates_follow_from_the_votes_and_tampered_ones_are_found(name, tmp_path):
    certified(name).save(tmp_path / "a.parquet")
    stored = certifl.Certificates.load(tmp_path / "a.parquet")
    assert verify(stored) == []
    assert (stored.radius > 0).any()
    changes = {
        "radius": np.nextafter(stored.radius, 9.0),
        "counts": stored.counts + 1,
        "level": stored.level / 2,
        "predicted": 1 - np.abs(stored.predicted),
    }
    for column, values in changes.items():
        tampered = {f: getattr(stored, f) for f in stored.__dataclass_fields__} | {column: values}
        assert len(verify(certifl.Certificates(**tampered))) >= len(stored), column


def test_an_interruption_after_any_batch_changes_nothing(name):
    network = prepare(model, images(), precision="float32", batch_size=64)
    counter, keys = VoteCounter(network, NOISE, 0), [image_key(image) for image in images()]
    estimator = Settings(name, n=N).estimator_for(NOISE)
    votes, batches = fresh(len(keys), 3), 0
    while not votes.done.all():
        advance(counter, images(), keys, None, estimator, votes)
        votes = Votes(**{key: values.copy() for key, values in votes.arrays().items()})
        batches += 1
    assert batches > 1
    assert finalize(votes, estimator).same_results(certified(name))


def test_votes_stop_at_looks_and_at_the_first_one_where_the_class_is_wrong(name):
    estimator = Settings(name, n=N).estimator_for(NOISE)
    made = certified(name, labels=torch.full((5,), 2))
    assert np.array_equal(made.votes, np.full(5, estimator.looks[0]))
    assert set(certified(name).votes.tolist()) <= set(estimator.looks)
    assert (len(estimator.looks) > 1) == estimator.stops_early


def test_too_few_votes_are_refused_by_the_library_and_a_spec(name):
    noise = {"family": "rotation", "sigma": NOISE.sigma}
    settings = {"perturbation": noise, "estimator": name, "n": 4}
    with pytest.raises(InputError, match="can decide nothing"):
        certified(name, n=4)
    with pytest.raises(certifl.errors.SpecError, match="can decide nothing"):
        with_settings({"data": {"name": "digits"}, "certification": settings})
    least = Settings(name, n=N).estimator_for(NOISE).least_votes()
    assert Settings(name, n=least).estimator_for(NOISE).decides()


def test_parameters_of_other_estimators_are_refused(name):
    taken = ESTIMATORS.rows[name].parameters.model_fields
    for parameter, value in {"keep": "curve", "reach": 0.5}.items():
        if parameter in taken:
            assert verify(certified(name, **{parameter: value})) == []
        else:
            with pytest.raises(InputError, match=f"{name} has no parameter '{parameter}'"):
                certified(name, **{parameter: value})
