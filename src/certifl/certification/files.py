"""Certificates as files: Parquet with everything, tab-separated as published code writes them."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from certifl.certification.certificates import ABSTAINED, UNLABELED, Certificates, Predictions
from certifl.certification.metadata import kinds, require_groups
from certifl.errors import InputError
from certifl.safe_io import MALFORMED, open_parquet, parse_json, replacing
from certifl.smoothing.curves import floor_text

_KEY = b"certifl"
_SCALARS = ("client", "index", "label", "predicted", "radius", "p_lower", "p_upper")
_ENDING = ("looks", "level", "seconds")
_LISTS = ("counts", "selection_counts")
_INTERVAL, _PACKED = ("interval_low", "interval_high"), "scan_votes"
_FLOATS = {"radius", "p_lower", "p_upper", "level", "seconds", *_INTERVAL}
_TSV_DIGITS = 6
TSV_HEADER = ("idx", "label", "predict", "radius", "correct", "time")


def save(certificates: Certificates, path: Path) -> None:
    """Write certificates whole or not at all; see `Certificates.save`."""
    writers = {".parquet": _write_parquet, ".tsv": _write_tsv}
    writer = writers.get(path.suffix.lower())
    if writer is None:
        raise InputError(f"Cannot save certificates as {path.name!r}: use .parquet or .tsv.")
    with replacing(path) as part:
        writer(certificates, part)


def load(path: Path) -> Certificates:
    """Read certificates from .parquet or .tsv, or a published log; see `Certificates.load`."""
    if not path.is_file():
        raise InputError(f"There is no certificate file at {path}.")
    try:
        ending = path.suffix.lower()
        if ending == ".parquet":
            return _read_parquet(path)
        # Published logs are named sigma_0.25, for instance.
        if ending in (".tsv", ".txt") or _is_log(path):
            return _read_log(path)
        raise InputError(
            "its name does not end in .parquet or .tsv. If it is a log of published code, it must "
            f"begin with {' '.join(TSV_HEADER)}, separated by tabs; otherwise rename it by what "
            "it is"
        )
    # InputError too (a ValueError): what opens files says what is wrong, and not with which.
    except (OSError, pa.ArrowException, *MALFORMED) as error:
        raise InputError(
            f"{path} holds no certificates this version can read: {str(error).rstrip('.')}."
        ) from error


def save_predictions(predictions: Predictions, path: Path) -> None:
    """Write plain predictions as Parquet, whole or not at all."""
    columns = {name: getattr(predictions, name) for name in Predictions.COLUMNS}
    with replacing(path) as part:
        _write_table({**columns, "correct": predictions.correct}, predictions.conditions, part)


def load_predictions(path: Path) -> Predictions:
    """Read plain predictions; see `Predictions.load`."""
    if not path.is_file():
        raise InputError(f"There are no plain predictions at {path}.")
    try:
        columns, conditions = _read_table(path, Predictions.COLUMNS)
    except (pa.ArrowException, KeyError, ValueError, TypeError, OSError) as error:
        raise InputError(f"{path} holds no plain predictions: {error}.") from error
    return Predictions(**columns, conditions=conditions)


def _write_table(columns: Mapping[str, Any], conditions: Mapping[str, Any], path: Path) -> None:
    stored = json.dumps(dict(conditions), sort_keys=True).encode()
    pq.write_table(pa.table(dict(columns)).replace_schema_metadata({_KEY: stored}), path)


def _read_table(
    path: Path, needed: Sequence[str], optional: Sequence[str] = ()
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Columns by name, and the conditions; types are checked before anything is expanded."""
    file = open_parquet(path, needed)
    schema = file.schema_arrow
    names = [*needed, *(name for name in optional if name in schema.names)]
    for name in names:
        if not _fits(name, kind := schema.field(name).type):
            raise ValueError(f"the column {name!r} holds {kind}")
    table = file.read(names)
    conditions = parse_json((table.schema.metadata or {}).get(_KEY, b"{}"))
    if not isinstance(conditions, dict):
        raise ValueError("its conditions are not an object")
    return {name: _column(table, name) for name in names}, conditions


def _fits(name: str, kind: pa.DataType) -> bool:
    """Whether a column has its type: a text expands to any size."""
    if name in _LISTS:
        return pa.types.is_list(kind) and pa.types.is_integer(kind.value_type)
    if name == _PACKED:
        return pa.types.is_binary(kind)
    return pa.types.is_floating(kind) if name in _FLOATS else pa.types.is_integer(kind)


def _column(table: pa.Table, name: str) -> np.ndarray:
    """A column as an array without gaps."""
    column = table[name]
    if name == _PACKED:
        return np.array(column.to_pylist(), dtype=object)
    if name in _LISTS:
        return _matrix(column, name)
    if column.null_count:
        raise ValueError(f"the column {name!r} has rows without a value")
    return column.cast(pa.float64() if name in _FLOATS else pa.int64()).to_numpy()


def _matrix(column: pa.ChunkedArray, name: str) -> np.ndarray:
    """A column of lists of one length: what is missing or longer elsewhere cannot be votes."""
    if len(column) == 0:
        return np.zeros((0, 0), np.int64)
    lists = pa.concat_arrays(column.chunks)
    lengths, values = lists.value_lengths(), lists.flatten()
    if lists.null_count or values.null_count:
        raise ValueError(f"the column {name!r} has rows without a value")
    width = lengths[0].as_py()
    if not np.all(lengths.to_numpy() == width):
        raise ValueError(f"the column {name!r} has rows of different length")
    return values.cast(pa.int64()).to_numpy().reshape(len(column), width)


