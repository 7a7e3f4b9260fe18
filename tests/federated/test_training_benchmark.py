"""benchmarks/training_gpu.py compares like with like."""

from __future__ import annotations

import importlib.util
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest
import torch

FILE = Path(__file__).parents[2] / "benchmarks" / "training_gpu.py"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    found = importlib.util.spec_from_file_location("training_gpu", FILE)
    assert found is not None
    assert found.loader is not None
    made = importlib.util.module_from_spec(found)
    monkeypatch.setitem(sys.modules, "training_gpu", made)  # where dataclasses look for it
    found.loader.exec_module(made)
    return made


def test_all_begin_with_images_on_the_host(benchmark):
    """Or the engine would be spared a transfer that is in the loader's time."""
    options = Namespace(
        images=23, clients=2, device="meta", perturbation="none", model="small_cnn", batch=4
    )
    setting = benchmark.setting_of(options)
    assert setting.device == torch.device("meta")
    assert [len(data) for data in setting.clients] == [12, 11]
    where = {t.device.type for data in setting.clients for t in (data.images, data.labels)}
    assert where == {"cpu"}
