"""Conformance: what holds for every algorithm in the table, and the limits of each."""

from __future__ import annotations

import json
import tomllib
from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch

from certifl.errors import InputError, SpecError
from certifl.federated import (
    ALGORITHMS,
    ClientState,
    FedAvg,
    Local,
    Mixture,
    Personalized,
    Schedule,
    ServerState,
    Update,
    client_state,
    deployed_model,
    describe,
    from_description,
    server_state,
    state_of,
    total_rounds,
    train,
)
from certifl.federated.averaging import average_models
from certifl.store.checkpoints import Checkpoints
from tiny_federation import (
    SCHEDULE,
    TinyNet,
    assert_same,
    client_data,
    clients,
    differ,
    training,
    without_seconds,
)

CASES = {
    "local": Local(),
    "fedavg": FedAvg(),
    "fedavg by size": FedAvg(weighting="size"),
    "personalized": Personalized(FedAvg(), epochs=1),
    "personalized mixture": Personalized(Mixture(0.5), epochs=2, lr=0.01),
    "mixture": Mixture(personalization=0.3),
}
MOMENTUM = ("reset", "keep")

every_algorithm = pytest.mark.parametrize("algorithm", CASES.values(), ids=CASES.keys())
either_momentum = pytest.mark.parametrize("momentum", MOMENTUM)


def test_every_row_of_the_table_is_tested():
    assert {case.name for case in CASES.values()} == set(ALGORITHMS)
    assert all(ALGORITHMS[case.name] is type(case) for case in CASES.values())


def one_round(algorithm, server, states, order, local):
    """A round in memory, working on the clients in `order`."""
    data = clients(len(states))
    worked = {i: algorithm.client_round(server, states[i], data[i], local) for i in order}
    updates = [worked[i][0] for i in sorted(worked)]
    return algorithm.aggregate(server, updates), [worked[i][1] for i in range(len(states))]


INITIAL = state_of(TinyNet())


def all_rounds(algorithm, order, local):
    server = algorithm.init(INITIAL)
    states = [ClientState() for _ in order]
    for _ in range(total_rounds(algorithm, local)):
        server, states = one_round(algorithm, server, states, order, local)
    return server, states


def copied(parts):
    return {
        part: {name: value.clone() for name, value in model.items()}
        for part, model in parts.items()
    }


@every_algorithm
def test_a_record_of_hyper_parameters_that_cannot_change(algorithm):
    assert algorithm == replace(algorithm)
    assert hash(algorithm) == hash(replace(algorithm))
    assert algorithm.deploys
    for option in fields(algorithm):
        with pytest.raises(FrozenInstanceError):
            setattr(algorithm, option.name, None)


@every_algorithm
def test_a_description_gives_the_algorithm_back(algorithm):
    table = json.loads(json.dumps(describe(algorithm)))
    assert from_description(table) == algorithm
    assert None not in table.values()


@every_algorithm
@either_momentum
def test_nothing_received_is_mutated(algorithm, momentum):
    local = training(momentum_between_rounds=momentum, rounds=1)
    server = algorithm.init(state_of(TinyNet()))
    server, states = one_round(algorithm, server, [ClientState()] * 2, [0, 1], local)
    before = copied(server.parts), [copied(state.parts) for state in states]
    data = client_data(0)
    images = data.images.clone()

    update, state = algorithm.client_round(server, states[0], data, local)
    sent = None if update.model is None else copied({"model": update.model})
    algorithm.aggregate(server, [update, replace(update, client=1)])
    algorithm.client_round(server, state, client_data(1), local)

    assert_same(server.parts, before[0])
    for state, parts in zip(states, before[1], strict=True):
        assert_same(state.parts, parts)
    assert torch.equal(data.images, images)
    if sent is not None:
        assert_same({"model": update.model}, sent)


