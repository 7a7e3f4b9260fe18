"""Figures of stored results, and both figure and numbers as files; equal results, equal files.

Every figure is a function of runs and returns a `Drawing`: the figure and the numbers it shows.
matplotlib's global state is left alone.
"""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from certifl.errors import InputError
from certifl.perturbations import trait
from certifl.report import summary
from certifl.report.results import (
    UNSEEN,
    Row,
    RunResults,
    all_clients,
    by_perturbation,
    by_seed,
    check_comparable,
    require_one_perturbation,
)
from certifl.report.style import (
    FAINT,
    FORMATS,
    INK,
    USUAL,
    FigureStyle,
    Look,
    arranged,
    band,
    frame,
    line,
    look_number,
    looks_of,
    named_legend,
    panel,
    short_name,
)
from certifl.report.wording import RadiusScale, scales
from certifl.runs.atomic import write_bytes, write_text
from certifl.smoothing.curves import mean_and_band

_COLUMNS, _LONGEST_TITLE = 5, 72
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
    """A figure and the numbers in it: names of their columns, and rows."""

    figure: Figure
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


def image_bytes(drawing: Drawing, kind: str) -> bytes:
    """The bytes of a "png" (200 dots per inch), "pdf" or "svg", the same for the same results."""
    buffer, figure = io.BytesIO(), drawing.figure
    with mpl.rc_context(_STYLE):
        # Lay out the panels once; repeating it for every file would take most of the time.
        if figure.get_layout_engine() is not None:
            figure.draw_without_rendering()
            figure.set_layout_engine("none")
        figure.savefig(buffer, format=kind, dpi=_DPI, metadata=_METADATA[kind])
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
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([drawing.columns, *drawing.rows])
    write_text(numbers, text.getvalue())
    return [*images, numbers]


# The figures of a study.


def certified_accuracy_figure(
    runs: Sequence[Row], title: str | None = None, style: FigureStyle = USUAL
) -> Drawing:
    """The paper's plot: certified accuracy against the radius, one curve per algorithm.

    The line is the mean over clients, the shaded band reaches from the smallest to the largest
    client. The numbers also contain every client's curve.

    Args:
        runs: one per algorithm, of the same data and perturbation.
        title: above the axes; the perturbation and its sigma where None, in print nothing.
        style: size, unit and bands.

    Raises:
        StoreMismatch: runs that cannot be in one figure.
    """
    check_comparable(runs)
    radii = summary.radius_grid(runs)
    figure = Figure(figsize=style.size or (6.4, 4.4), layout="constrained")
    axes, looks = figure.add_subplot(), looks_of(runs)
    rows = draw_curves(axes, runs, looks, radii, style)
    certified_axes(axes, runs, float(radii[-1]), style, _title(runs, title, style))
    columns = 1 if len(runs) < 5 or style.size else 2
    named_legend(axes, looks, [run.label for run in runs], "best", columns, style)
    return Drawing(figure, ("regime", "client", "radius", "certified_accuracy"), tuple(rows))


def draw_curves(
    axes: Axes, runs: Sequence[Row], looks: Sequence[Look], radii: np.ndarray, style: FigureStyle
) -> list[tuple[Any, ...]]:
    """Draw a mean with its band for each run; the numbers are those of every client as well."""
    rows: list[tuple[Any, ...]] = []
    for run, look in zip(runs, looks, strict=True):
        curves = summary.client_curves(run, radii)
        band(axes, look, radii, *mean_and_band(curves), run.label, style)
        rows += curve_rows(run, radii, curves)
    return rows


def _title(runs: Sequence[Row], title: str | None, style: FigureStyle) -> str:
    """The one that was asked for; otherwise the perturbation, unless a caption will give it."""
    if title is not None:
        return title
    return "" if style.size else summary.group_words(*runs)


