"""Rounds in one process: order, history, resuming after a kill, mixing nothing up."""

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from certifl.errors import InputError, StoreMismatch, TooFewClients
from certifl.federated import (
    FedAvg,
    Local,
    LocalTraining,
    Mixture,
    Personalized,
    Schedule,
    server_state,
    state_of,
    total_rounds,
    train,
)
from certifl.runs.checkpoints import Checkpoints
from tiny_federation import (
    SCHEDULE,
    Noise,
    TinyNet,
    assert_same,
    client_data,
    clients,
    federate,
    training,
    without_seconds,
)

light = {"rounds": 2, "local_epochs": 1}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return federate(tmp_path_factory.mktemp("finished"), local=training(**light))


@pytest.fixture
def copied(finished, tmp_path):
    return Path(shutil.copytree(finished.path.parent, tmp_path / "copied"))


def go(folder, algorithm=None, data=None, local=None, **options):
    return federate(folder, algorithm, data, local or training(**light), **options)


def test_the_initial_model_is_the_one_given(tmp_path):
    model = TinyNet(seed=4)
    before = state_of(model)

    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(FedAvg(), model, clients(), training(), Checkpoints(tmp_path), progress=stop)
    assert_same(Checkpoints(tmp_path).latest().server()["model"], before)
    assert_same(state_of(model), before)


def test_history_says_who_took_part_and_how_it_went(tmp_path):
    stored = go(tmp_path, participation=lambda round: [2, 0] if round else [1])
    assert stored.history == Checkpoints(tmp_path).history()
    assert [entry["round"] for entry in stored.history] == [0, 1]
    assert [entry["participants"] for entry in stored.history] == [[1], [0, 2]]
    for entry in stored.history:
        assert [row["client"] for row in entry["clients"]] == entry["participants"]
        assert 0 < sum(row["seconds"] for row in entry["clients"]) <= entry["seconds"]
        for row in entry["clients"]:
            assert row["loss"] > 0
            assert 0 <= row["accuracy"] <= 1


def test_clients_may_be_named_in_any_order_and_loaded_on_access(tmp_path, finished):
    class Lazy:
        loaded = 0

        def __len__(self):
            return 3

        def __getitem__(self, index):
            Lazy.loaded += 1
            return clients()[index]

    stored = go(tmp_path, data=Lazy(), participation=lambda _: (2, 1, 0, 2))
    assert Lazy.loaded == 3 * 2
    assert_same(stored.server(), finished.server())
    assert without_seconds(stored.history) == without_seconds(finished.history)


def test_progress_is_reported_after_every_client(tmp_path):
    seen = []
    local = training(rounds=1, local_epochs=1)
    go(tmp_path, Personalized(FedAvg(), epochs=1), local=local, progress=seen.append)
    assert [(p.round, p.client, p.done) for p in seen] == [
        (round, client, client + 1) for round in range(2) for client in range(3)
    ]
    assert {(p.rounds, p.participants) for p in seen} == {(2, 3)}
    assert all(set(p.metrics) == {"loss", "accuracy"} for p in seen)


def test_a_finished_training_returns_at_once(finished):
    folder = finished.path.parent
    again = go(folder, progress=lambda _: pytest.fail("a client was trained again"))
    assert again.path == finished.path
    assert again.history == finished.history
    assert total_rounds(FedAvg(), training(**light)) == again.number == server_state(again).round


def test_a_damaged_round_is_trained_again_to_the_same_bytes(finished, copied, caplog):
    (copied / finished.path.name / "server.safetensors").write_bytes(b"nothing")
    with caplog.at_level(logging.WARNING):
        again = go(copied)
    assert "damaged" in caplog.text
    assert again.files == finished.files
    assert again.damage() is None
    for name in again.files:
        assert (again.path / name).read_bytes() == (finished.path / name).read_bytes()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"algorithm": Local()}, "algorithm: {'name': 'fedavg'"),
        ({"data": clients(4)}, "clients: 3 stored, 4 requested"),
        ({"local": training(**light, lr=0.01)}, "schedule: .*'lr': 0.05"),
        (
            {"local": training(**light, augmentation=Noise(0.7))},
            r"augmentation: Noise\(sigma=0.1\) stored",
        ),
    ],
    ids=["algorithm", "clients", "schedule", "augmentation"],
)
def test_a_folder_of_another_training_is_refused(changes, said, finished):
    with pytest.raises(StoreMismatch, match=said):
        go(finished.path.parent, **changes)


