"""What all sections of the page draw on, and how a regime is named on it."""

from __future__ import annotations

from dataclasses import dataclass

from certifl.report.compare import Comparison
from certifl.report.looks import Look, looks_of
from certifl.report.markup import Markup, el
from certifl.report.payload import MARKERS, dash_text
from certifl.report.results import Row, RunResults, flat
from certifl.report.scale import RadiusScale

__all__ = ["Story", "named", "named_run", "swatch"]


@dataclass(frozen=True, eq=False)
class Story:
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


def named(story: Story, place: int) -> Markup:
    """A regime's name with its swatch."""
    return _with_swatch(story, place, story.runs[place].label)


def named_run(story: Story, run: RunResults) -> Markup:
    """A run's name, with the swatch of its row."""
    return _with_swatch(story, story.place_of(run), run.label)


def _with_swatch(story: Story, place: int, label: str) -> Markup:
    look = looks_of(story.runs)[place]
    return el("span", {"class": "regime"}, swatch(look), el("span", None, label))
