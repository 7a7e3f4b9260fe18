"""What a server may ask of a client, what leaves its machine, what it does with what it keeps."""

import json
import re
import stat
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="Flower is not installed: pip install certifl[flower]")

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from pydantic import BaseModel
from test_deploy_certify import parquet
from test_deploy_rounds import LIGHT, described, in_process

from certifl.deploy.client import settings as limits
from certifl.deploy.client.client import Client
from certifl.deploy.client.settings import Settings
from certifl.deploy.client.state import NEVER, SENT, sent_lines
from certifl.deploy.messages import Content, from_records
from certifl.federated import deployed_model
from certifl.spec import Spec
from certifl.study.opened_run import ClientStudy
from deploy_factory import (
    ID,
    MemoryGrid,
    ask,
    carried,
    clients_of,
    coordinated,
    dealt,
    model,
    options,
    study_of,
)
from tiny_federation import assert_same
from tiny_study import cli, spec

ROOT = Path(__file__).resolve().parents[2]
PATIENTS = [f"Jane Doe {number}" for number in range(40)]


def join(client: Client, asked: Spec) -> Content:
    return client.answer(Content({"order": "join", "study": study_of(asked)}))


def reason(answer: Content) -> str:
    assert not answer.parts
    return answer.fields["fault"]["reason"]


def everything_said(answer: Content) -> str:
    return json.dumps(answer.fields, default=str) + repr(sorted(answer.parts))


def patients(folder: Path) -> Path:
    for split in ("train", "test"):
        images = torch.randint(0, 255, (40, 1, 8, 8), dtype=torch.uint8)
        parquet(folder, split, images, torch.arange(40) % 4, ["a", "b", "c", "d"])
        path = folder / f"{split}-00000.parquet"
        table = pq.read_table(path).append_column("patient", pa.array(PATIENTS))
        pq.write_table(table.append_column("ward", pa.array(["x", "y"] * 20)), path)
    return folder


def own(folder: Path, root: Path, **settings) -> Client:
    return Client(Settings(client=0, data=str(folder), **settings), root)


def asking(**data) -> Spec:
    values = spec().model_dump(exclude_none=True)
    changed = {"data": {"name": "digits", **data.pop("data", {})}}
    return Spec.model_validate({**values, **changed, **data})


BY_COLUMN = {"count": 2, "split": "column", "options": {"column": "ward"}}


@pytest.mark.parametrize(
    ("asked", "key"),
    [
        ({"data": {"label_column": "patient"}}, "data.label_column"),
        ({"data": {"label_column": "label"}}, "data.label_column"),
        ({"data": {"name": "x[patient]"}}, "data.name"),
        ({"clients": BY_COLUMN}, "clients.split"),
    ],
)
def test_a_study_that_asks_for_a_column_of_its_images_is_refused(asked, key, tmp_path):
    answer = join(own(patients(tmp_path / "images"), tmp_path / "client"), asking(**asked))
    assert key in reason(answer)
    assert "Doe" not in everything_said(answer)


def test_class_names_found_in_the_images_are_not_sent(tmp_path):
    images = patients(tmp_path / "images")
    wrong = join(own(images, tmp_path / "client", label_column="patient"), asking())
    assert "Doe" not in everything_said(wrong)
    assert len(wrong.fields["joined"]["class_names"]) == 40
    right = join(own(images, tmp_path / "other", label_column="label"), asking())
    names = right.fields["joined"]["class_names"]
    assert len(names) == 4
    assert not {"a", "b", "c", "d"} & set(names)
    agreed = ["a", "b", "c", "d"]
    said = join(own(images, tmp_path / "third", label_column="label", classes=agreed), asking())
    assert said.fields["joined"]["class_names"] == agreed


def test_clients_with_other_classes_are_distinguished_without_their_names(tmp_path):
    told = []
    for number, names in enumerate((["cat", "dog"], ["cat", "cow"], ["dog", "cat"])):
        rows, folder = torch.zeros(4, 1, 8, 8, dtype=torch.uint8), tmp_path / f"images-{number}"
        for split in ("train", "test"):
            parquet(folder, split, rows, torch.tensor([0, 1, 1, 0]), names)
        answer = join(own(folder, tmp_path / f"client-{number}"), asking())
        told.append(tuple(answer.fields["joined"]["class_names"]))
    assert len(set(told)) == 3


