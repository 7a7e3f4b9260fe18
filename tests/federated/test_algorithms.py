"""Conformance: what holds for every algorithm in the table."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch

from algorithm_cases import CASES, INITIAL, all_rounds, light, one_round
from certifl.federated import (
    ALGORITHMS,
    ClientState,
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
from certifl.runs.checkpoints import Checkpoints
from tiny_federation import (
    TinyNet,
    assert_same,
    client_data,
    clients,
    differ,
    in_pieces,
    without_seconds,
)

MOMENTUM = ("reset", "keep")

every_algorithm = pytest.mark.parametrize("algorithm", CASES.values(), ids=CASES.keys())
either_momentum = pytest.mark.parametrize("momentum", MOMENTUM)


def test_every_row_of_the_table_is_tested():
    assert {case.name for case in CASES.values()} == set(ALGORITHMS)
    assert all(ALGORITHMS[case.name] is type(case) for case in CASES.values())


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
def test_nothing_received_is_mutated(algorithm):
    local = light(momentum_between_rounds="keep")
    server = algorithm.init(state_of(TinyNet()))
    server, states = one_round(algorithm, server, [ClientState()] * 2, [0, 1], local)
    before = copied(server.parts), [copied(state.parts) for state in states]
    data = client_data(0)
    images = data.images.clone()

    update, state = algorithm.client_round(server, states[0], data, local)
    sent = copied(update.parts)
    algorithm.aggregate(server, [update, replace(update, client=1)])
    algorithm.client_round(server, state, client_data(1), local)

    assert_same(server.parts, before[0])
    for state, parts in zip(states, before[1], strict=True):
        assert_same(state.parts, parts)
    assert torch.equal(data.images, images)
    assert_same(update.parts, sent)


@every_algorithm
@either_momentum
def test_the_order_in_which_clients_are_worked_on_changes_nothing(algorithm, momentum):
    local = light(momentum_between_rounds=momentum)
    server, states = all_rounds(algorithm, [0, 1, 2], local)
    # The same trainer object again: what the last client left in it must not leak either.
    again, other_states = all_rounds(algorithm, [2, 0, 1], local)
    assert_same(server.parts, again.parts)
    for state, other in zip(states, other_states, strict=True):
        assert_same(state.parts, other.parts)


@every_algorithm
def test_the_global_generator_is_neither_read_nor_disturbed(algorithm):
    local = light(rounds=1)
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
    one, two = light(rounds=1), light(rounds=1)
    two.seed += 1
    first = all_rounds(algorithm, [0, 1], one)
    second = all_rounds(algorithm, [0, 1], two)
    for a, b in zip(first[1], second[1], strict=True):
        assert differ(algorithm.deployed(first[0], a), algorithm.deployed(second[0], b))


@every_algorithm
@either_momentum
def test_a_resumed_training_is_the_uninterrupted_one(algorithm, momentum, tmp_path):
    def run(folder, progress=None):
        local, data = light(momentum_between_rounds=momentum), clients(2)
        return train(algorithm, TinyNet(), data, local, Checkpoints(folder), progress=progress)

    whole = run(tmp_path / "whole")
    resumed, stops = in_pieces(3, lambda stop: run(tmp_path / "resumed", stop))
    assert stops >= 1
    assert_same(resumed.server(), whole.server())
    for client in range(2):
        assert_same(resumed.client(client), whole.client(client))
    assert without_seconds(resumed.history) == without_seconds(whole.history)


@every_algorithm
def test_states_survive_storage_and_deploy_a_loadable_model(algorithm, tmp_path):
    local = light(rounds=1)
    server, states = all_rounds(algorithm, [0, 1], local)
    stored = train(algorithm, TinyNet(), clients(2), local, Checkpoints(tmp_path))
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
    after = algorithm.aggregate(server, equal).parts
    assert_same({part: after[part] for part in server.parts}, server.parts)


@every_algorithm
def test_many_equal_updates_move_the_model_like_one(algorithm):
    """What a robust rule hands on: the same parts from everybody."""
    local = light()
    server, states = one_round(
        algorithm, algorithm.init(INITIAL), [ClientState()] * 2, [0, 1], local
    )
    update, _ = algorithm.client_round(server, states[0], client_data(0), local)
    many = [replace(update, client=client) for client in range(5)]
    assert_same(
        {"model": algorithm.aggregate(server, many).parts["model"]},
        {"model": algorithm.aggregate(server, [update]).parts["model"]},
    )


@every_algorithm
def test_the_order_in_which_updates_arrive_hardly_matters(algorithm):
    local, data = light(), clients()
    server = algorithm.init(INITIAL)
    updates = [algorithm.client_round(server, ClientState(), one, local)[0] for one in data]
    forth, back = (algorithm.aggregate(server, some).parts for some in (updates, updates[::-1]))
    assert forth.keys() == back.keys()
    for part, held in forth.items():
        for name, value in held.items():
            torch.testing.assert_close(back[part][name], value, rtol=1e-5, atol=1e-6)


class Failing(list):
    """The clients' data; that of one client cannot be had from some moment on."""

    broken = None

    def __getitem__(self, index):
        if index == self.broken:
            raise RuntimeError("planted")
        return super().__getitem__(index)


@every_algorithm
def test_a_client_whose_update_does_not_arrive_counts_as_absent(algorithm, tmp_path):
    local, data = light(momentum_between_rounds="keep"), Failing(clients())

    def break_down(progress):
        data.broken = 1 if (progress.round, progress.client) == (0, 2) else data.broken
        data.broken = None if progress.round == 1 and progress.client == 2 else data.broken

    def without_1(round):
        return [0, 1, 2] if round == 0 else [0, 2]

    dropped, absent = (Checkpoints(tmp_path / name) for name in ("dropped", "absent"))
    failed = train(algorithm, TinyNet(), data, local, dropped, progress=break_down)
    missed = train(algorithm, TinyNet(), clients(), local, absent, participation=without_1)
    assert failed.history[1]["left_out"][0]["client"] == 1
    assert failed.files == missed.files


@every_algorithm
def test_a_client_that_misses_rounds_keeps_its_state(algorithm, tmp_path):
    def odd_rounds_without_client_1(round):
        return [0, 1, 2] if round % 2 == 0 else [2, 0]

    local = light(momentum_between_rounds="keep")
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
