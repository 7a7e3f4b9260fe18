"""Mutations of every kind of file that certifl reads, and the process that tries them.

A row of `KINDS` is a kind of file, how it is mutated, and what reads it. Everything follows from
the number of a case. Run as a program it tries every n-th case and writes, as lines of JSON, what
was wrong; its parent watches the time and knows from the last line where it hung.
"""

import contextlib
import copy
import functools
import gzip
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tomllib
import traceback
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import tomli_w
from PIL import Image

import tiny_study as tiny
from certifl.cli import common, main
from certifl.data import load as load_data
from certifl.deploy.bundle import load_connection
from certifl.deploy.client.settings import load_settings
from certifl.errors import CertiflError
from certifl.report import summary_rows
from certifl.report.page.background import attacks_section
from certifl.report.page.context import ReportContext
from certifl.report.page.explorer import explorer_payload
from certifl.report.results import by_perturbation, load_runs
from certifl.report.summary import left_out_words, measure_curves, measures_of
from certifl.spec import load as load_spec
from certifl.study.setup import open_data

__all__ = ["CASES", "KINDS", "SECONDS", "Kind", "Wrong", "prepare"]

SECONDS = 20
_WALL = 10 * SECONDS  # where it waits for something; other processes take time, too
_ADDRESS_SPACE = 3 << 30

Mutator = Callable[[Path, random.Random], None]
Reader = Callable[[Path, Path, random.Random], None]

# --- values that nobody expects -----------------------------------------------------------------

EVIL: tuple[Any, ...] = (
    *(None, True, -1, 0, 3, 2**31, 2**63, 2**64 + 1, 10**30, 1e300, -1e300, 5e-324, 0.5),
    *(float("nan"), float("inf"), "", "none", "x" * 3000, "$\\frac{[/bold]{}<b>&"),
    *("\x1b[2J\x07\0", "\ud800", "../../../../etc/passwd", "/dev/zero", "18deg", "\u202egnp.exe"),
    *([], {}, [[]], [None], ["a", 1], {"": {}}, {"clients": [1, None]}, [[1, 2], [3]]),
)
NEST = 3000


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _places(inner, (*path, key))
    elif isinstance(value, list):
        for at, inner in enumerate(value[:20]):
            yield from _places(inner, (*path, at))


def changed(value: Any, rng: random.Random) -> Any:
    """A value of JSON with one to three of its parts replaced, removed, added or renamed."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        path = rng.choice(list(_places(value)))
        if not path:
            continue
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        how = rng.randrange(6)
        if how == 0:
            del holder[path[-1]]
        elif how == 1 and isinstance(holder, dict):
            holder[rng.choice(("", "0", "\x1b[1m", "99999999999999999999"))] = holder.pop(path[-1])
        elif how == 2 and isinstance(holder, list):
            holder.insert(path[-1], copy.deepcopy(holder[path[-1]]))
        else:
            holder[path[-1]] = rng.choice(EVIL)
    return value


# --- mutators -----------------------------------------------------------------------------------


def as_bytes(path: Path, rng: random.Random) -> None:
    """Flip, cut, repeat or insert bytes."""
    content = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(content) + 1)
        how = rng.randrange(5)
        if how == 0 and at < len(content):
            content[at] ^= 1 << rng.randrange(8)
        elif how == 1:
            del content[at:]
        elif how == 2:
            del content[at : at + rng.randrange(1, 40)]
        elif how == 3:
            content[at:at] = rng.choice((b"\0", b"\xff\xfe", b"9" * 5000, b"-", b'"', b"\r"))
        else:
            content[at:at] = content[at : at + rng.randrange(1, 200)]
    path.write_bytes(content)


def as_other(path: Path, rng: random.Random) -> None:
    """Another kind of thing in the file's place."""
    path.unlink()
    how = rng.randrange(8)
    if how == 0:
        os.mkfifo(path)
    elif how == 1:
        path.mkdir()
    elif how == 2:
        path.symlink_to("/dev/zero")
    elif how == 3:
        path.symlink_to("nowhere")
    elif how == 4:
        path.symlink_to(path.name)  # a circle
    elif how == 5:
        path.touch()
    elif how == 6:
        with path.open("wb") as file:
            file.truncate(1 << 40)  # a terabyte of nothing
    # else: it is missing