@every_algorithm
@either_momentum
def test_the_order_in_which_clients_are_worked_on_changes_nothing(algorithm, momentum):
    local = training(momentum_between_rounds=momentum, rounds=2)
    server, states = all_rounds(algorithm, [0, 1, 2], local)
    # The same trainer object again: what the last client left in it must not leak either.
    again, other_states = all_rounds(algorithm, [2, 0, 1], local)
    assert_same(server.parts, again.parts)
    for state, other in zip(states, other_states, strict=True):
        assert_same(state.parts, other.parts)


@every_algorithm
def test_the_global_generator_is_neither_read_nor_disturbed(algorithm):
    local = training(rounds=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        first = all_rounds(algorithm, [0, 1], local)
        after = torch.rand(1)
        torch.manual_seed(1)
        assert torch.equal(torch.rand(1), after)
        second = all_rounds(algorithm, [0, 1], local)
    assert_same(first[0].parts, second[0].parts)


@every_algorithm
def test_the_seed_matters(algorithm):
    one, two = training(rounds=1), training(rounds=1)
    two.seed += 1
    first = all_rounds(algorithm, [0, 1], one)
    second = all_rounds(algorithm, [0, 1], two)
    for a, b in zip(first[1], second[1], strict=True):
        assert differ(algorithm.deployed(first[0], a), algorithm.deployed(second[0], b))


@every_algorithm
@either_momentum
def test_a_resumed_training_is_the_uninterrupted_one(algorithm, momentum, tmp_path):
    def run(folder, progress=None):
        local = training(momentum_between_rounds=momentum)
        return train(
            algorithm, TinyNet(), clients(), local, Checkpoints(folder), progress=progress
        )

    whole = run(tmp_path / "whole")
    seen = 0

    def interrupt(progress):
        nonlocal seen
        seen += 1
        if seen % 4 == 0:
            raise KeyboardInterrupt

    interruptions = 0
    while True:
        try:
            resumed = run(tmp_path / "resumed", interrupt)
            break
        except KeyboardInterrupt:
            interruptions += 1
    assert interruptions >= 2
    assert_same(resumed.server(), whole.server())
    for client in range(3):
        assert_same(resumed.client(client), whole.client(client))
    assert without_seconds(resumed.history) == without_seconds(whole.history)


@every_algorithm
def test_states_survive_storage_and_deploy_a_loadable_model(algorithm, tmp_path):
    local = training(rounds=1)
    server, states = all_rounds(algorithm, [0, 1, 2], local)
    stored = train(algorithm, TinyNet(), clients(), local, Checkpoints(tmp_path))
    assert stored.number == server.round == total_rounds(algorithm, local)
    assert_same(server_state(stored).parts, server.parts)
    models = []
    for client, state in enumerate(states):
        assert_same(client_state(stored, client).parts, state.parts)
        models.append(deployed_model(algorithm, stored, client))
        assert_same(models[-1], algorithm.deployed(server, state))
        TinyNet().load_state_dict(models[-1])
    assert differ(models[0], models[1]) == algorithm.keeps_client_state


@every_algorithm
def test_a_round_in_which_no_model_arrives_changes_no_part(algorithm):
    server = algorithm.init(state_of(TinyNet()))
    for updates in ([], [Update(0, 20.0, None, {})]):
        after = algorithm.aggregate(server, iter(updates))
        assert after.round == server.round + 1
        assert_same(after.parts, server.parts)


@every_algorithm
def test_averaging_equal_models_changes_nothing(algorithm):
    model = state_of(TinyNet(seed=3))
    server = algorithm.init(model)
    equal = [Update(i, 10.0 + i, {k: v.clone() for k, v in model.items()}, {}) for i in range(7)]
    assert_same(algorithm.aggregate(server, equal).parts, server.parts)


@every_algorithm
def test_a_client_that_misses_rounds_keeps_its_state(algorithm, tmp_path):
    def odd_rounds_without_client_1(round):
        return [0, 1, 2] if round % 2 == 0 else [2, 0]

    local = training(momentum_between_rounds="keep", rounds=2)
    checkpoints = Checkpoints(tmp_path)
    states = []

    def remember(progress):
        if progress.client == 0 and progress.round == 1:
            states.append(client_state(checkpoints.latest(), 1))

    stored = train(
        algorithm,
        TinyNet(),
        clients(),
        local,
        checkpoints,
        participation=odd_rounds_without_client_1,
        progress=remember,
    )
    assert [entry["participants"] for entry in stored.history[:2]] == [[0, 1, 2], [0, 2]]
    assert [len(entry["participants"]) for entry in stored.history[2:]] == [3] * (
        algorithm.extra_rounds
    )
    if algorithm.extra_rounds == 0:
        assert_same(client_state(stored, 1).parts, states[0].parts)


# Averages.


def test_equal_models_are_given_back_bit_for_bit_whatever_weights_and_dtype():
    drawn = torch.Generator().manual_seed(0)
    values = torch.randn(1000, generator=drawn, dtype=torch.float64)
    values[:3] = torch.tensor([-0.0, 5e-324, 1.7e308])
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        finite = values.to(dtype)
        finite = finite[finite.isfinite()]
        for weighting in ("uniform", "size"):
            updates = [Update(i, 0.1 + i / 3, {"x": finite.clone()}, {}) for i in range(11)]
            assert_same(average_models(updates, weighting), {"x": finite})


def test_averages_are_means_and_counters_are_maxima():
    values = [torch.tensor([1.0, 5.0]), torch.tensor([2.0, 5.0]), torch.tensor([6.0, 2.0])]
    updates = [
        Update(
            i, weight, {"w": value, "steps": torch.tensor(i + 3), "on": torch.tensor(i == 1)}, {}
        )
        for i, (weight, value) in enumerate(zip((1.0, 1.0, 2.0), values, strict=True))
    ]
    uniform = average_models(updates)
    assert torch.equal(uniform["w"], torch.tensor([3.0, 4.0]))
    assert torch.equal(average_models(updates, "size")["w"], torch.tensor([3.75, 3.5]))
    assert torch.equal(uniform["steps"], torch.tensor(5))
    assert uniform["steps"].dtype == torch.int64
    assert torch.equal(uniform["on"], torch.tensor(True))


def test_sums_do_not_lose_small_numbers():
    # In float32, 1 + 1e-8 is 1: a sum in float32 over 1001 clients would miss the small ones.
    models = [torch.tensor([1e8])] + [torch.tensor([1.0])] * 1000
    updates = [Update(i, 1.0, {"w": model}, {}) for i, model in enumerate(models)]
    assert torch.equal(average_models(updates)["w"], torch.tensor([(1e8 + 1000) / 1001]))


def test_updates_are_consumed_one_at_a_time():
    alive = 0

    class Watched(dict):
        def __init__(self, *args):
            super().__init__(*args)
            nonlocal alive
            alive += 1

        def __del__(self):
            nonlocal alive
            alive -= 1

    most = 0

    def updates():
        nonlocal most
        for client in range(20):
            yield Update(client, 1.0, Watched({"w": torch.ones(3) * client}), {})
            most = max(most, alive)

    average_models(updates())
    assert most <= 3  # the first, the one just added, and the one on its way


def test_another_architecture_is_refused_by_name_of_the_client():
    good = Update(0, 1.0, {"w": torch.ones(2)}, {})
    for wrong in ({"w": torch.ones(3)}, {"v": torch.ones(2)}, {}):
        with pytest.raises(InputError, match="Client 4 sent"):
            average_models([good, Update(4, 1.0, wrong, {})])


def test_batchnorm_counters_stay_whole_numbers(tmp_path):
    stored = train(FedAvg(), TinyNet(), clients(), training(), Checkpoints(tmp_path))
    counter = stored.server()["model"]["norm.num_batches_tracked"]
    assert counter.dtype == torch.int64
    # The largest client: 20 images, batches of 8 + 8 + 4, two epochs, three rounds; each round
    # starts from the largest counter.
    assert counter.item() == 3 * 2 * 3


# Limits.


@either_momentum
def test_mixture_at_lambda_1_is_local_training_bit_for_bit(momentum):
    local = training(momentum_between_rounds=momentum)
    alone, own = all_rounds(Local(), [0, 1, 2], local)
    mixed, pulled = all_rounds(Mixture(personalization=1.0), [0, 1, 2], local)
    for a, b in zip(own, pulled, strict=True):
        assert_same(a.parts, b.parts)
        assert_same(Local().deployed(alone, a), Mixture(1.0).deployed(mixed, b))


def test_mixture_near_lambda_1_is_near_local_training():
    local = training(rounds=1)
    _, own = all_rounds(Local(), [0, 1], local)
    _, pulled = all_rounds(Mixture(1 - 1e-7), [0, 1], local)
    for a, b in zip(own, pulled, strict=True):
        for name, value in a.parts["model"].items():
            torch.testing.assert_close(b.parts["model"][name], value, atol=1e-4, rtol=1e-4)
    assert differ(own[0].parts["model"], pulled[0].parts["model"])


def test_mixture_at_lambda_0_is_the_pull_alone():
    """theta - theta_bar shrinks by (1 - 2 gamma) a step; the loss and its decay play no part."""
    local = training(rounds=5, momentum=0.0, lr=0.05, decay_every=None, weight_decay=0.1)
    average, start = state_of(TinyNet(seed=1)), state_of(TinyNet(seed=2))
    server = ServerState(1, {"model": average})
    data = client_data(0, images=16)
    _, state = Mixture(0.0).client_round(server, ClientState({"model": start}), data, local)
    steps = 2 * 2
    for name, _ in TinyNet().named_parameters():
        expected = average[name] + (1 - 2 * 0.05) ** steps * (start[name] - average[name])
        torch.testing.assert_close(state.parts["model"][name], expected)


def test_a_mixture_step_is_equation_5():
    lam, gamma, decay = 0.3, 0.1, 0.01
    local = training(
        model=torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3)),
        rounds=1,
        local_epochs=1,
        lr=gamma,
        weight_decay=decay,
        augmentation=None,
        batch_size=100,
    )
    drawn = torch.Generator().manual_seed(1)
    shapes = {"1.weight": (3, 64), "1.bias": (3,)}
    theta, bar = (
        {k: torch.randn(s, generator=drawn) * 0.1 for k, s in shapes.items()} for _ in range(2)
    )
    data = client_data(0)
    _, state = Mixture(lam).client_round(
        ServerState(0, {"model": bar}), ClientState({"model": theta}), data, local
    )
    images = data.images.flatten(1).float() / 255
    probabilities = torch.softmax(images @ theta["1.weight"].T + theta["1.bias"], 1)
    error = (probabilities - torch.nn.functional.one_hot(data.labels, 3)) / len(data)
    gradient = {"1.weight": error.T @ images, "1.bias": error.sum(0)}
    for name, value in theta.items():
        bracket = lam * (gradient[name] + decay * value) + 2 * (1 - lam) * (value - bar[name])
        torch.testing.assert_close(state.parts["model"][name], value - gamma * bracket)


