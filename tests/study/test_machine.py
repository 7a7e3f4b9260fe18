"""The record of the machine, GPU memory between training and certification, lack of memory."""

import gc
import weakref
from typing import Any

import pytest
import torch

import tiny_study as tiny
from certifl.certification import sampling
from certifl.errors import WorkError
from certifl.experiments import run as run_module
from certifl.federated import LocalTraining, faults
from certifl.study import environment as machine
from certifl.study.environment import machine_metadata
from certifl.torch_env import out_of_memory

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
    # The first optimizer of a process imports more of torch, whose errors on the way keep frames.
    torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    gc.collect()
    gc.disable()
    try:
        run_module.run(spec, run_module.Options(tmp_path / "run", explore=False))
    finally:
        gc.enable()
    assert happened == ["given back", "certified"]


@pytest.mark.parametrize(
    "message",
    [
        "CUDA out of memory. Tried to allocate 2 GiB",
        "DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes",
        "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory",
        "[Errno 12] Cannot allocate memory",
        "CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "GET was unable to find an engine to execute this computation",
    ],
)
def test_training_and_voting_know_memory_that_ran_out_by_the_same_words(message):
    error = RuntimeError(message)
    assert out_of_memory(error)
    assert sampling.out_of_memory is faults.out_of_memory is out_of_memory
    with pytest.raises(WorkError, match="Memory ran out while client 3 trained"):
        faults.try_client(3, lambda: _raised(error))
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def _raised(error: Exception) -> None:
    raise error