def _write_parquet(certificates: Certificates, path: Path) -> None:
    columns: dict[str, Any] = {name: getattr(certificates, name) for name in _SCALARS}
    columns |= {"correct": certificates.correct, "votes": certificates.votes}
    columns |= {name: getattr(certificates, name) for name in _ENDING}
    lists = pa.list_(pa.int64())
    columns |= {name: pa.array(list(getattr(certificates, name)), lists) for name in _LISTS}
    if certificates.interval is not None:
        columns["interval_low"], columns["interval_high"] = certificates.interval.T
    if certificates.scan_votes is not None:
        columns[_PACKED] = pa.array(certificates.scan_votes, pa.binary())
    _write_table(columns, certificates.conditions, path)


def _read_parquet(path: Path) -> Certificates:
    columns, conditions = _read_table(path, (*_SCALARS, *_ENDING, *_LISTS), (*_INTERVAL, _PACKED))
    if any(name in columns for name in _INTERVAL):
        columns["interval"] = np.stack([columns.pop(name) for name in _INTERVAL], axis=1)
    require_groups(conditions)
    return Certificates(**columns, conditions=conditions)


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


# Logs of published code: tab-separated, one row per image.

_TRUTH = {"1": True, "true": True, "0": False, "false": False}
_LARGEST = 2**63 - 1
_TIME = re.compile(r"((?P<days>\d+) days?, )?(?P<clock>[\d:.eE+-]+)")


def _is_log(path: Path) -> bool:
    """Whether a file begins with the header of such a log, whatever its name."""
    with path.open("rb") as file:
        fields = file.readline(200).rstrip(b"\r\n").split(b"\t")
    return fields[: len(TSV_HEADER)] == [name.encode() for name in TSV_HEADER]


def _read_log(path: Path) -> Certificates:
    """Read a log; bounds, votes and levels, which it does not hold, are unknown (NaN, empty).

    A row that says that its image is not certified is an abstention here, whatever class it names:
    published logs mark that by a radius below 0, by `correct` being false, or by class -1. A
    ValueError names the line that is damaged or contradicts itself.
    """
    kinds = [(name, "i8") for name in ("index", "label", "predicted")]
    rows = np.array(list(_rows(path)), [*kinds, ("radius", "f8"), ("seconds", "f8")])
    columns = {name: rows[name].copy() for name in rows.dtype.names or ()}
    m = len(rows)
    nothing, unknown = np.zeros((m, 0), np.int64), np.full(m, np.nan)
    return Certificates(
        client=np.zeros(m, np.int64),
        **columns,
        p_lower=unknown,
        p_upper=unknown,
        counts=nothing,
        selection_counts=nothing,
        looks=np.zeros(m, np.int64),
        level=unknown,
        conditions={"source": path.name},
    )


def _rows(path: Path) -> Iterator[tuple[int, int, int, float, float]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, delimiter="\t")
        try:
            header = tuple(next(reader, ()))
            if header[: len(TSV_HEADER)] != TSV_HEADER:
                raise ValueError(f"the header must be {' '.join(TSV_HEADER)}")
            for fields in reader:
                if len(fields) not in (0, len(header)):
                    raise ValueError(
                        f"line {reader.line_num} is not as long as the header: {len(fields)}, "
                        f"not {len(header)}"
                    )
                if fields:
                    try:
                        yield _row(*fields[: len(TSV_HEADER)])
                    except ValueError as error:
                        raise ValueError(f"line {reader.line_num}: {error}") from error
        except csv.Error as error:
            raise ValueError(f"line {reader.line_num}: {error}") from error


def _row(
    idx: str, label: str, predict: str, radius: str, correct: str, time: str
) -> tuple[int, int, int, float, float]:
    """Index, label, class and radius that hold (or an abstention), and seconds."""
    index, truth, predicted = int(idx), int(label), int(predict)
    claimed, right = float(radius), _TRUTH.get(correct.strip().lower())
    if not math.isfinite(claimed):
        raise ValueError(f"the radius {radius} is not a finite number")
    if right is None:
        raise ValueError(f"correct must be 0, 1, False or True; got {correct!r}")
    if max(index, truth, predicted) > _LARGEST:
        raise ValueError("idx, label and predict must be below 2 to the power of 63")
    if index < 0 or truth < UNLABELED or predicted < ABSTAINED:
        raise ValueError("idx, label and predict must not be negative, but for -1 = unknown")
    if right and predicted not in (truth, ABSTAINED):
        raise ValueError(f"correct is {correct}, but class {predict} is not the label {label}")
    certified = claimed >= 0 and predicted != ABSTAINED and (right or predicted != truth)
    if not certified:
        predicted, claimed = ABSTAINED, 0.0
    return index, truth, predicted, claimed, _seconds(time)


def _seconds(text: str) -> float:
    """Seconds from a plain number, from H:MM:SS.ffffff, or from "D days, H:MM:SS.ffffff"."""
    match = _TIME.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"the time {text!r} is neither seconds nor H:MM:SS")
    total = 0.0
    for field in match["clock"].split(":"):
        total = total * 60 + float(field)
    total += 86_400 * float(match["days"] or 0)
    if not math.isfinite(total):
        raise ValueError(f"the time {text!r} is not a finite number of seconds")
    return total