def test_a_common_data_set_is_read_by_the_clients_label_column(tmp_path):
    images = patients(tmp_path / "images")
    client = own(images, tmp_path / "client", dealt=True, label_column="label")
    assert "label_column" in reason(join(client, asking(data={"label_column": "patient"})))
    assert "joined" in join(client, asking(data={"label_column": "label"})).fields
    client = own(images, tmp_path / "other", dealt=True)
    assert "label_column" in reason(join(client, asking(data={"label_column": "patient"})))


def test_a_folder_name_may_end_with_a_column(tmp_path):
    from certifl.deploy.client.process import _check_data

    _check_data(Settings(client=0, data=f"{patients(tmp_path / 'images')}[label]"))


def client_keys(section: type[BaseModel], before: str = "") -> set[str]:
    found = set()
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found |= client_keys(kind, f"{before}{name}.")
        else:
            found.add(before + name)
    return found


def test_every_key_of_a_spec_has_a_documented_decision():
    text = (ROOT / "docs" / "deploy.md").read_text()
    rows = re.findall(r"^\| `([\w.]+)` \| (refused|unused|done|server) \| (.*) \|$", text, re.M)
    decisions = {key: (what, why) for key, what, why in rows}
    assert len(rows) == len(decisions)
    assert set(decisions) == client_keys(Spec)
    assert decisions["model.weights"][0] == "refused"
    for key, limit in [
        ("clients.count", f"{limits._MOST_CLIENTS:,}"),
        ("certification.radii", f"{limits._MOST_RADII}:"),
        ("model.options", f"{limits._LARGEST_NETWORK >> 30} GiB"),
    ]:
        assert limit in decisions[key][1]


@pytest.mark.parametrize(
    ("setting", "word"),
    [
        ("model.options={width=30000}", "GiB"),
        ("model.options={width=1000000000}", "network"),
        (f"certification.radii={[i / 1000 for i in range(300)]}", "certification.radii"),
        ("training.crop=8", "training.crop"),
    ],
)
def test_a_study_that_asks_for_too_much_is_refused(setting, word, tmp_path):
    client = Client(Settings(client=0, data="digits"), tmp_path)
    assert word in reason(join(client, spec(setting)))


def test_a_study_of_too_many_clients_is_refused(tmp_path):
    client = Client(Settings(client=0, data="digits"), tmp_path)
    assert "clients.count" in reason(join(client, asking(clients={"count": 10**12})))


def certify(client: Client, /, asked: Spec, parts=None, **fields) -> Content:
    request = {"order": "certify", "round": asked.training.rounds, "piece": 60.0, "share": "curve"}
    return ask(client, asked, parts, **{**request, **fields})


def test_a_round_is_answered_once_with_the_same_bits(tmp_path):
    asked = spec(*LIGHT, 'training.momentum_between_rounds="keep"')
    client = dealt(tmp_path)
    first = ask(client, asked)
    assert_same(ask(client, asked).parts, first.parts)
    again = dealt(tmp_path)  # started again
    assert "answered once" in reason(ask(again, asked, model(0.1)))
    assert_same(ask(again, asked).parts, first.parts)
    assert ask(again, asked, model(0.1), round=1, counted=0).parts
    # From the same model with another past it would be another answer.
    assert "answered round 1" in reason(ask(again, asked, model(0.1), round=1, counted=NEVER))
    assert "2 rounds" in reason(ask(again, asked, model(0.2), round=2, counted=1))
    assert "answered once" in reason(ask(dealt(tmp_path), asked, model(0.3), round=1, counted=0))


def test_a_failed_round_is_not_answered_for_another_model(tmp_path):
    asked, client = spec(*LIGHT), dealt(tmp_path)
    sick = {"model": {name: value * torch.inf for name, value in model()["model"].items()}}
    assert ask(client, asked, sick).fields["fault"]["kind"] == "diverged"
    assert "answered once" in reason(ask(client, asked))


def test_images_that_changed_do_not_answer_the_same_round_again(tmp_path):
    images = tmp_path / "images"
    names = [str(digit) for digit in range(10)]
    for split in ("train", "test"):
        rows = torch.randint(0, 255, (20, 1, 8, 8), dtype=torch.uint8)
        parquet(images, split, rows, torch.arange(20) % 10, names)
    assert ask(own(images, tmp_path / "client"), spec(*LIGHT)).parts
    parquet(images, "train", torch.zeros_like(rows), torch.arange(20) % 10, names)
    assert "images" in reason(ask(own(images, tmp_path / "client"), spec(*LIGHT)))


