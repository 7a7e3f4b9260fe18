"""Runs that are killed, interrupted, out of space or started twice, and then gone on with."""

import contextlib
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

import tiny_study as tiny
from certifl.certification import counts as engine
from certifl.certification.certificates import Certificates
from certifl.errors import StoreMismatch
from certifl.experiments.run import Options, run
from certifl.experiments.verify import verify_run
from certifl.federated import rounds
from certifl.federated.states import ServerState
from certifl.runs.checkpoints import StoredRound
from certifl.runs.folder import RunFolder
from certifl.spec import Spec
from certifl.study import certify as certifying

# Long enough to be hit in the middle, in training and in certification.
LONG = (
    *("training.rounds=5", "clients.count=3", "training.momentum_between_rounds=keep"),
    "algorithm={name='personalized', base={name='mixture', personalization=0.5}, epochs=1}",
    *("certification.estimator=top-class", "certification.n=1500"),
)
KILLS = 2

# One process computes what its tests share.
pytestmark = pytest.mark.xdist_group("resume")


@pytest.fixture(scope="module")
def study() -> Spec:
    return tiny.spec(*LONG)


@pytest.fixture(scope="module")
def reference(study: Spec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(study, Options(tmp_path_factory.mktemp("reference") / "run")).path


def assert_same_run(found: Path, wanted: Path) -> None:
    assert tiny.weights(found) == tiny.weights(wanted)
    one, two = (RunFolder(place).load_certificates() for place in (found, wanted))
    assert one.same_results(two)
    assert dict(one.conditions) == dict(two.conditions)
    for name in ("spec.toml", "partition.json"):
        assert (found / name).read_bytes() == (wanted / name).read_bytes()
    assert verify_run(found).problems == ()
    assert not list(found.rglob("*.tmp"))


def work(spec: Spec, place: Path) -> None:
    """The study in a process of its own, with votes saved after every small batch."""
    torch.set_num_threads(1)
    certifying._SECONDS_BETWEEN_SAVES = 0.0
    engine._CALLS_PER_BATCH = 2
    run(spec, Options(place))


@pytest.fixture(scope="module")
def start() -> Callable[[Spec, Path], BaseProcess]:
    """Starts the study in a new process, forked from one that has torch loaded already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["certifl.experiments.run", "certifl.cli", "pytest"])

    def begin(spec: Spec, place: Path) -> BaseProcess:
        process = context.Process(target=work, args=(spec, place))
        process.start()
        return process

    return begin


def training_begun(place: Path) -> bool:
    return any((place / "checkpoints" / "training").glob("round-*"))


def certification_begun(place: Path) -> bool:
    return any((place / "checkpoints" / "certification").glob("client-*"))


def wait_for(process: BaseProcess, there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while process.is_alive() and not there():
        assert time.monotonic() < deadline, "the study did not get going"
        time.sleep(0.002)


@pytest.mark.parametrize("phase", ["training", "certification"])
def test_killed_at_random_moments_and_gone_on_with(phase, study, reference, start, tmp_path):
    moments, place, killed = random.Random(phase), tmp_path / "run", 0
    begun = {"training": training_begun, "certification": certification_begun}[phase]
    while killed < KILLS:
        process = start(study, place)
        wait_for(process, lambda: begun(place))
        time.sleep(moments.uniform(0.0, 0.15))
        process.kill()
        process.join()
        if process.exitcode == 0:  # it was faster
            break
        assert process.exitcode == -signal.SIGKILL
        killed += 1
        assert not RunFolder(place).finished()
    assert killed >= 1
    last = start(study, place)
    last.join()
    assert last.exitcode == 0
    assert_same_run(place, reference)


def test_votes_of_a_killed_certification_are_not_cast_again(
    study, reference, tmp_path, monkeypatch
):
    place, real, batches = tmp_path / "run", engine.advance, []
    monkeypatch.setattr(certifying, "_SECONDS_BETWEEN_SAVES", 0.0)

    class Killed(BaseException):
        pass

    def dying(*given: object) -> None:
        if len(batches) == 1:
            raise Killed
        batches.append(1)
        real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "advance", dying)
        with pytest.raises(Killed):
            run(study, Options(place, device="cpu"))
    kept = {name: held for name, held in tiny.files(place).items() if "round-" in name}
    monkeypatch.setattr(engine, "advance", lambda *given: batches.append(real(*given)))
    run(study, Options(place, device="cpu"))
    after = {name: held for name, held in tiny.files(place).items() if "round-" in name}
    assert after == kept  # nothing was trained again
    assert_same_run(place, reference)
    again = len(batches)
    batches.clear()
    run(study, Options(tmp_path / "whole", device="cpu"))
    assert len(batches) == again


def test_damaged_votes_are_cast_again(study, reference, tmp_path, caplog):
    folder = run(study, Options(tmp_path / "run"))
    folder.certificates.unlink()
    content = bytearray(folder.votes(1).read_bytes())
    content[-4] ^= 1
    folder.votes(1).write_bytes(bytes(content))
    folder.votes(2).write_bytes(content[:50])
    run(study, Options(tmp_path / "run"))
    assert "client-00001.safetensors is damaged" in caplog.text
    assert "client-00002.safetensors" in caplog.text
    assert_same_run(folder.path, reference)


def test_ctrl_c_says_how_to_go_on(study, reference, tmp_path):
    file, place = tiny.write_spec(tmp_path, *LONG), tmp_path / "run"
    command = [sys.executable, "-m", "certifl", "run", str(file), "--out", str(place)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=tiny.environment()
    )
    deadline = time.monotonic() + 60
    while not training_begun(place) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    # CPython itself ends by the signal where Ctrl-C struck inside an `exec` of text, as imports of
    # torch do many of, whatever was made of it afterwards.
    assert process.returncode in (130, -signal.SIGINT), said
    assert "the same command resumes it" in said
    assert "Traceback" not in said
    assert not RunFolder(place).finished()
    run(study, Options(place))
    assert_same_run(place, reference)


def test_ctrl_c_with_overwrite_does_not_promise_too_much(tmp_path, monkeypatch):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "advance", interrupted)
    asked = ("run", tiny.write_spec(tmp_path), "--out", tmp_path / "run")
    plain, over = tiny.cli(*asked), tiny.cli(*asked, "--overwrite")
    assert plain.code == over.code == 130
    assert "the same command resumes it" in plain.err
    assert "without --overwrite" in over.err


@pytest.mark.parametrize("struck", [True, False])
def test_ctrl_c_made_into_another_error_is_still_ctrl_c(struck, tmp_path, monkeypatch):
    """Libraries in C may clear the KeyboardInterrupt that strikes in them and raise their own."""

    def reading(_: StoredRound) -> ServerState:
        with contextlib.suppress(KeyboardInterrupt):
            if struck:
                signal.raise_signal(signal.SIGINT)
        raise ValueError("could not determine the shape")

    monkeypatch.setattr(rounds, "server_state", reading)
    asked = ("run", tiny.write_spec(tmp_path), "--out", tmp_path / "run")
    if struck:
        stopped = tiny.cli(*asked)
        assert stopped.code == 130
        assert "the same command resumes it" in stopped.err
    else:
        tiny.cli(*asked).refused("unexpected error", "the shape", ".log", code=1)


def test_a_second_process_on_one_folder_is_refused(tmp_path):
    place = tmp_path / "run"
    asked = ("run", tiny.write_spec(tmp_path), "--out", place)
    with RunFolder(place).locked():
        before = tiny.files(place)
        tiny.cli(*asked).refused("Another process", "--out")
        with pytest.raises(StoreMismatch, match="Another process"):
            run(tiny.spec(), Options(place))
        assert tiny.files(place) == before
    run(tiny.spec(), Options(place))


@pytest.mark.parametrize("room", [500, 1500, 4000, 60_000, 110_000])
def test_a_full_disk_at_any_point_is_reported_and_the_run_resumes(room, finished, tmp_path):
    """From the first file of the folder to the report; into 60 000 bytes no checkpoint fits."""
    place = tmp_path / "run"
    asked = ("run", tiny.write_spec(tmp_path), "--out", place)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        full = tiny.cli(*asked)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    full.refused("Cannot write", "ree some space", "repeat the command", code=1)
    assert not list(place.rglob("*.tmp"))
    run(tiny.spec(), Options(place))
    assert_same_run(place, finished)


def test_a_damaged_checkpoint_is_trained_again(study, reference, tmp_path, caplog):
    folder = run(study, Options(tmp_path / "run"))
    newest = max(folder.training.glob("round-*"))
    state = newest / "clients" / "00001.safetensors"
    state.write_bytes(state.read_bytes()[:-1])
    folder.certificates.unlink()
    run(study, Options(tmp_path / "run"))
    assert f"{newest.name} is damaged" in caplog.text
    assert_same_run(folder.path, reference)
    assert os.path.getsize(state) > 0


def test_progress_of_a_resumed_certification_ends_at_all_votes(tmp_path):
    reports: list[tuple[str, int, int]] = []
    options = Options(
        tmp_path / "run", report=lambda what, done, all_, _: reports.append((what, done, all_))
    )
    folder = run(tiny.spec(), options)
    first = [entry for entry in reports if entry[0] == "certifying"]
    assert first[-1][1] == first[-1][2]
    folder.certificates.unlink()
    reports.clear()
    run(tiny.spec(), options)
    last = [entry for entry in reports if entry[0] == "certifying"][-1]
    assert last[1] == last[2]
    assert len(Certificates.load(folder.certificates)) == 12