def per_client_figure(
    runs: Sequence[Row], title: str | None = None, style: FigureStyle = USUAL
) -> Drawing:
    """Certified accuracy of every client, a small panel each, one curve per algorithm.

    As `certified_accuracy_figure`; the size follows from the number of clients.
    """
    check_comparable(runs)
    radii = summary.radius_grid(runs)
    clients = all_clients(runs)
    columns = min(_COLUMNS, len(clients))
    lines, unit = -(-len(clients) // columns), shown_units(runs, style)[0]
    figure = Figure(figsize=(1.9 * columns + 1.2, 1.7 * lines + 1.3), layout="constrained")
    # Not shared axes: matplotlib's time for those grows with the square of their number.
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    rows: list[tuple[Any, ...]] = []
    for run, look in zip(runs, looks_of(runs), strict=True):
        curves = summary.client_curves(run, radii)
        for client, curve in zip(run.clients, curves, strict=True):
            line(panels[clients.index(int(client))], look, radii, curve, run.label)
        rows += curve_rows(run, radii, curves)
    for at, (client, axes) in enumerate(zip(clients, panels, strict=False)):
        lowest = at + columns >= len(clients)
        panel(axes, f"client {client}", radii[-1], left=at % columns == 0, lowest=lowest)
        ticks_in(axes, unit, 3)
        if lowest:
            axes.set_xlabel(f"radius in {unit.name}", fontsize=8, color=INK, parse_math=False)
    for axes in panels[len(clients) :]:
        axes.set_visible(False)
    figure.supylabel("certified accuracy", fontsize=10, color=INK)
    heading(figure, runs, title)
    return Drawing(figure, ("regime", "client", "radius", "certified_accuracy"), tuple(rows))


def average_radius_figure(
    runs: Sequence[Row], title: str | None = None, style: FigureStyle = USUAL
) -> Drawing:
    """Average certified radius (ACR) per algorithm: clients as dots, their mean as a bar.

    As `certified_accuracy_figure`; numbers are those of every client and the mean.
    """
    check_comparable(runs)
    figure = Figure(figsize=style.size or (6.4, 1.3 + 0.55 * len(runs)), layout="constrained")
    axes = figure.add_subplot()
    rows: list[tuple[Any, ...]] = []
    for y, (run, look) in enumerate(zip(runs, looks_of(runs), strict=True)):
        radii, mean = summary.client_acr(run), summary.mean_acr(run)
        axes.barh(y, mean, height=0.62, color=look.color, alpha=0.22, linewidth=0)
        axes.plot([mean, mean], [y - 0.31, y + 0.31], color=look.color, lw=2.2)
        # Fixed small vertical offsets, so that equal dots stay visible; no random jitter.
        offsets = ((np.arange(len(radii)) * 0.618) % 1.0 - 0.5) * 0.4
        dots = {"ls": "", "marker": look.marker, "ms": 5, "mec": "white", "mew": 0.6}
        axes.plot(radii, y + offsets, color=look.color, **dots)
        rows += [(run.label, int(c), float(r)) for c, r in zip(run.clients, radii, strict=True)]
        rows.append((run.label, "mean", mean))
    frame(axes, style)
    axes.grid(axis="y", visible=False)
    axes.set_yticks(range(len(runs)), [short_name(run.label) for run in runs], parse_math=False)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    radius_axis(axes, runs, "average certified radius", style)
    title_above(axes, _title(runs, title, style))
    return Drawing(figure, ("regime", "client", "average_certified_radius"), tuple(rows))


def history_figure(
    runs: Sequence[Row], title: str | None = None, style: FigureStyle = USUAL
) -> Drawing:
    """Training: each recorded measure against the round, mean over clients with its band.

    As `certified_accuracy_figure`; runs without history are left out, and no title is the default.
    """
    names, plain = summary.measures_of(runs), FigureStyle(bands=style.bands)
    width = max(1, len(names))
    figure = Figure(figsize=(4.2 * width, 3.4), layout="constrained")
    panels = figure.subplots(1, width, squeeze=False).ravel()
    rows: list[tuple[Any, ...]] = []
    for name, axes in zip(names, panels, strict=False):
        for run, look in zip(runs, looks_of(runs), strict=True):
            curve = summary.measure_curves(run, name)
            if curve is None:
                continue
            band(axes, look, *curve, run.label, plain)
            columns = (values.tolist() for values in curve)
            rows += [(run.label, name, int(r), *band) for r, *band in zip(*columns, strict=True)]
        frame(axes)
        axes.set_xlabel("round", color=INK)
        axes.set_ylabel(name, color=INK, parse_math=False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if not names:
        panels[0].set_axis_off()
        panels[0].text(0.5, 0.5, "no training history", ha="center", color=INK)
    heading(figure, runs if names else (), title)
    return Drawing(figure, ("regime", "measure", "round", "mean", "min", "max"), tuple(rows))


def curve_rows(run: Row, radii: np.ndarray, curves: np.ndarray) -> list[tuple[Any, ...]]:
    """(label, client, radius, value): every client's curve, then their mean, min and max."""
    named: list[tuple[Any, np.ndarray]] = [
        (int(client), curve) for client, curve in zip(run.clients, curves, strict=True)
    ]
    named += list(zip(("mean", "min", "max"), mean_and_band(curves), strict=True))
    return [
        (run.label, name, float(radius), float(value))
        for name, curve in named
        for radius, value in zip(radii, curve, strict=True)
    ]


def write_figures(
    runs: Sequence[RunResults], folder: str | Path, style: FigureStyle = USUAL
) -> list[Path]:
    """Write all figures of some runs as PNG, PDF, SVG and CSV, or in the formats of `style`.

    Where clients certify different perturbations, each has its own folder inside.

    Returns:
        The files: curves, clients, average_radius, and history where training was recorded.

    Raises:
        StoreMismatch: runs that cannot be compared. StoreError: the folder cannot be written.
    """
    groups = by_perturbation(runs)
    if len(groups) > 1:
        inside = zip(groups, _folder_names(groups), strict=True)
        written = [write_figures(part, Path(folder) / name, style) for part, name in inside]
        return [path for paths in written for path in paths]
    rows = by_seed(runs)
    drawings: dict[str, Drawing] = {
        "curves": certified_accuracy_figure(rows, style=style),
        "clients": per_client_figure(rows, style=style),
        "average_radius": average_radius_figure(rows, style=style),
    }
    if any(run.history for run in runs):
        drawings["history"] = history_figure(rows, style=style)
    return [
        path
        for stem, drawn in drawings.items()
        for path in save(drawn, folder, stem, style.formats)
    ]


def _folder_names(groups: Sequence[Sequence[Row]]) -> list[str]:
    """A short name for each group: its family, numbered where several share it."""
    families = [
        f"{runs[0].conditions['family']}{'-unseen' if runs[0].runs[0].group == UNSEEN else ''}"
        for runs in groups
    ]
    return [
        family if families.count(family) == 1 else f"{family}-{families[:at].count(family) + 1}"
        for at, family in enumerate(families)
    ]


# Curves on axes of a notebook or script: what `plot` of results and certificates draws.

_DRAWN = "certifl_curves"


def plot(
    results: Sequence[RunResults],
    ax: Axes | None = None,
    labels: Mapping[str, str] | None = None,
    order: Sequence[str] | None = None,
    colors: Mapping[str, str] | None = None,
    unit: str | None = None,
    bands: bool = True,
    size: tuple[float, float] | None = None,
) -> Axes:
    """Draw certified accuracy against the radius, a curve for each of several results.

    The line is the mean over clients, the band reaches from the smallest to the largest client.
    Results that differ in their seed alone are one curve.

    Args:
        results: of the same data and perturbation.
        ax: matplotlib axes to draw on, also some with curves of an earlier call; None = those of
            a new figure.
        labels: new label by label, algorithm or folder name: `{"fedavg": "Global model"}`.
        order: which come first, named like that or by their new labels.
        colors: by the same names, as matplotlib names colors.
        unit: "degrees" or "radians" for angles; None = degrees, with radians above.
        bands: shade the area from the smallest to the largest client.
        size: width and height in inches of a new figure, for print: no title, small text.

    Returns:
        The axes. Radii on them are in the stored unit, whatever their ticks show.

    Raises:
        InputError: no results, a name that no result has, a unit, a color, or clients that
            certify different perturbations. StoreMismatch: results that cannot be compared.
    """
    check_comparable(results)
    for one in results:
        require_one_perturbation(one)
    style = FigureStyle(size, unit, bands)
    rows = by_seed(arranged(results, labels, order, colors))
    if ax is None:
        import matplotlib.pyplot as plt  # it chooses a backend, which nothing else here needs

        # Of a figure that a notebook shows below its cell.
        axes = plt.subplots(figsize=style.size or (6.4, 4.4), layout="constrained")[1]
    else:
        axes = ax
    before: list[tuple[Look, str]] = list(getattr(axes, _DRAWN, []))
    looks = looks_of(rows)
    if before:  # looks beside those of earlier calls, in the colors that were chosen
        free = [look_number(len(before) + at) for at in range(len(rows))]
        looks = [
            dataclasses.replace(look, color=row.runs[0].color or look.color)
            for row, look in zip(rows, free, strict=True)
        ]
    radii = summary.radius_grid(rows)
    end = max(radii[-1], axes.get_xlim()[1] if before else 0.0)
    draw_curves(axes, rows, looks, radii, style)
    drawn = [*before, *((look, row.label) for row, look in zip(rows, looks, strict=True))]
    setattr(axes, _DRAWN, drawn)
    title = "" if style.size else summary.noise_words(*rows)
    certified_axes(axes, rows, end, style, title if ax is None else "")
    named_legend(axes, [look for look, _ in drawn], [name for _, name in drawn], "best", 1, style)
    return axes


# Axes, titles and legends of these figures.


def certified_axes(
    axes: Axes, runs: Sequence[Row], end: float, style: FigureStyle, title: str
) -> None:
    """Axes of certified accuracy against the radius, up to the radius `end`; a title if any."""
    frame(axes, style)
    axes.set(xlim=(0, end), ylim=(0, 1))
    axes.set_ylabel("certified accuracy", color=INK, fontsize=8 if style.size else 10)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol="\N{NO-BREAK SPACE}%"))
    radius_axis(axes, runs, "radius", style)
    title_above(axes, title)


