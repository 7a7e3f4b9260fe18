"""Experiment trackers beside real runs: what they hold is what the run's folder holds."""

import dataclasses
import json
import shutil
import socket
import sqlite3
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

import certifl.notebook
import tiny_study as tiny
from certifl.certification import Certificates
from certifl.experiments.run import Options, run
from certifl.progress import StageCallback
from certifl.runs.folder import RunFolder
from certifl.smoothing.laws import LAWS
from certifl.study.opened_run import OpenRun
from certifl.tracking import TRACKERS
from certifl.tracking.backends import importable
from certifl.tracking.run_tracker import certified_numbers, round_numbers

ROUNDS = 4
STUDY = tiny.spec(f"training.rounds={ROUNDS}", "certification.n=100")
# Warnings that the libraries raise about themselves.
_OF_LIBRARIES = ("DeprecationWarning", "FutureWarning", "ResourceWarning")
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{name}")
    for name in (*_OF_LIBRARIES, "pytest.PytestUnraisableExceptionWarning")
]

Points = dict[str, list[tuple[int, float]]]
"""Every (step, value) by its name, in the order in which they were logged."""


@pytest.fixture(autouse=True, scope="module")
def _no_settings() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "WANDB_MODE"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(autouse=True)
def _nothing_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any connection of this process to another machine fails the test."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            assert address[0] in ("127.0.0.1", "::1", "localhost"), address
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(scope="module")
def untracked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(STUDY, Options(tmp_path_factory.mktemp("untracked") / "run", explore=False)).path


@pytest.fixture
def finished(untracked: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(untracked, tmp_path / "run"))


def tracked(place: Path, *names: str, report: StageCallback | None = None) -> None:
    """The study with trackers; a run that is finished is only logged."""
    run(STUDY, Options(place, track=names, report=report, explore=False))


def in_tensorboard(folder: Path) -> Points:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    held = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    held.Reload()
    return {
        tag: [(event.step, event.value) for event in held.Scalars(tag)]
        for tag in held.Tags()["scalars"]
    }


def in_mlflow(folder: Path) -> Points:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    (experiment,) = (e for e in client.search_experiments() if e.name == "certifl")
    (found,) = client.search_runs([experiment.experiment_id])
    names = found.data.metrics
    rows = {name: client.get_metric_history(found.info.run_id, name) for name in names}
    return {name: [(point.step, point.value) for point in row] for name, row in rows.items()}


def in_wandb(folder: Path) -> Points:
    points: Points = {}
    files = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))
    assert len({path.name for path in files}) == 1, "all starts belong to one run"
    for path in files:
        for step, numbers in wandb_rows(path.read_bytes()):
            for name, value in numbers.items():
                points.setdefault(name, []).append((step, value))
    return points


def wandb_rows(content: bytes) -> Iterator[tuple[int, dict[str, float]]]:
    """Rows of an offline file: a LevelDB log (blocks of 32 KiB) of protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    block, at, whole = 32768, 7, b""
    while at + 7 <= len(content):
        if block - at % block < 7:
            at += block - at % block
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a record, or the last piece of one
            record, whole = Record.FromString(whole), b""
            if record.HasField("history"):
                items = {
                    (item.key or "/".join(item.nested_key)): item.value_json
                    for item in record.history.item
                }
                numbers = {
                    name: float(json.loads(text))
                    for name, text in items.items()
                    if not name.startswith("_")
                }
                yield record.history.step.num, numbers


READERS: dict[str, Callable[[Path], Points]] = {
    "tensorboard": in_tensorboard,
    "mlflow": in_mlflow,
    "wandb": in_wandb,
}
each_tracker = pytest.mark.parametrize("name", sorted(READERS))


def needed(name: str) -> None:
    if not TRACKERS[name].installed():
        pytest.skip(f"{name} is not installed: pip install 'certifl[{name}]'")


def assert_logged(points: Points, folder: Path) -> None:
    """Each round once and in order, the certificates once; the numbers are the folder's own."""
    held = RunFolder(folder)
    history = [json.loads(line) for line in held.history.read_text().splitlines()]
    assert len(history) == ROUNDS
    wanted: Points = {}
    for entry in history:
        for client, row in entry["clients"].items():
            for metric in ("loss", "accuracy", "seconds"):
                point = (entry["round"], row[metric])
                wanted.setdefault(f"{metric}/client-{client}", []).append(point)
        wanted.setdefault("seconds/round", []).append((entry["round"], entry["seconds"]))
    certificates = held.load_certificates()
    sigma = certificates.conditions["sigma"]
    for client in range(STUDY.clients.count):
        own = certificates.of_client(client)
        wanted[f"acr/client-{client}"] = [(ROUNDS, own.average_certified_radius())]
        share = float(own.certified_accuracy([0.5 * sigma])[0])
        wanted[f"certified_accuracy/0.5-sigma/client-{client}"] = [(ROUNDS, share)]
    for name, row in wanted.items():
        assert [step for step, _ in points[name]] == [step for step, _ in row], name
        assert [v for _, v in points[name]] == pytest.approx([v for _, v in row], rel=1e-6), name
    mean = sum(value for key in (0, 1) for _, value in wanted[f"acr/client-{key}"]) / 2
    assert points["acr/mean"] == [(ROUNDS, pytest.approx(mean, rel=1e-6))]
    end = LAWS["uniform"].largest_radius(sigma, STUDY.certification.n, STUDY.certification.alpha)
    radii = {float(k.split("/")[1].partition("-")[0]) for k in points if "-sigma/" in k}
    assert radii == {radius for radius in (0, 0.25, 0.5, 0.75, 1.0) if radius * sigma <= end}


