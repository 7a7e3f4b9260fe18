"""Logs of certificates as published code writes them: tab-separated, one row per image."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from certifl.certification.certificates import ABSTAINED, UNLABELLED, Certificates

TSV_HEADER = ("idx", "label", "predict", "radius", "correct", "time")
_TRUTH = {"1": True, "true": True, "0": False, "false": False}
_LARGEST = 2**63 - 1
_TIME = re.compile(r"((?P<days>\d+) days?, )?(?P<clock>[\d:.eE+-]+)")


@dataclass(frozen=True)
class _Row:
    """One line of a log: a radius and a class that hold, or an abstention."""

    index: int
    label: int
    predicted: int
    radius: float
    seconds: float


def is_log(path: Path) -> bool:
    """Whether a file begins with the header of such a log, whatever its name."""
    with path.open("rb") as file:
        return file.readline(200).rstrip(b"\r\n").split(b"\t")[: len(TSV_HEADER)] == [
            name.encode() for name in TSV_HEADER
        ]


def read_log(path: Path) -> Certificates:
    """Read a log; bounds, votes and levels, which it does not hold, are unknown (NaN, empty).

    A row that says that its image is not certified is an abstention here, whatever class it names:
    published logs mark that by a radius below 0, by `correct` being false, or by class -1.

    Raises:
        ValueError: the header differs, or a row is damaged or contradicts itself; the message
            names its line.
    """
    rows = list(_rows(path))
    m = len(rows)
    nothing, unknown = np.zeros((m, 0), np.int64), np.full(m, np.nan)
    return Certificates(
        client=np.zeros(m, np.int64),
        index=np.array([row.index for row in rows], np.int64),
        label=np.array([row.label for row in rows], np.int64),
        predicted=np.array([row.predicted for row in rows], np.int64),
        radius=np.array([row.radius for row in rows], np.float64),
        p_lower=unknown,
        p_upper=unknown,
        counts=nothing,
        selection_counts=nothing,
        looks=np.zeros(m, np.int64),
        level=unknown,
        seconds=np.array([row.seconds for row in rows], np.float64),
        conditions={"source": path.name},
    )


def _rows(path: Path) -> Iterator[_Row]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, delimiter="\t")
        try:
            header = tuple(next(reader, ()))
            if header[: len(TSV_HEADER)] != TSV_HEADER:
                raise ValueError(f"the header must be {' '.join(TSV_HEADER)}")
            for fields in reader:
                if fields:
                    yield _numbered(fields, len(header), reader.line_num)
        except csv.Error as error:
            raise ValueError(f"line {reader.line_num}: {error}") from error


def _numbered(fields: list[str], width: int, line: int) -> _Row:
    if len(fields) != width:
        raise ValueError(f"line {line} is not as long as the header: {len(fields)}, not {width}")
    try:
        return _row(*fields[: len(TSV_HEADER)])
    except ValueError as error:
        raise ValueError(f"line {line}: {error}") from error


def _row(idx: str, label: str, predict: str, radius: str, correct: str, time: str) -> _Row:
    index, truth, predicted = int(idx), int(label), int(predict)
    claimed, right = float(radius), _TRUTH.get(correct.strip().lower())
    if not math.isfinite(claimed):
        raise ValueError(f"the radius {radius} is not a finite number")
    if right is None:
        raise ValueError(f"correct must be 0, 1, False or True; got {correct!r}")
    if max(index, truth, predicted) > _LARGEST:
        raise ValueError("idx, label and predict must be below 2 to the power of 63")
    if index < 0 or truth < UNLABELLED or predicted < ABSTAINED:
        raise ValueError("idx, label and predict must not be negative, but for -1 = unknown")
    if right and predicted not in (truth, ABSTAINED):
        raise ValueError(f"correct is {correct}, but class {predict} is not the label {label}")
    certified = claimed >= 0 and predicted != ABSTAINED and (right or predicted != truth)
    return _Row(
        index,
        truth,
        predicted if certified else ABSTAINED,
        claimed if certified else 0.0,
        _seconds(time),
    )


def _seconds(text: str) -> float:
    """Seconds from a plain number, from H:MM:SS.ffffff, or from "D days, H:MM:SS.ffffff"."""
    found = _TIME.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"the time {text!r} is neither seconds nor H:MM:SS")
    total = 0.0
    for field in found["clock"].split(":"):
        total = total * 60 + float(field)
    total += 86_400 * float(found["days"] or 0)
    if not math.isfinite(total):
        raise ValueError(f"the time {text!r} is not a finite number of seconds")
    return total
