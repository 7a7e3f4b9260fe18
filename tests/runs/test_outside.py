"""What comes from outside: files that are none, too large, too deep; names; folders; the log."""

import gzip
import io
import json
import os
import re
import struct
import tracemalloc
import zipfile
import zlib
from pathlib import Path
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import certifl.notebook
import certifl.report
import tiny_study as tiny
from certifl import PixelNoise
from certifl import safe_io as outside
from certifl.certification import Certificates
from certifl.data import load, read_image
from certifl.deploy.bundle import Connection
from certifl.deploy.keys import public_key_bytes
from certifl.errors import InputError, SpecError, StoreError, StoreMismatch
from certifl.experiments.run import Options, run
from certifl.paper import scales as presets
from certifl.report import write_report
from certifl.runs.atomic import read_json, write_text
from certifl.runs.folder import RunFolder
from certifl.spec import load as load_spec
from certifl.spec import with_settings

SHORT = ("training.rounds=1", "certification.n=100", "certification.images=2")


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "link to a device", "circle"])
def test_what_is_not_a_file_is_refused_at_once(kind, tmp_path):
    path = tmp_path / "spec.toml"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "circle":
        path.symlink_to(path)
    else:
        path.symlink_to("/dev/zero")
    if kind == "device":
        path = Path("/dev/zero")
    with pytest.raises(SpecError):
        load_spec(path)
    with pytest.raises(StoreError):
        read_json(path)
    with pytest.raises((InputError, OSError)):
        outside.read_bytes(path)


def test_a_pipe_in_place_of_the_lock_is_not_waited_for(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    os.mkfifo(folder.path / ".lock")
    with folder.locked():  # opened for both ways, a pipe waits for nobody
        pass
    (folder.path / ".lock").unlink()
    (folder.path / ".lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="Cannot write"), folder.locked():
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_a_link_in_place_of_a_temporary_file_is_not_written_through(tmp_path):
    target = tmp_path / "precious"
    target.write_text("mine")
    (tmp_path / f".page.html.{os.getpid()}.tmp").symlink_to(target)
    write_text(tmp_path / "page.html", "page")
    assert target.read_text() == "mine"
    assert (tmp_path / "page.html").read_text() == "page"


def test_a_name_with_a_nul_character_is_refused():
    with pytest.raises(InputError, match="NUL"):
        outside.read_bytes(Path("a\0b"))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[" * 100_000, "nested deeper"),
        ('{"a":' * 100_000, "nested deeper"),
        ("[" * 60 + "]" * 60, "nested deeper"),
        ("9" * 5000, "64 bits"),
        ('{"seed": -99999999999999999999}', "64 bits"),
        ('{"a": "\\ud800', "not JSON"),
        ("", "not JSON"),
    ],
)
def test_json_that_no_program_of_ours_wrote(text, why):
    with pytest.raises(InputError, match=why):
        outside.parse_json(text)


def test_json_of_too_many_containers(monkeypatch):
    monkeypatch.setattr(outside, "_CONTAINERS", 1000)
    assert len(outside.parse_json("[" + "[]," * 998 + "1]")) == 999
    with pytest.raises(InputError, match="more than 1,000 lists and objects"):
        outside.parse_json("[" + "[]," * 1000 + "1]")


def test_brackets_within_texts_are_not_depth():
    text = json.dumps({"a": "[" * 1000 + '"' + "{" * 1000, "b": [[[1]]]})
    assert outside.parse_json(text) == json.loads(text)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a = " + "[" * 100_000, "nested deeper"),
        ("a = " + "[" * 60 + "]" * 60, "nested deeper"),
        ("a." * 200_000 + "a = 1", "nested deeper"),
        ("[" + "a." * 100 + "a]", "nested deeper"),
        ("seed = " + "9" * 5000, "not TOML"),
        ("seed = 99999999999999999999", "64 bits"),
        ("#" * (2 << 20), "bytes"),
    ],
)
def test_toml_that_nobody_wrote(text, why, tmp_path):
    (tmp_path / "spec.toml").write_text(text)
    with pytest.raises(SpecError, match=why):
        load_spec(tmp_path / "spec.toml")


def test_settings_have_the_same_limits():
    for value in ("[" * 5000, "9" * 5000):
        with pytest.raises(SpecError, match="cannot be taken"):
            with_settings(tiny.VALUES, [f"seed={value}"])