def interrupted_after(rounds: int) -> Callable[[str, int, int, str], None]:
    """A listener that stops the run in the middle of a round."""

    def report(what: str, done: int, _all: int, _unit: str) -> None:
        if what == "training" and done == STUDY.clients.count * rounds + 1:
            raise KeyboardInterrupt

    return report


@each_tracker
def test_an_interrupted_run_is_logged_completely_and_once(name, tmp_path, untracked):
    needed(name)
    place = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        tracked(place, name, report=interrupted_after(2))
    note = json.loads((place / "tracking" / name / "certifl.json").read_text())
    assert note["rounds"] == 2
    assert not note["certified"]
    tracked(place, name)
    after = json.loads((place / "tracking" / name / "certifl.json").read_text())
    assert after == {"run": note["run"], "rounds": ROUNDS, "certified": True}
    assert_logged(READERS[name](place / "tracking" / name), place)
    # The run is what it is without a tracker, to the last bit.
    assert tiny.weights(place) == tiny.weights(untracked)
    assert RunFolder(place).manifest()["spec_hash"] == RunFolder(untracked).manifest()["spec_hash"]


@each_tracker
def test_a_finished_run_can_be_logged_later_and_only_once(name, finished):
    needed(name)
    before = tiny.files(finished)
    tracked(finished, name)
    logged = tiny.files(finished)
    assert {path: logged[path] for path in before} == before
    tracked(finished, name)
    assert tiny.files(finished) == logged
    assert_logged(READERS[name](finished / "tracking" / name), finished)


def test_the_command_names_trackers_and_parameters_are_the_spec(tmp_path, monkeypatch):
    needed("tensorboard")
    monkeypatch.setattr(certifl.notebook, "write_report", lambda *_, **__: None)  # slow
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    study, place = tiny.write_spec(tmp_path), tmp_path / "run"
    tiny.cli("run", study, "--out", place, "--track", "tensorboard").fine()
    held = EventAccumulator(str(place / "tracking" / "tensorboard"))
    held.Reload()
    content = held.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    logged = HParamsPluginData.FromString(content).session_start_info.hparams
    assert logged["training.lr"].number_value == 0.05
    assert logged["algorithm.name"].string_value == "fedavg"
    assert logged["certification.perturbation.family"].string_value == "rotation"
    text = held.Tensors("files/text_summary")[0].tensor_proto.string_val[0].decode()
    assert str(place / "report.html") in text
    assert str(place / "figures") in text


def test_mlflow_begins_anew_where_a_kill_left_half_a_database_and_has_the_spec_as_parameters(
    finished,
):
    needed("mlflow")
    from mlflow.tracking import MlflowClient

    base = finished / "tracking/mlflow/mlflow.db"
    base.parent.mkdir(parents=True)
    with sqlite3.connect(base) as half:
        half.execute("CREATE TABLE trace_info (request_id VARCHAR(50))")
    half.close()
    tracked(finished, "mlflow")
    assert_logged(in_mlflow(base.parent), finished)
    note = json.loads((base.parent / "certifl.json").read_text())
    found = MlflowClient(tracking_uri=f"sqlite:///{base}").get_run(note["run"])
    assert found.info.status == "FINISHED"
    assert found.data.params["training.rounds"] == str(ROUNDS)
    assert found.data.params["augmentation.federated.family"] == "rotation"
    assert str(finished / "report.html") in found.data.tags["mlflow.note.content"]


class Broken:
    """A tracker whose server goes away in the middle of the run."""

    working = False

    def __init__(self, folder: Path) -> None:
        self.written = folder / "log.txt"

    @staticmethod
    def installed() -> bool:
        return True

    def begin(self, spec: Any, metadata: Any, run_id: str | None, rounds: int) -> str:
        return run_id or "mine"

    def log(self, numbers: Any, step: int) -> None:
        if step == 1 and not Broken.working:
            raise ConnectionError("the server went away")
        what = "round" if "seconds/round" in numbers else "certificates"
        with self.written.open("a") as file:
            file.write(f"{what} {step}, ")

    def finish(self, complete: bool) -> None:
        raise OSError("and it does not answer")


