"""Parts of figures: a curve with its band, the radius axis, titles and legends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from certifl.report.characters import unbroken
from certifl.report.looks import Look, looks_of
from certifl.report.results import Row
from certifl.report.scale import RadiusScale, family_words, scales, sigma_text
from certifl.report.summary import largest_radius

__all__ = [
    "INK",
    "band",
    "certified_axes",
    "default_title",
    "first_unit",
    "frame",
    "heading",
    "legend",
    "line",
    "named_legend",
    "panel",
    "radius_axis",
    "short_name",
    "spread_out",
    "ticks_in",
    "title_above",
]

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
) -> None:
    """A mean with its band from low to high; thin edges keep bands apart in print."""
    axes.fill_between(x, low, high, color=look.colour, alpha=0.13, linewidth=0)
    for edge in (low, high):
        axes.plot(x, edge, color=look.colour, alpha=0.35, lw=0.6, dashes=look.dash or (None, None))
    line(axes, look, x, mean, label)


def line(axes: Axes, look: Look, x: np.ndarray, y: np.ndarray, label: str) -> None:
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


def certified_axes(axes: Axes, runs: Sequence[Row], radii: np.ndarray) -> None:
    """Axes of certified accuracy against the radius."""
    frame(axes)
    axes.set(xlim=(0, radii[-1]), ylim=(0, 1))
    axes.set_ylabel("certified accuracy", color=INK)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol="\N{NO-BREAK SPACE}%"))
    radius_axis(axes, runs, "radius")


def panel(axes: Axes, name: str, end: float, left: bool, lowest: bool) -> None:
    """One small panel; only those at the edges are labelled."""
    frame(axes)
    axes.set_title(name, fontsize=9, color=INK)
    axes.set(xlim=(0, end), ylim=(0, 1))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol="\N{NO-BREAK SPACE}%"))
    axes.xaxis.set_major_locator(MaxNLocator(3))
    axes.tick_params(labelleft=left, labelbottom=lowest)


def first_unit(runs: Sequence[Row]) -> RadiusScale:
    """The unit that is read first, as on the page: degrees for angles."""
    return scales(runs[0].conditions, largest_radius(runs))[0]


def radius_axis(axes: Axes, runs: Sequence[Row], what: str) -> None:
    """The radius in the unit that is read first below; angles also in radians above."""
    facts = runs[0].conditions
    first, *others = scales(facts, largest_radius(runs))
    axes.set_xlabel(f"{what} in {first.name} ({facts['norm']})", color=INK, parse_math=False)
    ticks_in(axes, first, 8)
    for other in others:
        above = axes.secondary_xaxis("top")
        above.set_xlabel(other.name, color=INK, fontsize=9)
        above.tick_params(labelsize=8, colors=INK, length=3)
        above.spines["top"].set_color(_FAINT)


def ticks_in(axes: Axes, unit: RadiusScale, most: int) -> None:
    """Ticks at round numbers of a unit, on an axis of stored radii that begins at 0."""
    if unit.factor == 1.0:
        return
    end = axes.get_xlim()[1] * unit.factor
    marks = [
        t for t in MaxNLocator(most, steps=[1, 2, 2.5, 5, 10]).tick_values(0, end) if t <= end
    ]
    axes.set_xticks([mark / unit.factor for mark in marks], [f"{mark:g}" for mark in marks])


def frame(axes: Axes) -> None:
    """Two spines, a faint grid, small ticks."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#888888")
    axes.grid(color=_FAINT, lw=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, colors=INK, length=3)


def default_title(run: Row) -> str:
    """The perturbation and its sigma."""
    return f"{family_words(run.conditions)}, σ = {sigma_text(run.conditions)}"


def title_above(axes: Axes, title: str) -> None:
    """A title, cut where it would be wider than the axes."""
    axes.set_title(
        short_name(title, _LONGEST_TITLE), fontsize=10.5, color=INK, loc="left", parse_math=False
    )


def heading(figure: Figure, runs: Sequence[Row], title: str | None) -> None:
    """A title and one legend for all panels."""
    text = title if title is not None else default_title(runs[0]) if runs else ""
    if text:
        figure.suptitle(
            short_name(text, _LONGEST_TITLE), fontsize=10.5, color=INK, parse_math=False
        )
    if runs:
        legend(figure, runs, loc="outside lower center", ncols=min(4, len(runs)))


def legend(place: Axes | Figure, runs: Sequence[Row], loc: Any, ncols: int) -> None:
    """One entry per run, its name word for word; `loc` as matplotlib names places."""
    named_legend(place, looks_of(runs), [run.label for run in runs], loc, ncols)


def named_legend(
    place: Axes | Figure, looks: Sequence[Look], names: Sequence[str], loc: Any, ncols: int
) -> None:
    """One entry per look; `loc` as matplotlib names places."""
    handles = [_handle(look) for look in looks]
    numbers = [str(number) for number in range(len(looks))]
    style: dict[str, Any] = {"frameon": False, "fontsize": 9, "handlelength": 3.6}
    legend = place.legend(handles, numbers, loc=loc, ncols=ncols, **style)
    # The names come last: as labels, those that begin with an underscore would be left out.
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set(text=short_name(name), parse_math=False, color=INK)


def _handle(look: Look) -> Line2D:
    line = Line2D([], [], color=look.colour, marker=look.marker, lw=1.7, ms=4.5)
    line.set_dashes(look.dash or (None, None))
    line.set(markeredgecolor="white", markeredgewidth=0.6)
    return line


def short_name(text: str, longest: int = _LONGEST_NAME) -> str:
    """A name that leaves room for the axes; the numbers beside the figure hold it in full."""
    return unbroken(text if len(text) <= longest else text[: longest - 1] + "…")


def spread_out(count: int) -> np.ndarray:
    """Fixed small vertical offsets, so that equal dots stay visible; no random jitter."""
    return ((np.arange(count) * 0.618) % 1.0 - 0.5) * 0.4
