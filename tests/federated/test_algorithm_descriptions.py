"""Algorithms and schedules as tables: what is read, what is refused and how."""

from __future__ import annotations

import tomllib
from dataclasses import replace

import pytest

from certifl.errors import SpecError
from certifl.federated import FedAvg, Local, Personalized, Schedule, from_description
from tiny_federation import SCHEDULE


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
        ({"name": "fedprox", "mu": -0.1}, "mu = -0.1.*from 0"),
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
