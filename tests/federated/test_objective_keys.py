"""Objectives in a spec, in checkpoints and in lists, and what they refuse."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from certifl import rng as streams
from certifl.errors import CertiflError, InputError, SpecError, StoreMismatch
from certifl.experiments.run import Options, run
from certifl.federated import FedAvg, LocalTraining, train
from certifl.federated.batches import Batch
from certifl.federated.objectives import OBJECTIVES, Consistency, Macer, SmoothAdv, Stability
from certifl.perturbations import PixelNoise
from certifl.runs.checkpoints import Checkpoints
from certifl.smoothing.laws import UNIFORM, Law
from certifl.spec import load, with_settings
from certifl.study.setup import label_of
from tiny_federation import SCHEDULE, Noise, TinyNet, client_data
from tiny_study import VALUES, cli, spec

PIXEL = PixelNoise(0.3)


@pytest.mark.parametrize(
    "objective",
    [
        *(kind() for kind in OBJECTIVES.values()),
        Consistency(3, 2.5, 0.0),
        SmoothAdv(4, 0.5, 1),
        Macer(2, 3.0, 4.0, 1.0),
        Stability(0.0),
    ],
    ids=str,
)
def test_descriptions_give_the_equal_objective_back(objective):
    table = OBJECTIVES.describe(objective)
    assert OBJECTIVES.build(table) == objective
    assert table["name"] == objective.name
    assert OBJECTIVES[objective.name] is type(objective)
    assert with_settings(VALUES | {"objective": table}).build_objective() == objective


@pytest.mark.parametrize(
    ("kind", "options", "word"),
    [
        (Consistency, {"copies": 0}, "copies = 0"),
        (Consistency, {"copies": 2.0}, "copies = 2.0"),
        (Consistency, {"weight": -1.0}, "weight = -1.0"),
        (Consistency, {"entropy": float("nan")}, "entropy = nan"),
        (SmoothAdv, {"copies": 0}, "copies = 0"),
        (SmoothAdv, {"epsilon": -0.1}, "epsilon = -0.1"),
        (SmoothAdv, {"steps": 0}, "steps = 0"),
        (Macer, {"copies": True}, "copies = True"),
        (Macer, {"weight": float("inf")}, "weight = inf"),
        (Macer, {"gamma": 0}, "gamma = 0"),
        (Macer, {"beta": 0.0}, "beta = 0.0"),
        (Stability, {"weight": "2"}, "weight = '2'"),
    ],
)
def test_hyper_parameters_are_checked(kind, options, word):
    with pytest.raises(SpecError, match=word):
        kind(**options)
    with pytest.raises(SpecError, match=word):
        with_settings(VALUES | {"objective": {"name": kind.name, **options}})


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"name": "mixup"}, "objective: objective name = 'mixup' is unknown: choose one of aug"),
        ({"weight": 1.0}, "objective name = None"),
        ({"name": "macer", "lambda": 1.0}, "no parameter 'lambda': it has copies, weight"),
        ({"name": "augmented", "copies": 1}, "it has no parameters"),
        ("macer", "objective: must be a table, such as objective = { name"),
    ],
)
def test_a_spec_says_what_is_wrong_with_its_objective(value, words):
    with pytest.raises(SpecError, match=words):
        with_settings(VALUES | {"objective": value})


def test_an_objective_needs_a_perturbation_to_train_against():
    bare = {key: value for key, value in VALUES.items() if key != "augmentation"}
    macer = ["objective.name=macer"]
    with pytest.raises(SpecError, match="'macer' needs a perturbation to train against"):
        with_settings(bare, macer)
    personal = "algorithm={name='personalized', base='fedavg'}"
    tuned = "augmentation.personalized={family='pixel', sigma=0.25}"
    with_settings(bare, [*macer, personal, tuned])  # fine-tuning has one
    with_settings(bare, [*macer, "augmentation.federated=own"])


def test_the_default_leaves_old_studies_their_names():
    plain, named = spec(), spec("objective.name=augmented")
    assert (plain.hash(), plain.training_hash()) == (named.hash(), named.training_hash())
    other = spec("objective.name=consistency")
    heavier = spec("objective={name='consistency', weight=20.0}")
    names = {one.training_hash() for one in (plain, other, heavier)}
    assert len(names) == len({one.hash() for one in (plain, other, heavier)}) == 3


def test_labels_name_the_objective_where_it_is_not_the_papers():
    assert label_of(spec()) == "FedAvg"
    assert label_of(spec("objective.name=consistency")) == "FedAvg, consistency"
    mixture = "algorithm={name='mixture', personalization=0.5}"
    assert label_of(spec("objective.name=macer", mixture)) == "Mixture, λ = 0.5, MACER"


def test_the_list_shows_objectives():
    cli("list").fine("objectives augmented, consistency, smoothadv, macer, stability")


def test_a_run_trains_with_the_objective_of_its_spec(tmp_path):
    few = ("training.rounds=1", "certification.n=50", "certification.images=1")
    options = Options(tmp_path / "run")
    run(spec("objective={name='smoothadv', epsilon=0.5}", *few), options)
    assert load(tmp_path / "run" / "spec.toml").objective["epsilon"] == 0.5
    last = Checkpoints(tmp_path / "run" / "checkpoints" / "training").latest()
    assert last is not None
    assert last.identity["objective"] == repr(SmoothAdv(epsilon=0.5))
    with pytest.raises(CertiflError, match="another"):
        run(spec("objective.name=macer", *few), options)


def test_checkpoints_belong_to_an_objective(tmp_path):
    def trained(objective: Any, rounds: int) -> Any:
        schedule = replace(SCHEDULE, rounds=rounds, local_epochs=1)
        local = LocalTraining(TinyNet(), schedule, seed=1, augmentation=PIXEL, objective=objective)
        return train(FedAvg(), TinyNet(), [client_data(0)], local, Checkpoints(tmp_path))

    assert "objective" not in trained(None, 1).identity  # as before there were others
    with pytest.raises(StoreMismatch, match="objective: None stored, Macer"):
        trained(Macer(), 1)


def batch(augmentation: Any) -> Batch:
    data = client_data(0)
    generator = streams.generator(0, "noise")
    return Batch(data.images.float() / 255, data.labels, augmentation, generator)


def test_augmentations_without_a_law_serve_where_none_is_needed():
    for objective in (Macer(), SmoothAdv()):
        with pytest.raises(
            InputError, match=f"'{objective.name}' needs a perturbation with sigma"
        ):
            objective(TinyNet(), batch(Noise()))
    for objective in (Consistency(), Stability()):
        assert objective(TinyNet(), batch(Noise()))[0].isfinite()


@dataclass(frozen=True)
class Odd(Noise):
    """Noise with a law of its own, and perhaps without a derivative."""

    law: Law = UNIFORM
    norm: str = "l1"
    rounded: bool = False

    def apply(self, images: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        return images + (params.detach() if self.rounded else params)


@dataclass(frozen=True)
class Laplace:
    name: str = "laplace"


def test_balls_laws_and_samplers_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="attacks in l2, and radii of Odd are in l1 over 64"):
        SmoothAdv()(TinyNet(), batch(Odd()))
    with pytest.raises(InputError, match=r"the gradient of Odd\.apply in the parameters"):
        SmoothAdv()(TinyNet(), batch(Odd(norm="l2", rounded=True)))
    laplace: Any = Laplace()
    with pytest.raises(InputError, match="no radius for the law 'laplace'"):
        Macer()(TinyNet(), batch(Odd(law=laplace)))