def radius_axis(axes: Axes, runs: Sequence[Row], what: str, style: FigureStyle = USUAL) -> None:
    """The radius in the unit that is read first below; angles also in radians above."""
    metadata = runs[0].conditions
    first, *others = shown_units(runs, style)
    words = f"{what}{trait(metadata['family'], 'radius_note', '')} in {first.name}"
    words += f" ({metadata['norm']})"
    axes.set_xlabel(words, color=INK, fontsize=8 if style.size else 10, parse_math=False)
    ticks_in(axes, first, 5 if style.size else 8)
    for other in others if not axes.child_axes else ():
        above = axes.secondary_xaxis("top")
        above.set_xlabel(other.name, color=INK, fontsize=9)
        above.tick_params(labelsize=8, colors=INK, length=3)
        above.spines["top"].set_color(FAINT)


def shown_units(runs: Sequence[Row], style: FigureStyle) -> tuple[RadiusScale, ...]:
    """The units of the radius axis: the one that was chosen, or all, the first read first.

    Raises:
        InputError: these radii have no such unit.
    """
    units = scales(runs[0].conditions, summary.largest_radius(runs))
    if style.unit is None:
        return units[:1] if style.size else units
    chosen = tuple(unit for unit in units if unit.name == style.unit)
    if not chosen:
        known = " or ".join(unit.name for unit in units)
        raise InputError(f"These radii are in {known}; got {style.unit!r}.")
    return chosen


