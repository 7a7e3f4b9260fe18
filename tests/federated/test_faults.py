"""Clients that fail: left out with a reason, nothing else disturbed; too many are an error."""

import logging
import math
from dataclasses import replace

import pytest

from certifl.errors import (
    InputError,
    SpecError,
    StoreError,
    TooFewClients,
    TrainingDiverged,
    WorkError,
)
from certifl.federated import (
    ClientState,
    FedAvg,
    Local,
    Mixture,
    Personalized,
    ServerState,
    Update,
    state_of,
)
from certifl.federated.faults import Fault, ResultChecker, required_clients, try_client
from certifl.runs.checkpoints import Checkpoints
from faulty_clients import DEEDS, Misbehaving
from tiny_federation import (
    Noise,
    TinyNet,
    assert_same,
    client_data,
    clients,
    differ,
    federate,
    in_pieces,
    training,
    without_seconds,
)

LIGHT = {"rounds": 2, "local_epochs": 1}


def run(folder, algorithm, data=None, local=None, **options):
    return federate(folder, algorithm, data, local or training(**LIGHT), **{"count": 4, **options})


FAULTS = {
    "nan": "head.weight of its model is not finite",
    "infinity": "head.bias of its model is not finite",
    "infinite extra": "c of its control is not finite",
    "infinite state": "x of its own is not finite",
    "nan metric": "its loss is nan",
    "missing key": "its model does not fit, head.bias is missing",
    "strange key": "its model does not fit, strange is unexpected",
    "shape": "its model does not fit, head.bias is torch.float32 (4,) instead of torch.float32",
    "dtype": "its model does not fit, head.bias is torch.float64 (3,) instead of torch.float32",
    "no tensors": "its model is not a dictionary of tensors",
    "weight": "its weight is nan",
    "other client": "it answered as client 3",
    "variance": "its model holds a variance below 0 (norm.running_var)",
    "nothing": "it returned NoneType, not update and state",
    "half": "it returned Update and NoneType, not update and state",
}


@pytest.mark.parametrize(("deed", "reason"), FAULTS.items(), ids=FAULTS.keys())
def test_what_is_wrong_with_a_result_is_named(deed, reason):
    model = state_of(TinyNet())
    result = DEEDS[deed](Update(2, 20.0, model, {"loss": 1.0}), ClientState())
    fault = ResultChecker(ServerState(0, {"model": model}), model).fault(2, result)
    assert fault.reason.startswith(reason)


@pytest.mark.parametrize(
    ("deed", "reason"),
    [("raises", "it raised RuntimeError: the camera is broken"), ("nan", FAULTS["nan"])],
)
def test_a_client_that_fails_is_left_out_and_named(deed, reason, tmp_path, caplog):
    seen = []
    stored = run(tmp_path, Misbehaving({"2/1": deed}), progress=seen.append)
    assert stored.number == 2
    assert "Client 2 is left out of round 1: " + reason in caplog.text
    assert caplog.records[0].levelno == logging.WARNING
    first, second = stored.history
    assert "left_out" not in first
    assert [fault["client"] for fault in second["left_out"]] == [2]
    assert second["left_out"][0]["reason"].startswith(reason)
    assert second["participants"] == [0, 1, 2, 3]
    assert [row["client"] for row in second["clients"]] == [0, 1, 3]
    reported = [p for p in seen if p.left_out is not None]
    assert [(p.round, p.client, p.done) for p in reported] == [(1, 2, 3)]
    assert reason in reported[0].left_out
    assert [p.done for p in seen] == [1, 2, 3, 4] * 2


def test_the_round_is_that_of_the_others_and_its_own_state_stays(tmp_path):
    local = training(**LIGHT, momentum_between_rounds="keep")
    checkpoints, kept = Checkpoints(tmp_path), {}

    def remember(progress):
        if (progress.round, progress.done) == (1, 1):
            kept.update(checkpoints.latest().client(2))

    algorithm = Misbehaving({"2/1": "nan"}, base=Mixture(0.5))
    stored = run(tmp_path, algorithm, local=local, progress=remember)
    assert_same(stored.client(2), kept)
    assert kept["momentum"]

    server, states = Mixture(0.5).init(state_of(TinyNet())), [ClientState()] * 4
    for who in ([0, 1, 2, 3], [0, 1, 3]):
        worked = {
            i: Mixture(0.5).client_round(server, states[i], clients(4)[i], local) for i in who
        }
        server = Mixture(0.5).aggregate(server, [worked[i][0] for i in who])
        states = [worked[i][1] if i in worked else states[i] for i in range(4)]
    assert_same(stored.server(), server.parts)


