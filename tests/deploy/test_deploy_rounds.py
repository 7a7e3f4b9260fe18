"""The same algorithms with clients elsewhere: equal models, whatever comes between."""

import json

import pytest

pytest.importorskip("flwr", reason="Flower is not installed: pip install certifl[flower]")


from flwr.app import Message
from flwr.app.error import Error

from algorithm_cases import CASES
from certifl.deploy.client.client import Client, Rejected
from certifl.deploy.client.settings import Settings
from certifl.deploy.client.state import ClientStateStore
from certifl.deploy.messages import from_records, to_records
from certifl.deploy.server.remote_runner import last_counted
from certifl.errors import StoreMismatch, TooFewClients, WorkError
from certifl.federated import ALGORITHMS, ClientData, client_state, deployed_model, describe, train
from certifl.runs.atomic import load_tensors
from certifl.runs.checkpoints import Checkpoints, StoredRound
from certifl.runs.folder import RunFolder
from certifl.spec import Spec
from certifl.study.setup import (
    initial_model,
    local_training,
    open_data,
    participation,
    protection,
    training_key,
)
from deploy_factory import MemoryGrid, carried, clients_of, coordinated, options
from tiny_federation import assert_same, without_seconds
from tiny_study import spec

_TRAINED: dict[str, StoredRound] = {}


def in_process(study: Spec, root) -> StoredRound:
    """The rounds of a study in one process; without noise it is trained once."""
    name = study.hash()
    if name not in _TRAINED or study.privacy.kind != "none":
        _TRAINED[name] = _trained(study, root)
    return _TRAINED[name]


def _trained(study: Spec, root) -> StoredRound:
    dataset, partition = open_data(study, None)
    model = initial_model(study, dataset)
    data = []
    for client, stored in enumerate(partition.clients):
        part = dataset.train.take(stored.train)
        data.append(ClientData(client, part.images, part.labels))
    root.mkdir(parents=True, exist_ok=True)
    private = protection(study, model, [len(d) for d in data], training_key(study, root))
    local, place = local_training(study, model, "cpu", private), Checkpoints(root / "training")
    rule = private.client or study.aggregation.build()
    options = {"participation": participation(study), "rule": rule, "ledger": private.ledger}
    return train(study.build_algorithm(), model, data, local, place, **options)


def same_training(study: Spec, root, folder: RunFolder, at: dict) -> None:
    """Server, history and clients' states are those of one process, bit for bit."""
    own, last = in_process(study, root), Checkpoints(folder.training).latest()
    assert last.number == own.number
    assert last.identity == own.identity
    assert without_seconds(last.history) == without_seconds(own.history)
    assert_same(last.server(), own.server())
    id = folder.manifest()["deployment"]["id"]
    for client in at.values():
        number = client.settings.client
        store = ClientStateStore(client._folder / "studies", id)
        state = store.state(last_counted(last, number))
        assert_same(state.parts, client_state(own, number).parts)
        deployed = deployed_model(study.build_algorithm(), own, number)
        assert_same(load_tensors(store.deployed), deployed)


LIGHT = ("certification.images=2", "certification.n=20", "certification.n0=5")


def described(case: str, *settings: str) -> Spec:
    values = spec(*LIGHT, *settings).model_dump(exclude_none=True)
    return Spec.model_validate({**values, "algorithm": describe(CASES[case])})


def test_all_algorithms_are_tested():
    assert {CASES[case].name for case in CASES} == set(ALGORITHMS)


@pytest.mark.parametrize("case", CASES)
def test_every_algorithm_gives_the_models_of_one_process(case, tmp_path):
    study = described(case, 'training.momentum_between_rounds="keep"')
    at = clients_of(tmp_path)
    folder = coordinated(study, at, tmp_path / "run")
    same_training(study, tmp_path / "own", folder, at)