def ticks_in(axes: Axes, unit: RadiusScale, most: int) -> None:
    """Ticks at round numbers of a unit, on an axis of stored radii that begins at 0."""
    if unit.factor == 1.0:
        return
    end = axes.get_xlim()[1] * unit.factor
    marks = [
        t for t in MaxNLocator(most, steps=[1, 2, 2.5, 5, 10]).tick_values(0, end) if t <= end
    ]
    axes.set_xticks([mark / unit.factor for mark in marks], [f"{mark:g}" for mark in marks])


def title_above(axes: Axes, title: str) -> None:
    """A title if it is not empty, cut where it would be wider than the axes."""
    if title:
        text = short_name(title, _LONGEST_TITLE)
        axes.set_title(text, fontsize=10.5, color=INK, loc="left", parse_math=False)


def heading(figure: Figure, runs: Sequence[Row], title: str | None) -> None:
    """A title and one legend for all panels."""
    text = title if title is not None else summary.group_words(*runs) if runs else ""
    if text:
        shown = short_name(text, _LONGEST_TITLE)
        figure.suptitle(shown, fontsize=10.5, color=INK, parse_math=False)
    if runs:
        labels, columns = [run.label for run in runs], min(4, len(runs))
        named_legend(figure, looks_of(runs), labels, "outside lower center", columns)
