"""The figures of a study: the paper's certified-accuracy plots, radii per client, training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from certifl.report.figures.files import Drawing
from certifl.report.figures.parts import (
    INK,
    band,
    certified_axes,
    default_title,
    first_unit,
    frame,
    heading,
    legend,
    line,
    panel,
    radius_axis,
    short_name,
    spread_out,
    ticks_in,
    title_above,
)
from certifl.report.history import measure_curves, measures_of
from certifl.report.looks import looks_of
from certifl.report.results import Row, check_comparable
from certifl.report.summary import client_acr, client_curves, mean_acr, radius_grid
from certifl.smoothing.curves import mean_and_band

__all__ = [
    "average_radius_figure",
    "certified_accuracy_figure",
    "history_figure",
    "per_client_figure",
]

_COLUMNS = 5


def certified_accuracy_figure(runs: Sequence[Row], title: str | None = None) -> Drawing:
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
        band(axes, look, radii, mean, low, high, run.label)
        rows += _curve_rows(run, radii, curves)
    certified_axes(axes, runs, radii)
    title_above(axes, title if title is not None else default_title(runs[0]))
    legend(axes, runs, loc="best", ncols=1 if len(runs) < 5 else 2)
    return Drawing(figure, ("regime", "client", "radius", "certified_accuracy"), tuple(rows))


def per_client_figure(runs: Sequence[Row], title: str | None = None) -> Drawing:
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
    lines, unit = -(-len(clients) // columns), first_unit(runs)
    figure = Figure(figsize=(1.9 * columns + 1.2, 1.7 * lines + 1.3), layout="constrained")
    # Not shared axes: matplotlib's time for those grows with the square of their number.
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    rows: list[tuple[Any, ...]] = []
    for run, look in zip(runs, looks_of(runs), strict=True):
        curves = client_curves(run, radii)
        for client, curve in zip(run.clients, curves, strict=True):
            line(panels[clients.index(int(client))], look, radii, curve, run.label)
        rows += _curve_rows(run, radii, curves)
    for place, (client, axes) in enumerate(zip(clients, panels, strict=False)):
        lowest = place + columns >= len(clients)
        panel(axes, f"client {client}", radii[-1], left=place % columns == 0, lowest=lowest)
        ticks_in(axes, unit, 3)
        if lowest:
            axes.set_xlabel(f"radius in {unit.name}", fontsize=8, color=INK, parse_math=False)
    for axes in panels[len(clients) :]:
        axes.set_visible(False)
    figure.supylabel("certified accuracy", fontsize=10, color=INK)
    heading(figure, runs, title)
    return Drawing(figure, ("regime", "client", "radius", "certified_accuracy"), tuple(rows))


def average_radius_figure(runs: Sequence[Row], title: str | None = None) -> Drawing:
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
        mean = mean_acr(run)
        axes.barh(place, mean, height=0.62, color=look.colour, alpha=0.22, linewidth=0)
        axes.plot([mean, mean], [place - 0.31, place + 0.31], color=look.colour, lw=2.2)
        offsets = spread_out(len(radii))
        style = {"ls": "", "marker": look.marker, "ms": 5, "mec": "white", "mew": 0.6}
        axes.plot(radii, place + offsets, color=look.colour, **style)
        rows += [(run.label, int(c), float(r)) for c, r in zip(run.clients, radii, strict=True)]
        rows.append((run.label, "mean", mean))
    frame(axes)
    axes.grid(axis="y", visible=False)
    axes.set_yticks(range(len(runs)), [short_name(run.label) for run in runs], parse_math=False)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    radius_axis(axes, runs, "average certified radius")
    title_above(axes, title if title is not None else default_title(runs[0]))
    return Drawing(figure, ("regime", "client", "average_certified_radius"), tuple(rows))


def history_figure(runs: Sequence[Row], title: str | None = None) -> Drawing:
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
            band(axes, look, curve.rounds, curve.mean, curve.low, curve.high, run.label)
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
