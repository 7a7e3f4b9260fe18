"""Certificates of clients elsewhere: what each lets go, and what the server makes of it."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("flwr", reason="Flower is not installed: pip install certifl[flower]")

import torch
from flwr.app import Message

from certifl.certification import Certificates
from certifl.deploy.client.client import Client
from certifl.deploy.client.curves import CertificateChecks, rows_of
from certifl.deploy.client.settings import Settings, open_local_data
from certifl.deploy.messages import from_records, to_records
from certifl.errors import InputError, StoreError, StoreMismatch, WorkError
from certifl.experiments.run import Options as Here
from certifl.experiments.run import run
from certifl.report import summary_rows, write_report
from certifl.report.results import load_run
from certifl.report.summary import client_acr, client_curves, radius_grid
from certifl.runs.checkpoints import Checkpoints
from certifl.runs.folder import StoredRun
from certifl.study.setup import open_data
from deploy_factory import MemoryGrid, carried, clients_of, coordinated, options
from tiny_federation import assert_same
from tiny_study import cli, spec

STUDY = spec("certification.images=8", "training.rounds=1", "training.lr=0.02")


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return run(STUDY, Here(tmp_path_factory.mktemp("own") / "run", device="cpu"))


def federation(root, share="curve", study=STUDY, change=None, **settings):
    at = clients_of(root, study.clients.count, **settings)
    grid = MemoryGrid(at, change)
    return coordinated(study, grid, options(root / "run", share=share)), grid


def test_rows_are_the_certificates_of_one_process(own, tmp_path):
    at = clients_of(tmp_path, 2, share="rows")
    folder = coordinated(STUDY, at, options(tmp_path / "rows", share="rows"))
    assert folder.load_certificates().same_results(own.load_certificates())
    page = write_report([folder.path], tmp_path / "page.html", figures=False).read_text()
    assert "for each radius of a fixed grid" not in page


def test_a_curve_gives_the_same_numbers(own, tmp_path):
    folder, _ = federation(tmp_path, share="curve")
    here, there = load_run(own.path), load_run(folder.path)
    assert there.curves_only
    grid = radius_grid([here])
    assert np.array_equal(grid, radius_grid([there]))
    assert np.array_equal(client_curves(here, grid), client_curves(there, grid))
    assert client_acr(there) == pytest.approx(client_acr(here), rel=1e-12, abs=1e-12)
    rows, told = summary_rows([own.path])[0], summary_rows([folder.path])[0]
    assert [a["value"] for a in rows["accuracy"]] == [a["value"] for a in told["accuracy"]]
    assert told["abstained"] is None
    page = write_report([folder.path], tmp_path / "page.html", figures=False).read_text()
    assert "for each radius of a fixed grid" in page
    assert "not shared" in page
    both = write_report([folder.path, own.path], tmp_path / "both.html", figures=False)
    assert "compared image by image" in both.read_text()
    answer = cli("verify", folder.path)
    assert answer.code == 2
    assert "2 curves agree with the spec and are possible" in answer.err.replace("\n", " ")


def test_only_what_the_disclosure_level_permits_leaves_a_client(own, tmp_path):
    seen = []

    def listen(node, request, reply):
        if request.metadata.message_type == "query.certify":
            seen.append(from_records(carried(reply).content))
        return reply

    folder, _ = federation(tmp_path, "rows", change=listen)
    assert len(seen) == 2
    for answer in seen:
        assert answer.parts == {}
        assert answer.fields.keys() == {"certified", "client", "seconds"}
        told = answer.fields["certified"]
        assert told.keys() == {"share", "model", "done", "at_most", "cast", "curve"}
        assert told["curve"].keys() == {"radii", "correct", "images", "acr", "conditions"}
        assert not any("fingerprint" in key for key in told["curve"]["conditions"])
    rows = Certificates.load(next((tmp_path / "client-0").glob("studies/*/certificates.parquet")))
    assert rows.same_results(own.load_certificates().of_client(0))
    assert "rows" not in json.dumps(folder.manifest()["deployment"]["shares"])


def test_the_status_of_a_study_while_it_runs_and_after(tmp_path):
    seen = []

    def look(node, request, reply):
        seen.append(cli("deploy", "status", tmp_path / "run").out)  # the server holds the lock
        return reply

    study = spec("certification.images=2", "certification.n=20", "certification.n0=5")
    folder, _ = federation(tmp_path, "none", study, change=look)
    rounds = study.training.rounds
    assert "No round has begun" in seen[0]
    under_way = next(text for text in seen if f"Rounds: 1 of {rounds}" in text)
    assert "round 1: loss " in under_way
    assert "clients 0, 1 answered" in under_way
    assert "Time left for the rounds: about" in under_way
    assert "Certification: 0 of 2 clients have finished." in "".join(seen)
    done = cli("deploy", "status", folder.path)
    done.fine(f"Rounds: {rounds} of {rounds}", "Finished.")
    assert "test" not in done.out  # with `share = "none"`, how many images they test is theirs


@pytest.mark.parametrize(
    "wrong",
    [{"round": "x"}, {"clients": 5}, {"clients": [{}]}, {"seconds": None}, {"left_out": [5]}],
)
def test_the_status_of_a_damaged_history_is_an_error(wrong, own, tmp_path):
    for name in ("spec.toml", "run.json"):
        (tmp_path / name).write_bytes((own.path / name).read_bytes())
    history = [{"round": 0, "seconds": 1.0, "clients": [{"client": 0, "loss": 1.0}], **wrong}]
    with Checkpoints(tmp_path / "checkpoints" / "training").begin(1) as pending:
        pending.put_server({})
        pending.commit(identity={}, history=history)
    cli("deploy", "status", tmp_path).refused("round.json is damaged", code=1)


def test_of_rows_the_server_stores_its_own_metadata(own):
    rows = own.load_certificates().of_client(0)
    model = rows.conditions["model_fingerprint"]["0"]
    honest = {**rows.conditions, "model_fingerprint": model}
    lies = {"threat": "everything", "certified": "all", "device": "\x1b[2J"}
    lies |= {"versions": {"certifl": "0.0.1"}}  # another version may word the threat otherwise
    sent = rows_of(dataclasses.replace(rows, conditions={**honest, **lies}))
    stored = CertificateChecks(STUDY, 0, len(rows), 10).rows(sent, model)
    assert stored.same_results(rows)
    assert "\x1b" not in stored.conditions["device"]
    same = {n: v for n, v in honest.items() if n not in lies}
    assert {n: v for n, v in stored.conditions.items() if n not in lies} == same
    assert stored.conditions["threat"] == honest["threat"]
    assert "certified" not in stored.conditions


def test_a_full_disk_of_the_server_is_not_blamed_on_a_client(own, monkeypatch):
    rows = own.load_certificates().of_client(0)

    def full(*_):
        raise OSError("no space left")

    sent = rows_of(rows)
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StoreError, match="no space left"):
        CertificateChecks(STUDY, 0, len(rows), 10).rows(sent, "0")


def test_share_none_gives_the_server_nothing_and_the_client_everything(tmp_path):
    folder, _ = federation(tmp_path, "none")
    assert folder.finished()
    assert folder.complete()
    assert StoredRun(folder.path).curves == {}
    with pytest.raises(StoreMismatch, match="keeps its certificates"):
        load_run(folder.path)
    assert len(list(tmp_path.glob("client-*/studies/*/certificates.parquet"))) == 2


def test_certifying_in_pieces_gives_the_same_certificates(own, tmp_path):
    at = clients_of(tmp_path, 2, share="rows")
    grid = MemoryGrid(at)
    asked = options(tmp_path / "run", share="rows", piece=1e-9)
    folder = coordinated(STUDY, grid, asked)
    pieces = [n for n, request in grid.sent if request.metadata.message_type == "query.certify"]
    assert folder.load_certificates().same_results(own.load_certificates())
    assert len(pieces) >= 2


def reply_to(request, content):
    return Message(to_records(content), reply_to=request)


def test_with_mostly_impossible_certificates_the_run_stops_and_resumes(tmp_path):
    lies = [True]

    def plays(node, request, reply):
        if request.metadata.message_type != "query.certify" or not lies or node == 100:
            return reply
        content = from_records(carried(reply).content)
        content.fields["certified"]["curve"]["acr"] = 1000.0
        return reply_to(request, content)

    study = spec("clients.count=3", "certification.images=4", "training.rounds=1")
    at = clients_of(tmp_path, 3)
    with pytest.raises(WorkError, match=r"2 of 3.*client 1 \(.*1000 does not fit.*client 2"):
        coordinated(study, MemoryGrid(at, plays), tmp_path / "run")
    lies.clear()
    again = MemoryGrid(at, plays)
    assert coordinated(study, again, tmp_path / "run").complete()
    asked = [n for n, request in again.sent if request.metadata.message_type == "query.certify"]
    assert asked == [101, 102]


def test_a_failing_client_reports_it_without_private_details(tmp_path):
    at = clients_of(tmp_path)
    secret = {"data": str(tmp_path / "very private place"), "dealt": False}
    object.__setattr__(at[101], "settings", at[101].settings.model_copy(update=secret))
    grid = MemoryGrid(at)
    with pytest.raises(WorkError, match="client 1"):
        coordinated(STUDY, grid, tmp_path / "run")
    assert "private" not in (tmp_path / "run" / "run.json").read_text()


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"perturbation": {"family": "rotation", "sigma": 0.1}}, "own perturbation"),
        ({"device": "tpu"}, "its own log"),
    ],
)
def test_a_mismatched_client_is_named(settings, word, tmp_path):
    with pytest.raises(WorkError, match=f"client 0 was refused.*{word}"):
        federation(tmp_path, **settings)


def test_own_perturbations_are_certified_if_the_study_allows_it(tmp_path):
    at = clients_of(tmp_path)
    at |= {101: clients_of(tmp_path, perturbation={"family": "pixel", "sigma": 0.2})[101]}
    asked = options(tmp_path / "run", own_perturbation=True)
    folder = coordinated(STUDY, at, asked)
    kinds = load_run(folder.path).certificates.by_kind()
    assert {part.conditions["family"] for part in kinds} == {"rotation", "pixel"}
    write_report([folder.path], tmp_path / "page.html", figures=False)


def test_code_named_by_a_server_is_not_loaded(tmp_path):
    study = spec('model.name="os:system"')
    with pytest.raises(WorkError, match=r"code that this client has not *allowed"):
        federation(tmp_path, study=study)


def test_a_node_cannot_pose_as_another_client(tmp_path):
    at = clients_of(tmp_path)
    at[103] = clients_of(tmp_path / "twin")[101]
    coordinated(STUDY, at, tmp_path / "run")
    swapped = {100: at[101], 101: at[100]}
    keys = {0: b"key 100", 1: b"key 101"}
    with pytest.raises(WorkError, match="another key"):
        coordinated(STUDY, swapped, options(tmp_path / "other", keys=keys))


def test_a_lost_state_is_reported_and_not_replaced(tmp_path):
    study = spec('algorithm={name="mixture",personalization=0.5}', "training.rounds=3")
    at = clients_of(tmp_path)

    def loses(node, request, reply):
        if request.metadata.group_id == "1" and node == 101:
            for path in (tmp_path / "client-1").rglob("state-*"):
                path.unlink()
        return reply

    with pytest.raises(WorkError, match="its state after round 1 is lost"):
        coordinated(study, MemoryGrid(at, loses), tmp_path / "run")
    history = Checkpoints(tmp_path / "run/checkpoints/training").history()
    assert "is lost" in history[2]["left_out"][0]["reason"]


def parquet(folder, split, images, labels, names):
    """A split as the hub lays it out, with the names of all classes."""
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    def png(image):
        file = io.BytesIO()
        Image.fromarray(image[0].numpy()).save(file, "png")
        return {"bytes": file.getvalue(), "path": None}

    table = pa.table({"image": [png(image) for image in images], "label": labels.tolist()})
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
    told = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata(told), folder / f"{split}-00000.parquet")


def test_clients_own_folders_give_the_same_models_and_certificates(own, tmp_path):
    dataset, partition = open_data(STUDY, None)
    at = {}
    for client, stored in enumerate(partition.clients):
        folder, names = tmp_path / f"images-{client}", list(dataset.class_names)
        for split, part, index in [
            ("train", dataset.train, stored.train),
            ("test", dataset.test, stored.test),
        ]:
            chosen = part.take(index)
            parquet(folder, split, chosen.images, chosen.labels, names)
        settings = Settings(client=client, data=str(folder), share="rows")
        at[100 + client] = Client(settings, tmp_path / f"client-{client}")
    folder = coordinated(STUDY, at, options(tmp_path / "run", share="rows"))
    here = Checkpoints(own.training).latest()
    there = Checkpoints(folder.training).latest()
    assert_same(there.server(), here.server())
    mine, theirs = own.load_certificates(), folder.load_certificates()
    for name in ("client", "label", "predicted", "radius", "counts"):
        assert np.array_equal(getattr(mine, name), getattr(theirs, name)), name
    assert "fingerprint" not in json.dumps(folder.manifest()["deployment"]["facts"])


def test_classes_that_a_client_lacks_are_named_in_its_settings(tmp_path):
    rows = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    for split in ("train", "test"):
        parquet(tmp_path / "images", split, rows, torch.tensor([0, 1, 1, 0]), ["7", "3"])
    asked = {"client": 0, "data": str(tmp_path / "images")}
    settings = Settings(**asked, classes=[str(digit) for digit in range(10)])
    local_data = open_local_data(STUDY, settings)
    assert local_data.train.labels.tolist() == [7, 3, 3, 7]
    assert local_data.dataset.num_classes == 10
    with pytest.raises(InputError, match="does not name '7'"):
        open_local_data(STUDY, Settings(**asked, classes=["3", "4"]))