def test_participation_and_robust_rules_give_the_models_of_one_process(tmp_path):
    study = described(
        *("mixture", "clients.count=4", "clients.participation=0.75"),
        *('aggregation.rule="median"', "training.rounds=3"),
    )
    at = clients_of(tmp_path, 4)
    folder = coordinated(study, at, tmp_path / "run")
    same_training(study, tmp_path / "own", folder, at)


@pytest.mark.parametrize("kind", ["example", "client"])
def test_private_training_gives_the_models_of_one_process(kind, tmp_path):
    pytest.importorskip("opacus", reason="accounting needs opacus: pip install certifl[dp]")
    study = described("fedavg", f'privacy.kind="{kind}"', "privacy.noise_multiplier=1.0")
    at = clients_of(tmp_path)
    folder = coordinated(study, at, tmp_path / "run")
    same_training(study, tmp_path / "own", folder, at)
    assert folder.manifest()["privacy"]["kind"] == kind


class Stopped(Exception):
    pass


@pytest.mark.parametrize("at_answer", [1, 2, 3, 4])
def test_a_server_killed_at_any_answer_resumes_to_the_same_models(at_answer, tmp_path):
    study, at = (
        described("mixture", 'training.momentum_between_rounds="keep"'),
        clients_of(tmp_path),
    )
    answers = []

    def killed(node, request, reply):
        if request.metadata.message_type == "train":
            answers.append(node)
            if len(answers) == at_answer:
                raise Stopped
        return reply

    with pytest.raises(Stopped):
        coordinated(study, MemoryGrid(at, killed), tmp_path / "run")
    again = clients_of(tmp_path)  # the clients were started again, too
    folder = coordinated(study, again, tmp_path / "run")
    same_training(study, tmp_path / "own", folder, again)


@pytest.mark.parametrize("case", ["fedadam", "personalized-fedadam", "scaffold"])
def test_clients_get_only_the_parts_they_need(case, tmp_path):
    study = described(case.rpartition("-")[2])
    if case.startswith("personalized"):
        values = study.model_dump(exclude_none=True)
        base = values["algorithm"]
        algorithm = {"name": "personalized", "base": base, "epochs": 1}
        study = Spec.model_validate({**values, "algorithm": algorithm})
    at = clients_of(tmp_path)
    grid = MemoryGrid(at)
    folder = coordinated(study, grid, tmp_path / "run")
    same_training(study, tmp_path / "own", folder, at)
    requests = [request for _, request in grid.sent if request.metadata.group_id == "1"]
    asked = [json.loads(request.content["certifl"]["json"])["parts"] for request in requests]
    wanted = ["control", "known", "model"] if case == "scaffold" else ["model"]
    assert [sorted(parts) for parts in asked] == [wanted] * 2
    stored = Checkpoints(folder.training).latest()
    assert len(stored.server()) == 3


def test_answers_are_taken_in_client_order_one_at_a_time(tmp_path):
    study = described("fedavg", "clients.count=3", "training.rounds=1")
    grid = MemoryGrid(dict(reversed(clients_of(tmp_path, 3).items())))
    coordinated(study, grid, tmp_path / "run")
    trained = [node for node, request in grid.sent if request.metadata.message_type == "train"]
    assert trained == [100, 101, 102]
    assert all(request.metadata.ttl <= 120 for _, request in grid.sent)


def test_a_node_restarted_during_a_round_is_asked_again(tmp_path, monkeypatch):
    monkeypatch.setattr("certifl.deploy.server.remote_runner._REFRESH_SECONDS", 0.1)
    study, at = described("mixture"), clients_of(tmp_path)
    lost = []

    def swallow(node, request, reply):
        if request.metadata.message_type == "train" and node == 101 and not lost:
            lost.append(node)
            grid.since[101] = "second start"
            return None
        return reply

    grid = MemoryGrid(at, swallow)
    folder = coordinated(study, grid, tmp_path / "run")
    assert lost
    same_training(study, tmp_path / "own", folder, at)


