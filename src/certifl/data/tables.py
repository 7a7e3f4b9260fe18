"""Images and labels out of Arrow tables: parquet files here, or a data set of the hub."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from certifl.data.decode import NamedImage, decode_all
from certifl.data.preparation import Preparation
from certifl.data.readers import RawSplit, ReadOptions
from certifl.errors import InputError
from certifl.safe_io import open_parquet, parse_json

_BATCH = 2048

TableRows = Iterator[tuple[str, Path, pa.RecordBatch | pa.Table]]
"""Parts of a table: how an error names it, the folder of its image paths, and its rows."""


def read_tables(files: tuple[Path, ...], columns: ReadOptions) -> RawSplit:
    """Read parquet files with the columns and names of the first; else InputError."""
    schema = _opened(files[0]).schema_arrow
    chosen = choose_columns(schema, features_of(schema), columns, str(files[0]))
    return read_rows(_rows(files, chosen), chosen, columns.prepare)


def read_rows(rows: TableRows, chosen: Chosen, prepare: Preparation) -> RawSplit:
    """Decode all rows, a few thousand in memory at a time."""
    labels: list[np.ndarray] = []
    kept_parts: list[np.ndarray] = []
    images = decode_all(_images(rows, chosen, labels, kept_parts), prepare)
    column = _joined(kept_parts, chosen.keep_column or "") if kept_parts else None
    numbers = _joined(labels, chosen.label)
    return RawSplit(images, numbers, chosen.class_names, column, chosen.label)


def _joined(parts: list[np.ndarray], name: str) -> np.ndarray:
    """The values of all parts; numpy alone would make texts of integers beside texts."""
    if len({part.dtype.kind for part in parts if part.size}) > 1:
        raise InputError(
            f"Column {name!r} holds integers in one file and strings in another. Files of one "
            "split must store their values alike."
        )
    return np.concatenate([part for part in parts if part.size] or parts)


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
        _require_same_names(file, table, files[0], chosen)
        try:
            for batch in table.iter_batches(_BATCH, columns=chosen.read):
                yield str(file), file.parent, batch
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"Cannot read {file}: {error}. Copy or download it again.") from error


def _require_same_names(file: Path, table: pq.ParquetFile, first: Path, chosen: Chosen) -> None:
    """Refuse a file whose numbers stand for other names: each site may have exported its own."""
    features = features_of(table.schema_arrow)
    for column, names in (
        (chosen.label, chosen.class_names),
        (chosen.keep_column, chosen.keep_column_names),
    ):
        found = None if column is None else class_names_of(features, column)
        if found != names:
            pairs = enumerate(itertools.zip_longest(found or (), names or ()))
            number, pair = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
            here, there = ("no name" if one is None else repr(one) for one in pair)
            raise InputError(
                f"In {file}, number {number} stands for {here}, but for {there} in {first.name}: "
                f"column {column!r} has other names for its numbers there. Export all files of a "
                "split with the same names in the same order."
            )


def _images(
    rows: TableRows, chosen: Chosen, labels: list[np.ndarray], kept_parts: list[np.ndarray]
) -> Iterator[NamedImage]:
    """Yield encoded images; on the way, append each part's labels, and what is kept."""
    counted: dict[str, int] = {}
    for where, folder, part in rows:
        labels.append(_labels(part.column(chosen.label), chosen.label, where))
        if chosen.keep_column is not None:
            kept_parts.append(_kept_values(part.column(chosen.keep_column), chosen, where))
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
    column = _plain(column)
    if pa.types.is_boolean(column.type):
        column = pa.array([None if v is None else str(v) for v in column.to_pylist()], pa.string())
    values = _integers_or_texts(column)
    if column.null_count or (values is not None and values.dtype.kind == "U" and "" in values):
        raise InputError(f"Column {name!r} of {where} has missing labels. Remove those rows.")
    if values is None:
        raise InputError(
            f"Column {name!r} of {where} holds {column.type}; labels are integers or strings. "
            "Store them as such, or choose another column by writing it behind the data set's "
            "name, as in NAME[COLUMN]."
        )
    return values


def _kept_values(column: pa.Array | pa.ChunkedArray, chosen: Chosen, where: str) -> np.ndarray:
    """Values of the column that is kept: integers, or strings (also where numbers have names)."""
    column = _plain(column)
    if column.null_count:
        raise InputError(
            f"Column {chosen.keep_column!r} of {where} has missing values, so it does not say "
            "whose those images are. Fill them in, or remove those rows."
        )
    values = _integers_or_texts(column)
    if values is None:
        raise InputError(
            f"Column {chosen.keep_column!r} of {where} holds {column.type}; clients are named by "
            "integers or strings. Choose another column, or store this one as strings."
        )
    names = np.array(chosen.keep_column_names or (), dtype=np.str_)
    if not names.size or values.dtype.kind == "U":
        return values
    if values.size and not (values.min() >= 0 and values.max() < names.size):
        raise InputError(
            f"Column {chosen.keep_column!r} of {where} holds numbers without a name: its names "
            f"are for 0 to {names.size - 1}. Correct the values or the names."
        )
    return names[values]


