"""Objectives, algorithms and schedules as tables: what is read, and what is refused and how."""

import tomllib
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from certifl import rng as streams
from certifl.errors import CertiflError, InputError, SpecError, StoreMismatch
from certifl.experiments.run import Options, run
from certifl.federated import (
    FedAvg,
    Local,
    LocalTraining,
    Personalized,
    Schedule,
    from_description,
    train,
)
from certifl.federated.batches import Batch
from certifl.federated.objectives import OBJECTIVES, Consistency, Macer, SmoothAdv, Stability
from certifl.perturbations import PixelNoise
from certifl.runs.checkpoints import Checkpoints
from certifl.smoothing.laws import UNIFORM, Law
from certifl.spec import load, with_settings
from certifl.study.setup import label_of
from tiny_federation import SCHEDULE, Noise, TinyNet, client_data
from tiny_study import VALUES, spec

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


def test_a_run_trains_with_the_objective_of_its_spec(tmp_path):
    few = ("training.rounds=1", "certification.n=50", "certification.images=1")
    options = Options(tmp_path / "run")
    run(spec("objective={name='smoothadv', epsilon=0.5}", *few), options)
    assert load(tmp_path / "run" / "spec.toml").objective["epsilon"] == 0.5
    last = Checkpoints(tmp_path / "run" / "checkpoints" / "training").latest()
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
    with pytest.raises(InputError, match="no radius for the distribution 'laplace'"):
        Macer()(TinyNet(), batch(Odd(law=laplace)))


def test_descriptions_from_toml():
    table = tomllib.loads('name = "personalized"\nepochs = 3\nbase = { name = "fedavg" }')
    assert from_description(table) == Personalized(FedAvg(), epochs=3)
    assert from_description({"name": "personalized", "base": "local"}) == Personalized(Local())
    assert from_description("fedavg") == FedAvg()


@pytest.mark.parametrize(
    ("description", "said"),
    [
        ({"name": "fedavgg"}, "'fedavgg' is unknown.*local, fedavg, personalized, mixture"),
        ({}, "None is unknown"),
        ({"name": ["fedavg"]}, "is unknown"),
        ({"name": "fedavg", "weights": 1}, "fedavg has no parameter 'weights'.*weighting"),
        ({"name": "local", "lr": 1}, "local has no parameter 'lr'"),
        ({"name": "fedavg", "weighting": "sizes"}, "weighting = 'sizes'.*size, uniform"),
        ({"name": "mixture"}, "mixture needs the parameter 'personalization'"),
        ({"name": "fedprox", "mu": -0.1}, "mu = -0.1.*at least 0"),
        ({"name": "ditto", "mu": float("inf")}, "mu = inf"),
        ({"name": "scaffold", "server_lr": 0}, "server_lr = 0.*above 0"),
        ({"name": "fedavgm", "beta": 1}, "beta = 1.*to below 1"),
        ({"name": "fedadagrad", "server_lr": float("nan")}, "server_lr = nan"),
        ({"name": "l2gd", "personalization": 0}, "personalization = 0 .*above 0"),
        ({"name": "l2gd", "personalization": 0.5, "probability": 1}, "probability = 1 .*below 1"),
        ({"name": "l2gd", "personalization": 0.5, "probability": 0}, "probability = 0 .*above 0"),
        ({"name": "apfl", "alpha": 2}, "alpha = 2"),
        ({"name": "apfl", "adaptive": 1}, "adaptive = 1.*true or false"),
        ({"name": "fedbn", "layers": "group"}, "layers = 'group'.*all, batch"),
        ({"name": "fedrep", "head": 3}, "head = 3.*name of a part"),
        ({"name": "perfedavg", "inner_lr": -1}, "inner_lr = -1"),
        ({"name": "perfedavg", "approximation": "second"}, "approximation = 'second'"),
        ({"name": "mixture", "personalization": 1.5}, "personalization = 1.5.*from 0"),
        ({"name": "mixture", "personalization": float("nan")}, "personalization = nan"),
        ({"name": "mixture", "personalization": "0.5"}, "personalization = '0.5'"),
        ({"name": "mixture", "personalization": True}, "personalization = True"),
        ({"name": "personalized"}, "personalized needs the parameter 'base'"),
        ({"name": "personalized", "base": 3}, "base = 3"),
        ({"name": "personalized", "base": "fedavg", "epochs": 1.5}, "epochs = 1.5"),
        ({"name": "personalized", "base": "fedavg", "lr": 0}, "lr = 0.*above 0"),
        ({"name": "personalized", "base": {"name": "personalized", "base": "local"}}, "base ="),
    ],
)
def test_wrong_descriptions_name_the_key_and_what_is_allowed(description, said):
    with pytest.raises(SpecError, match=said):
        from_description(description)


@pytest.mark.parametrize(
    "change",
    [
        {"rounds": -1},
        {"local_epochs": 1.5},
        {"batch_size": -1},
        {"lr": 0.0},
        {"lr": float("inf")},
        {"momentum": 1.5},
        {"weight_decay": -0.1},
        {"decay_every": 0},
        {"decay_factor": 0},
        {"crop": -1},
        {"momentum_between_rounds": "forget"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_wrong_schedules_name_the_key(change):
    with pytest.raises(SpecError, match=next(iter(change))):
        replace(SCHEDULE, **change)


def test_the_rate_decays_over_the_whole_training():
    paper = Schedule(45, 2, 64, 0.1, decay_every=30)
    rates = [paper.lr_at(epoch) for epoch in range(paper.epochs)]
    assert rates[:30] == [0.1] * 30
    assert rates[30:60] == pytest.approx([0.01] * 30)
    assert rates[60:] == pytest.approx([0.001] * 30)
    assert replace(paper, decay_every=None).lr_at(89) == 0.1
