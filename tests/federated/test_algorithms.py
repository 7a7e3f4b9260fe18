"""Conformance: what holds for every algorithm in the table."""

import json
from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch

from algorithm_cases import CASES, INITIAL, all_rounds, in_memory, light
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
from tiny_federation import TinyNet, assert_same, client_data, clients, differ, in_pieces

every_algorithm = pytest.mark.parametrize("name", CASES)


def test_every_row_of_the_table_is_tested():
    assert {case.name for case in CASES.values()} == set(ALGORITHMS)
    assert all(ALGORITHMS[case.name] is type(case) for case in CASES.values())


def copied(parts):
    return {
        part: {name: value.clone() for name, value in model.items()}
        for part, model in parts.items()
    }


@every_algorithm
def test_a_record_of_hyper_parameters_that_cannot_change(name):
    algorithm = CASES[name]
    assert algorithm == replace(algorithm)
    assert hash(algorithm) == hash(replace(algorithm))
    assert algorithm.deploys
    for option in fields(algorithm):
        with pytest.raises(FrozenInstanceError):
            setattr(algorithm, option.name, None)
    table = json.loads(json.dumps(describe(algorithm)))
    assert from_description(table) == algorithm
    assert None not in table.values()


@every_algorithm
def test_nothing_received_is_mutated(name):
    algorithm, (local, server, states) = CASES[name], in_memory(name)
    before = copied(server.parts), [copied(state.parts) for state in states]
    data = client_data(0)
    images = data.images.clone()

    server = replace(server, round=1)  # the last round of the schedule
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
def test_neither_the_order_of_clients_nor_the_global_generator_changes_anything(name):
    """With the same trainer again: what the last client left in it must not leak either."""
    local, server, states = in_memory(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        before = torch.get_rng_state()
        again, other_states = all_rounds(CASES[name], [2, 0, 1], local)
        assert torch.equal(torch.get_rng_state(), before)
    assert_same(server.parts, again.parts)
    for state, other in zip(states, other_states, strict=True):
        assert_same(state.parts, other.parts)


@every_algorithm
def test_the_seed_matters(name):
    algorithm, (_, server, states) = CASES[name], in_memory(name)
    local = light(momentum_between_rounds="keep")
    local.seed += 1
    other, changed = all_rounds(algorithm, [0, 1, 2], local)
    for a, b in zip(states, changed, strict=True):
        assert differ(algorithm.deployed(server, a), algorithm.deployed(other, b))


@every_algorithm
def test_a_resumed_training_is_the_one_in_memory_and_deploys_a_loadable_model(name, tmp_path):
    algorithm, (local, server, states) = CASES[name], in_memory(name)

    def run(stop):
        return train(algorithm, TinyNet(), clients(), local, Checkpoints(tmp_path), progress=stop)

    stored, stops = in_pieces(4, run)
    assert stops >= 1
    assert stored.number == server.round == total_rounds(algorithm, local)
    assert [entry["round"] for entry in stored.history] == list(range(stored.number))
    assert_same(server_state(stored).parts, server.parts)
    models = []
    for client, state in enumerate(states):
        assert_same(client_state(stored, client).parts, state.parts)
        models.append(deployed_model(algorithm, stored, client))
        assert_same(models[-1], algorithm.deployed(server, state))
        TinyNet().load_state_dict(models[-1])
    assert differ(models[0], models[1]) == algorithm.keeps_client_state


@every_algorithm
def test_equal_models_and_no_model_leave_the_server_as_it_is(name):
    algorithm, model = CASES[name], state_of(TinyNet(seed=3))
    server = algorithm.init(model)
    for updates in ([], [Update(0, 20.0, None, {})]):
        after = algorithm.aggregate(server, iter(updates))
        assert after.round == server.round + 1
        assert_same(after.parts, server.parts)
    equal = [Update(i, 10.0 + i, {k: v.clone() for k, v in model.items()}, {}) for i in range(7)]
    after = algorithm.aggregate(server, equal).parts
    assert_same({part: after[part] for part in server.parts}, server.parts)


@every_algorithm
def test_many_equal_updates_move_the_model_like_one_and_their_order_hardly_matters(name):
    """Equal parts from everybody are what a robust rule hands on."""
    algorithm, (local, _, _), data = CASES[name], in_memory(name), clients()
    server = algorithm.init(INITIAL)
    updates = [algorithm.client_round(server, ClientState(), one, local)[0] for one in data]
    many = [replace(updates[0], client=client) for client in range(5)]
    assert_same(
        {"model": algorithm.aggregate(server, many).parts["model"]},
        {"model": algorithm.aggregate(server, updates[:1]).parts["model"]},
    )
    forth, back = (algorithm.aggregate(server, some).parts for some in (updates, updates[::-1]))
    assert forth.keys() == back.keys()
    for part, held in forth.items():
        for key, value in held.items():
            torch.testing.assert_close(back[part][key], value, rtol=1e-5, atol=1e-6)


class Failing(list):
    """The clients' data; that of one client cannot be had from some moment on."""

    broken = None

    def __getitem__(self, index):
        if index == self.broken:
            raise RuntimeError("planted")
        return super().__getitem__(index)


@every_algorithm
def test_a_client_whose_update_does_not_arrive_counts_as_absent_and_keeps_its_state(
    name, tmp_path
):
    algorithm, local, data = CASES[name], in_memory(name)[0], Failing(clients())
    dropped, absent = (Checkpoints(tmp_path / name) for name in ("dropped", "absent"))
    states = []

    def break_down(progress):
        data.broken = 1 if (progress.round, progress.client) == (0, 2) else data.broken
        data.broken = None if progress.round == 1 and progress.client == 2 else data.broken

    def remember(progress):
        if progress.client == 0 and progress.round == 1:
            states.append(client_state(absent.latest(), 1))

    def without_1(round):
        return [0, 1, 2] if round == 0 else [2, 0]

    failed = train(algorithm, TinyNet(), data, local, dropped, progress=break_down)
    missed = train(
        algorithm, TinyNet(), clients(), local, absent, participation=without_1, progress=remember
    )
    assert failed.history[1]["left_out"][0]["client"] == 1
    assert failed.files == missed.files
    assert [entry["participants"] for entry in missed.history[:2]] == [[0, 1, 2], [0, 2]]
    assert all(entry["participants"] == [0, 1, 2] for entry in missed.history[2:])
    if algorithm.extra_rounds == 0:
        assert_same(client_state(missed, 1).parts, states[0].parts)