def _plain(column: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """The values themselves, where a categorical column stores numbers of them."""
    kind = plain_type(column.type)
    return column if kind == column.type else column.cast(kind)


def _integers_or_texts(column: pa.Array | pa.ChunkedArray) -> np.ndarray | None:
    """(n,) int64 or texts, without what is missing; None for columns of other types."""
    if pa.types.is_integer(column.type):
        try:
            return np.asarray(column.drop_null().cast(pa.int64()))
        except pa.ArrowInvalid:  # beyond 64 bits with a sign
            return None
    if is_text(column.type):
        return np.array(column.drop_null().to_pylist(), dtype=np.str_)
    return None


# Which column of a table holds the images, and which the labels.


_USUAL_NAMES = {"image": ("image", "img"), "label": ("label", "labels")}
_TYPES = {"image": "Image", "label": "ClassLabel"}
_STORED = {
    "image": "Store the bytes of image files, alone or as a struct with `bytes`.",
    "label": "Store labels as integers or strings.",
}
_STRING_VIEW = pa.string_view() if hasattr(pa, "string_view") else None

Features = Mapping[str, Mapping[str, object]]
"""Column name -> the hub's feature, e.g. {"_type": "ClassLabel", "names": [...]}."""


@dataclass(frozen=True)
class Chosen:
    """The columns of images and labels, and the names of the classes where the file says them.

    Attributes:
        image, label, class_names: as they say.
        keep_column: a further column to keep.
        keep_column_names: the names of its numbers, where the file has them.
    """

    image: str
    label: str
    class_names: tuple[str, ...] | None
    keep_column: str | None = None
    keep_column_names: tuple[str, ...] | None = None

    @property
    def read(self) -> list[str]:
        """All columns that are read."""
        return list(dict.fromkeys(c for c in (self.image, self.label, self.keep_column) if c))


def features_of(schema: pa.Schema) -> Features:
    """The feature metadata that the hub writes into a parquet file; empty if there is none."""
    text = (schema.metadata or {}).get(b"huggingface")
    try:
        features = parse_json(text)["info"]["features"] if text else {}
    except (ValueError, KeyError, TypeError):
        return {}
    usable = features if isinstance(features, dict) else {}
    return {name: feature for name, feature in usable.items() if isinstance(feature, dict)}


def choose_columns(
    schema: pa.Schema, features: Features, columns: ReadOptions, where: str
) -> Chosen:
    """Find the columns: as asked for, else by feature type, else by storage type and name.

    A column that is kept for itself is not taken for the label unless that was asked for.
    InputError where it is not clear which one is meant.
    """
    kept = columns.keep_column
    image, label = columns.image, columns.label
    image = _found("image", schema, features, where) if image is None else image
    label = _found("label", schema, features, where, kept) if label is None else label
    for requested in (columns.image, columns.label):
        if requested is not None and requested not in schema.names:
            raise InputError(
                f"{where} has no column {requested!r}; its columns are {', '.join(schema.names)}."
            )
    if kept is not None and kept not in schema.names:
        raise InputError(
            f"{where} has no column {kept!r} to split by; its columns are "
            f"{', '.join(schema.names)}."
        )
    named = None if kept is None else class_names_of(features, kept)
    return Chosen(image, label, class_names_of(features, label), kept, named)


def class_names_of(features: Features, column: str) -> tuple[str, ...] | None:
    """What the numbers of a column stand for, where the metadata says it."""
    names = features.get(column, {}).get("names")
    return tuple(map(str, names)) if isinstance(names, list) else None


def _found(
    role: str, schema: pa.Schema, features: Features, where: str, kept: str | None = None
) -> str:
    """The one column that can be meant: by feature type, else by storage type and name."""
    fields = [field for field in schema if field.name != kept]
    typed = [f.name for f in fields if features.get(f.name, {}).get("_type") == _TYPES[role]]
    usual_names = _USUAL_NAMES[role]
    stored = [f.name for f in fields if _may_hold(role, f.type, f.name in usual_names)]
    candidates = typed or stored
    usual = [name for name in usual_names if name in candidates]
    if len(usual) == 1:
        return usual[0]
    unusable = [f for f in fields if f.name in usual_names and f.name not in candidates]
    if candidates and unusable and not typed and not usual:
        raise InputError(
            f"Column {unusable[0].name!r} of {where} holds {unusable[0].type}, from which no "
            f"{role}s are read. {_STORED[role]} If another column holds the {role}s: "
            f"{_how_to_choose(role, candidates[0])}"
        )
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        raise InputError(
            f"{where} has no column that could hold the {role}s; its columns are "
            f"{', '.join(f'{field.name} ({field.type})' for field in schema)}. {_STORED[role]}"
        )
    raise InputError(
        f"{where} has several columns that could hold the {role}s: {', '.join(candidates)}. "
        f"{_how_to_choose(role, candidates[0])}"
    )


def _how_to_choose(role: str, example: str) -> str:
    if role == "label":
        return f"Choose one by writing it behind the data set's name, as in NAME[{example}]."
    return f"Choose one with image_column={example!r}."


def _may_hold(role: str, kind: pa.DataType, usual: bool) -> bool:
    """Whether a column's type fits; yes and no only by its name, as in a column `occluded`."""
    if role == "label":
        kind = plain_type(kind)
        return is_text(kind) or pa.types.is_integer(kind) or (usual and pa.types.is_boolean(kind))
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def plain_type(kind: pa.DataType) -> pa.DataType:
    """The type of a column's values, also where it is stored by number (a categorical column)."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def is_text(kind: pa.DataType) -> bool:
    """Whether a column's values are texts."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or kind == _STRING_VIEW
