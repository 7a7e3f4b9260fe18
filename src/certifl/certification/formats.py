"""Certificates as files: Parquet with everything, tab-separated as in published code."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from certifl.certification.certificates import Certificates
from certifl.certification.groups import kinds, require_groups
from certifl.certification.published import TSV_HEADER, is_log, read_log
from certifl.errors import InputError
from certifl.outside import open_parquet, parse_json
from certifl.smoothing.rounding import floor_text

__all__ = ["TSV_HEADER", "column_of_numbers", "load", "save"]

_KEY = b"certifl"
_SCALARS = ("client", "index", "label", "predicted", "radius", "p_lower", "p_upper")
_ENDING = ("looks", "level", "seconds")
_LISTS = ("counts", "selection_counts")
_TSV_DIGITS = 6
_FLOATS = ("radius", "p_lower", "p_upper", "level", "seconds")
_INTERVAL, _PACKED = ("interval_low", "interval_high"), "scan_votes"


def save(certificates: Certificates, path: Path) -> None:
    """Write certificates whole or not at all; the ending chooses the format.

    Raises:
        InputError: the ending is neither .parquet nor .tsv, or a .tsv, which has no place for a
            unit, is asked for certificates of several.
    """
    writers = {".parquet": _write_parquet, ".tsv": _write_tsv}
    writer = writers.get(path.suffix.lower())
    if writer is None:
        raise InputError(f"Cannot save certificates as {path.name!r}: use .parquet or .tsv.")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        writer(certificates, part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def load(path: Path) -> Certificates:
    """Read certificates from .parquet or .tsv, or a published log under any name.

    Raises:
        InputError: the file is missing, damaged, or has other columns.
    """
    if not path.is_file():
        raise InputError(f"There is no certificate file at {path}.")
    readers = {".parquet": _read_parquet, ".tsv": read_log, ".txt": read_log}
    reader = readers.get(path.suffix.lower())
    try:
        if reader is None and is_log(path):  # published logs are named sigma_0.25, for instance
            reader = read_log
        if reader is None:
            raise InputError(
                f"Cannot read certificates from {path.name!r}: .parquet or .tsv. If it is a log "
                f"of published code, it must begin with {' '.join(TSV_HEADER)}, separated by "
                "tabs; otherwise rename it by what it is."
            )
        return reader(path)
    except InputError:
        raise
    except (OSError, pa.ArrowException, KeyError, ValueError, TypeError, OverflowError) as error:
        raise InputError(f"{path} holds no certificates this version can read: {error}") from error


def _write_parquet(certificates: Certificates, path: Path) -> None:
    columns: dict[str, Any] = {name: getattr(certificates, name) for name in _SCALARS}
    columns["correct"] = certificates.correct
    columns["votes"] = certificates.votes
    columns.update({name: getattr(certificates, name) for name in _ENDING})
    columns.update({name: _as_lists(getattr(certificates, name)) for name in _LISTS})
    if certificates.interval is not None:
        columns["interval_low"] = certificates.interval[:, 0]
        columns["interval_high"] = certificates.interval[:, 1]
    if certificates.scan_votes is not None:
        columns["scan_votes"] = pa.array(certificates.scan_votes, pa.binary())
    conditions = json.dumps(dict(certificates.conditions), sort_keys=True).encode()
    table = pa.table(columns).replace_schema_metadata({_KEY: conditions})
    pq.write_table(table, path)


def _as_lists(counts: np.ndarray) -> pa.Array:
    rows, classes = counts.shape
    return (
        pa.FixedSizeListArray.from_arrays(pa.array(counts.reshape(-1)), classes).cast(
            pa.list_(pa.int64())
        )
        if rows
        else pa.array([], pa.list_(pa.int64()))
    )


def _read_parquet(path: Path) -> Certificates:
    file = open_parquet(path, _SCALARS + _ENDING + _LISTS)
    names = file.schema_arrow.names
    ends = [name for name in _INTERVAL if name in names]
    packed = [name for name in (_PACKED,) if name in names]
    _require_types(file.schema_arrow, ends, packed)
    table = file.read([*_SCALARS, *_ENDING, *_LISTS, *ends, *packed])
    columns = {name: column_of_numbers(table, name) for name in _SCALARS + _ENDING}
    columns.update({name: _as_matrix(table, name) for name in _LISTS})
    if ends:
        columns["interval"] = np.stack([column_of_numbers(table, n) for n in _INTERVAL], axis=1)
    if packed:
        columns["scan_votes"] = np.array(table[_PACKED].to_pylist(), dtype=object)
    conditions = parse_json((table.schema.metadata or {}).get(_KEY, b"{}"))
    if not isinstance(conditions, dict):
        raise ValueError("its conditions are not an object")
    require_groups(conditions)
    return Certificates(**columns, conditions=conditions)


def _require_types(schema: pa.Schema, ends: list[str], packed: list[str]) -> None:
    """Refuse columns of other types before they are read: a text expands to any size."""
    floats = {*_FLOATS, *ends}
    for name in (*_SCALARS, *_ENDING, *ends):
        fits = pa.types.is_floating if name in floats else pa.types.is_integer
        if not fits(schema.field(name).type):
            raise ValueError(f"the column {name!r} holds {schema.field(name).type}")
    for name in _LISTS:
        kind = schema.field(name).type
        if not (pa.types.is_list(kind) and pa.types.is_integer(kind.value_type)):
            raise ValueError(f"the column {name!r} holds {kind}")
    if packed and not pa.types.is_binary(schema.field(_PACKED).type):
        raise ValueError(f"the column {_PACKED!r} holds {schema.field(_PACKED).type}")


def column_of_numbers(table: pa.Table, name: str) -> np.ndarray:
    """A column of numbers without gaps.

    Raises:
        ValueError: a number is missing, or does not fit into 64 bits.
    """
    column = table[name]
    if column.null_count:
        raise ValueError(f"the column {name!r} has rows without a value")
    kind = pa.int64() if pa.types.is_integer(column.type) else pa.float64()
    return column.cast(kind).to_numpy()


def _as_matrix(table: pa.Table, name: str) -> np.ndarray:
    """A column of lists of one length: what is missing or longer elsewhere cannot be votes."""
    if table.num_rows == 0:
        return np.zeros((0, 0), np.int64)
    column = pa.concat_arrays(table[name].chunks)
    lengths, values = column.value_lengths(), column.flatten()
    if column.null_count or values.null_count:
        raise ValueError(f"the column {name!r} has rows without a value")
    width = lengths[0].as_py()
    if not np.all(lengths.to_numpy() == width):
        raise ValueError(f"the column {name!r} has rows of different length")
    return values.cast(pa.int64()).to_numpy().reshape(table.num_rows, width)


def _write_tsv(certificates: Certificates, path: Path) -> None:
    if len(kinds(certificates.conditions)) > 1:
        raise InputError(
            "A .tsv says nowhere which perturbation a radius belongs to, and these certificates "
            "are of several. Write one file for each of by_kind(), or a .parquet."
        )
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(TSV_HEADER)
        for row in range(len(certificates)):
            writer.writerow(
                (
                    int(certificates.index[row]),
                    int(certificates.label[row]),
                    int(certificates.predicted[row]),
                    floor_text(float(certificates.radius[row]), _TSV_DIGITS),
                    int(certificates.correct[row]),
                    f"{certificates.seconds[row]:.6f}",
                )
            )
