"""Parallel runs of a study: the same results, no process left behind, failures reported."""

import dataclasses
import multiprocessing
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from certifl.errors import InputError
from certifl.experiments.parallel import compute, helper_processes, processes_here
from certifl.experiments.run import Options
from certifl.paper.figures import FIGURES, Figure, Panel, Regime, Setting
from certifl.paper.reproduce import Plan, make_plan
from certifl.paper.scales import SCALES
from certifl.runs.folder import RunFolder
from tiny_study import cli, environment

SMOKE = SCALES["smoke"]
SETTINGS = tuple(Setting("cifar10", 4, "rotation", sigma) for sigma in ("0.1pi",))
REGIMES = (Regime("Local", "local"), Regime("FedAvg", "fedavg"))
TUNED = Regime("Personalized", "personalized")
STUDY = {"study": Figure("Study", ((Panel("curves", SETTINGS, (*REGIMES, TUNED)),),))}


def options(out: Path) -> Options:
    return Options(out, device="cpu", explore=False)


def study(out: Path) -> Plan:
    return make_plan(STUDY, SMOKE, out)


def test_helpers_do_the_whole_study_with_the_same_results(tmp_path):
    alone, together = study(tmp_path / "alone"), study(tmp_path / "together")
    compute(alone.jobs, options(alone.out), [])
    before = torch.get_num_threads()
    with helper_processes(together.jobs, options(together.out), 3):
        assert len(multiprocessing.active_children()) == 2
        deadline = time.monotonic() + 120
        while not all(job.done() for job in together.jobs):
            assert multiprocessing.active_children()
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert not multiprocessing.active_children()
    assert torch.get_num_threads() == before
    assert len(alone.jobs) == 3
    for mine, theirs in zip(alone.jobs, together.jobs, strict=True):
        wanted, found = (RunFolder(job.path).load_certificates() for job in (mine, theirs))
        assert np.array_equal(found.counts, wanted.counts)
        assert np.array_equal(found.radius, wanted.radius)


def test_leaving_early_ends_the_helpers_and_loses_nothing(tmp_path):
    plan = study(tmp_path)

    def leave() -> None:
        with helper_processes(plan.jobs, options(tmp_path), 2):
            deadline = time.monotonic() + 120
            while not plan.jobs[0].path.is_dir():
                assert time.monotonic() < deadline
                time.sleep(0.05)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        leave()
    assert not multiprocessing.active_children()
    compute(plan.jobs, options(tmp_path), [])
    assert all(job.done() for job in plan.jobs)


def test_helpers_end_when_the_command_is_killed(tmp_path):
    psutil = pytest.importorskip("psutil")
    arguments = ("reproduce", "figure1", "--scale", "smoke", "--out", str(tmp_path), "--jobs", "2")
    command, silent = [sys.executable, "-m", "certifl", *arguments], subprocess.DEVNULL
    process = subprocess.Popen(command, stdout=silent, stderr=silent, env=environment())
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("runs/*/spec.toml"))) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    helpers = psutil.Process(process.pid).children(recursive=True)
    assert helpers
    process.kill()
    assert process.wait() == -signal.SIGKILL
    _, left = psutil.wait_procs(helpers, timeout=60)
    assert not left


def test_a_failure_of_a_helper_is_reported_by_the_command(tmp_path):
    arguments = ("reproduce", "figure1", "--scale", "smoke", "--out", tmp_path)
    plan = make_plan({"figure1": FIGURES["figure1"]}, SMOKE, tmp_path)
    first = plan.jobs[0].path
    first.mkdir(parents=True)
    (first / "notes.txt").write_text("mine")
    cli(*arguments, "--jobs", "2").refused("notes.txt")
    assert not multiprocessing.active_children()
    assert (first / "notes.txt").read_text() == "mine"


def test_how_many_by_default(tmp_path, monkeypatch):
    monkeypatch.setattr("certifl.experiments.parallel.cores", lambda: 8)
    plans = {name: dataclasses.replace(study(tmp_path), scale=SCALES[name]) for name in SCALES}
    found = {
        name: processes_here(None, plan.scale.jobs, "cpu", False) for name, plan in plans.items()
    }
    assert found == {"smoke": 1, "laptop": 4, "overnight": 2, "paper": 1}
    assert processes_here(None, plans["laptop"].scale.jobs, "cuda:0", False) == 1
    assert processes_here(None, plans["laptop"].scale.jobs, "cpu", True) == 1
    assert processes_here(3, plans["paper"].scale.jobs, "cuda", False) == 3
    monkeypatch.setattr("certifl.experiments.parallel.cores", lambda: 2)
    assert processes_here(None, plans["laptop"].scale.jobs, "auto", False) == 2
    with pytest.raises(InputError, match="one after the other"):
        processes_here(2, plans["laptop"].scale.jobs, "cpu", True)
