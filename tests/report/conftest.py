"""Pages that several files look at, written once per test process."""

from pathlib import Path

import pytest

from report_pages import (
    hostile_page,
    own_page,
    shifted_runs,
    study_page,
    study_runs,
    without_drawings,
)


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return study_runs(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="session")
def study_report(study: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return study_page(study, tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="session")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hostile_page(tmp_path_factory.mktemp("hostile"))


@pytest.fixture(scope="session")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return own_page(tmp_path_factory.mktemp("own"))


@pytest.fixture(scope="session")
def shifted(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return shifted_runs(tmp_path_factory.mktemp("shifted"))


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that do not look at the drawings of a page."""
    without_drawings(monkeypatch)
