"""Files and run folders: whole or absent, whatever stops the writing."""

import contextlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE

import numpy as np
import pytest
import torch

from certifl.certification import Certificates
from certifl.errors import StoreError, StoreMismatch
from certifl.runs.atomic import (
    load_tensors,
    read_json,
    save_tensors,
    tensor_metadata,
    write_bytes,
    write_json,
    write_text,
)
from certifl.runs.folder import FINISHED, RunFolder, StoredRun
from report_factory import blank_certificates

SPEC, HASH = 'name = "x"\n', "abc"


@contextlib.contextmanager
def full_after(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def certificates(rows: int = 3) -> Certificates:
    counts = np.full((rows, 4), 25, np.int64)
    return blank_certificates(rows, counts=counts, selection_counts=counts)


def begun(folder: Path) -> RunFolder:
    place = RunFolder(folder)
    with place.locked():
        place.begin(SPEC, HASH)
    return place


def test_what_is_written_is_read_back(tmp_path):
    place = tmp_path / "new" / "folder"
    write_json(place / "a.json", {"b": 1, "a": [0.1, None]})
    assert read_json(place / "a.json") == {"a": [0.1, None], "b": 1}
    write_text(place / "a.txt", "Grüße\n")
    assert (place / "a.txt").read_text() == "Grüße\n"
    tensors = {"x": torch.arange(6).reshape(2, 3).T, "flag": torch.tensor(True)}
    save_tensors(place / "a.safetensors", tensors, {"key": "value"})
    found = load_tensors(place / "a.safetensors")
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert tensor_metadata(place / "a.safetensors") == {"key": "value"}
    assert sorted(os.listdir(place)) == ["a.json", "a.safetensors", "a.txt"]


def test_equal_contents_are_equal_files(tmp_path):
    for name, values in (("1", {"a": 1, "b": 2}), ("2", {"b": 2, "a": 1})):
        write_json(tmp_path / name, values)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path):
    old, new = b"old", bytes(200_000)
    file, tensors = tmp_path / "file", tmp_path / "t.safetensors"
    write_bytes(file, old)
    save_tensors(tensors, {"x": torch.zeros(2)})
    with full_after(100_000):
        with pytest.raises(StoreError, match="free some space"):
            write_bytes(file, new)
        with pytest.raises(StoreError, match="free some space"):
            save_tensors(tensors, {"x": torch.zeros(50_000)})
    assert file.read_bytes() == old
    assert torch.equal(load_tensors(tensors)["x"], torch.zeros(2))
    assert sorted(os.listdir(tmp_path)) == ["file", "t.safetensors"]
    write_bytes(file, new)
    assert file.read_bytes() == new


