"""A figure with its numbers, and both as files: equal results give equal files."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from certifl.report.style import FORMATS
from certifl.runs.atomic import write_bytes, write_text

_DPI = 200
# No dates and no program versions inside the files: the same results give the same bytes.
_METADATA: dict[str, dict[str, Any]] = {
    "png": {"Software": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    "svg": {"Date": None, "Creator": None},
}
_STYLE: Any = {
    "svg.hashsalt": "certifl",
    "svg.fonttype": "path",
    "pdf.fonttype": 42,
    "font.family": ["DejaVu Sans"],
    "axes.unicode_minus": False,
    "path.simplify": False,
}


@dataclass(frozen=True, eq=False)
class Drawing:
    """A figure and the numbers in it.

    Attributes:
        figure: ready to be saved.
        columns: names of the numbers' columns.
        rows: the numbers, in the units of the columns.
    """

    figure: Figure
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


def image_bytes(drawing: Drawing, kind: str) -> bytes:
    """The figure as the bytes of a file, the same for the same results.

    Args:
        drawing: what to write.
        kind: "png" (200 dots per inch), "pdf" or "svg".
    """
    buffer = io.BytesIO()
    with mpl.rc_context(_STYLE):
        _settle(drawing.figure)
        drawing.figure.savefig(buffer, format=kind, dpi=_DPI, metadata=_METADATA[kind])
    return buffer.getvalue()


def save(
    drawing: Drawing, folder: str | Path, stem: str, formats: Sequence[str] = FORMATS
) -> list[Path]:
    """Write `stem` as .png, .pdf, .svg or some of these, and the numbers as .csv.

    Returns:
        The files, in that order.

    Raises:
        StoreError: the folder cannot be written.
    """
    *images, numbers = (Path(folder) / f"{stem}.{kind}" for kind in (*formats, "csv"))
    for path, kind in zip(images, formats, strict=True):
        write_bytes(path, image_bytes(drawing, kind))
    write_text(numbers, _csv(drawing))
    return [*images, numbers]


def _settle(figure: Figure) -> None:
    """Lay out the panels once; repeating it for every file would take most of the time."""
    if figure.get_layout_engine() is not None:
        figure.draw_without_rendering()
        figure.set_layout_engine("none")


def _csv(drawing: Drawing) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(drawing.columns)
    writer.writerows(drawing.rows)
    return text.getvalue()