def test_a_client_that_never_trained_has_no_state_after_a_fault(tmp_path):
    stored = run(tmp_path, Misbehaving({"2": "raises"}, base=Local()))
    assert stored.clients == [0, 1, 3]
    assert_same(Local().deployed(*_states(stored, 2)), state_of(TinyNet()))


def _states(stored, client):
    return ServerState(stored.number, stored.server()), ClientState(stored.client(client))


def test_faults_in_the_extra_round_leave_what_the_base_deploys(tmp_path):
    broken = training(rounds=1, local_epochs=1)
    broken.finetuning_augmentation = Shaky()
    algorithm = Personalized(FedAvg(), epochs=1)
    Shaky.calls = 0
    stored = run(tmp_path, algorithm, count=3, local=broken)
    assert [f["client"] for f in stored.history[1]["left_out"]] == [0]
    assert_same(algorithm.deployed(*_states(stored, 0)), stored.server()["model"])
    assert differ(algorithm.deployed(*_states(stored, 1)), stored.server()["model"])


class Shaky(Noise):
    calls = 0

    def sample(self, n, image_shape, generator):
        Shaky.calls += 1
        if Shaky.calls == 1:
            raise OSError("unplugged")
        return super().sample(n, image_shape, generator)


def test_data_that_cannot_be_loaded_are_a_fault_of_that_client(tmp_path, caplog):
    class Remote:
        def __len__(self):
            return 4

        def __getitem__(self, index):
            if index == 1:
                raise ConnectionError("no route to the hospital")
            return client_data(index)

    stored = run(tmp_path, FedAvg(), data=Remote())
    assert [fault["client"] for fault in stored.history[0]["left_out"]] == [1]
    assert "no route to the hospital" in caplog.text


@pytest.mark.parametrize(
    ("participants", "asked", "wanted"),
    [
        (1, None, 1),
        (2, None, 1),
        (3, None, 2),
        (10, None, 5),
        (11, None, 6),
        (10, 9, 9),
        (3, 1, 1),
    ],
)
def test_half_of_the_participants_rounded_up_must_remain(participants, asked, wanted):
    assert required_clients(participants, asked) == wanted


def test_training_stops_when_too_few_remain_and_goes_on_when_mended(tmp_path):
    plan = {"0/1": "raises", "2/1": "nan", "3/1": "nan metric"}
    worked = []
    with pytest.raises(TooFewClients) as caught:
        run(tmp_path, Misbehaving(plan), progress=lambda p: worked.append(p.client))
    error = caught.value
    assert error.round == 1
    assert list(error.left_out) == [0, 2, 3]
    for words in (
        "Round 1 cannot be finished: 3 of its 4 clients failed and at least 2 must remain",
        "client 0 (it raised RuntimeError: the camera is broken)",
        "client 3 (its loss is nan)",
        "Lower training.lr",
        "the same command resumes",
    ):
        assert words in str(error)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["round-00000", "round-00001"]
    # The same with fewer clients asked for goes on from there.
    stored = run(tmp_path, Misbehaving(plan), min_clients=1)
    assert [row["client"] for row in stored.history[1]["clients"]] == [1]


def test_it_stops_at_the_first_client_too_many(tmp_path):
    seen = []
    plan = {f"{client}/0": "raises" for client in range(6)}
    with pytest.raises(TooFewClients):
        run(tmp_path, Misbehaving(plan), count=6, progress=lambda p: seen.append(p.client))
    assert seen == [0, 1, 2]  # the fourth of six leaves two


def test_the_cause_is_chained(tmp_path):
    with pytest.raises(TooFewClients) as caught:
        run(tmp_path, Misbehaving({"0": "raises", "1": "raises"}), count=2)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_training_in_which_everybody_diverges_says_what_to_do(tmp_path):
    local = training(**LIGHT, lr=1e18, momentum=0.0, weight_decay=1.0)
    with pytest.raises(TooFewClients, match=r"diverged.*Lower training\.lr.*resumes") as caught:
        run(tmp_path, FedAvg(), local=local)
    assert isinstance(caught.value.__cause__, TrainingDiverged)