def test_mixture_clients_keep_their_own_batchnorm_statistics(tmp_path):
    stored = train(Mixture(0.2), TinyNet(), clients(), training(), Checkpoints(tmp_path))
    means = [stored.client(i)["model"]["norm.running_mean"] for i in range(3)]
    assert not torch.equal(means[0], means[1])
    averaged = torch.stack(means).double().mean(0).float()
    torch.testing.assert_close(stored.server()["model"]["norm.running_mean"], averaged)


def test_a_smaller_lambda_keeps_clients_closer_together(tmp_path):
    spreads = []
    for lam in (1.0, 0.7, 0.3):
        stored = train(
            Mixture(lam), TinyNet(), clients(), training(), Checkpoints(tmp_path / f"{lam}")
        )
        weights = [stored.client(i)["model"]["head.weight"] for i in range(3)]
        spreads.append(torch.stack(weights).std(0).mean().item())
    assert spreads[0] > spreads[1] > spreads[2] > 0


@pytest.mark.parametrize("base", [Local(), FedAvg(), Mixture(0.5)], ids=lambda base: base.name)
def test_personalised_rounds_are_those_of_the_base(base, tmp_path):
    tuned = Personalized(base, epochs=1, lr=0.01)
    alone = train(base, TinyNet(), clients(), training(), Checkpoints(tmp_path / "base"))
    rounds = {}
    folder = Checkpoints(tmp_path / "whole")

    def remember(progress):
        if progress.round == SCHEDULE.rounds:
            rounds["last"] = folder.latest()
            states = [rounds["last"].client(i) for i in range(3)]
            rounds.setdefault("parts", (rounds["last"].server(), states))

    whole = train(tuned, TinyNet(), clients(), training(), folder, progress=remember)
    server, states = rounds["parts"]
    assert_same(server, alone.server())
    for client in range(3):
        assert_same(states[client], alone.client(client))

    reused = train(
        tuned,
        TinyNet(),
        clients(),
        training(),
        Checkpoints(tmp_path / "reused"),
        start_from=Checkpoints(tmp_path / "base"),
    )
    assert_same(reused.server(), whole.server())
    for client in range(3):
        assert_same(deployed_model(tuned, reused, client), deployed_model(tuned, whole, client))
        assert differ(deployed_model(tuned, reused, client), deployed_model(base, alone, client))
    assert without_seconds(reused.history) == without_seconds(whole.history)