def test_another_seed_or_initial_model_is_another_training(finished):
    local, folder = training(**light), finished.path.parent
    with pytest.raises(StoreMismatch, match="initial_model: "):
        train(FedAvg(), TinyNet(seed=1), clients(), local, Checkpoints(folder))
    local.seed = 6
    with pytest.raises(StoreMismatch, match="seed: 5 stored, 6 requested"):
        go(folder, local=local)


def test_beginning_from_an_unrelated_training_is_refused(tmp_path, finished):
    for algorithm in (Local(), Personalized(Local())):
        with pytest.raises(StoreMismatch, match="cannot be resumed"):
            go(tmp_path, algorithm, start_from=Checkpoints(finished.path.parent))
        assert Checkpoints(tmp_path).latest() is None


def test_a_finished_training_can_be_taken_over_whole(tmp_path, copied):
    first = go(copied)
    never = {"progress": lambda _: pytest.fail("a client was trained again")}
    taken = go(tmp_path / "2", start_from=Checkpoints(copied), **never)
    assert taken.files == first.files
    assert taken.damage() is None
    # Independent from then on, although files are linked.
    (first.path / "server.safetensors").unlink()
    assert taken.damage() is None


def test_an_empty_origin_is_no_origin(tmp_path, finished):
    stored = go(tmp_path / "new", start_from=Checkpoints(tmp_path / "empty"))
    assert_same(stored.server(), finished.server())


def test_a_diverging_client_stops_the_training_and_keeps_finished_rounds(tmp_path):
    class Poisoned:
        good = True

        def __len__(self):
            return 2

        def __getitem__(self, index):
            return client_data(index)

    class Spoiling(Noise):
        def apply(self, images, params):
            return images + params if Poisoned.good else images * float("nan")

    def spoil_later(progress):
        Poisoned.good = not (progress.round == 1 and progress.client == 0)

    local = training(**light, augmentation=Spoiling())
    with pytest.raises(TooFewClients, match=r"Round 1 .*client 1 \(its training diverged"):
        federate(tmp_path, Local(), Poisoned(), local, progress=spoil_later, min_clients=2)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["round-00000", "round-00001"]
    Poisoned.good = True
    resumed = federate(tmp_path, Local(), Poisoned(), local)
    whole = federate(tmp_path / "whole", Local(), Poisoned(), local)
    assert resumed.files == whole.files


def test_wrong_clients_are_named(tmp_path):
    with pytest.raises(InputError, match=r"clients\[0\] is the data of client 1"):
        federate(tmp_path / "1", data=clients()[1:])
    with pytest.raises(InputError, match=r"participants of round 0 include clients \[7\]"):
        federate(tmp_path / "2", participation=lambda _: [0, 7])


def test_memory_does_not_grow_with_clients(tmp_path):
    """The peak of memory, after what is loaded on first use: the same for 3 clients and for 9."""
    psutil = pytest.importorskip("psutil")
    size = 1_000_000  # weights, 4 MB

    def model():
        return nn.Sequential(nn.Flatten(), nn.Linear(64, size // 64), nn.Linear(size // 64, 3))

    def peak(count):
        process = psutil.Process()
        most = 0

        def watch(_):
            nonlocal most
            most = max(most, process.memory_info().rss)

        data = [client_data(client, images=4) for client in range(count)]
        schedule = Schedule(2, 1, 8, 0.01, momentum=0.9, momentum_between_rounds="keep")
        local = LocalTraining(model(), schedule, seed=0)
        folder = Checkpoints(tmp_path / f"{count}")
        train(Mixture(0.5), model(), data, local, folder, progress=watch)
        return most

    peak(2)  # what is loaded on first use
    few = peak(3)
    # Six more clients with a model and momentum each would be 48 MB more.
    assert peak(9) - few < 24e6


def test_any_device_string_of_this_machine_works(tmp_path):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    schedule = replace(SCHEDULE, **light)
    local = LocalTraining(
        TinyNet(), schedule, seed=5, augmentation=Noise(), device=torch.device(device)
    )
    data = [client.to(device) for client in clients()]
    stored = federate(tmp_path, Mixture(0.5), data, local)
    assert {value.device.type for value in stored.server()["model"].values()} == {"cpu"}
