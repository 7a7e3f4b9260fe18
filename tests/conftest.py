"""One thread per test process: tests run in parallel, and bits must not depend on the machine."""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
import torch

import tiny_study as tiny
from certifl.certification import arithmetic

torch.set_num_threads(1)
# A busy machine makes no example wrong.
hypothesis.settings.register_profile("certifl", deadline=None)
hypothesis.settings.load_profile("certifl")

pytest_plugins = ("browser", "required")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Weights that a test leaves to chance are the same in every order of tests."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def equally_fast() -> Iterator[None]:
    """No arithmetic is faster than another, so that "auto" is float32 in every test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arithmetic, "seconds_of_call", lambda _network, noisy: 1e-3 * len(noisy))
        yield


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of images that the tests share and nobody else sees; no data folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CERTIFL_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("CERTIFL_DATA", raising=False)
        yield


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the tiny study with its report, which no test changes."""
    folder = tmp_path_factory.mktemp("study")
    with tiny.undrawn():
        done = tiny.cli("run", tiny.write_spec(folder), "--out", folder / "run")
    done.fine("FedAvg", "ACR", "Report:")
    return folder / "run"


@pytest.fixture(scope="module")
def undrawn() -> Iterator[None]:
    """Figures are laid out and not drawn: drawing takes most of the time of a small run."""
    with tiny.undrawn():
        yield


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def own_modules() -> Iterator[None]:
    """Networks that a test brings, and where they lie, are forgotten afterwards."""
    path = list(sys.path)
    yield
    for name in ("my_network", "changing", "unfit", "own_model", "recast_network"):
        sys.modules.pop(name, None)
    sys.path[:] = path
