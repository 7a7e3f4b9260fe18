"""Images and labels out of Arrow tables: parquet files here, or a data set of the hub."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from certifl.data.columns import Chosen, choose_columns, features_of
from certifl.data.decode import NamedImage, decode_all
from certifl.data.readers import ColumnNames, RawSplit
from certifl.errors import InputError
from certifl.outside import open_parquet

__all__ = ["TableRows", "read_rows", "read_tables"]

_BATCH = 2048

TableRows = Iterator[tuple[str, Path, pa.RecordBatch | pa.Table]]
"""Parts of a table: how an error names it, the folder of its image paths, and its rows."""


def read_tables(files: tuple[Path, ...], columns: ColumnNames) -> RawSplit:
    """Read parquet files that all have the columns of the first.

    Raises:
        InputError: a file is damaged, columns are unclear, or an image or label is unusable.
    """
    schema = _opened(files[0]).schema_arrow
    chosen = choose_columns(
        schema, features_of(schema), columns.image, columns.label, str(files[0]), columns.kept
    )
    return read_rows(_rows(files, chosen), chosen)


def read_rows(rows: TableRows, chosen: Chosen) -> RawSplit:
    """Decode all rows, a few thousand in memory at a time."""
    labels: list[np.ndarray] = []
    kept: list[np.ndarray] = []
    images = decode_all(_images(rows, chosen, labels, kept))
    column = np.concatenate(kept) if kept else None
    return RawSplit(images, np.concatenate(labels), chosen.class_names, column)


def _opened(file: Path) -> pq.ParquetFile:
    try:
        return open_parquet(file)
    except (OSError, InputError) as error:
        raise InputError(f"Cannot read {file}: {error}. Copy or download it again.") from error


def _rows(files: tuple[Path, ...], chosen: Chosen) -> TableRows:
    for file in files:
        table = _opened(file)
        if missing := set(chosen.read) - set(table.schema_arrow.names):
            raise InputError(
                f"{file} has no column {', '.join(sorted(missing))}, unlike the files before it. "
                "Files of one split must have the same columns."
            )
        try:
            for batch in table.iter_batches(_BATCH, columns=chosen.read):
                yield str(file), file.parent, batch
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"Cannot read {file}: {error}. Copy or download it again.") from error


def _images(
    rows: TableRows, chosen: Chosen, labels: list[np.ndarray], kept: list[np.ndarray]
) -> Iterator[NamedImage]:
    """Yield encoded images; on the way, append each part's labels, and what is kept."""
    counted: dict[str, int] = {}
    for where, folder, part in rows:
        labels.append(_labels(part.column(chosen.label), chosen.label, where))
        if chosen.kept is not None:
            kept.append(_kept(part.column(chosen.kept), chosen, where))
        for value in part.column(chosen.image).to_pylist():
            row = counted.get(where, 0)
            counted[where] = row + 1
            name = partial("row {} of {}".format, row, where)
            yield name, _encoded(value, folder, name)


def _encoded(value: object, folder: Path, name: Callable[[], str]) -> bytes | Path:
    content = value.get("bytes") if isinstance(value, dict) else value
    if isinstance(content, bytes):
        return content
    path = value.get("path") if isinstance(value, dict) else None
    if isinstance(path, str) and (file := _beside(folder, path)) is not None:
        return file
    raise InputError(
        f"{name()} holds neither the bytes of an image nor the path of a file in {folder}. "
        "Export the data set with its images embedded."
    )


def _beside(folder: Path, path: str) -> Path | None:
    """The file of a data set that a row names; None if there is none below the table's folder.

    A table may come from anybody, so it cannot have other files of this machine read.
    """
    try:
        inside = (folder / path).resolve().is_relative_to(folder.resolve())
        return folder / path if inside and (folder / path).is_file() else None
    except (OSError, ValueError, RuntimeError):  # too long, a circle of links, a NUL character
        return None


def _labels(column: pa.Array | pa.ChunkedArray, name: str, where: str) -> np.ndarray:
    if column.null_count:
        raise InputError(f"Column {name!r} of {where} has missing labels. Remove those rows.")
    if pa.types.is_integer(column.type):
        return np.asarray(column).astype(np.int64)
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return np.array(column.to_pylist(), dtype=np.str_)
    raise InputError(
        f"Column {name!r} of {where} holds {column.type}; labels are integers or texts. "
        "Choose another column by writing it behind the data set's name, as in NAME[COLUMN]."
    )


def _kept(column: pa.Array | pa.ChunkedArray, chosen: Chosen, where: str) -> np.ndarray:
    """Values of the column that is kept: integers, or texts (also where numbers have names)."""
    if column.null_count:
        raise InputError(
            f"Column {chosen.kept!r} of {where} has missing values, so it does not say whose "
            "those images are. Fill them in, or remove those rows."
        )
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    values = column.to_pylist()
    if pa.types.is_integer(column.type):
        names = chosen.kept_names or ()
        named = all(0 <= value < len(names) for value in values)
        return np.array([names[v] for v in values] if named else values)
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return np.array(values, dtype=np.str_)
    raise InputError(
        f"Column {chosen.kept!r} of {where} holds {column.type}; clients are named by integers or "
        "texts. Choose another column, or store this one as text."
    )