def test_an_id_belongs_to_one_study_and_a_lost_record_is_not_recreated(tmp_path):
    asked, client = spec(*LIGHT), dealt(tmp_path)
    assert ask(client, asked).parts
    assert "another spec" in reason(ask(client, spec(*LIGHT, "seed=1")))
    record = tmp_path / "studies" / ID / "answered.json"
    whole = record.read_text()
    for damage in ("", "{}", "[]", whole.replace('"format": 1', '"format": 9')):
        record.write_text(damage)
        assert "lost or damaged" in reason(ask(dealt(tmp_path), asked))
    record.unlink()
    assert "lost or damaged" in reason(ask(dealt(tmp_path), asked))


def test_a_client_may_change_its_own_settings_within_a_study(tmp_path):
    asked, allowed = spec(*LIGHT), study_of(spec(*LIGHT), own_perturbation=True)
    first = ask(dealt(tmp_path), asked, study=allowed)
    own_one = dealt(tmp_path, perturbation={"family": "pixel", "sigma": 0.2})
    assert_same(ask(own_one, asked, study=allowed).parts, first.parts)


def test_one_deployed_model_is_certified(tmp_path):
    asked, client = spec(*LIGHT, "training.rounds=1"), dealt(tmp_path)
    assert "after the last" in reason(certify(client, asked, round=0))
    first = certify(client, asked)
    assert first.fields["certified"]["done"] is True
    assert certify(dealt(tmp_path), asked).fields["certified"] == first.fields["certified"]
    assert "another model" in reason(certify(dealt(tmp_path), asked, model(0.1)))


def test_only_rounds_that_a_client_is_drawn_for_are_answered(tmp_path):
    from certifl.study.setup import participation

    asked = spec(*LIGHT, "clients.count=4", "clients.participation=0.5", "training.rounds=6")
    drawn = participation(asked)
    client = dealt(tmp_path)
    rounds = [0 in set(drawn(number)) for number in range(6)]
    assert set(rounds) == {True, False}
    answers = [ask(client, asked, round=number) for number in range(6)]
    assert ["fault" not in answer.fields for answer in answers] == rounds


BIG = 10**400


@pytest.mark.parametrize(
    "wrong",
    [
        *({"round": bad} for bad in (-1, BIG, True, "0", 0.0, None, [0], float("nan"))),
        *({"counted": bad} for bad in (-2, BIG, False, "x", 1.5, None, 7)),
        *({"broadcast": bad} for bad in (None, 3, "0" * 64, "x" * 10_000)),
        *({"client": bad} for bad in (1, False, "0", None, BIG, 0.0)),
        *({"order": bad} for bad in ("Round", None, 3, ["round"], {"a": 1}, "\x1b[31m")),
        *({"study": bad} for bad in (None, [], "x", {}, {"id": ID})),
    ],
    ids=lambda wrong: repr(wrong)[:60],
)
def test_requests_with_wrong_values_are_refused(wrong, tmp_path):
    said = reason(ask(dealt(tmp_path), spec(*LIGHT), **wrong))
    assert said.startswith("it refuses: ")
    assert said.isprintable()
    assert not list(tmp_path.glob("studies/*/state-*"))