def test_min_clients_that_cannot_be_met_are_refused(tmp_path):
    for wrong in (0, 5, 1.5, True):
        with pytest.raises(SpecError, match="min_clients"):
            run(tmp_path, FedAvg(), min_clients=wrong)
    with pytest.raises(InputError, match="min_clients = 3 is more than the 2 clients"):
        run(tmp_path, FedAvg(), min_clients=3, participation=lambda _: [0, 1])


def test_a_wrong_request_stops_at_once(tmp_path):
    data = clients(4)
    data[2] = client_data(2, images=0)
    with pytest.raises(InputError, match="Client 2 has no training images"):
        run(tmp_path, FedAvg(), data=data)


def test_lack_of_memory_is_the_machine_s_and_stops_with_advice(tmp_path):
    with pytest.raises(WorkError, match=r"Memory ran out while client 1.*batch_size") as caught:
        run(tmp_path, Misbehaving({"1": "memory"}))
    assert not isinstance(caught.value, TooFewClients)
    error = RuntimeError(
        "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"
    )
    with pytest.raises(WorkError, match="Memory ran out"):
        try_client(0, lambda: (_ for _ in ()).throw(error))


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, StoreError("full")])
def test_interruption_and_storage_are_nobody_s_fault(error, tmp_path):
    def work():
        raise error

    with pytest.raises(error if isinstance(error, type) else type(error)):
        try_client(0, work)


def test_a_server_that_diverges_stops_the_training(tmp_path):
    class Exploding(FedAvg):
        def aggregate(self, server_state, updates):
            after = super().aggregate(server_state, updates)
            model = {name: value / 0 for name, value in after.parts["model"].items()}
            return ServerState(after.round, {"model": model} if after.round == 2 else after.parts)

    with pytest.raises(TrainingDiverged, match="at the server in round 1"):
        run(tmp_path, Exploding())
    assert Checkpoints(tmp_path).latest().number == 1


def test_a_training_with_faults_resumes_to_the_same_bytes(tmp_path):
    algorithm = Misbehaving({"1/0": "nan", "2/2": "raises"}, base=Mixture(0.5))
    local = training(momentum_between_rounds="keep", rounds=3, local_epochs=1)
    whole = run(tmp_path / "whole", algorithm, local=local)
    resumed, stops = in_pieces(
        6, lambda stop: run(tmp_path / "resumed", algorithm, local=local, progress=stop)
    )
    assert stops >= 2
    assert resumed.files == whole.files
    assert without_seconds(resumed.history) == without_seconds(whole.history)


def test_the_reference_is_what_was_broadcast_not_the_first_answer(tmp_path):
    """A first client with another network must not make all others strangers."""
    local = training(rounds=1, local_epochs=1)
    stored = run(tmp_path / "1", Misbehaving({"0": "shape"}), local=local)
    assert [fault["client"] for fault in stored.history[0]["left_out"]] == [0]
    others = run(tmp_path / "2", FedAvg(), local=local, participation=lambda _: [1, 2, 3])
    assert_same(stored.server(), others.server())


SICK = {
    "a metric in another's name": {"metrics": {"client": 2}},
    "time of its own": {"metrics": {"seconds": -1.0}},
    "privacy that nobody spent": {"metrics": {"epsilon": 0.0}},
    "too large a whole number": {"metrics": {"loss": 10**400}},
    "no number": {"metrics": {"loss": True}},
    "ten thousand metrics": {"metrics": {f"m{i}": 1.0 for i in range(10_000)}},
    "a weight beyond all": {"weight": 10**400},
    "an infinite weight": {"weight": math.inf},
    "another client": {"client": True},
    "huge values": {"model": {name: v * 0 + 1e30 for name, v in state_of(TinyNet()).items()}},
}


@pytest.mark.parametrize("changes", SICK.values(), ids=SICK.keys())
def test_an_inspection_finds_what_would_be_written_or_averaged(changes):
    model = state_of(TinyNet())
    inspection = ResultChecker(ServerState(0, {"model": model}), model)
    update = Update(1, 3.0, model, {"loss": 1.0})
    assert inspection.fault(1, (update, ClientState())) is None
    fault = inspection.fault(1, (replace(update, **changes), ClientState()))
    assert len(fault.reason) <= 500


def test_a_reason_is_one_line_that_can_be_printed():
    fault = Fault("raised", "\x1b[2Jfirst\nsecond\u202e" + "x" * 10_000)
    assert fault.reason.startswith("[2Jfirst second x")
    assert len(fault.reason) == 500