def test_places_that_cannot_be_written_or_read(tmp_path):
    write_text(tmp_path / "file", "x")
    with pytest.raises(StoreError, match="--out"):
        write_text(tmp_path / "file" / "below", "y")
    with pytest.raises(StoreError, match="is damaged: it is not JSON"):
        read_json(tmp_path / "file")
    with pytest.raises(StoreError, match="Cannot read"):
        read_json(tmp_path / "none")
    for name in ("file", "none"):
        with pytest.raises(StoreError, match="Cannot read"):
            load_tensors(tmp_path / name)


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    write_text(tmp_path / "file", "old")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            write_text(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_is_begun_gone_on_with_and_finished(tmp_path):
    folder = begun(tmp_path / "runs" / "one")
    assert folder.exists()
    assert not folder.finished()
    folder.update({"status": FINISHED, "extra": 1})
    assert folder.finished()
    assert not folder.complete()  # no certificates
    folder.save(certificates())
    assert folder.complete()
    assert begun(folder.path).manifest()["extra"] == 1


def test_only_the_same_spec_goes_on(tmp_path):
    folder = begun(tmp_path)
    with pytest.raises(StoreMismatch, match="another study"):
        folder.check("other")
    folder.check("other", overwrite=True)
    (tmp_path / "note.txt").write_text("mine")
    with folder.locked():
        folder.begin("name = 'y'\n", "other", overwrite=True)
    assert folder.manifest() == {"spec_hash": "other", "status": "running"}
    assert folder.spec.read_text() == "name = 'y'\n"
    assert sorted(os.listdir(tmp_path)) == [".lock", "run.json", "spec.toml"]


@pytest.mark.parametrize("left", [[], [".lock"], [".lock", ".spec.toml.77.tmp"], ["spec.toml"]])
def test_what_a_kill_leaves_behind_at_the_very_start_is_no_stranger(left, tmp_path):
    for name in left:
        (tmp_path / name).write_text("")
    begun(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".lock", "run.json", "spec.toml"]


def test_other_files_are_no_place_for_a_run(tmp_path):
    (tmp_path / "data.csv").write_text("1")
    with pytest.raises(StoreMismatch, match=r"data\.csv"):
        RunFolder(tmp_path).check(HASH)
    with pytest.raises(StoreMismatch, match=r"data\.csv"):
        RunFolder(tmp_path).check(HASH, overwrite=True)


def test_a_removal_stopped_half_way_leaves_no_run_that_looks_finished(tmp_path, monkeypatch):
    folder = begun(tmp_path)
    folder.save(certificates())
    folder.update({"status": FINISHED})

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with folder.locked(), monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", stop)
        with pytest.raises(KeyboardInterrupt):
            folder.begin(SPEC, HASH, overwrite=True)
    assert not folder.finished()


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"status": "finished"'])
def test_a_damaged_manifest_is_named_with_what_to_do(content, tmp_path):
    folder = begun(tmp_path)
    (tmp_path / "run.json").write_text(content)
    for ask in (folder.manifest, folder.finished, folder.complete, lambda: folder.check(HASH)):
        with pytest.raises(StoreError, match=r"run\.json is damaged .*--overwrite"):
            ask()
    folder.check(HASH, overwrite=True)


def test_a_missing_entry_is_named(tmp_path):
    with pytest.raises(StoreError, match="'data'"):
        StoredRun(begun(tmp_path).path).entry("data")
    with pytest.raises(StoreError, match="not a run folder"):
        RunFolder(tmp_path / "none").manifest()


def test_certificates_of_a_run(tmp_path):
    folder = begun(tmp_path)
    with pytest.raises(StoreError, match="Repeat the command"):
        folder.load_certificates()
    with full_after(1000), pytest.raises(StoreError, match="votes are saved"):
        folder.save(certificates())
    assert not folder.certificates.exists()
    folder.save(certificates())
    assert folder.load_certificates().same_results(certificates())
    content = folder.certificates.read_bytes()
    for damaged in (b"", content[:100], content[:-8], b"PAR1" + bytes(100) + b"PAR1"):
        folder.certificates.write_bytes(damaged)
        with pytest.raises(StoreError, match="Repeat the command"):
            folder.load_certificates()


def test_history_is_one_line_per_round(tmp_path):
    folder = begun(tmp_path)
    folder.write_history([{"round": 0, "loss": 0.5}, {"round": 1}])
    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"round": 0, "loss": 0.5}, {"round": 1}]


HOLDER = """
import fcntl, sys
file = open(sys.argv[1], "a")
fcntl.flock(file, fcntl.LOCK_EX)
print("holding", flush=True)
sys.stdin.read()
"""


def test_one_process_at_a_time(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    command = [sys.executable, "-S", "-c", HOLDER, folder.path / ".lock"]
    with subprocess.Popen(command, stdin=PIPE, stdout=PIPE, text=True) as other:
        assert other.stdout.readline() == "holding\n"
        with pytest.raises(StoreMismatch, match="Another process is using"), folder.locked():
            pass
        other.communicate("")
    with folder.locked():
        pass