def test_what_is_printed_cannot_move_the_cursor(tmp_path):
    shown = outside.visible("a\x1b[2J\x07\r\u202e\udcff\u00a095\u00a0% é")
    assert shown == "a\\x1b[2J\\x07\\r\\u202e\\udcff\u00a095\u00a0% é"
    outcome = tiny.cli("run", tmp_path / "a\x1b[2J[/bold].toml")
    outcome.refused("a\\x1b[2J[/bold].toml")


def test_a_folder_whose_name_is_not_utf_8(tmp_path):
    place = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    tiny.cli("verify", place).refused("\\udcff")


def test_a_gzip_bomb_is_not_expanded(tmp_path):
    head = bytes((0, 0, 8, 3)) + struct.pack(">III", 2, 8, 8)
    content = gzip.compress(head + bytes(100 << 20), 1)
    for name in ("train-images-idx3", "t10k-images-idx3"):
        (tmp_path / f"{name}-ubyte.gz").write_bytes(content)
    labels = gzip.compress(bytes((0, 0, 8, 1)) + struct.pack(">I", 2) + bytes((0, 1)))
    for name in ("train-labels-idx1", "t10k-labels-idx1"):
        (tmp_path / f"{name}-ubyte.gz").write_bytes(labels)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="IDX"):
            load(str(tmp_path))
        assert tracemalloc.get_traced_memory()[1] < 50 << 20
    finally:
        tracemalloc.stop()


def _bomb(path: Path, width: int, height: int) -> Path:
    content = io.BytesIO()
    Image.new("L", (1, 1)).save(content, "png")
    made = bytearray(content.getvalue())
    made[16:24] = struct.pack(">II", width, height)
    made[29:33] = struct.pack(">I", zlib.crc32(made[12:29]))
    path.write_bytes(made)
    return path


@pytest.mark.parametrize("side", [6000, 60_000])
def test_an_image_that_declares_any_number_of_pixels_is_refused(side, tmp_path):
    with pytest.raises(InputError, match=r"too large|exceeds limit"):
        read_image(_bomb(tmp_path / "bomb.png", side, side), 1, (8, 8))


def test_a_table_that_declares_any_number_of_rows_is_refused(tmp_path):
    path = tmp_path / "certificates.parquet"
    part = pa.table({"client": pa.nulls(1 << 24)})
    with pq.ParquetWriter(path, part.schema) as file:
        for _ in range(9):
            file.write_table(part)
    with pytest.raises(InputError, match="declares"):
        Certificates.load(path)


@pytest.mark.parametrize("to", ["../secret.png", "/etc/hostname", "\0", "link.png", "x" * 5000])
def test_a_row_of_a_table_reads_no_file_elsewhere(to, tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "secret.png")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "link.png").symlink_to("../secret.png")
    Image.new("L", (8, 8)).save(folder / "own.png")

    def write(path: str) -> None:
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        images = pa.array([{"bytes": None, "path": path}] * 2, kind)
        for split in ("train", "test"):
            pq.write_table(
                pa.table({"image": images, "label": [0, 1]}), folder / f"{split}.parquet"
            )

    write(to)
    with pytest.raises(InputError, match=r"neither .*bytes"):
        load(str(folder))
    write("own.png")
    assert len(load(str(folder)).train) == 2


def test_quickstart_refuses_a_folder_that_holds_something_else(tmp_path, monkeypatch):
    small = {"fedavg": tiny.spec(*SHORT)}
    monkeypatch.setattr(presets, "quickstart", lambda seed: small)
    for names in (("thesis.txt",), ("report.html",), ("figures", "fedavg")):
        place = tmp_path / names[0]
        place.mkdir()
        for name in names:
            (place / name).mkdir() if "." not in name else (place / name).write_text("mine")
        before = tiny.files(place)
        tiny.cli("quickstart", "--out", place).refused("holds something else", "--out")
        assert tiny.files(place) == before
    (tmp_path / "file").touch()
    tiny.cli("quickstart", "--out", tmp_path / "file").refused("is a file")


def test_the_page_is_written_under_the_lock(tmp_path):
    folder = run(tiny.spec(*SHORT), Options(tmp_path / "run"))
    spec = tmp_path / "run" / "spec.toml"
    with folder.locked():
        tiny.cli("report", folder.path).refused("Another process")
        tiny.cli("run", spec, "--out", folder.path).refused("Another process")
        assert not folder.report.exists()
        write_report([folder.path], tmp_path / "page.html", figures=False)

    def locked(*_: object, **__: object) -> Path:
        with pytest.raises(StoreMismatch, match="Another process"), folder.locked():
            pass
        return folder.report

    # `run` and `report` each have the function under a name of their module.
    run_page = mock.patch.object(certifl.notebook, "write_report", side_effect=locked)
    report_page = mock.patch.object(certifl.report, "write_report", side_effect=locked)
    with run_page as in_run, report_page as in_report:
        tiny.cli("run", spec, "--out", folder.path).fine()
        tiny.cli("report", folder.path).fine()
    assert (in_run.call_count, in_report.call_count) == (1, 1)


