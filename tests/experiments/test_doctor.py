"""`certifl doctor`: what there is, and what is missing for what."""

from __future__ import annotations

import importlib.util
import tomllib
from pathlib import Path

import pytest

import tiny_study as tiny
from certifl.study import environment as doctor

ROOT = Path(__file__).resolve().parents[2]


def by_topic(data_dir: Path | None = None) -> dict[str, doctor.Check]:
    return {check.topic: check for check in doctor.examine(data_dir)}


def test_it_says_what_runs_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CERTIFL_DATA", raising=False)
    said = tiny.cli("doctor")
    assert said.code == 0
    for word in ("certifl", "torch", "cores", "GB free", "digits", "data folder", "bfloat16"):
        assert word in said.out, word


def test_every_extra_is_known_and_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = set(project["optional-dependencies"]) - {"dev", "docs", "track"}
    assert set(doctor.EXTRAS) == optional
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    found = by_topic()
    for extra in optional:
        assert f"certifl[{extra}]" in found[f"extra {extra}"].missing


def test_data_folders_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "mnist").mkdir()
    assert by_topic(tmp_path)["data folder"].found.endswith(": mnist")
    assert by_topic(tmp_path / "nowhere")["data folder"].missing