def test_a_tracker_that_fails_costs_a_warning_and_nothing_else(
    tmp_path, untracked, monkeypatch, caplog
):
    monkeypatch.setitem(TRACKERS, "mlflow", Broken)
    monkeypatch.setattr(Broken, "working", False)
    place = tmp_path / "run"
    tracked(place, "mlflow")
    assert RunFolder(place).complete()
    assert tiny.weights(place) == tiny.weights(untracked)
    warned = [r.message for r in caplog.records if r.levelname == "WARNING"]
    assert len(warned) == 1
    assert "mlflow" in warned[0]
    assert "ConnectionError: the server went away" in warned[0]
    assert (place / "tracking/mlflow/log.txt").read_text() == "round 0, "
    # The same command logs what is missing.
    monkeypatch.setattr(Broken, "working", True)
    tracked(place, "mlflow")
    rounds = "".join(f"round {number}, " for number in range(ROUNDS))
    logged = (place / "tracking/mlflow/log.txt").read_text()
    assert logged == f"{rounds}certificates {ROUNDS}, "


def test_a_folder_that_cannot_be_written_costs_a_warning(finished, caplog):
    needed("tensorboard")
    (finished / "tracking").write_text("in the way")
    tracked(finished, "tensorboard")
    assert RunFolder(finished).complete()
    assert any("Tracking with tensorboard stopped" in r.message for r in caplog.records)


def test_unknown_and_missing_trackers_are_refused_before_anything_is_written(
    tmp_path, monkeypatch
):
    study, place = tiny.write_spec(tmp_path), tmp_path / "run"
    refused = tiny.cli("run", study, "--out", place, "--track", "notebook")
    refused.refused("notebook", "mlflow, tensorboard, wandb")
    monkeypatch.setattr(TRACKERS["wandb"], "installed", staticmethod(lambda: False))
    tiny.cli("run", study, "--out", place, "--track", "wandb").refused("certifl[wandb]")
    assert not place.exists()


def test_a_folder_of_a_library_s_name_is_no_library(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "certifl_no_such_tracker").mkdir()
    assert not importable("certifl_no_such_tracker")
    assert not importable("certifl_not_even_a_folder")
    assert importable("json", "torch")


def test_names_and_means_of_a_round():
    entry = {
        "round": 3,
        "seconds": 5.0,
        "clients": {
            "0": {"loss": 1.0, "seconds": 2.0},
            "7": {"loss": 4.0, "seconds": 3.0, "steps": 9},
        },
    }
    assert round_numbers(entry) == {
        "seconds/round": 5.0,
        "loss/mean": 2.5,
        "loss/client-0": 1.0,
        "loss/client-7": 4.0,
        "seconds/client-0": 2.0,
        "seconds/client-7": 3.0,
        "steps/mean": 9.0,
        "steps/client-7": 9.0,
    }


def test_means_of_certificates_count_every_client_once_and_never_mix_units(untracked):
    opened = OpenRun(untracked)
    numbers = certified_numbers(opened)
    accuracy = "certified_accuracy/0.5-sigma"
    for name in ("acr", accuracy):
        mean = (numbers[f"{name}/client-0"] + numbers[f"{name}/client-1"]) / 2
        assert numbers[f"{name}/mean"] == pytest.approx(mean)
    one, other = (opened.certificates.of_client(client) for client in (0, 1))
    pixels = {**other.conditions, "family": "pixel", "unit": "intensity"}
    both = Certificates.concatenate([one, dataclasses.replace(other, conditions=pixels)])
    opened.certificates = both
    apart = certified_numbers(opened)
    assert apart == {name: v for name, v in numbers.items() if not name.endswith("/mean")}


class Noted:
    """A tracker that keeps what it is given."""

    logged: ClassVar[list[dict[str, float]]] = []

    def __init__(self, folder: Path) -> None:
        del folder

    @staticmethod
    def installed() -> bool:
        return True

    def begin(self, *_: Any) -> str:
        return "noted"

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        del step
        self.logged.append(dict(numbers))

    def finish(self, complete: bool) -> None:
        del complete


@pytest.mark.parametrize(("share", "open_"), [(0.6, False), (1.0, True)])
def test_trackers_do_not_learn_who_took_part_where_privacy_assumes_that(
    share: float, open_: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("opacus", reason="needs the extra [dp]")
    private = ("privacy.kind=client", "privacy.noise_multiplier=2.0", "training.rounds=2")
    few = ("certification.n=100", "certification.images=1", f"clients.participation={share}")
    monkeypatch.setitem(TRACKERS, "tensorboard", Noted)
    monkeypatch.setattr(Noted, "logged", [])
    options = Options(tmp_path / "run", track=("tensorboard",), explore=False)
    run(tiny.spec(*private, *few), options)
    *rounds, certified = Noted.logged
    assert len(rounds) == 2
    for numbers in rounds:
        assert any("client-" in name for name in numbers) == open_
        assert open_ or set(numbers) == {"epsilon/mean"}
    assert "acr/client-1" in certified