def as_text(path: Path, rng: random.Random) -> None:
    """Text that is deep, long or of other bytes."""
    deep = rng.choice(("[" * NEST, '{"a":' * NEST, "[" * NEST + "]" * NEST, "a." * NEST + "a = 1"))
    texts: tuple[bytes, ...] = (
        *(deep.encode(), b"seed = " + deep.encode(), b"9" * 6000, b"seed = " + b"9" * 6000),
        *(b"seed = 1e999999", b"\xff\xfe\x00", b"null", b"[]", b'"text"', b"{}", b"\n" * 5000),
        b"[[],[" + b"[]," * 200_000 + b"0]]",
        b"\xef\xbb\xbf" + path.read_bytes(),
        path.read_bytes().replace(b"\n", b"\r\n"),
        path.read_bytes() * 2,
    )
    path.write_bytes(rng.choice(texts))


def as_json(path: Path, rng: random.Random) -> None:
    path.write_text(json.dumps(changed(json.loads(path.read_text()), rng)))


def as_lines(path: Path, rng: random.Random) -> None:
    lines = path.read_text().splitlines()
    at = rng.randrange(len(lines))
    lines[at] = json.dumps(changed(json.loads(lines[at]), rng))
    path.write_text("\n".join(lines))


def as_toml(path: Path, rng: random.Random) -> None:
    with contextlib.suppress(TypeError, ValueError):  # TOML knows no null, and no surrogates
        text = tomli_w.dumps(changed(load_toml(path), rng))
        path.write_bytes(text.encode())


def load_toml(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text())


def as_round(path: Path, rng: random.Random) -> None:
    """The record of a checkpoint, with the checksum of what it says now."""
    record = json.loads(path.read_bytes())["record"]
    text = json.dumps(changed(record, rng), indent=1, sort_keys=True)
    seal = zlib.crc32(text.encode())
    path.write_text(f'{{"checksum": {seal},\n"record": {text}}}\n')


def as_table(path: Path, rng: random.Random) -> None:
    """Columns that are missing, doubled, of another type, with gaps, of any number."""
    table = pq.read_table(path)
    name = rng.choice(table.column_names)
    at, column, rows = table.column_names.index(name), table[name], table.num_rows
    how = rng.randrange(10)
    if how == 0:
        table = table.drop_columns([name])
    elif how == 1:
        table = table.append_column(name, column)
    elif how == 2:
        table = table.set_column(at, name, pa.array(["\x1b[2J" * 9] * rows))
    elif how == 3:
        table = table.set_column(at, name, pa.nulls(rows, column.type))
    elif how == 4:
        table = table.set_column(at, name, pa.array([float(rng.choice(EVIL[2:10]))] * rows))
    elif how == 5:
        table = table.set_column(at, name, pa.array([-(2**63), *[2**40] * (rows - 1)]))
    elif how == 6:
        table = table.set_column(at, name, pa.array([[1] * n for n in range(rows)]))
    elif how == 7:
        table = table.slice(0, rng.randrange(2))
    elif how == 8:
        with contextlib.suppress(pa.ArrowException):
            table = pa.concat_tables([table] * 3).cast(
                pa.schema(
                    [f if f.name != name else f.with_type(pa.string()) for f in table.schema]
                )
            )
    else:
        about = dict(table.schema.metadata or {})
        for key, text in about.items():
            with contextlib.suppress(ValueError):
                about[key] = json.dumps(changed(json.loads(text), rng)).encode()
        table = table.replace_schema_metadata(about)
    pq.write_table(table, path)


def as_long_table(path: Path, rng: random.Random) -> None:
    """A small file that declares more rows than memory may be asked for."""
    path.write_bytes(_long_table(rng.choice(("client", "radius"))))


@functools.cache
def _long_table(name: str) -> bytes:
    part, content = pa.table({name: pa.nulls(1 << 24)}), io.BytesIO()
    with pq.ParquetWriter(content, part.schema) as file:
        for _ in range(9):
            file.write_table(part)
    return content.getvalue()


