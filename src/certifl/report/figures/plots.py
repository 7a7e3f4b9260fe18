"""The figures of a study: the paper's certified-accuracy plots, radii per client, training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from certifl.errors import InputError
from certifl.report.figures.files import Drawing
from certifl.report.results import Row, all_clients, check_comparable
from certifl.report.style import FigureStyle, Look, looks_of, unbroken
from certifl.report.summary import (
    client_acr,
    client_curves,
    group_words,
    largest_radius,
    mean_acr,
    measure_curves,
    measures_of,
    radius_grid,
)
from certifl.report.units import RadiusScale, scales
from certifl.smoothing.curves import mean_and_band

_COLUMNS = 5


_USUAL = FigureStyle()


def certified_accuracy_figure(
    runs: Sequence[Row], title: str | None = None, style: FigureStyle = _USUAL
) -> Drawing:
    """The paper's plot: certified accuracy against the radius, one curve per algorithm.

    The line is the mean over clients, the shaded band reaches from the smallest to the largest
    client. The numbers also contain every client's curve.

    Args:
        runs: one per algorithm, of the same data and perturbation.
        title: above the axes; the perturbation and its sigma where None.
        style: size, unit and bands.

    Raises:
        StoreMismatch: runs that cannot be in one figure.
    """
    check_comparable(runs)
    radii = radius_grid(runs)
    figure = Figure(figsize=style.size or (6.4, 4.4), layout="constrained")
    axes, looks = figure.add_subplot(), looks_of(runs)
    rows = draw_curves(axes, runs, looks, radii, style)
    finished_axes(axes, runs, float(radii[-1]), style, _title(runs, title, style))
    columns = 1 if len(runs) < 5 or style.size else 2
    named_legend(axes, looks, [run.label for run in runs], "best", columns, style)
    return Drawing(figure, ("regime", "client", "radius", "certified_accuracy"), tuple(rows))


def draw_curves(
    axes: Axes,
    runs: Sequence[Row],
    looks: Sequence[Look],
    radii: np.ndarray,
    style: FigureStyle,
) -> list[tuple[Any, ...]]:
    """Draw a mean with its band for each run; the numbers are those of every client as well."""
    rows: list[tuple[Any, ...]] = []
    for run, look in zip(runs, looks, strict=True):
        curves = client_curves(run, radii)
        mean, low, high = mean_and_band(curves)
        if style.bands:
            band(axes, look, radii, mean, low, high, run.label, style)
        else:
            line(axes, look, radii, mean, run.label, style)
        rows += _curve_rows(run, radii, curves)
    return rows


def finished_axes(
    axes: Axes, runs: Sequence[Row], end: float, style: FigureStyle, title: str
) -> None:
    """Labels, limits and ticks of certified accuracy against the radius; a title if not empty."""
    certified_axes(axes, runs, end, style)
    if title:
        title_above(axes, title)


def _title(runs: Sequence[Row], title: str | None, style: FigureStyle) -> str:
    """The one that was asked for; otherwise the perturbation, unless a caption will give it."""
    if title is not None:
        return title
    return "" if style.size else group_words(runs[0])


def per_client_figure(
    runs: Sequence[Row], title: str | None = None, style: FigureStyle = _USUAL
) -> Drawing:
    """Certified accuracy of every client, a small panel each, one curve per algorithm.

    Args:
        runs: one per algorithm, of the same data and perturbation.
        title: above all panels; the perturbation and its sigma where None.
        style: the unit; the size follows from the number of clients.

    Raises:
        StoreMismatch: runs that cannot be in one figure.
    """
    check_comparable(runs)
    radii = radius_grid(runs)
    clients = all_clients(runs)
    columns = min(_COLUMNS, len(clients))
    lines, unit = -(-len(clients) // columns), shown_units(runs, style)[0]
    figure = Figure(figsize=(1.9 * columns + 1.2, 1.7 * lines + 1.3), layout="constrained")
    # Not shared axes: matplotlib's time for those grows with the square of their number.
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    rows: list[tuple[Any, ...]] = []
    for run, look in zip(runs, looks_of(runs), strict=True):
        curves = client_curves(run, radii)
        for client, curve in zip(run.clients, curves, strict=True):
            line(panels[clients.index(int(client))], look, radii, curve, run.label)
        rows += _curve_rows(run, radii, curves)
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
    runs: Sequence[Row], title: str | None = None, style: FigureStyle = _USUAL
) -> Drawing:
    """Average certified radius (ACR) per algorithm: clients as dots, their mean as a bar.

    Args:
        runs: one per algorithm, of the same data and perturbation.
        title: above the axes; the perturbation and its sigma where None.
        style: size and unit.

    Raises:
        StoreMismatch: runs that cannot be in one figure.
    """
    check_comparable(runs)
    figure = Figure(figsize=style.size or (6.4, 1.3 + 0.55 * len(runs)), layout="constrained")
    axes = figure.add_subplot()
    rows: list[tuple[Any, ...]] = []
    for y, (run, look) in enumerate(zip(runs, looks_of(runs), strict=True)):
        radii = client_acr(run)
        mean = mean_acr(run)
        axes.barh(y, mean, height=0.62, color=look.color, alpha=0.22, linewidth=0)
        axes.plot([mean, mean], [y - 0.31, y + 0.31], color=look.color, lw=2.2)
        offsets = spread_out(len(radii))
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
    if text := _title(runs, title, style):
        title_above(axes, text)
    return Drawing(figure, ("regime", "client", "average_certified_radius"), tuple(rows))


def history_figure(
    runs: Sequence[Row], title: str | None = None, style: FigureStyle = _USUAL
) -> Drawing:
    """Training: each recorded measure against the round, mean over clients with its band.

    Args:
        runs: one per algorithm; runs without history are left out.
        title: above all panels; nothing where None.
        style: whether bands are drawn.
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
            if style.bands:
                band(axes, look, curve.rounds, curve.mean, curve.low, curve.high, run.label)
            else:
                line(axes, look, curve.rounds, curve.mean, run.label)
            rows += [
                (run.label, name, int(r), m, lo, hi)
                for r, m, lo, hi in zip(*curve.columns(), strict=True)
            ]
        frame(axes)
        axes.set_xlabel("round", color=INK)
        axes.set_ylabel(name, color=INK, parse_math=False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if not names:
        panels[0].set_axis_off()
        panels[0].text(0.5, 0.5, "no training history", ha="center", color=INK)
    heading(figure, runs if names else (), title)
    return Drawing(figure, ("regime", "measure", "round", "mean", "min", "max"), tuple(rows))


def _curve_rows(run: Row, radii: np.ndarray, curves: np.ndarray) -> list[tuple[Any, ...]]:
    named: list[tuple[Any, np.ndarray]] = [
        (int(client), curve) for client, curve in zip(run.clients, curves, strict=True)
    ]
    named += list(zip(("mean", "min", "max"), mean_and_band(curves), strict=True))
    return [
        (run.label, name, float(radius), float(value))
        for name, curve in named
        for radius, value in zip(radii, curve, strict=True)
    ]


# Parts of figures: a curve with its band, the radius axis, titles and legends.


_MARKERS_PER_CURVE = 8
_LONGEST_NAME, _LONGEST_TITLE = 32, 72
INK, _FAINT = "#222222", "#DDDDDD"


def band(
    axes: Axes,
    look: Look,
    x: np.ndarray,
    mean: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    label: str,
    style: FigureStyle = _USUAL,
) -> None:
    """A mean with its band from low to high; thin edges keep bands apart in print."""
    axes.fill_between(x, low, high, color=look.color, alpha=0.13, linewidth=0)
    for edge in (low, high):
        axes.plot(x, edge, color=look.color, alpha=0.35, lw=0.6, dashes=look.dash or (None, None))
    line(axes, look, x, mean, label, style)


def line(
    axes: Axes,
    look: Look,
    x: np.ndarray,
    y: np.ndarray,
    label: str,
    style: FigureStyle = _USUAL,
) -> None:
    """One curve; markers of different looks start at different points, so that none is hidden."""
    every = max(1, len(x) // _MARKERS_PER_CURVE)
    axes.plot(
        x,
        y,
        color=look.color,
        lw=1.2 if style.size else 1.7,
        dashes=look.dash or (None, None),
        marker=look.marker,
        markevery=(look.slot * every // 4 % every, every),
        ms=3.2 if style.size else 4.5,
        mec="white",
        mew=0.6,
        label=label,
    )


def certified_axes(
    axes: Axes, runs: Sequence[Row], end: float, style: FigureStyle = _USUAL
) -> None:
    """Axes of certified accuracy against the radius, up to the radius `end`."""
    frame(axes, style)
    axes.set(xlim=(0, end), ylim=(0, 1))
    axes.set_ylabel("certified accuracy", color=INK, fontsize=_text_size(style))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol="\N{NO-BREAK SPACE}%"))
    radius_axis(axes, runs, "radius", style)


def panel(axes: Axes, name: str, end: float, left: bool, lowest: bool) -> None:
    """One small panel; only those at the edges are labelled."""
    frame(axes)
    axes.set_title(name, fontsize=9, color=INK)
    axes.set(xlim=(0, end), ylim=(0, 1))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol="\N{NO-BREAK SPACE}%"))
    axes.xaxis.set_major_locator(MaxNLocator(3))
    axes.tick_params(labelleft=left, labelbottom=lowest)