@pytest.mark.parametrize(
    "wrong",
    [
        *({"piece": bad} for bad in (0.0, -1.0, float("inf"), float("nan"), BIG, "1", None, True)),
        *({"share": bad} for bad in ("all", None, 3, ["rows"])),
        *({"round": bad} for bad in (0, 3, BIG, None)),
        {"counted": 2},
    ],
    ids=lambda wrong: repr(wrong)[:60],
)
def test_wrong_requests_for_certificates_are_refused(wrong, tmp_path):
    said = reason(certify(dealt(tmp_path), spec(*LIGHT), **wrong))
    assert said.startswith("it refuses: ")
    assert not list(tmp_path.glob("studies/*/deployed*"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"id": "../../x"},
        {"id": "0" * 65},
        {"id": ID + "\n"},
        {"id": 7},
        {"hash": "g" * 16},
        {"hash": "0" * 16},
        {"own_perturbation": "yes"},
        {"spec": 3},
        {"spec": "x" * (2 << 20)},
        {"spec": "a = " + "[" * 5000},
        {"spec": "a = " + "9" * 10_000},
        {"spec": "name = '\x1b[2J'"},
        {"spec": "a.b = 1\na = 2"},
    ],
    ids=lambda wrong: repr(wrong)[:60],
)
def test_studies_with_wrong_values_are_refused(wrong, tmp_path):
    named = study_of(spec(*LIGHT), **wrong)
    said = reason(dealt(tmp_path).answer(Content({"order": "join", "study": named})))
    assert said.startswith("it refuses: ")
    assert said.isprintable()
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize(
    "change",
    [
        lambda parts: parts["model"].popitem(),
        lambda parts: parts["model"].update(extra=torch.ones(2)),
        lambda parts: parts["model"].update({k: v.double() for k, v in parts["model"].items()}),
        lambda parts: parts["model"].update({k: v[None] for k, v in parts["model"].items()}),
        lambda parts: parts.pop("model"),
        lambda parts: parts.update(control={"x": torch.ones(1000)}),
        lambda parts: parts.update(control={k: v[None] for k, v in parts["model"].items()}),
    ],
)
def test_models_that_do_not_fit_are_refused(change, tmp_path):
    parts = model()
    change(parts)
    assert "does not fit" in reason(ask(dealt(tmp_path), spec(*LIGHT), parts))
    assert "does not fit" in reason(certify(dealt(tmp_path), spec(*LIGHT), parts))


def listened(root: Path, asked: Spec, share: str, **changes):
    """All answers of clients that share so much, in a whole study."""
    heard = []

    def listen(node, request, reply):
        heard.append((request.metadata.message_type, from_records(carried(reply).content)))
        return reply

    at = clients_of(root, asked.clients.count, share=share)
    options_ = options(root / "run", share="rows", **changes)
    folder = coordinated(asked, MemoryGrid(at, listen), options_)
    return heard, folder


JOINED = {"in_channels", "image_size", "class_names", "train_images", "name", "fingerprint"}
JOINED |= {"client", "initial_model", "versions"}


@pytest.mark.parametrize("case", ["fedavg", "mixture"])
def test_with_share_none_a_server_learns_only_that_a_client_has_finished(case, tmp_path):
    heard, _ = listened(tmp_path, described(case, "training.rounds=1"), "none")
    for kind, answer in heard:
        fields = answer.fields
        kinds = {"joined", "update", "certified", "round", "started_from"}
        assert fields.keys() - {"client", "seconds"} <= kinds
        if kind == "query.join":
            assert fields["joined"].keys() == JOINED
        elif kind == "train":
            assert fields["update"].keys() == {"client", "weight", "metrics", "model"}
            assert fields["update"]["metrics"].keys() <= {"loss", "accuracy"}
            assert answer.parts.keys() == {"model"}
        else:
            assert not answer.parts
            model_too = {"model"} if case == "fedavg" else set()  # the server's own
            assert fields["certified"].keys() == {"share", "done"} | model_too
    assert {kind for kind, _ in heard} == {"query.join", "train", "query.certify"}