def as_tensors(path: Path, rng: random.Random) -> None:
    """The header of a file of tensors: shapes, offsets, types, names."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, rest = json.loads(content[8 : 8 + length]), content[8 + length :]
    how = rng.randrange(4)
    if how == 0:
        length = rng.choice((0, 1, 2**40, 2**63, length - 1, length + 9))
        path.write_bytes(struct.pack("<Q", length) + content[8:])
        return
    names = [name for name in header if name != "__metadata__"]
    if how == 1 and names:
        header[rng.choice(names)]["shape"] = rng.choice(
            ([2**40], [0, 2**62], [-1], [], [2**32] * 2)
        )
    else:
        header = changed(header, rng)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + rest)


def as_idx(path: Path, rng: random.Random) -> None:
    """Sizes that are declared otherwise, a file that is cut, or that expands without end."""
    content = bytearray(gzip.decompress(path.read_bytes()))
    how = rng.randrange(5)
    if how == 0:
        content[4:8] = struct.pack(">I", rng.choice((0, 1, 2**31, 2**32 - 1)))
    elif how == 1:
        content[rng.randrange(4)] = rng.randrange(256)
    elif how == 2:
        del content[rng.randrange(len(content)) :]
    elif how == 3:
        content += bytes(1 << 25)
    packed = gzip.compress(bytes(content), 1)
    path.write_bytes(packed if how < 4 else packed[: rng.randrange(len(packed))])


def as_image(path: Path, rng: random.Random) -> None:
    """Another size, mode or format, or a header that declares any number of pixels."""
    how = rng.randrange(4)
    if how == 0 and path.suffix == ".png":
        content = bytearray(path.read_bytes())
        content[16:24] = struct.pack(">II", *rng.choice(((60_000, 60_000), (0, 0), (2**31, 1))))
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
        path.write_bytes(content)
    elif how == 1:
        side = rng.choice((1, 9, 5000))
        Image.new(rng.choice(("1", "L", "P", "RGBA", "I;16")), (side, side)).save(path, "png")
    elif how == 2:
        Image.new("CMYK", (8, 8)).save(path, "jpeg")
    else:
        path.write_bytes(
            rng.choice((b"GIF89a", b"\x89PNG\r\n\x1a\n", b"BM", b"II*\0" + b"\xff" * 99))
        )


def as_row_with_a_path(path: Path, rng: random.Random) -> None:
    """Images that a table does not hold but points to."""
    table = pq.read_table(path)
    to = rng.choice(
        ("../secret.png", "/dev/zero", "\0", "/etc/passwd", ".", "secret.png", "x" * 999)
    )
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": None, "path": to}] * table.num_rows, kind)
    at = table.column_names.index("image")
    pq.write_table(table.set_column(at, "image", images), path)


def as_rows(path: Path, rng: random.Random) -> None:
    """Cells of a table of text."""
    rows = [line.split("\t") for line in path.read_text().splitlines()]
    row = rng.choice(rows)
    cell = rng.choice(("", "nan", "-1", "1e999", "9" * 5000, "\x1b[2J", "1:2:3:4", "x" * 140_000))
    row[rng.randrange(len(row))] = cell
    path.write_text("\n".join("\t".join(row) for row in rows))


# --- readers ------------------------------------------------------------------------------------


def command(*arguments: str) -> Reader:
    """A command of the command line; `RUN` and `OUT` stand for the folder and a free place."""

    def read(folder: Path, out: Path, _rng: random.Random) -> None:
        names = {"RUN": str(folder), "OUT": str(out)}
        words = [_filled(word, names) for word in arguments]
        with mock.patch.object(sys, "argv", ["certifl", *words]):
            main()

    return read


def _filled(word: str, names: dict[str, str]) -> str:
    for name, value in names.items():
        word = word.replace(name, value)
    return word


def any_of(*readers: Reader) -> Reader:
    def read(folder: Path, out: Path, rng: random.Random) -> None:
        rng.choice(readers)(folder, out, rng)

    return read


def library(call: Callable[[Path], object]) -> Reader:
    """What a command reads at first, without what it would do then."""

    def read(folder: Path, _out: Path, _rng: random.Random) -> None:
        try:
            call(folder)
        except CertiflError as error:
            common.say(f"certifl: {error}", err=True)

    return read


def _spec(folder: Path) -> None:
    spec = load_spec(folder / "spec.toml")
    spec.perturbations()
    spec.build_algorithm()
    spec.hash()
    spec.to_toml()
    open_data(spec, None)


def _page(folder: Path) -> None:
    """What a page says, without drawing its figures, which takes most of its time."""
    runs = load_runs([folder])
    for group in by_perturbation(runs):
        context = ReportContext.of(group)
        attacks_section(context)
        explorer_payload(context)
        left_out_words(group[0])
        for measure in measures_of(group):
            measure_curves(group[0], measure)
    summary_rows([folder])


def _client(folder: Path) -> None:
    load_settings(folder / "client.toml")
    load_connection(folder)


VERIFY = command("verify", "RUN")
PAGE = library(_page)
REPORT = any_of(command("report", "RUN", "--out", "OUT/page.html"), *[PAGE] * 11)
CLAIMS = command("claims", "RUN")
PREDICT = command("predict", "RUN/../gray.png", "--run", "RUN", "--n", "20")
ABOUT = any_of(VERIFY, VERIFY, REPORT, CLAIMS, PREDICT)
DATA = library(lambda folder: load_data(str(folder)))


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        base: the folder that is copied. file: the one that is mutated.
        count: of cases. reader: who reads it.
        mutators: one of them is taken for each case.
    """

    base: str
    file: str
    count: int
    reader: Reader
    mutators: tuple[Mutator, ...]