def test_personalisation_has_its_own_rate_and_augmentation():
    local = training(rounds=1, momentum=0.0, weight_decay=0.0)
    server = replace(FedAvg().init(state_of(TinyNet())), round=1)
    start = server.parts["model"]

    def moved(algorithm, trainer):
        _, state = algorithm.client_round(server, ClientState(), client_data(0), trainer)
        tuned = state.parts["personalized"]
        return tuned["head.weight"] - start["head.weight"]

    small = moved(Personalized(FedAvg(), epochs=1, lr=1e-6), local)
    large = moved(Personalized(FedAvg(), epochs=1, lr=2e-6), local)
    torch.testing.assert_close(large, 2 * small, rtol=0.05, atol=1e-7)
    plain = moved(Personalized(FedAvg(), epochs=1), local)
    # The federated augmentation plays no part in fine-tuning, the personalisation's does.
    local.augmentation = None
    assert torch.equal(moved(Personalized(FedAvg(), epochs=1), local), plain)
    local.finetuning_augmentation = None
    assert not torch.equal(moved(Personalized(FedAvg(), epochs=1), local), plain)


# Descriptions and schedules.


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
        ({"name": "fedavg", "weights": 1}, "fedavg has no hyper-parameter 'weights'.*weighting"),
        ({"name": "local", "lr": 1}, "local has no hyper-parameter 'lr'"),
        ({"name": "fedavg", "weighting": "sizes"}, "weighting = 'sizes'.*size, uniform"),
        ({"name": "mixture"}, "mixture needs the hyper-parameter 'personalization'"),
        ({"name": "mixture", "personalization": 1.5}, "personalization = 1.5.*from 0"),
        ({"name": "mixture", "personalization": float("nan")}, "personalization = nan"),
        ({"name": "mixture", "personalization": "0.5"}, "personalization = '0.5'"),
        ({"name": "mixture", "personalization": True}, "personalization = True"),
        ({"name": "personalized"}, "personalized needs the hyper-parameter 'base'"),
        ({"name": "personalized", "base": 3}, "base = 3"),
        ({"name": "personalized", "base": "fedavg", "epochs": 0}, "epochs = 0"),
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
        {"rounds": 0},
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
