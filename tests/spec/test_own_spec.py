"""Perturbations of clients in the spec: what they stand for, their names, what is wrong."""

from __future__ import annotations

import tomllib

import pytest

import tiny_study as tiny
from certifl.errors import SpecError
from certifl.federated.batches import PerClient
from certifl.spec import with_settings
from certifl.study.setup import label_of
from own_study import OWN, PIXEL, spec


def test_every_client_gets_its_own_and_toml_gives_it_back() -> None:
    made = spec()
    rotation, pixel, nothing = made.perturbations()
    assert (rotation.family, pixel.family, nothing) == ("rotation", "pixel", None)
    assert made.augmentations()[0] == PerClient((rotation, pixel, None))
    assert with_settings(tomllib.loads(made.to_toml())) == made
    assert made.hash() != spec([OWN[1]]).hash()
    assert label_of(made) == "FedAvg"


def test_own_without_exceptions_is_the_common_perturbation() -> None:
    """The same objects train, under the same name: nothing of an older study changes."""
    plain = spec(None, augmentation={"federated": tiny.ROTATION})
    short = spec(None)
    assert short.augmentations() == plain.augmentations()
    assert short.training_hash() == plain.training_hash()
    assert "own" not in plain.to_toml()


def test_the_training_is_named_by_what_augments_each_client() -> None:
    other = [{"clients": [1], "perturbation": {**PIXEL, "sigma": 0.2}}, OWN[1]]
    assert spec().training_hash() != spec(other).training_hash()
    nominal = {"federated": "none"}
    first, second = (spec(own, augmentation=nominal) for own in (OWN, other))
    assert first.hash() != second.hash()
    assert first.training_hash() == second.training_hash()
    assert label_of(first) == "FedAvg (nominal)"


@pytest.mark.parametrize(
    ("own", "settings", "says"),
    [
        ([*OWN, {"clients": [1], "perturbation": "none"}], [], "client 1 twice"),
        ([{"clients": [3], "perturbation": PIXEL}], [], "names client 3"),
        ([{"clients": [0, 1, 2], "perturbation": "none"}], [], "no client certifies anything"),
        ([{"clients": [], "perturbation": PIXEL}], [], "at least 1 item"),
        ([{"clients": [1], "perturbation": "same"}], [], '"none", or a table'),
        ([{**OWN[1], "noise": PIXEL}], [], "Allowed here: clients, perturbation, radii, reach"),
        (OWN, ["certification.radii=[0.1]"], "radii is in radians, but own certifies pixel"),
        (OWN, ["certification.estimator=scan", "certification.n=300"], "pixel is none"),
    ],
)
def test_what_cannot_be_meant_is_refused(own: object, settings: list[str], says: str) -> None:
    with pytest.raises(SpecError) as refused:
        spec(own, *settings)
    assert says in str(refused.value)


def test_radii_may_be_given_in_each_unit() -> None:
    own = [{**OWN[0], "radii": [0.05, 0.1]}, OWN[1]]
    settings = spec(own, "certification.radii=[0.2]").certification.settings
    assert settings(0).radii == (0.2,)
    assert settings(1).radii == (0.05, 0.1)
