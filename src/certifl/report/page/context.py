"""What all sections of the page use: runs, comparison, units, names and common cells."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from certifl.errors import StoreError
from certifl.perturbations import trait
from certifl.report import summary
from certifl.report.compare import Comparison, compare, own_interval
from certifl.report.page.html import Markup, el, stacked
from certifl.report.results import MODEL, Row, RunResults, all_clients, flat
from certifl.report.style import Look, looks_of
from certifl.report.wording import RadiusScale, outward, percent, scales, share_of_sigma
from certifl.runs.atomic import read_json
from certifl.safe_io import MALFORMED


@dataclass(frozen=True, eq=False)
class ReportContext:
    """What all sections of one perturbation use: rows in order, units of radii, comparison."""

    runs: tuple[Row, ...]
    units: tuple[RadiusScale, ...]
    comparison: Comparison

    @classmethod
    def of(cls, runs: Sequence[Row]) -> ReportContext:
        """The context of some rows, with radii in percent of sigma where all have one sigma."""
        largest = summary.largest_radius(runs)
        units = scales(runs[0].conditions, largest)
        sigmas = {float(run.conditions["sigma"]) for run in flat(runs)}
        if len(sigmas) == 1 and min(sigmas) > 0:
            units = (*units, share_of_sigma(sigmas.pop(), largest))
        return cls(tuple(runs), units, compare(runs))

    @property
    def scale(self) -> RadiusScale:
        """The unit of radii in text and tables."""
        return self.units[0]

    @property
    def trained(self) -> tuple[RunResults, ...]:
        """Every single run: those of a row differ in their seed."""
        return tuple(flat(self.runs))

    @property
    def clients(self) -> list[int]:
        """All clients that have certificates."""
        return all_clients(self.runs)

    @property
    def of_model(self) -> bool:
        """Whether the page is about one model that no study trained."""
        return self.runs[0].algorithm == MODEL and len(self.clients) == 1

    @property
    def several_seeds(self) -> bool:
        """Whether some row has several seeds."""
        return len(self.trained) > len(self.runs)

    @cached_property
    def accuracies(self) -> dict[int, tuple[summary.Share | None, ...]]:
        """Of every compared client its certified accuracy at radius 0 in each row."""
        clients = [part.client for part in self.comparison.clients]
        return {c: tuple(summary.client_share(row, c) for row in self.runs) for c in clients}


def stored_record(run: RunResults, name: str, formats: Collection[int]) -> dict[str, Any] | None:
    """A record beside a run's certificates; None where it is of another spec or format."""
    path = run.folder / name
    record = read_json(path) if path.is_file() else None
    if not isinstance(record, dict) or record.get("format") not in formats:
        return None
    return record if record.get("spec_hash") == run.manifest.get("spec_hash") else None


@contextlib.contextmanager
def damage_named(name: str, command: str) -> Iterator[None]:
    """Malformed content of such a record is reported as its damage.

    Raises:
        StoreError: the record is damaged.
    """
    try:
        yield
    except MALFORMED as error:
        raise StoreError(
            f"The {name} of one of the runs is damaged ({type(error).__name__}: {error}). "
            f"Remove it, or repeat `{command}`."
        ) from error


def named(context: ReportContext, row: int, label: str = "") -> Markup:
    """The name of a row's algorithm, or of one of its runs, with a piece of its line."""
    look, label = looks_of(context.runs)[row], label or context.runs[row].label
    line = {"x1": "1", "y1": "7", "x2": "33", "y2": "7"}
    if look.dash:
        line["stroke-dasharray"] = _dash_text(look)
    marker = el("path", {"d": MARKERS[look.marker], "transform": "translate(17 7)"})
    box = {"class": f"swatch s{look.slot}", "viewBox": "0 0 34 14", "aria-hidden": "true"}
    swatch = el("svg", box, el("line", line), marker)
    return el("span", {"class": "algorithm"}, swatch, el("span", None, label))


def named_run(context: ReportContext, run: RunResults) -> Markup:
    """The name of a run, with the swatch of its row."""
    rows = enumerate(context.runs)
    at = next(at for at, row in rows if any(one is run for one in row.runs))
    return named(context, at, run.label)


def acr_cell(row: Row, scale: RadiusScale) -> Markup:
    """Average certified radius with its interval."""
    ends = own_interval(row)
    interval = scale.interval(*ends) if ends else "too few images for an interval"
    return stacked(scale.text(summary.mean_acr(row)), interval)


def spread_cell(row: Row, scale: RadiusScale) -> str:
    """How far best and worst client are apart, and which they are."""
    if len(row.clients) < 2:
        return "–"
    best, worst, gap = summary.spread(row)
    clients = f"client {best} and client {worst}" if len(row.runs) == 1 else "mean over seeds"
    return stacked(f"{scale.text(gap)} apart", clients)


def share_cell(share: summary.Share) -> Markup:
    """A share of images with its limits."""
    return stacked(percent(share.value), outward(share.low, share.high))


# The numbers the page's script draws, and the look of each algorithm.

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


def _dash_text(look: Look) -> str:
    """Dash lengths as SVG takes them; empty for a solid line."""
    return " ".join(f"{length * _LINE_WIDTH:g}" for length in look.dash)


def chart_payload(context: ReportContext) -> dict[str, Any]:
    """Everything the charts show, ready for JSON.

    Radii come with their texts, rounded down in every unit, so that the script prints no radius
    that it rounded itself.
    """
    runs, radii = context.runs, summary.radius_grid(context.runs)
    family = str(runs[0].conditions["family"])
    return {
        "radii": radii.tolist(),
        "units": [_unit(unit, radii.tolist(), family) for unit in context.units],
        "runs": [
            _run(run, look, radii, context.units)
            for run, look in zip(runs, looks_of(runs), strict=True)
        ],
        "clients": context.clients,
        "history": [_measure(runs, name) for name in summary.measures_of(runs)],
    }


def _unit(unit: RadiusScale, radii: list[float], family: str) -> dict[str, Any]:
    return {
        "name": unit.name,
        "axis": f"{trait(family, 'radius_note', '')} in {unit.name}",
        "suffix": unit.suffix,
        "factor": unit.factor,
        "texts": [unit.text(radius) for radius in radii],
    }


def _run(run: Row, look: Look, radii: Any, units: Sequence[RadiusScale]) -> dict[str, Any]:
    acr, mean = summary.client_acr(run), summary.mean_acr(run)
    return {
        "label": run.label,
        "slot": look.slot,
        "dash": _dash_text(look),
        "marker": MARKERS[look.marker],
        "clients": run.clients.tolist(),
        "curves": summary.client_curves(run, radii).round(_SHARE_DIGITS).tolist(),
        "acr": acr.tolist(),
        "acrTexts": [[unit.text(float(radius)) for radius in acr] for unit in units],
        "mean": mean,
        "meanTexts": [unit.text(mean) for unit in units],
        "interval": own_interval(run),
    }


def _measure(runs: Sequence[Row], name: str) -> dict[str, Any]:
    curves = [(row, summary.measure_curves(run, name)) for row, run in enumerate(runs)]
    series = [
        {"run": row, **{key: values.tolist() for key, values in curve._asdict().items()}}
        for row, curve in curves
        if curve is not None
    ]
    return {"name": name, "series": series}