TEXT, BYTES = (as_bytes, as_text, as_other), (as_bytes, as_other)
VOTES = any_of(VERIFY, REPORT)
ROUND, SERVER = (
    f"checkpoints/training/round-00001/{name}" for name in ("round.json", "server.safetensors")
)
KINDS: tuple[Kind, ...] = (
    Kind("run", "spec.toml", 180, library(_spec), (*TEXT, as_toml, as_toml, as_toml)),
    Kind("run", "spec.toml", 40, any_of(VERIFY, CLAIMS, PREDICT), (*TEXT, as_toml)),
    Kind("run", "run.json", 90, ABOUT, (*TEXT, as_json, as_json, as_json)),
    Kind("run", "partition.json", 40, ABOUT, (*TEXT, as_json)),
    Kind("run", "history.jsonl", 40, any_of(REPORT, CLAIMS), (*TEXT, as_lines, as_lines)),
    Kind(
        *("run", "certificates.parquet", 100, any_of(VERIFY, REPORT, CLAIMS)),
        (*BYTES, as_table, as_table, as_table, as_long_table),
    ),
    Kind("own", "predictions.parquet", 30, VOTES, (*BYTES, as_table)),
    Kind("own", "certificates.parquet", 30, VOTES, (as_table, as_bytes)),
    Kind("own", "run.json", 20, VOTES, (as_json,)),
    Kind("run", "explorer.json", 30, REPORT, (*TEXT, as_json, as_json, as_json)),
    Kind("run", "attack.json", 30, REPORT, (*TEXT, as_json, as_json, as_json)),
    Kind("curves", "curves.json", 40, VOTES, (*TEXT, as_json, as_json, as_json)),
    Kind("run", ROUND, 30, any_of(VERIFY, PREDICT), (*TEXT, as_round, as_round)),
    Kind("run", SERVER, 40, any_of(VERIFY, PREDICT), (*BYTES, as_tensors)),
    Kind(
        "weights",
        "net.safetensors",
        50,
        command(
            *("certify", "--model", "small_cnn", "--weights", "RUN/net.safetensors"),
            *("--data", "digits", "--images", "1", "--n", "20", "--out", "OUT/c.parquet"),
        ),
        (*BYTES, as_tensors, as_tensors),
    ),
    Kind("weights", "rows.tsv", 30, command("verify", "RUN/rows.tsv"), (*TEXT, as_rows, as_rows)),
    Kind("idx", "train-images-idx3-ubyte.gz", 40, DATA, (*BYTES, as_idx, as_idx)),
    Kind("idx", "train-labels-idx1-ubyte.gz", 20, DATA, BYTES),
    Kind("images", "train/ash/0.png", 40, DATA, (*BYTES, as_image, as_image)),
    Kind("images", "train/oak/0.jpg", 20, DATA, (*BYTES, as_image)),
    Kind("table", "train.parquet", 60, DATA, (*BYTES, as_table, as_table, as_row_with_a_path)),
    Kind("client", "client.toml", 40, library(_client), (*TEXT, as_toml, as_toml)),
    Kind("client", "connection.toml", 30, library(_client), (*TEXT, as_toml, as_toml)),
    Kind(
        "folder",
        "gray.png",
        20,
        command("predict", "RUN/gray.png", "--run", "RUN/../run"),
        (as_image, *BYTES),
    ),
)
CASES = [(kind, number) for kind in KINDS for number in range(kind.count)]