@pytest.mark.parametrize("share", ["none", "curve"])
def test_pieces_do_not_disclose_the_votes_of_each_image(share, tmp_path, monkeypatch):
    monkeypatch.setattr("certifl.deploy.client.client._SHORTEST", 0.0)
    asked = spec("certification.images=8", "training.rounds=1", "certification.n=2000")
    heard, _ = listened(tmp_path, asked, share, piece=1e-9)
    told = [a.fields["certified"] for kind, a in heard if kind == "query.certify"]
    pieces = [fields for fields in told if not fields["done"]]
    assert pieces
    for fields in pieces:
        votes = set() if share == "none" else {"at_most", "cast"}
        assert fields.keys() == {"share", "done", "model"} | votes
        assert not votes or fields["cast"] % (fields["at_most"] // 10) == 0


def test_every_answer_is_logged_before_it_leaves(tmp_path):
    heard, _ = listened(tmp_path, described("mixture"), "curve")
    folder = tmp_path / "client-0"
    entries = [json.loads(line) for line in (folder / SENT).read_text().splitlines()]
    mine = [(kind, answer) for kind, answer in heard if answer.fields["client"] == 0]
    assert [entry["kind"] for entry in entries] == ["join", "round", "round", "certify"]
    assert len(mine) == len(entries)
    for entry, (_, answer) in zip(entries, mine, strict=True):
        assert entry["parts"].keys() == answer.parts.keys()
        assert entry["bytes"] >= sum(
            v.numel() * v.element_size()
            for stored in answer.parts.values()
            for v in stored.values()
        )
    assert "update.metrics.loss" in entries[1]["says"]
    said = cli("deploy", "log", folder)
    said.fine("round 0", "update.weight", "float32", "certified.curve.correct", "same")
    assert next(iter(sent_lines(tmp_path / "nobody"))).startswith("Nothing has left")
    cli("deploy", "log", tmp_path).refused("not a client's folder")
    with (folder / SENT).open("a") as file:
        file.write("[1]\n{}\n")
    cli("deploy", "log", folder).fine("is damaged")


def test_faults_are_logged_and_nothing_leaves_unlogged(tmp_path):
    from flwr.app import Message

    from certifl.deploy.client_app import respond
    from certifl.deploy.messages import to_records

    client = dealt(tmp_path / "client")
    MemoryGrid({})  # gives messages a run
    request = to_records(Content({"order": "nonsense"}))
    assert not respond(Message(request, 1, "query.join"), client).has_error()
    malformed = to_records(Content({}))
    malformed.config_records["certifl"]["json"] = "{"
    assert respond(Message(malformed, 1, "query.join"), client).has_error()
    path = tmp_path / "client" / SENT
    assert [json.loads(line)["kind"] for line in path.read_text().splitlines()] == [
        "fault",
        "error",
    ]
    path.unlink()
    path.mkdir()  # it cannot be written
    request = to_records(Content({"order": "join", "study": study_of(spec(*LIGHT))}))
    reply = respond(Message(request, 1, "query.join"), client)
    assert reply.has_error()
    assert reply.error.reason == "its disk failed"


def test_a_disk_that_fills_up_within_a_line_of_the_log_stops_the_message(tmp_path):
    import resource

    from certifl.deploy.client.state import SentLog
    from certifl.errors import StoreError

    log = SentLog(tmp_path)
    log.note_error("one")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (log.path.stat().st_size + 10, limits[1]))
    try:
        with pytest.raises(StoreError, match="Nothing is sent"):
            log.note_error("two")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    log.note_error("three")
    lines = list(sent_lines(tmp_path))
    assert ["damaged" in line for line in lines if "says" not in line] == [False, True, False]


def test_a_log_of_hostile_content_is_shown_without_harm(tmp_path):
    (tmp_path / SENT).write_text("[" * 100_000 + "\n" + "9" * 10_000 + '\n"\x1b[2J"\n')
    assert [line[:6] for line in sent_lines(tmp_path)] == ["line 1", "line 2", "line 3"]
    entry = {"time": "\x1b[2J", "kind": "join", "study": "", "round": None, "bytes": 1}
    (tmp_path / SENT).write_text(json.dumps({**entry, "says": ["\x1b[2J"], "parts": {}}) + "\n")
    shown = cli("deploy", "log", tmp_path)
    shown.fine("says")
    assert "\x1b" not in shown.out


def test_a_clients_files_are_private(tmp_path):
    (tmp_path / "client-0" / "studies").mkdir(parents=True, mode=0o755)
    listened(tmp_path, described("mixture", "training.rounds=1"), "rows")
    for client in range(2):
        folder = tmp_path / f"client-{client}"
        stored = [path for path in folder.rglob("*") if path != folder]
        assert {"answered.json", "certificates.parquet", "spec.toml"} <= {p.name for p in stored}
        for path in stored:
            assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_the_model_for_predictions_is_the_one_that_was_deployed(tmp_path):
    picture = tmp_path / "digit.png"
    Image.new("L", (8, 8), 100).save(picture)
    study = described("mixture")
    folder = coordinated(study, clients_of(tmp_path), tmp_path / "run")
    last = in_process(study, tmp_path / "own")
    study_folder = tmp_path / "client-1" / "studies" / folder.manifest()["deployment"]["id"]
    cli("predict", picture, "--run", study_folder, "--client", "1").fine()
    cli("predict", picture, "--run", study_folder, "--client", "0").refused("--client")
    model = ClientStudy(study_folder).deployed(None).model
    assert_same(
        {"m": dict(model.state_dict())}, {"m": deployed_model(study.build_algorithm(), last, 1)}
    )
    (study_folder / "deployed.safetensors").unlink()
    cli("predict", picture, "--run", study_folder).refused("no deployed model yet")
