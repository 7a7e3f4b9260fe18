"""Files and texts from outside: opened, checked and limited here and nowhere else.

The sender of a file may have written anything into it. So it must be a regular file (no pipe,
device or folder, which could block or never end) of a size that its kind can have, its text UTF-8,
its JSON or TOML not nested deeper than any honest one, and its integers those of 64 bits. What a
file declares about its own size is limited before memory is asked for.

Every function raises `InputError`, which says in a few words what is wrong with the file (not a
regular one, too large, damaged, of another form), and `OSError` where it cannot be opened or read;
callers add its path and what to do.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import re
import stat
import threading
import tomllib
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from certifl.errors import InputError

if TYPE_CHECKING:
    import pyarrow.parquet as pq

SPEC_BYTES = 1 << 20
"""The most that a spec or a settings file may hold."""
TEXT_BYTES = 1 << 27
"""The most that another text may hold: records, histories, partitions."""
DATA_BYTES = 1 << 30
"""The most that a file of images may hold, and expand to where it is compressed."""

MALFORMED = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""What a record of another shape makes the code raise that reads it part by part."""

_SPACES = "\n\t\u00a0\u202f"  # not printable in Python's sense, and harmless
_DEPTH = 48
_CONTAINERS = 4_000_000  # an empty one takes 64 bytes of memory, and two of text
_VALUES = 1 << 27  # of a table: what a million images of 60 classes need
_LOWEST, _HIGHEST = -(1 << 63), (1 << 64) - 1
_DIGITS = 25
_GZIP_RATIO = 1100  # deflate never packs more tightly
_PIECE = 1 << 20
# A key of so many parts takes tomllib the square of them.
_LONG_KEY = re.compile(r"""(?<![\w"'-])(?:[\w"'-]++[ \t]*+\.[ \t]*+){48}""")
_JSON_MARKS = re.compile(r'"(?:[^"\\]++|\\.)*+(?:"|\Z)|[\[{\]}]', re.DOTALL)
_OTHER_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def visible(text: str) -> str:
    """A text that can be printed anywhere: control characters and what is not UTF-8 are escaped.

    Names from files and folders may hold sequences that move a terminal's cursor or clear it.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in _SPACES else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def require_regular(path: Path, most: int | None = None) -> os.stat_result:
    """Refuse what is not a regular file, or is larger than it may be."""
    _require_name(path)
    return _checked(os.stat(path), most)


def open_regular(path: Path, most: int | None = None) -> BinaryIO:
    """Open a regular file for reading, without waiting for anybody."""
    _require_name(path)
    # Without O_NONBLOCK, opening a pipe waits until somebody writes to it.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | os.O_CLOEXEC)
    try:
        _checked(os.fstat(handle), most)
        return open(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def is_temporary(name: str) -> bool:
    """Whether a file of this name was being written when its process was killed."""
    return name.startswith(".") and name.endswith(".tmp")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on leaving without error it replaces `path`.

    A process killed at any moment leaves the old file or the new one, never half of either.

    Raises:
        OSError: the folder cannot be written, or the disk is full; `path` is as it was.
    """
    unique = f"{os.getpid()}-{threading.get_ident()}"
    part = path.with_name(f".{path.name}.{unique}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if part.is_symlink():  # somebody else's: it could lead anywhere
            part.unlink()
        yield part
        flush(part)
        os.replace(part, path)
        flush(path.parent)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """What was written to a file, or the names in a folder, is on the disk when this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_bytes(path: Path, most: int = DATA_BYTES) -> bytes:
    """The content of a regular file."""
    with open_regular(path, most) as file:
        content = file.read(most + 1)
    if len(content) > most:  # it grew
        raise InputError(_too_large(len(content), most))
    return content


def read_text(path: Path, most: int = TEXT_BYTES) -> str:
    """The text of a regular file, which must be UTF-8."""
    try:
        text = read_bytes(path, most).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"it is not UTF-8 text (byte {error.start})") from error
    return text.replace("\r\n", "\n")


def read_json(path: Path, most: int = TEXT_BYTES) -> Any:
    """The content of a JSON file."""
    return parse_json(read_text(path, most))


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text."""
    try:
        plain = text.decode("utf-8") if isinstance(text, bytes) else text
        _require_shallow(plain)
        return json.loads(plain, parse_int=_integer)
    except RecursionError:
        raise InputError(_too_deep()) from None
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"it is not JSON ({error})") from error


def read_toml(path: Path, most: int = SPEC_BYTES) -> dict[str, Any]:
    """The content of a TOML file."""
    return parse_toml(read_text(path, most))