@pytest.mark.parametrize("crashes", [1, 2])
def test_a_client_whose_process_crashed_is_asked_once_more(crashes, tmp_path):
    study, at = described("mixture", "clients.count=3"), clients_of(tmp_path, 3)
    asked = []

    def crash(node, request, reply):
        if request.metadata.message_type == "train" and node == 101:
            asked.append(node)
            if len(asked) <= crashes:
                return Message(Error(8, "ClientApp stopped responding."), reply_to=request)
        return reply

    folder = coordinated(study, MemoryGrid(at, crash), options(tmp_path / "run"))
    left_out = Checkpoints(folder.training).history()[0].get("left_out", [])
    assert [entry["client"] for entry in left_out] == [1] * (crashes - 1)
    if crashes == 1:
        same_training(study, tmp_path / "own", folder, at)


def test_a_late_client_takes_part_with_the_number_of_images_that_it_first_reports(tmp_path):
    study = described("fedavg", "clients.count=3", "training.rounds=3")
    at = clients_of(tmp_path, 3)
    late = at.pop(102)

    def comes_and_grows(node, request, reply):
        if request.metadata.group_id == "0":
            grid.clients[102], grid.since[102] = late, "late"
        if request.metadata.group_id == "1":
            grid.since[102] = "again"
        if node == 102 and grid.since[102] == "again" and not request.metadata.group_id:
            content = from_records(carried(reply).content)
            content.fields["joined"]["train_images"] += 1
            return Message(to_records(content), reply_to=request)
        return reply

    grid = MemoryGrid(at, comes_and_grows)
    folder = coordinated(study, grid, options(tmp_path / "run", min_clients=2))
    history = Checkpoints(folder.training).history()
    counted = [[row["client"] for row in entry["clients"]] for entry in history]
    assert counted == [[0, 1], [0, 1, 2], [0, 1]]
    assert history[0]["left_out"][0]["reason"] == "it is not connected"
    assert "must not change" in history[2]["left_out"][0]["reason"]
    assert folder.manifest()["deployment"]["train_images"].keys() == {"0", "1", "2"}


def test_too_few_clients_are_reported_and_the_same_call_resumes(tmp_path):
    study = described("fedavg", "clients.count=3")
    at = clients_of(tmp_path, 3)
    alone = {100: at[100]}
    with pytest.raises(WorkError, match=r"1 of 3.*client 1 is not connected; client 2"):
        coordinated(study, alone, tmp_path / "run")

    def gone(node, request, reply):
        if request.metadata.group_id == "1":
            for other in (101, 102):
                grid.clients.pop(other, None)
        return reply if node in grid.clients else None

    grid = MemoryGrid(dict(at), gone)

    def unavailable(node, request, reply):
        done = gone(node, request, reply)
        return Message(Error(5, "Node Unavailable"), reply_to=request) if done is None else done

    grid.change = unavailable
    with pytest.raises(TooFewClients, match="its machine is gone"):
        coordinated(study, grid, tmp_path / "run")
    assert len(Checkpoints(tmp_path / "run/checkpoints/training").history()) == 1
    folder = coordinated(study, at, tmp_path / "run")
    same_training(study, tmp_path / "own", folder, at)


def test_a_folder_of_another_study_is_refused(tmp_path):
    at = clients_of(tmp_path)
    coordinated(described("local"), at, tmp_path / "run")
    with pytest.raises(StoreMismatch):
        coordinated(described("fedavg"), at, tmp_path / "run")


@pytest.mark.parametrize("kind", ["example", "client"])
def test_predictable_noise_is_refused_for_a_clients_own_images(kind, tmp_path):
    client = Client(Settings(client=0, data="digits"), tmp_path / "client")
    study = described("fedavg", f'privacy.kind="{kind}"', "privacy.noise_multiplier=1.0")
    with pytest.raises(Rejected, match="noise_key"):
        client._open("study", study, own_perturbation=False)
