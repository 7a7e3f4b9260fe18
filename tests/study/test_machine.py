"""What a run was computed on, and what it leaves of a GPU's memory to its certification."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

import tiny_study as tiny
from certifl.experiments import run as run_module
from certifl.federated import LocalTraining
from certifl.study import environment as machine
from certifl.study.environment import machine_metadata

GPUS = {None: "the current one", "cuda": "the current one", "cuda:0": "small", "cuda:1": "large"}


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("cuda:1", "large"),
        ("cuda:1,cuda:0", "large"),
        ("cuda:0 , cuda:1", "small"),
        ("cuda", "the current one"),
        ("auto", "the current one"),
        ("cpu", "cpu"),
    ],
)
def test_the_device_is_the_one_that_was_asked_for(asked, name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: GPUS[device])
    assert machine_metadata(asked)["device"] == name


@pytest.mark.parametrize("used", [True, False])
def test_memory_is_handed_back_where_a_gpu_was_used(used, monkeypatch):
    done: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: used)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("emptied"))
    machine.release_memory()
    assert done == ["emptied"] * used


def test_training_is_gone_before_certification_begins(tmp_path, monkeypatch):
    """Its graphs and model go when the last round is stored, not when cycles are looked for."""
    made: list[weakref.ref[LocalTraining]] = []
    happened: list[str] = []
    local_training, certify_clients = run_module.local_training, run_module.certify_clients

    def noted(*arguments: Any) -> LocalTraining:
        local = local_training(*arguments)
        made.append(weakref.ref(local))
        return local

    def given_back() -> None:
        happened.append("given back")
        assert [local() for local in made] == [None]

    def certified(*arguments: Any, **options: Any) -> Any:
        happened.append("certified")
        return certify_clients(*arguments, **options)

    monkeypatch.setattr(run_module, "local_training", noted)
    monkeypatch.setattr(run_module, "release_memory", given_back)
    monkeypatch.setattr(run_module, "certify_clients", certified)
    spec = tiny.spec("training.rounds=1")
    gc.disable()
    try:
        run_module.run(spec, run_module.Options(tmp_path / "run", explore=False))
    finally:
        gc.enable()
    assert happened == ["given back", "certified"]
