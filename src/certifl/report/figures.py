"""Figures of stored results: the paper's certified-accuracy plots, radii per client, training.

Every function takes runs and returns a `Drawing`: the figure and the numbers it shows. `save`
writes both. Nothing here leaves a trace in matplotlib's global state; equal results give equal
files.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from certifl.report.history import measure_curves, measures_of
from certifl.report.looks import Look, looks_of
from certifl.report.results import RunResults, check_comparable
from certifl.report.scale import RadiusScale, family_words, scales, sigma_text
from certifl.report.summary import client_acr, client_curves, largest_radius, radius_grid
from certifl.smoothing.curves import mean_and_band
from certifl.store.atomic import write_bytes, write_text

__all__ = [
    "FORMATS",
    "Drawing",
    "average_radius_figure",
    "certified_accuracy_figure",
    "history_figure",
    "image_bytes",
    "per_client_figure",
    "save",
]

FORMATS = ("png", "pdf", "svg")
_DPI = 200
_MARKERS_PER_CURVE = 8
_COLUMNS = 5
_LONGEST_NAME, _LONGEST_TITLE = 32, 72
_INK, _FAINT = "#222222", "#DDDDDD"
# No dates and no program versions inside the files: the same results give the same bytes.
_METADATA: dict[str, dict[str, Any]] = {
    "png": {"Software": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    "svg": {"Date": None, "Creator": None},
}
_STYLE = {
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


def certified_accuracy_figure(runs: Sequence[RunResults], title: str | None = None) -> Drawing:
    """The paper's plot: certified accuracy against the radius, one curve per regime.

    The line is the mean over clients, the shaded band reaches from the smallest to the largest
    client. The numbers also hold every client's own curve.

    Args:
        runs: one per regime, of the same data and perturbation.
        title: above the axes; the perturbation and its sigma where None.

    Raises:
        StoreMismatch: runs that cannot stand in one figure.
    """
    check_comparable(runs)
    radii = radius_grid(runs)
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.add_subplot()
    rows: list[tuple[Any, ...]] = []
    for run, look in zip(runs, looks_of(runs), strict=True):
        curves = client_curves(run, radii)
        mean, low, high = mean_and_band(curves)
        _band(axes, look, radii, mean, low, high, run.label)
        rows += _curve_rows(run, radii, curves)
    _certified_axes(axes, runs, radii)
    _title(axes, title if title is not None else _default_title(runs[0]))
    _legend(axes, runs, loc="best", ncols=1 if len(runs) < 5 else 2)
    return Drawing(figure, ("regime", "client", "radius", "certified_accuracy"), tuple(rows))


def per_client_figure(runs: Sequence[RunResults], title: str | None = None) -> Drawing:
    """Certified accuracy of every client, a small panel each, one curve per regime.

    Args:
        runs: one per regime, of the same data and perturbation.
        title: above all panels; the perturbation and its sigma where None.

    Raises:
        StoreMismatch: runs that cannot stand in one figure.
    """
    check_comparable(runs)
    radii = radius_grid(runs)
    clients = sorted({int(c) for run in runs for c in run.clients})
    columns = min(_COLUMNS, len(clients))
    lines = -(-len(clients) // columns)
    figure = Figure(figsize=(1.9 * columns + 1.2, 1.7 * lines + 1.3), layout="constrained")
    # Not shared axes: matplotlib's time for those grows with the square of their number.
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    rows: list[tuple[Any, ...]] = []
    for run, look in zip(runs, looks_of(runs), strict=True):
        curves = client_curves(run, radii)
        for client, curve in zip(run.clients, curves, strict=True):
            _line(panels[clients.index(int(client))], look, radii, curve, run.label)
        rows += _curve_rows(run, radii, curves)
    for place, (client, axes) in enumerate(zip(clients, panels, strict=False)):
        lowest = place + columns >= len(clients)
        _panel(axes, f"client {client}", radii[-1], left=place % columns == 0, lowest=lowest)
        if lowest:
            unit = str(runs[0].conditions["unit"])
            axes.set_xlabel(f"radius in {unit}", fontsize=8, color=_INK, parse_math=False)
    for axes in panels[len(clients) :]:
        axes.set_visible(False)
    figure.supylabel("certified accuracy", fontsize=10, color=_INK)
    _heading(figure, runs, title)
    return Drawing(figure, ("regime", "client", "radius", "certified_accuracy"), tuple(rows))


def average_radius_figure(runs: Sequence[RunResults], title: str | None = None) -> Drawing:
    """Average certified radius (ACR) per regime: every client a dot, the mean over clients a bar.

    Args:
        runs: one per regime, of the same data and perturbation.
        title: above the axes; the perturbation and its sigma where None.

    Raises:
        StoreMismatch: runs that cannot stand in one figure.
    """
    check_comparable(runs)
    figure = Figure(figsize=(6.4, 1.3 + 0.55 * len(runs)), layout="constrained")
    axes = figure.add_subplot()
    rows: list[tuple[Any, ...]] = []
    for place, (run, look) in enumerate(zip(runs, looks_of(runs), strict=True)):
        radii = client_acr(run)
        mean = float(radii.mean())
        axes.barh(place, mean, height=0.62, color=look.colour, alpha=0.22, linewidth=0)
        axes.plot([mean, mean], [place - 0.31, place + 0.31], color=look.colour, lw=2.2)
        offsets = _spread_out(len(radii))
        style = {"ls": "", "marker": look.marker, "ms": 5, "mec": "white", "mew": 0.6}
        axes.plot(radii, place + offsets, color=look.colour, **style)
        rows += [(run.label, int(c), float(r)) for c, r in zip(run.clients, radii, strict=True)]
        rows.append((run.label, "mean", mean))
    _frame(axes)
    axes.grid(axis="y", visible=False)
    axes.set_yticks(range(len(runs)), [_short(run.label) for run in runs], parse_math=False)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    _radius_axis(axes, runs, "average certified radius")
    _title(axes, title if title is not None else _default_title(runs[0]))
    return Drawing(figure, ("regime", "client", "average_certified_radius"), tuple(rows))


def history_figure(runs: Sequence[RunResults], title: str | None = None) -> Drawing:
    """Training: each recorded measure against the round, mean over clients with its band.

    Args:
        runs: one per regime; runs without history are left out.
        title: above all panels; nothing where None.
    """
    names = measures_of(runs)
    width = max(1, len(names))
    figure = Figure(figsize=(4.2 * width, 3.4), layout="constrained")
    panels = figure.subplots(1, width, squeeze=False).ravel()
    rows: list[tuple[Any, ...]] = []
    for name, axes in zip(names, panels, strict=False):
        for run, look in zip(runs, looks_of(runs), strict=True):
            curve = measure_curves(run, name)
            if curve is None:
                continue
            _band(axes, look, curve.rounds, curve.mean, curve.low, curve.high, run.label)
            rows += [
                (run.label, name, int(r), m, lo, hi)
                for r, m, lo, hi in zip(*curve.columns(), strict=True)
            ]
        _frame(axes)
        axes.set_xlabel("round", color=_INK)
        axes.set_ylabel(name, color=_INK, parse_math=False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if not names:
        panels[0].set_axis_off()
        panels[0].text(0.5, 0.5, "no training history", ha="center", color=_INK)
    _heading(figure, runs if names else (), title)
    return Drawing(figure, ("regime", "measure", "round", "mean", "min", "max"), tuple(rows))


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


def _settle(figure: Figure) -> None:
    """Place the panels once; doing it again for every file takes most of the time."""
    if figure.get_layout_engine() is not None:
        figure.draw_without_rendering()
        figure.set_layout_engine("none")


def save(drawing: Drawing, folder: str | Path, stem: str) -> list[Path]:
    """Write `stem`.png, .pdf, .svg and the numbers as .csv.

    Returns:
        The files, in that order.

    Raises:
        StoreError: the folder cannot be written.
    """
    place = Path(folder)
    written = []
    for kind in FORMATS:
        path = place / f"{stem}.{kind}"
        write_bytes(path, image_bytes(drawing, kind))
        written.append(path)
    numbers = place / f"{stem}.csv"
    write_text(numbers, _csv(drawing))
    return [*written, numbers]


def _csv(drawing: Drawing) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(drawing.columns)
    writer.writerows(drawing.rows)
    return text.getvalue()


def _curve_rows(run: RunResults, radii: np.ndarray, curves: np.ndarray) -> list[tuple[Any, ...]]:
    named: list[tuple[Any, np.ndarray]] = [
        (int(client), curve) for client, curve in zip(run.clients, curves, strict=True)
    ]
    named += list(zip(("mean", "min", "max"), mean_and_band(curves), strict=True))
    return [
        (run.label, name, float(radius), float(value))
        for name, curve in named
        for radius, value in zip(radii, curve, strict=True)
    ]


def _band(
    axes: Axes,
    look: Look,
    x: np.ndarray,
    mean: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    label: str,
) -> None:
    axes.fill_between(x, low, high, color=look.colour, alpha=0.13, linewidth=0)
    for edge in (low, high):
        axes.plot(x, edge, color=look.colour, alpha=0.35, lw=0.6, dashes=look.dash or (None, None))
    _line(axes, look, x, mean, label)


def _line(axes: Axes, look: Look, x: np.ndarray, y: np.ndarray, label: str) -> None:
    """One curve; its markers start where those of no other look do, so that none is hidden."""
    every = max(1, len(x) // _MARKERS_PER_CURVE)
    axes.plot(
        x,
        y,
        color=look.colour,
        lw=1.7,
        dashes=look.dash or (None, None),
        marker=look.marker,
        markevery=(look.slot * every // 4 % every, every),
        ms=4.5,
        mec="white",
        mew=0.6,
        label=label,
    )


def _panel(axes: Axes, name: str, end: float, left: bool, lowest: bool) -> None:
    """One small panel; only those at the edges are labelled."""
    _frame(axes)
    axes.set_title(name, fontsize=9, color=_INK)
    axes.set(xlim=(0, end), ylim=(0, 1))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
    axes.xaxis.set_major_locator(MaxNLocator(3))
    axes.tick_params(labelleft=left, labelbottom=lowest)


def _certified_axes(axes: Axes, runs: Sequence[RunResults], radii: np.ndarray) -> None:
    _frame(axes)
    axes.set(xlim=(0, radii[-1]), ylim=(0, 1))
    axes.set_ylabel("certified accuracy", color=_INK)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
    _radius_axis(axes, runs, "radius")


def _radius_axis(axes: Axes, runs: Sequence[RunResults], what: str) -> None:
    """The radius in the family's unit below; rotation also in degrees above."""
    facts = runs[0].conditions
    units = scales(facts, largest_radius(runs))
    axes.set_xlabel(f"{what} in {facts['unit']} ({facts['norm']})", color=_INK, parse_math=False)
    if len(units) > 1:
        _second_axis(axes, units[0])