def radius_axis(axes: Axes, runs: Sequence[Row], what: str, style: FigureStyle = _USUAL) -> None:
    """The radius in the unit that is read first below; angles also in radians above."""
    norm = runs[0].conditions["norm"]
    first, *others = shown_units(runs, style)
    words = f"{what} in {first.name} ({norm})"
    axes.set_xlabel(words, color=INK, fontsize=_text_size(style), parse_math=False)
    ticks_in(axes, first, 5 if style.size else 8)
    for other in others if not axes.child_axes else ():
        above = axes.secondary_xaxis("top")
        above.set_xlabel(other.name, color=INK, fontsize=9)
        above.tick_params(labelsize=8, colors=INK, length=3)
        above.spines["top"].set_color(_FAINT)


def shown_units(runs: Sequence[Row], style: FigureStyle) -> tuple[RadiusScale, ...]:
    """The units of the radius axis: the one that was chosen, or all, the first read first.

    Raises:
        InputError: these radii have no such unit.
    """
    units = scales(runs[0].conditions, largest_radius(runs))
    if style.unit is None:
        return units[:1] if style.size else units
    chosen = tuple(unit for unit in units if unit.name == style.unit)
    if not chosen:
        known = " or ".join(unit.name for unit in units)
        raise InputError(f"These radii are in {known}; got {style.unit!r}.")
    return chosen


