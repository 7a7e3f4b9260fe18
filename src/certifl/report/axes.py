"""Parts of figures: a curve with its band, the radius axis, titles and legends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from certifl.errors import InputError
from certifl.perturbations import trait
from certifl.report.results import Row
from certifl.report.style import USUAL, FigureStyle, Look, looks_of, unbroken
from certifl.report.summary import group_words, largest_radius
from certifl.report.units import RadiusScale, scales

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
    style: FigureStyle = USUAL,
) -> None:
    """A mean, with its band from low to high if the style has bands; thin edges for print."""
    if style.bands:
        axes.fill_between(x, low, high, color=look.color, alpha=0.13, linewidth=0)
        edges: dict[str, Any] = {"color": look.color, "alpha": 0.35, "lw": 0.6}
        for edge in (low, high):
            axes.plot(x, edge, dashes=look.dash or (None, None), **edges)
    line(axes, look, x, mean, label, style)


def line(
    axes: Axes,
    look: Look,
    x: np.ndarray,
    y: np.ndarray,
    label: str,
    style: FigureStyle = USUAL,
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
    axes: Axes, runs: Sequence[Row], end: float, style: FigureStyle, title: str
) -> None:
    """Axes of certified accuracy against the radius, up to the radius `end`; a title if any."""
    frame(axes, style)
    axes.set(xlim=(0, end), ylim=(0, 1))
    axes.set_ylabel("certified accuracy", color=INK, fontsize=_text_size(style))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol="\N{NO-BREAK SPACE}%"))
    radius_axis(axes, runs, "radius", style)
    title_above(axes, title)


def panel(axes: Axes, name: str, end: float, left: bool, lowest: bool) -> None:
    """One small panel; only those at the edges are labeled."""
    frame(axes)
    axes.set_title(name, fontsize=9, color=INK)
    axes.set(xlim=(0, end), ylim=(0, 1))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol="\N{NO-BREAK SPACE}%"))
    axes.xaxis.set_major_locator(MaxNLocator(3))
    axes.tick_params(labelleft=left, labelbottom=lowest)


def radius_axis(axes: Axes, runs: Sequence[Row], what: str, style: FigureStyle = USUAL) -> None:
    """The radius in the unit that is read first below; angles also in radians above."""
    metadata = runs[0].conditions
    first, *others = shown_units(runs, style)
    words = f"{what}{trait(metadata['family'], 'radius_note', '')} in {first.name}"
    words += f" ({metadata['norm']})"
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


def frame(axes: Axes, style: FigureStyle = USUAL) -> None:
    """Two spines, a faint grid, small ticks."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#888888")
    axes.grid(color=_FAINT, lw=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=7 if style.size else 8, colors=INK, length=3)


def title_above(axes: Axes, title: str) -> None:
    """A title if it is not empty, cut where it would be wider than the axes."""
    if title:
        text = short_name(title, _LONGEST_TITLE)
        axes.set_title(text, fontsize=10.5, color=INK, loc="left", parse_math=False)


def heading(figure: Figure, runs: Sequence[Row], title: str | None) -> None:
    """A title and one legend for all panels."""
    text = title if title is not None else group_words(runs[0]) if runs else ""
    if text:
        shown = short_name(text, _LONGEST_TITLE)
        figure.suptitle(shown, fontsize=10.5, color=INK, parse_math=False)
    if runs:
        labels, columns = [run.label for run in runs], min(4, len(runs))
        named_legend(figure, looks_of(runs), labels, "outside lower center", columns)


def named_legend(
    target: Axes | Figure,
    looks: Sequence[Look],
    names: Sequence[str],
    loc: Any,
    ncols: int,
    style: FigureStyle = USUAL,
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
