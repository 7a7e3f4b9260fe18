"""Training killed at any moment, on a full disk, in a folder that turns read-only."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from certifl.errors import StoreError
from certifl.federated import Mixture, Personalized, train
from certifl.runs.checkpoints import Checkpoints
from tiny_federation import TinyNet, clients, training, without_seconds

TESTS = Path(__file__).resolve().parents[1] / "support"
KILLS = 15
ROUNDS = 7  # six of the schedule, one of fine-tuning

SETTING = """
import json, os, random, signal, sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
import torch
from tiny_federation import TinyNet, clients, training
from certifl.federated import Mixture, Personalized, train
from certifl.runs.checkpoints import Checkpoints

def work(folder, **options):
    local = training(momentum_between_rounds="keep", rounds=6)
    algorithm = Personalized(Mixture(0.5))
    return train(algorithm, TinyNet(), clients(), local, Checkpoints(folder), **options)
"""

KILLER = (
    SETTING
    + """
torch.set_num_threads(1)
place, kills_wanted = Path(sys.argv[1]), int(sys.argv[2])
rounds = {{}}

def remember(progress):
    stored = Checkpoints(place / "whole").latest()
    rounds[stored.number] = stored.files

work(place / "first")  # loads what is loaded on first use
started = time.perf_counter()
last = work(place / "whole", progress=remember)
whole = time.perf_counter() - started
rounds[last.number] = last.files

moments, kills, runs, seen = random.Random(1), 0, 0, []
while kills < kills_wanted:
    folder = place / f"killed-{{runs}}"
    child = os.fork()  # each attempt is a process of its own, after the slow imports
    if child == 0:
        work(folder)
        os._exit(0)
    time.sleep(moments.uniform(0.0, 0.7) * whole)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    kills += os.WIFSIGNALED(status)
    stored = Checkpoints(folder).latest()
    number = -1 if stored is None else stored.number
    # Nothing that was committed is lost; whatever is read is what an undisturbed training wrote.
    assert number >= (seen[-1] if seen else -1), (seen, number)
    assert stored is None or stored.files == rounds[number], number
    seen.append(number)
    if number == last.number:
        runs, seen = runs + 1, []
for run in range(runs + 1):
    assert work(place / f"killed-{{run}}").files == last.files
print(json.dumps({{"kills": kills, "runs": runs + 1}}))
"""
)


def in_process(script: str, *arguments: object) -> str:
    command = [sys.executable, "-c", script.format(tests=str(TESTS)), *map(str, arguments)]
    options = {"env": {**os.environ, "OMP_NUM_THREADS": "1"}, "timeout": 300}
    done = subprocess.run(command, **options, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_random_moments_it_ends_with_the_same_bytes(tmp_path):
    result = json.loads(in_process(KILLER, tmp_path, KILLS))
    assert result["kills"] == KILLS
    assert result["runs"] >= 2
    for run in range(result["runs"]):
        folder = tmp_path / f"killed-{run}"
        names = sorted(path.name for path in folder.iterdir())
        assert names == [f"round-{ROUNDS - 1:05d}", f"round-{ROUNDS:05d}"]
        stored, whole = (Checkpoints(f).latest() for f in (folder, tmp_path / "whole"))
        assert without_seconds(stored.history) == without_seconds(whole.history)


WITH_WORKERS = (
    SETTING
    + """
if __name__ == "__main__":
    work(sys.argv[1], workers=2, progress=lambda _: time.sleep(0.05))
"""
)


def test_killed_with_workers_nobody_is_left_behind(tmp_path):
    psutil = pytest.importorskip("psutil")
    script, folder = tmp_path / "script.py", tmp_path / "killed"
    script.write_text(WITH_WORKERS.format(tests=str(TESTS)))
    process = subprocess.Popen(
        [sys.executable, script, folder], env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    deadline = time.monotonic() + 120
    while not (folder / "round-00002").is_dir():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    helpers = psutil.Process(process.pid).children(recursive=True)
    assert len(helpers) >= 3  # two workers and what forks them
    process.kill()
    assert process.wait() == -signal.SIGKILL
    _, left = psutil.wait_procs(helpers, timeout=60)
    assert not left
    assert_same_end(folder, tmp_path / "whole")


def work(folder: Path, **options):
    local = training(momentum_between_rounds="keep", rounds=6)
    algorithm = Personalized(Mixture(0.5))
    return train(algorithm, TinyNet(), clients(), local, Checkpoints(folder), **options)


def assert_same_end(folder: Path, whole: Path) -> None:
    """The training in `folder` is gone on with and ends like one that was never disturbed."""
    undisturbed, resumed = work(whole), work(folder)
    assert resumed.files == undisturbed.files
    assert without_seconds(resumed.history) == without_seconds(undisturbed.history)
    assert not list(folder.rglob("*.tmp"))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own, for whoever may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("may not mount a disk")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def in_round(number: int, deed):
    def on_progress(progress):
        if (progress.round, progress.done) == (number, 1):
            deed()

    return on_progress


def committed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("round-*"))


def test_a_disk_that_fills_up_loses_nothing(disk, tmp_path):
    filler = disk / "filler"

    def fill() -> None:
        with filler.open("wb", buffering=0) as file:
            while True:
                try:
                    file.write(bytes(4096))
                except OSError:
                    return

    with pytest.raises(StoreError, match=r"No space left.*free some space.*repeat the command"):
        work(disk / "run", progress=in_round(3, fill))
    assert committed(disk / "run") == ["round-00002", "round-00003"]
    latest = Checkpoints(disk / "run").latest()
    assert latest.number == 3
    with pytest.raises(StoreError, match="No space left"):
        work(disk / "run")
    filler.unlink()
    assert_same_end(disk / "run", tmp_path / "whole")


def test_a_folder_that_turns_read_only_loses_nothing(disk, tmp_path):
    def remount(mode: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{mode}", disk], check=True)

    with pytest.raises(StoreError, match=r"Cannot write .*Read-only"):
        work(disk / "run", progress=in_round(2, lambda: remount("ro")))
    latest = Checkpoints(disk / "run").latest()
    assert latest.number == 2
    with pytest.raises(StoreError, match="Read-only"):
        work(disk / "run")
    remount("rw")
    assert_same_end(disk / "run", tmp_path / "whole")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_loses_nothing(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(StoreError, match=r"Cannot write .*Permission denied"):
        work(folder, progress=in_round(2, lambda: folder.chmod(0o555)))
    folder.chmod(0o755)
    assert_same_end(folder, tmp_path / "whole")


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_files_that_may_not_grow_further_are_reported_and_the_training_resumes(share, tmp_path):
    """The record of a round grows with its history, so a limit on size strikes in a later one."""
    whole = work(tmp_path / "whole")
    room = int(share * (whole.path / "round.json").stat().st_size)
    assert room > max(size for size, _ in whole.files.values())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(StoreError, match=r"Cannot write .*Rounds committed before"):
            work(tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(committed(tmp_path / "run")) == 2
    assert not list((tmp_path / "run").glob(".*"))
    assert_same_end(tmp_path / "run", tmp_path / "whole")