# --- trying -------------------------------------------------------------------------------------


class TooSlow(BaseException):
    pass


@dataclass(frozen=True)
class Wrong:
    case: int
    what: str


def prepare(kind: Kind, number: int, base: Path, place: Path) -> Path:
    """A kind's folder with its file mutated; the others are those of the whole example."""
    rng = random.Random(f"{kind.base}/{kind.file}/{number}")
    folder = place / kind.base
    shutil.copytree(base / kind.base, folder, copy_function=os.link)
    file = folder / kind.file
    file.unlink()
    shutil.copy(base / kind.base / kind.file, file)
    kind.mutators[number % len(kind.mutators)](file, rng)
    return folder


def _files(folder: Path) -> dict[str, tuple[int, ...]]:
    """What would show that a file was written: which it is, how long, and when it was changed."""
    found = {}
    for path in folder.rglob("*"):
        if not path.is_dir() or path.is_symlink():
            held = path.lstat()
            found[str(path)] = (held.st_ino, held.st_mode, held.st_size, held.st_mtime_ns)
    return found


def attempt(case: int, base: Path, place: Path) -> str:
    """Try one case; what was wrong, or ""."""
    kind, number = CASES[case]
    place.mkdir()
    folder, out = prepare(kind, number, base, place), place / "out"
    out.mkdir()
    shutil.copy(base / "gray.png", place / "gray.png")
    if kind.base == "folder":
        shutil.copytree(base / "run", place / "run", copy_function=os.link)
    before = _files(folder)
    said, code = io.StringIO(), 0
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, _WALL)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            kind.reader(folder, out, random.Random(case))
    except SystemExit as exit:
        code = exit.code or 0
    except TooSlow:
        return "it took too long"
    except BaseException:
        return traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
    printed = said.getvalue()
    after = _files(folder)
    lost = {name for name, content in before.items() if after.get(name) != content}
    shutil.rmtree(place)
    if lost:
        return f"it changed {sorted(lost)}"
    if code not in (0, 1, 2):
        return f"it ended with {code}: {printed}"
    if "\x1b" in printed or "Traceback" in printed:
        return f"it printed {printed!r}"
    return ""


def _unexpected(error: Exception) -> str:
    raise AssertionError("the last handler was used") from error


def _too_slow(*_: object) -> None:
    raise TooSlow


def work(base: Path, place: Path, cases: range) -> None:
    """Try cases; a line before each, and one with what was wrong."""
    signal.signal(signal.SIGALRM, _too_slow)
    signal.signal(signal.SIGPROF, _too_slow)
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE))
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    with mock.patch("certifl.cli.unexpected", _unexpected), tiny.undrawn():
        for case in cases:
            answers.write(json.dumps({"begun": case}) + "\n")
            if wrong := attempt(case, base, place / str(case)):
                answers.write(json.dumps({"case": case, "wrong": wrong}) + "\n")
    # Not ru_maxrss, which a new process inherits from the one that started it.
    status = Path("/proc/self/status").read_text()
    peak = 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])  # type: ignore[index]
    answers.write(json.dumps({"peak": peak}) + "\n")


if __name__ == "__main__":
    work(Path(sys.argv[1]), Path(sys.argv[2]), range(0, len(CASES), int(sys.argv[3])))
