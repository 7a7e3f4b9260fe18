"""What all sections of the page draw on, and how a regime is named on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from certifl.report.compare import Comparison, own_interval
from certifl.report.page.html import Markup, el
from certifl.report.results import Row, RunResults, flat
from certifl.report.style import Look, looks_of
from certifl.report.summary import (
    client_acr,
    client_curves,
    mean_acr,
    measure_curves,
    measures_of,
    radius_grid,
)
from certifl.report.units import RadiusScale


@dataclass(frozen=True, eq=False)
class ReportContext:
    """What all sections draw on.

    Attributes:
        runs: the rows of the page in the order of the report, each of one or several seeds.
        units: to show radii in, the first one first.
        comparison: of all runs, image by image.
    """

    runs: tuple[Row, ...]
    units: tuple[RadiusScale, ...]
    comparison: Comparison

    @property
    def scale(self) -> RadiusScale:
        """The unit of radii in text and tables."""
        return self.units[0]

    @property
    def trained(self) -> tuple[RunResults, ...]:
        """Every run by itself: those of a row differ in their seed."""
        return tuple(flat(self.runs))

    def place_of(self, run: RunResults) -> int:
        """The row in which a run stands."""
        return next(at for at, row in enumerate(self.runs) if any(one is run for one in row.runs))


def swatch(look: Look) -> Markup:
    """A short piece of a regime's line with its marker."""
    line = {"x1": "1", "y1": "7", "x2": "33", "y2": "7"}
    if look.dash:
        line["stroke-dasharray"] = dash_text(look)
    shapes = el("line", line) + el(
        "path", {"d": MARKERS[look.marker], "transform": "translate(17 7)"}
    )
    box = {"class": f"swatch s{look.slot}", "viewBox": "0 0 34 14", "aria-hidden": "true"}
    return el("svg", box, Markup(shapes))


def named(story: ReportContext, place: int) -> Markup:
    """A regime's name with its swatch."""
    return _with_swatch(story, place, story.runs[place].label)


def named_run(story: ReportContext, run: RunResults) -> Markup:
    """A run's name, with the swatch of its row."""
    return _with_swatch(story, story.place_of(run), run.label)


def _with_swatch(story: ReportContext, place: int, label: str) -> Markup:
    look = looks_of(story.runs)[place]
    return el("span", {"class": "regime"}, swatch(look), el("span", None, label))


# The numbers the page's script draws, and the look of each regime.


_SHARE_DIGITS = 5
_LINE_WIDTH = 2.0

# Outlines in a box from -5 to 5, the same shapes as in the figures.
MARKERS = {
    "s": "M-3.6-3.6H3.6V3.6H-3.6Z",
    "o": "M4 0A4 4 0 1 1-4 0A4 4 0 1 1 4 0Z",
    "^": "M0-4.6L4.4 3.4H-4.4Z",
    "D": "M0-5L4.2 0L0 5L-4.2 0Z",
    "v": "M0 4.6L4.4-3.4H-4.4Z",
    "P": "M-1.5-4.6H1.5V-1.5H4.6V1.5H1.5V4.6H-1.5V1.5H-4.6V-1.5H-1.5Z",
    "X": "M-4.4-2.2L-2.2-4.4L0-2.2L2.2-4.4L4.4-2.2L2.2 0L4.4 2.2L2.2 4.4L0 2.2L-2.2 4.4"
    "L-4.4 2.2L-2.2 0Z",
    "*": "M0-5L1.5-1.6L5-1.5L2.2 .8L3.1 4.3L0 2.3L-3.1 4.3L-2.2 .8L-5-1.5L-1.5-1.6Z",
}


def dash_text(look: Look) -> str:
    """Dash lengths as SVG takes them; empty for a whole line."""
    return " ".join(f"{length * _LINE_WIDTH:g}" for length in look.dash)


def payload(runs: Sequence[Row], units: Sequence[RadiusScale]) -> dict[str, Any]:
    """Everything the page draws, ready for JSON.

    Radii come with their texts, rounded down in every unit, so that the script prints no radius
    of its own making.
    """
    radii = radius_grid(runs)
    return {
        "radii": radii.tolist(),
        "units": [_unit(unit, radii.tolist()) for unit in units],
        "runs": [
            _run(run, look, radii, units) for run, look in zip(runs, looks_of(runs), strict=True)
        ],
        "clients": sorted({int(client) for run in runs for client in run.clients}),
        "history": [_measure(runs, name) for name in measures_of(runs)],
    }


def _unit(unit: RadiusScale, radii: list[float]) -> dict[str, Any]:
    return {
        "name": unit.name,
        "suffix": unit.suffix,
        "factor": unit.factor,
        "texts": [unit.text(radius) for radius in radii],
    }


def _run(run: Row, look: Look, radii: Any, units: Sequence[RadiusScale]) -> dict[str, Any]:
    acr = client_acr(run)
    return {
        "label": run.label,
        "slot": look.slot,
        "dash": dash_text(look),
        "marker": MARKERS[look.marker],
        "clients": run.clients.tolist(),
        "curves": client_curves(run, radii).round(_SHARE_DIGITS).tolist(),
        "acr": acr.tolist(),
        "acrTexts": [[unit.text(float(radius)) for radius in acr] for unit in units],
        "mean": mean_acr(run),
        "meanTexts": [unit.text(mean_acr(run)) for unit in units],
        "interval": own_interval(run),
    }


def _measure(runs: Sequence[Row], name: str) -> dict[str, Any]:
    series = []
    for place, run in enumerate(runs):
        curve = measure_curves(run, name)
        if curve is not None:
            rounds, mean, low, high = curve.columns()
            series.append({"run": place, "rounds": rounds, "mean": mean, "low": low, "high": high})
    return {"name": name, "series": series}
