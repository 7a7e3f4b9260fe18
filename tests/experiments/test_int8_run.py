"""A study in int8: each client's scales stand in the record, and all later votes use them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import certifl
import tiny_study as tiny


@pytest.fixture(scope="module")
def run(own_cache: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int8")
    spec = tiny.write_spec(folder, "certification.precision=int8", "algorithm.name=local")
    tiny.cli("run", spec, "--out", folder / "run").fine("ACR")
    return folder / "run"


def test_each_client_has_scales_of_its_own_in_the_record(run: Path) -> None:
    made = certifl.Certificates.load(run / "certificates.parquet")
    known = made.conditions["quantization"]
    assert set(known) == {"0", "1"}
    assert known["0"]["fingerprint"] != known["1"]["fingerprint"]
    assert set(made.conditions["agreement_with_float32"]) == {"0", "1"}


def test_votes_are_cast_again_and_attacked_with_the_recorded_network(run: Path) -> None:
    tiny.cli("verify", run).fine()
    tiny.cli("verify", run, "--recast", "3").fine("all as recorded")
    tiny.cli("attack", run, "--images", "2").fine()


def test_certifying_a_client_again_gives_its_certificates(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "again.parquet"
    options = ("--images", "6", "--n", "200", "--precision", "int8")
    tiny.cli("certify", "--run", run, *options, "--out", out).fine()
    again, made = (
        certifl.Certificates.load(out),
        certifl.Certificates.load(run / "certificates.parquet"),
    )
    assert np.array_equal(again.counts, made.select(made.client == 0).counts)
    own = made.conditions["quantization"]["0"]
    assert json.dumps(again.conditions["quantization"]) == json.dumps(own)
