"""Client-level privacy: what the server sums, how noisy it is, who takes part."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from certifl.errors import InputError, ModelError, SpecError
from certifl.federated import (
    FedAvg,
    LocalTraining,
    Mixture,
    ModelState,
    Personalized,
    ServerState,
    Update,
    deployed_model,
    server_state,
    train,
)
from certifl.federated.privacy import Budget, ClientLevel, check_algorithm
from certifl.runs.checkpoints import Checkpoints
from private_federation import KEY, SCHEDULE, client_training, models, plain_training
from tiny_federation import TinyNet, assert_same, clients, differ, without_seconds

pytest.importorskip("opacus", reason="needs the extra [dp]")

RULE = ClientLevel(max_norm=0.5, noise_multiplier=0.0, rate=0.25, clients=8, key=KEY)
START = {"a": torch.linspace(-1, 1, 6).reshape(2, 3), "b": torch.ones(4)}


def moved(client: int, length: float) -> Update:
    """A client whose model lies so far from the start, in a direction of its own."""
    drawn = torch.Generator().manual_seed(client)
    change = {
        n: torch.randn(v.shape, generator=drawn, dtype=torch.float64) for n, v in START.items()
    }
    scale = length / math.sqrt(sum(float(v.square().sum()) for v in change.values()))
    return Update(client, 1.0, {n: (START[n] + scale * v).float() for n, v in change.items()}, {})


def result(rule: ClientLevel, updates: list[Update], round: int = 0) -> ModelState:
    """The one model that the rule hands on."""
    made = list(rule(ServerState(round, {"model": START}), iter(updates)))
    assert len(made) == 1
    assert made[0].model is not None
    return made[0].model


def distance(left: ModelState, right: ModelState) -> float:
    return math.sqrt(sum(float((left[n] - right[n]).double().square().sum()) for n in left))


def test_changes_are_clipped_summed_and_divided_by_a_fixed_number():
    updates = [moved(1, 0.2), moved(4, 3.0)]
    wanted = {}
    for name, start in START.items():
        near, far = (update.model[name].double() - start for update in updates)
        wanted[name] = start + (near + far * (0.5 / 3.0)) / (0.25 * 8)
    found = result(RULE, updates)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length", [0.1, 0.5, 7.0, 1e6])
def test_one_client_more_moves_the_model_by_no_more_than_its_share(length):
    others = [moved(client, 2.0) for client in range(3)]
    change = distance(result(RULE, [*others, moved(3, length)]), result(RULE, others))
    share = 0.5 / (0.25 * 8)
    assert change <= share * (1 + 1e-5)
    assert change == pytest.approx(min(length, 0.5) / (0.25 * 8), rel=1e-3)


def test_a_client_whose_model_is_not_finite_counts_as_none():
    others, broken = [moved(0, 0.3)], moved(1, 1.0)
    broken.model["b"][2] = math.nan
    assert_same(result(RULE, [*others, broken]), result(RULE, others))


def test_noise_is_added_also_where_nobody_took_part():
    # 100 000 coordinates: the standard deviation is known to about 0.3 per cent.
    start = {"a": torch.zeros(100_000)}
    rule = replace(RULE, noise_multiplier=1.3)
    (update,) = rule(ServerState(0, {"model": start}), iter([]))
    noise = update.model["a"].double()
    assert float(noise.std()) == pytest.approx(1.3 * 0.5 / (0.25 * 8), rel=0.012)
    (later,) = rule(ServerState(1, {"model": start}), iter([]))
    correlation = np.corrcoef(noise.numpy(), later.model["a"].numpy())[0, 1]
    assert abs(correlation) < 4.4 / math.sqrt(100_000)


def test_everybody_takes_part_with_the_same_probability():
    rule = replace(RULE, rate=0.3, clients=40)
    drawn = np.zeros((3000, 40))
    for round in range(3000):
        drawn[round, rule.participants(round)] = 1
    # Binomial(40, 0.3): mean 12, variance 8.4.
    sizes = drawn.sum(1)
    assert abs(sizes.mean() - 12) < 4.4 * math.sqrt(8.4 / 3000)
    assert abs(sizes.var() - 8.4) < 4.4 * 8.4 * math.sqrt(2 / 3000)
    assert np.abs(drawn.mean(0) - 0.3).max() < 4.6 * math.sqrt(0.21 / 3000)
    assert replace(rule, rate=1.0).participants(7) == list(range(40))
    assert replace(rule, key=b"other").participants(0) != rule.participants(0)


def test_without_noise_and_clipping_it_is_federated_averaging(tmp_path):
    free = Budget(max_norm=1e6, delta=1e-3, noise_multiplier=0.0)
    private = client_training(FedAvg(), tmp_path / "a", budget=free, rate=1.0)
    plain = plain_training(tmp_path / "b")
    for name, value in server_state(plain).parts["model"].items():
        found = server_state(private).parts["model"][name]
        torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("algorithm", [Mixture(0.4), Personalized(FedAvg(), epochs=1)])
def test_training_is_the_same_after_an_interruption(algorithm, tmp_path):
    whole = client_training(algorithm, tmp_path / "whole")
    stops = [0]

    def stop(now):
        stops[0] += 1
        if stops[0] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        client_training(algorithm, tmp_path / "cut", progress=stop)
    cut = client_training(algorithm, tmp_path / "cut")
    assert_same(models(algorithm, cut), models(algorithm, whole))
    assert without_seconds(cut.history) == without_seconds(whole.history)


def test_fine_tuning_adds_no_noise_and_is_not_counted(tmp_path):
    base = client_training(FedAvg(), tmp_path / "a")
    tuned = client_training(Personalized(FedAvg(), epochs=1), tmp_path / "b")
    assert_same(server_state(tuned).parts, server_state(base).parts)
    assert tuned.history[-1]["epsilon"] == base.history[-1]["epsilon"]
    own = deployed_model(Personalized(FedAvg(), epochs=1), tuned, 0)
    assert differ(own, server_state(base).parts["model"])


def test_the_history_holds_nothing_that_clients_measured(tmp_path):
    stored = client_training(FedAvg(), tmp_path)
    rows = [row for entry in stored.history for row in entry["clients"]]
    assert rows
    assert all(set(row) == {"client", "seconds", "epsilon"} for row in rows)


def test_participants_are_those_that_are_accounted_for(tmp_path):
    stored = client_training(FedAvg(), tmp_path / "a", rate=0.4)
    rule = ClientLevel(0.5, 1.2, 0.4, 3, KEY)
    assert [e["participants"] for e in stored.history] == [rule.participants(r) for r in range(3)]
    with pytest.raises(InputError, match="draws the participants itself"):
        client_training(FedAvg(), tmp_path / "b", participation=lambda round: [0])


def test_batchnorm_is_refused(tmp_path):
    training = LocalTraining(TinyNet(), SCHEDULE, seed=1)
    with pytest.raises(ModelError, match="running statistics that would be averaged without"):
        train(FedAvg(), TinyNet(), clients(2), training, Checkpoints(tmp_path), rule=RULE)


def test_more_than_a_model_is_refused():
    more = replace(moved(0, 0.1), extra={"control": {"a": torch.zeros(1)}})
    for update in (more, Update(0, 1.0, None, {}), Update(0, 1.0, {"a": START["a"]}, {})):
        with pytest.raises(InputError, match="Client 0 sent something other"):
            result(RULE, [update])


@pytest.mark.parametrize(
    ("algorithm", "reason"),
    [
        ({"name": "local"}, "send nothing"),
        ({"name": "scaffold"}, "control variates"),
        ({"name": "fedavg", "weighting": "size"}, "fixed denominator"),
        ({"name": "personalized", "base": {"name": "local"}}, "send nothing"),
    ],
)
def test_algorithms_that_would_not_be_protected_are_refused(algorithm, reason):
    with pytest.raises(SpecError, match=reason):
        check_algorithm(algorithm, "client")