def _text_size(style: FigureStyle) -> float:
    """Points of the labels of axes."""
    return 8 if style.size else 10


def ticks_in(axes: Axes, unit: RadiusScale, most: int) -> None:
    """Ticks at round numbers of a unit, on an axis of stored radii that begins at 0."""
    if unit.factor == 1.0:
        return
    end = axes.get_xlim()[1] * unit.factor
    marks = [
        t for t in MaxNLocator(most, steps=[1, 2, 2.5, 5, 10]).tick_values(0, end) if t <= end
    ]
    axes.set_xticks([mark / unit.factor for mark in marks], [f"{mark:g}" for mark in marks])


def frame(axes: Axes, style: FigureStyle = _USUAL) -> None:
    """Two spines, a faint grid, small ticks."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#888888")
    axes.grid(color=_FAINT, lw=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=7 if style.size else 8, colors=INK, length=3)


def title_above(axes: Axes, title: str) -> None:
    """A title, cut where it would be wider than the axes."""
    axes.set_title(
        short_name(title, _LONGEST_TITLE), fontsize=10.5, color=INK, loc="left", parse_math=False
    )


def heading(figure: Figure, runs: Sequence[Row], title: str | None) -> None:
    """A title and one legend for all panels."""
    text = title if title is not None else group_words(runs[0]) if runs else ""
    if text:
        figure.suptitle(
            short_name(text, _LONGEST_TITLE), fontsize=10.5, color=INK, parse_math=False
        )
    if runs:
        legend(figure, runs, loc="outside lower center", ncols=min(4, len(runs)))


def legend(target: Axes | Figure, runs: Sequence[Row], loc: Any, ncols: int) -> None:
    """One entry per run with its name; `loc` as in matplotlib."""
    named_legend(target, looks_of(runs), [run.label for run in runs], loc, ncols)


def named_legend(
    target: Axes | Figure,
    looks: Sequence[Look],
    names: Sequence[str],
    loc: Any,
    ncols: int,
    style: FigureStyle = _USUAL,
) -> None:
    """One entry per look; `loc` as in matplotlib."""
    handles = [_handle(look, style) for look in looks]
    numbers = [str(number) for number in range(len(looks))]
    form: dict[str, Any] = {"frameon": False, "fontsize": 7 if style.size else 9}
    form |= {"handlelength": 3.6, "labelspacing": 0.3 if style.size else 0.5}
    legend = target.legend(handles, numbers, loc=loc, ncols=ncols, **form)
    # The names come last: as labels, those that begin with an underscore would be left out.
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set(text=short_name(name), parse_math=False, color=INK)


def _handle(look: Look, style: FigureStyle) -> Line2D:
    lw, ms = (1.2, 3.2) if style.size else (1.7, 4.5)
    line = Line2D([], [], color=look.color, marker=look.marker, lw=lw, ms=ms)
    line.set_dashes(look.dash or (None, None))
    line.set(markeredgecolor="white", markeredgewidth=0.6)
    return line


def short_name(text: str, longest: int = _LONGEST_NAME) -> str:
    """A name that leaves room for the axes; the numbers beside the figure have it in full."""
    return unbroken(text if len(text) <= longest else text[: longest - 1] + "…")


def spread_out(count: int) -> np.ndarray:
    """Fixed small vertical offsets, so that equal dots stay visible; no random jitter."""
    return ((np.arange(count) * 0.618) % 1.0 - 0.5) * 0.4
