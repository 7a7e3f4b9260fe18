"""A study in int8: each client's scales stand in the record, and all later votes use them."""

import copy
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import certifl
import tiny_study as tiny
from certifl.certification.quantization import Scales
from certifl.errors import InputError
from certifl.experiments.hub import push
from certifl.experiments.predict import certify_image
from certifl.experiments.recast import Options
from certifl.experiments.verify import verify_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int8")
    spec = tiny.write_spec(folder, "certification.precision=int8", "algorithm.name=local")
    with tiny.undrawn():
        tiny.cli("run", spec, "--out", folder / "run").fine("ACR")
    return folder / "run"


def test_each_client_has_scales_of_its_own_in_the_record(run):
    made = certifl.Certificates.load(run / "certificates.parquet")
    known = made.conditions["quantization"]
    assert set(known) == {"0", "1"}
    assert known["0"]["fingerprint"] != known["1"]["fingerprint"]
    assert set(made.conditions["agreement_with_float32"]) == {"0", "1"}


def test_votes_are_cast_again_and_attacked_with_the_recorded_network(run, tmp_path):
    tiny.cli("verify", run).fine("fingerprints of weights and scales", "the scales of int8")
    tiny.cli("verify", run, "--recast", "3").fine(
        "all as recorded", "scales of int8 computed again"
    )
    tiny.cli("attack", run, "--images", "1", "--directions", "4").fine()
    Image.new("L", (8, 8)).save(tmp_path / "x.png")
    predicted = certify_image(tmp_path / "x.png", run, 1, 50, False, "cpu").certificates
    made = certifl.Certificates.load(run / "certificates.parquet").conditions["quantization"]["1"]
    assert predicted.conditions["quantization"] == made


def test_certifying_a_client_again_gives_its_certificates(run, tmp_path):
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


def test_a_pushed_network_has_its_own_scales_alone_and_only_where_rows_are_shared(run, tmp_path):
    with pytest.raises(InputError, match=r"--share rows.*nobody can vote"):
        push(run, str(tmp_path / "curve"), client=1)
    push(run, str(tmp_path / "rows"), client=1, share="rows")
    rows = certifl.Certificates.load(tmp_path / "rows" / "certificates.parquet").conditions
    for name in ("quantization", "model_fingerprint", "agreement_with_float32"):
        assert set(rows[name]) == {"1"}, name
    assert verify_run(tmp_path / "rows" / "certificates.parquet").problems == ()
    Image.new("L", (8, 8)).save(tmp_path / "x.png")
    made = certify_image(tmp_path / "x.png", tmp_path / "rows", None, 50, False, "cpu")
    assert made.certificates.conditions["quantization"] == rows["quantization"]["1"]


def test_changed_scales_are_found(run, tmp_path):
    """By their fingerprint, and where that was changed too, when they are computed again."""
    made = certifl.Certificates.load(run / "certificates.parquet")
    changed = copy.deepcopy(dict(made.conditions))
    own = changed["quantization"]["1"]
    own["scales"][next(iter(own["scales"]))][0] *= 1.25
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    stored = folder / "certificates.parquet"
    dataclasses.replace(made, conditions=changed).save(stored)
    assert any("client 1" in p and "weights and scales" in p for p in verify_run(folder).problems)
    assert verify_run(stored).problems
    own["fingerprint"] = Scales.read(own["scales"]).fingerprint(changed["model_fingerprint"]["1"])
    dataclasses.replace(made, conditions=changed).save(stored)
    assert verify_run(folder).problems == ()
    again = verify_run(folder, recast=Options(1, seed=0)).problems
    assert any(p.startswith("client 1: the scales of int8 differ") for p in again)


def test_nothing_in_int8_is_made_or_published_of_a_private_run(run: Path, tmp_path: Path) -> None:
    private = shutil.copytree(run, tmp_path / "private")
    text, none = (private / "spec.toml").read_text(), '[privacy]\nkind = "none"'
    assert none in text
    noisy = '[privacy]\nkind = "example"\nnoise_multiplier = 1.0'
    (private / "spec.toml").write_text(text.replace(none, noisy))  # as 0.1.0 allowed it
    for share in ("rows", "curve"):
        with pytest.raises(InputError, match="no epsilon of its"):
            push(private, str(tmp_path / "model"), share=share)
    options = ("--precision", "int8", "--out", tmp_path / "again.parquet")
    tiny.cli("certify", "--run", private, *options).refused("training of", "was private")
    assert not (tmp_path / "model").exists()