def test_what_a_killed_process_left_is_removed(tmp_path):
    folder = run(tiny.spec(*SHORT), Options(tmp_path / "run"))
    spec = tmp_path / "run" / "spec.toml"
    folder.report.write_text("page")
    folder.figures.mkdir()
    left = [folder.path, folder.figures, folder.votes(0).parent]
    for place in left:
        (place / ".report.html.123.tmp").write_text("half")
    tiny.cli("run", spec, "--out", folder.path).fine()
    assert not list(folder.path.rglob("*.tmp"))
    assert folder.report.read_text() == "page"


@pytest.mark.parametrize("content", ["", "seed = [", "\0", 'name = "another"\n'])
def test_a_damaged_spec_of_an_unfinished_run_is_restored(content, tmp_path):
    study = tiny.spec(*SHORT)
    folder = RunFolder(tmp_path / "run")
    with folder.locked():
        folder.begin(study.to_toml(), study.hash())
    folder.spec.write_text(content)
    run(study, Options(folder.path))
    assert folder.spec.read_text() == study.to_toml()
    tiny.cli("verify", folder.path).fine("follow from their votes")


def test_what_nobody_foresaw_ends_in_one_line_with_a_log(tmp_path):
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a secret\x1b[2J of\nmany lines")

    (tmp_path / "run.json").write_text("{}")
    with mock.patch("certifl.experiments.verify.verify_run", broken):
        outcome = tiny.cli("verify", tmp_path)
    outcome.refused("unexpected error", "ZeroDivisionError", "\\x1b[2J", code=1)
    log = Path(re.findall(r"\S+\.log", outcome.err)[0])
    text = log.read_text()
    log.unlink()
    assert "Traceback" in text
    assert "many lines" in text


def test_exhausted_memory_is_reported(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    with mock.patch("certifl.experiments.verify.verify_run", side_effect=MemoryError):
        tiny.cli("verify", tmp_path).refused("memory ran out", code=1)


@pytest.mark.parametrize("way", ["numbers", "deflated", "nested"])
def test_weights_that_are_none(way, tmp_path):
    path = tmp_path / "net.pt"
    if way == "numbers":
        torch.save({0: torch.zeros(1), "a": torch.zeros(1)}, path)
    elif way == "nested":
        torch.save({"state_dict": {"a": {"b": torch.zeros(1)}}}, path)
    else:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
            packed.writestr("archive/data.pkl", bytes(20 << 20))
    asked = ("certify", "--model", "small_cnn", "--weights", path, "--data", "digits")
    outcome = tiny.cli(*asked, "--out", tmp_path / "c.parquet")
    outcome.refused("names are not in the file" if way == "nested" else "state_dict")


def test_a_key_that_is_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "key.pub")
    with pytest.raises(InputError, match="pipe"):
        public_key_bytes(tmp_path / "key.pub")


@pytest.mark.parametrize("sigma", ["1e300", "1e40", "5e-324"])
@pytest.mark.parametrize("family", ["pixel", "translation", "affine", "dense_flow"])
def test_a_sigma_that_no_number_can_follow_is_refused_in_the_spec(family, sigma):
    setting = f"certification.perturbation={{family='{family}', sigma={sigma}}}"
    with pytest.raises(SpecError, match="beyond what numbers"):
        with_settings(tiny.VALUES, [setting, "certification.n=100"])
    with pytest.raises(InputError, match="finite"):
        PixelNoise(10**400)


def test_a_checkpoint_of_a_terabyte_of_nothing_is_not_read(tmp_path):
    folder = run(tiny.spec(*SHORT), Options(tmp_path / "run"))
    newest = max(folder.training.glob("round-*"))
    with (newest / "server.safetensors").open("r+b") as file:
        file.truncate(1 << 40)
    outcome = tiny.cli("verify", folder.path)
    assert outcome.code == 1
    assert "checkpoint" in outcome.err


@pytest.mark.parametrize("port", ["9" * 5000, "²", "0", "65536", ""])
def test_a_port_that_is_none(port):
    with pytest.raises(InputError, match="HOST:PORT"):
        Connection.parse(f"localhost:{port}", True)
