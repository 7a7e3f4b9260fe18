"""Certification by several processes gives what one process gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from certifl.errors import InputError, WorkError
from certifl.experiments.run import Options, cast_votes, device_names, run
from certifl.study.opened_run import OpenRun
from tiny_study import spec


def test_two_processes_cast_the_votes_of_one(tmp_path: Path) -> None:
    study, seen = spec("clients.count=3"), []
    alone = run(study, Options(tmp_path / "alone", device="cpu"))
    shared = run(
        study,
        Options(
            tmp_path / "shared",
            device="cpu,cpu",
            report=lambda what, done, total, _unit: seen.append((what, done, total)),
        ),
    )
    assert shared.load_certificates().same_results(alone.load_certificates())
    voted = [(done, total) for what, done, total in seen if what == "certifying"]
    assert voted[-1][0] == voted[-1][1]


def test_a_process_that_fails_is_reported_with_its_reason(tmp_path: Path) -> None:
    folder = run(spec(), Options(tmp_path / "run", device="cpu", explore=False))
    for server in folder.training.glob("round-*/server.safetensors"):
        server.write_bytes(b"damaged")
    with pytest.raises(WorkError, match=r"missing or damaged|ended early"):
        cast_votes(OpenRun(folder.path), None, ("cpu",), None)


def test_names_of_devices() -> None:
    assert device_names("cpu") == ("cpu",)
    assert device_names("cpu, cpu") == ("cpu", "cpu")
    with pytest.raises(InputError, match="device is empty"):
        device_names(" , ")
    with pytest.raises(InputError, match="cannot be used"):
        device_names("cpu,quantum")
