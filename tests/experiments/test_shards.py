"""A certification cut into shards: the same certificates, and nothing lost or mixed up."""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

import tiny_study as tiny
from certifl.certification import Certificates
from certifl.errors import InputError
from certifl.experiments.standalone import Shard, read_shard

# One process computes what its tests share.
pytestmark = pytest.mark.xdist_group("shards")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "cluster"
QUICK = ("--images", "7", "--n", "200")


@pytest.fixture(scope="module")
def shards(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("shards")
    files = [folder / f"{number}.parquet" for number in (1, 2, 3)]
    for number, file in enumerate(files, start=1):
        given = ("--run", finished, *QUICK, "--shard", f"{number}/3", "--out", file)
        tiny.cli("certify", *given).fine()
    return files


def test_merged_shards_are_the_uncut_certificates(finished, shards, tmp_path):
    whole, merged = tmp_path / "whole.parquet", tmp_path / "merged.parquet"
    tiny.cli("certify", "--run", finished, *QUICK, "--out", whole).fine()
    tiny.cli("merge", *reversed(shards), "--out", merged).fine("images 7")
    one, other = Certificates.load(whole), Certificates.load(merged)
    assert one.same_results(other)
    assert one.conditions == other.conditions
    assert sorted(len(Certificates.load(file)) for file in shards) == [2, 2, 3]
    tiny.cli("verify", merged).fine("7 certificates")
    tiny.cli("merge", *shards, "--out", merged).refused("exists", "--overwrite")


def test_missing_doubled_and_foreign_shards_are_refused(finished, shards, tmp_path):
    out = ("--out", tmp_path / "merged.parquet")
    tiny.cli("merge", shards[0], *out).refused("missing", "2/3", "3/3")
    tiny.cli("merge", shards[0], *shards, *out).fine()  # the same file twice is one shard
    (tmp_path / "merged.parquet").unlink()
    twin = tmp_path / "twin.parquet"
    twin.write_bytes(shards[0].read_bytes())
    tiny.cli("merge", twin, *shards, *out).refused("both shard 1")
    for name, options in (
        ("n", (*QUICK[:3], "300", "--shard", "3/3")),
        ("the number of shards", (*QUICK, "--shard", "3/4")),
        ("lengths", ("--images", "20", *QUICK[2:], "--shard", "3/3")),
    ):
        foreign = tmp_path / "foreign.parquet"
        tiny.cli("certify", "--run", finished, *options, "--out", foreign).fine()
        tiny.cli("merge", *shards[:2], foreign, *out).refused(name)
        foreign.unlink()
    uncut = tmp_path / "uncut.parquet"
    tiny.cli("certify", "--run", finished, *QUICK, "--out", uncut).fine()
    tiny.cli("merge", uncut, *out).refused("without --shard")
    published = tmp_path / "c.tsv"
    Certificates.load(uncut).save(published)
    tiny.cli("merge", published, *out).refused("not a shard")
    tiny.cli("merge", tmp_path / "none.parquet", *out).refused("no file of certificates")
    assert not (tmp_path / "merged.parquet").exists()


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "a/b", "1/0", "-1/2"])
def test_what_is_no_shard_is_refused(text):
    with pytest.raises(InputError, match="3/8"):
        read_shard(text)


def test_every_image_is_in_one_shard():
    index = np.arange(100, 117)
    parts = [Shard(number, 5).of(index) for number in range(1, 6)]
    assert np.array_equal(np.sort(np.concatenate(parts)), index)
    with pytest.raises(InputError, match="fewer shards"):
        Shard(1, 18).of(index)


def test_the_cluster_scripts_certify_and_merge(copied, tmp_path):
    log = tmp_path / "commands"
    (tmp_path / "certifl").write_text(f'#!/bin/sh\necho "$@" > {log}\n')
    (tmp_path / "certifl").chmod(0o755)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_CPUS_PER_TASK": "1"}
    script = (EXAMPLES / "certify.sbatch").read_text()
    small = script.replace("/16", "/2").replace("--images 500", "--images 4 --n 200")
    assert small.count("/2") == 1

    def call(script: str, **more: str) -> None:
        log.unlink(missing_ok=True)
        environment = {**os.environ, **path, **more}
        asked = ["bash", "-s", copied, "1"]
        subprocess.run(asked, input=script, text=True, check=True, env=environment)
        tiny.cli(*log.read_text().split()).fine()

    for task in ("1", "2"):
        call(small, SLURM_ARRAY_TASK_ID=task)
    call((EXAMPLES / "merge.sbatch").read_text())
    assert len(Certificates.load(copied / "client-1.parquet")) == 4
