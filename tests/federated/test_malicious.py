"""Malicious clients: what robust aggregation withstands and where it breaks; training goes on."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from algorithm_cases import CASES
from certifl.federated import ClientState, FedAvg, Local, Mixture, Personalized, state_of, train
from certifl.federated.aggregation import Clip, Krum, Mean, Median, TrimmedMean
from certifl.federated.averaging import average_models
from certifl.runs.checkpoints import Checkpoints
from tiny_federation import TinyNet, assert_same, clients, differ, training, without_seconds
from tiny_updates import result, updates

honest_and_wrong = st.integers(1, 12).flatmap(
    lambda n: st.tuples(
        st.lists(st.floats(-10, 10), min_size=n, max_size=n),
        st.lists(st.floats(-1e30, 1e30), min_size=0, max_size=n - 1),
    )
)


@given(honest_and_wrong)
@settings(max_examples=150)
def test_a_median_stays_among_honest_values_while_they_are_more_than_half(values):
    honest, wrong = values
    found = result(Median(), updates(*wrong, *honest)).item()
    assert min(honest) <= found <= max(honest)


@given(honest_and_wrong, st.randoms(use_true_random=False))
@settings(max_examples=150)
def test_a_trimmed_mean_stays_among_honest_values_up_to_its_share(values, order):
    honest, wrong = values
    sent = [*honest, *wrong]
    order.shuffle(sent)
    rule = TrimmedMean(len(wrong) / len(sent))
    found = result(rule, updates(*sent)).item()
    assert min(honest) - 1e-9 <= found <= max(honest) + 1e-9


def test_breakdown_points():
    assert result(Median(), updates(1, 2, 3, 1e9, 1e9)).item() == 3
    assert result(Median(), updates(1, 2, 1e9, 1e9, 1e9)).item() == 1e9
    assert result(TrimmedMean(0.2), updates(*range(9), 1e9)).item() < 10
    assert result(TrimmedMean(0.1), updates(*range(8), 1e9, 1e9)).item() > 1e6
    colluding = [[1e6, 1e6]] * 2
    points = np.random.default_rng(0).normal(size=(5, 2)).tolist()
    assert np.linalg.norm(result(Krum(2 / 7), updates(*points, *colluding))) < 10
    assert np.linalg.norm(result(Krum(2 / 7), updates(*points[:2], *colluding * 3))) > 1e5
    assert result(Mean(), updates(*range(9), 1e9)).item() > 1e7


ATTACKS = {
    "sign flip": lambda model, center, drawn: {
        k: center[k] - 10 * (v - center[k]) for k, v in model.items()
    },
    "huge": lambda model, center, drawn: {k: v * 1e6 for k, v in model.items()},
    "random": lambda model, center, drawn: {
        k: 10 * torch.randn(v.shape, generator=drawn) for k, v in model.items()
    },
}


def attacked_round(attack, wrong):
    """A round of FedAvg in which some send what an attack makes of their honest model."""
    local, data = training(rounds=1), clients(10)
    server = FedAvg().init(state_of(TinyNet()))
    sent = []
    for client in range(10):
        update, _ = FedAvg().client_round(server, ClientState(), data[client], local)
        if client in wrong:
            drawn = torch.Generator().manual_seed(client)
            floats = {k: v for k, v in update.model.items() if v.is_floating_point()}
            floats.pop("norm.running_var")
            planted = ATTACKS[attack](floats, server.parts["model"], drawn)
            update = replace(update, model={**update.model, **planted})
        sent.append(update)
    return server, sent


def length(one, two):
    keys = [k for k, v in one.items() if v.is_floating_point()]
    return float(sum(((one[k] - two[k]) ** 2).sum() for k in keys)) ** 0.5


@pytest.mark.parametrize("attack", ATTACKS)
def test_planted_attackers_destroy_the_mean_and_nothing_else(attack):
    server, sent = attacked_round(attack, wrong=(0, 4, 7))
    honest = average_models([sent[client] for client in (1, 2, 3, 5, 6, 8, 9)])
    spread = length(honest, server.parts["model"])
    for name, rule in {
        "mean": Mean(),
        "median": Median(),
        "trimmed-mean": TrimmedMean(0.3),
        "krum": Krum(0.3),
        "multi-krum": Krum(0.3, keep=5),
        "clip": Clip(1.0),
    }.items():
        off = length(average_models(rule(server, sent)), honest)
        if name == "mean":
            assert off > 1.5 * spread, (name, off, spread)
        elif name == "clip":  # three of ten, two lengths of at most 1 each way
            assert off < 2.0, (name, off, spread)
        else:
            assert off < 1.0 * spread, (name, off, spread)


@pytest.mark.parametrize(
    "algorithm", [Local(), Mixture(0.3), Personalized(FedAvg(), epochs=1)], ids=lambda a: a.name
)
@pytest.mark.parametrize("rule", [Median(), Krum(0.2, keep=3), Clip(1e6)], ids=lambda r: r.name)
def test_every_algorithm_trains_with_every_rule_and_resumes(algorithm, rule, tmp_path):
    def run(folder, **options):
        data, local = clients(5), training(rounds=2)
        return train(algorithm, TinyNet(), data, local, Checkpoints(folder), rule=rule, **options)

    whole = run(tmp_path / "whole")

    def stop(progress):
        if (progress.round, progress.client) == (1, 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "resumed", progress=stop)
    resumed = run(tmp_path / "resumed")
    assert resumed.files == whole.files
    assert without_seconds(resumed.history) == without_seconds(whole.history)
    plain = train(
        algorithm, TinyNet(), clients(5), training(rounds=2), Checkpoints(tmp_path / "plain")
    )
    if algorithm.name == "local" or rule == Clip(1e6):
        assert_same(whole.server(), plain.server())
    else:
        assert differ(whole.server()["model"], plain.server()["model"])


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_no_algorithm_trips_over_a_rule(case, tmp_path):
    rule = Clip(0.5, Krum(0.2, keep=3))
    stored = train(
        case, TinyNet(), clients(5), training(rounds=2), Checkpoints(tmp_path), rule=rule
    )
    assert all("left_out" not in entry for entry in stored.history)