def _second_axis(axes: Axes, unit: RadiusScale) -> None:
    above = axes.secondary_xaxis(
        "top", functions=(lambda r: r * unit.factor, lambda r: r / unit.factor)
    )
    above.set_xlabel(unit.name, color=_INK, fontsize=9)
    above.tick_params(labelsize=8, colors=_INK, length=3)
    above.spines["top"].set_color(_FAINT)


def _frame(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#888888")
    axes.grid(color=_FAINT, lw=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, colors=_INK, length=3)


def _default_title(run: RunResults) -> str:
    return f"{family_words(run.conditions)}, σ = {sigma_text(run.conditions)}"


def _title(axes: Axes, title: str) -> None:
    axes.set_title(
        _short(title, _LONGEST_TITLE), fontsize=10.5, color=_INK, loc="left", parse_math=False
    )


def _heading(figure: Figure, runs: Sequence[RunResults], title: str | None) -> None:
    """A title and one legend for all panels."""
    text = title if title is not None else _default_title(runs[0]) if runs else ""
    if text:
        figure.suptitle(_short(text, _LONGEST_TITLE), fontsize=10.5, color=_INK, parse_math=False)
    if runs:
        _legend(figure, runs, loc="outside lower center", ncols=min(4, len(runs)))


def _legend(place: Axes | Figure, runs: Sequence[RunResults], loc: str, ncols: int) -> None:
    handles = [_handle(look) for look in looks_of(runs)]
    numbers = [str(number) for number in range(len(runs))]
    style: dict[str, Any] = {"frameon": False, "fontsize": 9, "handlelength": 3.6}
    legend = place.legend(handles, numbers, loc=loc, ncols=ncols, **style)
    # The names come last: as labels, those that begin with an underscore would be left out.
    for text, run in zip(legend.get_texts(), runs, strict=True):
        text.set(text=_short(run.label), parse_math=False, color=_INK)


def _handle(look: Look) -> Line2D:
    line = Line2D([], [], color=look.colour, marker=look.marker, lw=1.7, ms=4.5)
    line.set_dashes(look.dash or (None, None))
    line.set(markeredgecolor="white", markeredgewidth=0.6)
    return line


def _short(text: str, longest: int = _LONGEST_NAME) -> str:
    """A name that leaves room for the axes; the numbers beside the figure hold it in full."""
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _spread_out(count: int) -> np.ndarray:
    """Fixed small vertical offsets, so that equal dots stay visible; no random jitter."""
    return ((np.arange(count) * 0.618) % 1.0 - 0.5) * 0.4
