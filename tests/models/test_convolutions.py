"""cuDNN held to its deterministic algorithms; the flags can be set without a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from certifl.federated.steps import isolated_rng
from certifl.torch_env import exact_convolutions

CUDA = torch.device("cuda:0")


def flags() -> tuple[bool, bool]:
    return torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic


@pytest.fixture(params=[(True, False), (False, True)], ids=str)
def before(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[bool, bool]:
    benchmark, deterministic = request.param
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", benchmark)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", deterministic)
    return request.param


def test_they_are_exact_within_and_as_before_afterwards(before):
    with exact_convolutions(CUDA):
        assert flags() == (False, True)
    assert flags() == before
    with pytest.raises(KeyError), exact_convolutions(CUDA):
        raise KeyError
    assert flags() == before


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_other_devices_have_no_such_flags(before, device):
    with exact_convolutions(torch.device(device)):
        assert flags() == before


@pytest.fixture
def convolutions() -> Iterator[Any]:
    """As a program has it that chose the precision of convolutions by torch's newer names."""
    by_name: Any = getattr(torch.backends.cudnn, "conv", None)
    if not hasattr(by_name, "fp32_precision"):
        pytest.skip("this torch has no fp32_precision, so nothing that reading allow_tf32 refuses")
    chosen = by_name.fp32_precision
    by_name.fp32_precision = "ieee"
    try:
        with pytest.raises(RuntimeError, match="mix of the legacy and new APIs"):
            _ = torch.backends.cudnn.allow_tf32
        yield by_name
    finally:
        by_name.fp32_precision = chosen


def test_a_clients_passes_do_not_ask_for_tf32(convolutions, monkeypatch):
    """Asking is an error of torch once a program chose it by `fp32_precision`."""
    nothing = contextlib.nullcontext
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: nothing(devices))
    monkeypatch.setattr(torch.cuda, "device", nothing)
    monkeypatch.setattr(torch.cuda, "manual_seed", lambda seed: None)
    with torch.random.fork_rng([]), isolated_rng(CUDA, seed=3):
        assert flags() == (False, True)
    assert convolutions.fp32_precision == "ieee"
