"""Curves on axes of a notebook or script: what `plot` of results and certificates draws."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes

from certifl.report.figures.plots import draw_curves, finished_axes, named_legend
from certifl.report.frames import require_one_perturbation
from certifl.report.naming import arranged
from certifl.report.results import RunResults, by_seed, check_comparable
from certifl.report.style import FigureStyle, Look, look_number, looks_of
from certifl.report.summary import noise_words, radius_grid

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
    axes = _new_axes(style) if ax is None else ax
    before: list[tuple[Look, str]] = list(getattr(axes, _DRAWN, []))
    looks = [
        _next_look(look, len(before) + at, row.color) if before else look
        for at, (row, look) in enumerate(zip(rows, looks_of(rows), strict=True))
    ]
    radii = radius_grid(rows)
    end = max(radii[-1], axes.get_xlim()[1] if before else 0.0)
    draw_curves(axes, rows, looks, radii, style)
    drawn = [*before, *((look, row.label) for row, look in zip(rows, looks, strict=True))]
    setattr(axes, _DRAWN, drawn)
    title = "" if style.size else noise_words(rows[0].conditions)
    finished_axes(axes, rows, end, style, title if ax is None else "")
    named_legend(axes, [look for look, _ in drawn], [name for _, name in drawn], "best", 1, style)
    return axes


def _new_axes(style: FigureStyle) -> Axes:
    """Of a figure that a notebook shows below its cell."""
    import matplotlib.pyplot as plt  # it chooses a backend, which nothing else here needs

    return plt.subplots(figsize=style.size or (6.4, 4.4), layout="constrained")[1]


def _next_look(look: Look, position: int, color: str | None) -> Look:
    """The look of a curve beside those of earlier calls."""
    free = look_number(position)
    return free if color is None else dataclasses.replace(free, color=look.color)