def parse_toml(text: str) -> dict[str, Any]:
    """The values of a TOML text."""
    if len(text) > SPEC_BYTES:
        raise InputError(_too_large(len(text), SPEC_BYTES))
    if _LONG_KEY.search(text):
        raise InputError(_too_deep())
    try:
        values = tomllib.loads(text)
    except RecursionError:
        raise InputError(_too_deep()) from None
    except ValueError as error:  # also integers of thousands of digits
        raise InputError(f"it is not TOML ({error})") from error
    _require_plain(values)
    return values


def read_gzip(path: Path, header: int, most: int = DATA_BYTES) -> Iterator[bytes]:
    """Yield the first `header` bytes of a gzipped file, then the rest in pieces."""
    with open_regular(path, most) as raw:
        allowed = min(most, _GZIP_RATIO * max(1, os.fstat(raw.fileno()).st_size))
        try:
            with gzip.GzipFile(fileobj=raw) as file:
                piece = file.read(header)
                while piece:
                    allowed -= len(piece)
                    if allowed < 0:
                        raise InputError(f"it expands to more than {most:,} bytes")
                    yield piece
                    piece = file.read(_PIECE)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise InputError(f"it is damaged ({error})") from error


def open_parquet(
    path: Path, required: Sequence[str] | None = None, values: int = _VALUES
) -> pq.ParquetFile:
    """Open a parquet file whose table, as the file declares it, fits into memory.

    Args:
        path: the file.
        required: columns that must be there, once.
        values: the most numbers or texts in all columns together.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    require_regular(path)
    try:
        # Not read_table, which would look for a data set in the path's folders.
        file = pq.ParquetFile(path)
        declared = _declared(file.metadata)
        names = file.schema_arrow.names
    except (pa.ArrowException, UnicodeDecodeError, OverflowError) as error:
        raise InputError(f"it is not a whole parquet file ({error})") from error
    if declared > values:
        raise InputError(f"it declares {declared:,} values, more than the {values:,} allowed")
    twice = [name for name in names if names.count(name) > 1] if len(names) < 10_000 else names
    if twice:
        raise InputError(f"it has the column {twice[0]!r} twice, or too many columns")
    if missing := [name for name in required or () if name not in names]:
        raise InputError(f"it has no column {missing[0]!r}")
    return file


def _declared(metadata: Any) -> int:
    """Values in all columns, as the footer of a parquet file counts them."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    counted = sum(g.column(index).num_values for g in groups for index in range(g.num_columns))
    rows = [group.num_rows for group in groups]
    if min([metadata.num_rows, *rows]) < 0:
        raise InputError("it declares a negative number of rows")
    return max(counted, metadata.num_rows, sum(rows))


def _require_name(path: Path) -> None:
    if "\0" in str(path):
        raise InputError("a file name cannot hold a NUL character")


def _checked(status: os.stat_result, most: int | None) -> os.stat_result:
    if not stat.S_ISREG(status.st_mode):
        kind = _OTHER_KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise InputError(f"it is {kind}, not a file")
    if most is not None and status.st_size > most:
        raise InputError(_too_large(status.st_size, most))
    return status


def _too_large(size: int, most: int) -> str:
    return f"it holds {size:,} bytes, more than the {most:,} that such a file may have"


def _too_deep() -> str:
    return f"it is nested deeper than {_DEPTH} levels"


def _integer(digits: str) -> int:
    if len(digits) > _DIGITS or not _LOWEST <= int(digits) <= _HIGHEST:
        raise InputError(f"it holds an integer beyond 64 bits ({digits[:10]}...)")
    return int(digits)


def _require_shallow(text: str) -> None:
    """Refuse deep nesting before it is parsed: how deep Python can go depends on its version."""
    depth = opened = 0
    for mark in _JSON_MARKS.finditer(text):
        first = mark.group()[0]
        opened += first in "[{"
        depth += (first in "[{") - (first in "]}")
        if depth > _DEPTH:
            raise InputError(_too_deep())
        if opened > _CONTAINERS:
            raise InputError(f"it holds more than {_CONTAINERS:,} lists and objects")


def _require_plain(values: Any) -> None:
    """Refuse deep nesting and large integers in values that were parsed, without recursion."""
    waiting = [(values, 0)]
    while waiting:
        value, depth = waiting.pop()
        if depth > _DEPTH:
            raise InputError(_too_deep())
        if isinstance(value, dict):
            waiting += [(inner, depth + 1) for inner in value.values()]
        elif isinstance(value, list):
            waiting += [(inner, depth + 1) for inner in value]
        elif isinstance(value, int) and not _LOWEST <= value <= _HIGHEST:
            raise InputError("it holds an integer beyond 64 bits")
