"""Worker processes: the same bits, and whatever happens to one of them."""

import multiprocessing
import pickle

import pytest
import torch
from torch import nn

import tiny_study as tiny
from algorithm_cases import CASES
from certifl.errors import InputError, SpecError
from certifl.experiments.run import Options
from certifl.experiments.run import run as run_study
from certifl.federated import ClientState, FedAvg, Mixture, state_of, train
from certifl.federated.workers import pack, unpack
from certifl.runs.checkpoints import Checkpoints
from faulty_clients import Misbehaving
from tiny_federation import (
    TinyNet,
    assert_same,
    client_data,
    clients,
    federate,
    training,
    without_seconds,
)

PATIENCE = 5.0  # seconds; clients here take some hundredths of one
LIGHT = {"rounds": 2, "local_epochs": 1}


def run(folder, algorithm, data=None, local=None, **options):
    return federate(folder, algorithm, data, local or training(**LIGHT), **{"count": 6, **options})


class Lazy:
    def __init__(self, count):
        self.count, self.loaded, self.done, self.ahead = count, 0, 0, 0

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.loaded += 1
        self.ahead = max(self.ahead, self.loaded - self.done)
        return clients(self.count)[index]

    def one_done(self, _):
        self.done += 1


def test_workers_give_the_same_bits_in_the_same_order(tmp_path):
    def changing(round):
        return [5, 0, 3, 1, 2] if round else range(6)

    algorithm = Misbehaving({"2/1": "raises", "4/0": "nan"}, base=Mixture(0.4))
    local = training(**LIGHT, momentum_between_rounds="keep")
    options = {"local": local, "participation": changing}
    alone = run(tmp_path / "alone", algorithm, **options)
    lazy = Lazy(6)
    shared = run(
        tmp_path / "shared", algorithm, data=lazy, workers=2, progress=lazy.one_done, **options
    )
    assert shared.files == alone.files
    assert without_seconds(shared.history) == without_seconds(alone.history)
    assert all(row["seconds"] > 0 for row in shared.history[0]["clients"])
    assert lazy.ahead <= 4  # what waits in memory for its turn, and what is worked on
    # What one began, the other goes on with.
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "mixed", algorithm, workers=2, progress=_stop_in_round_1, **options)
    assert run(tmp_path / "mixed", algorithm, **options).files == alone.files


def _stop_in_round_1(progress):
    if progress.round == 1:
        raise KeyboardInterrupt


def test_a_client_whose_process_ends_or_hangs_is_left_out_of_that_round(tmp_path, caplog):
    plan = {"1/0": "dies", "2/0": "hangs", "3/1": "exits", "5/1": "cannot be sent"}
    stored = run(tmp_path / "workers", Misbehaving(plan), workers=2, answer_within=PATIENCE)
    left_out = [{f["client"]: f["reason"] for f in e["left_out"]} for e in stored.history]
    assert list(left_out[0]) == [1, 2]
    assert left_out[0][1] == "its process exited (signal 9)"
    assert left_out[0][2] == "it did not answer within 5 seconds"
    assert list(left_out[1]) == [3, 5]
    assert left_out[1][3] == "its process exited (exit code 3)"
    assert "cannot be sent" in left_out[1][5] or "its loss is" in left_out[1][5]
    assert "Client 2 is left out of round 0: it did not answer within 5 seconds" in caplog.text
    drawn = {"participation": lambda round: [0, 1, 2, 4] if round else [0, 3, 4, 5]}
    rest = run(tmp_path / "rest", FedAvg(), **drawn)
    assert_same(stored.server(), rest.server())


def test_a_worker_killed_while_idle_is_nobody_s_fault(tmp_path):
    def kill_all(progress):
        if (progress.round, progress.done) == (0, 6):
            for child in multiprocessing.active_children():
                child.kill()
                child.join()

    stored = run(tmp_path / "1", FedAvg(), workers=2, progress=kill_all)
    assert all("left_out" not in entry for entry in stored.history)
    assert_same(stored.server(), run(tmp_path / "2", FedAvg()).server())


def test_a_wrong_request_stops_at_once_also_in_a_worker(tmp_path):
    data = [*clients(2), client_data(2, images=0)]
    with pytest.raises(InputError, match="Client 2 has no training images"):
        run(tmp_path / "1", FedAvg(), data=data, workers=2)
    assert not multiprocessing.active_children()
    with pytest.raises(InputError, match=r"clients\[0\] is the data of client 1"):
        run(tmp_path / "2", FedAvg(), data=clients()[1:], workers=1)


def test_what_cannot_be_sent_to_another_process_is_refused(tmp_path):
    class Local(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(64, 3)

        def forward(self, images):
            return self.head(images.flatten(1))

    model = Local()
    local = training(model=model, rounds=1)
    with pytest.raises(InputError, match="at the top of a module"):
        train(FedAvg(), model, clients(), local, Checkpoints(tmp_path), workers=2)
    assert not list(tmp_path.iterdir())
    assert train(FedAvg(), model, clients(), local, Checkpoints(tmp_path)).number == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"workers": -1}, "workers = -1"),
        ({"workers": 1.5}, "workers = 1.5"),
        ({"workers": 2, "answer_within": 0}, "answer_within = 0"),
        ({"answer_within": 10}, "answer_within needs workers"),
    ],
)
def test_wrong_options_are_refused(options, said, tmp_path):
    with pytest.raises((SpecError, InputError), match=said):
        run(tmp_path, FedAvg(), **options)


def test_every_algorithm_and_its_trainer_can_be_sent():
    algorithms, local = pickle.loads(pickle.dumps((CASES, training(**LIGHT))))
    assert algorithms == CASES
    server, data = FedAvg().init(state_of(TinyNet())), client_data(1)
    there, here = (
        Mixture(0.4).client_round(server, ClientState(), data, by)
        for by in (local, training(**LIGHT))
    )
    assert_same(there[1].parts, here[1].parts)
    assert unpack(pack(there[0])).client == 1


def test_messages_give_tensors_of_every_kind_back_and_write_each_once():
    model = {
        "w": torch.randn(1000),
        "half": torch.randn(3).bfloat16(),
        "complex": torch.randn(2, dtype=torch.complex64),
        "steps": torch.tensor(3),
        "on": torch.tensor([True, False]),
        "none": torch.empty(0, 4),
        "turned": torch.arange(6).reshape(2, 3).T,
    }
    message = pack({"sent": model, "kept": model})
    assert_same(unpack(message)["kept"], model)
    twice = pack({"sent": model, "kept": {k: v.clone() for k, v in model.items()}})
    assert len(message) < 0.6 * len(twice)


NETWORK = """
from torch import nn

class Mine(nn.Module):
    def __init__(self, channels, classes):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64 * channels, classes))

    def forward(self, images):
        return self.layers(images)

def mine(in_channels, num_classes):
    return Mine(in_channels, num_classes)
"""


def test_a_network_of_one_s_own_trains_in_workers_from_the_command_line(tmp_path, monkeypatch):
    (tmp_path / "my_own_network.py").write_text(NETWORK)
    spec = tiny.write_spec(tmp_path, "model.name=my_own_network:mine", "clients.count=3")
    asked = ("run", spec, "--out", tmp_path / "run", "--workers", "2", "--answer-within", "60")
    tiny.cli(*asked).fine("Report")
    monkeypatch.syspath_prepend(tmp_path)
    study = tiny.spec("model.name=my_own_network:mine", "clients.count=3")
    whole = run_study(study, Options(tmp_path / "whole"))
    assert tiny.weights(tmp_path / "run") == tiny.weights(whole.path)
