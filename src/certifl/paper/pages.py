"""A figure of a study as files: the picture, its numbers, one page per comparison, an index page.

Reads `figure.json`, which names the panels, their curves and the runs behind them, and the run
folders; nothing else.
"""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from certifl._version import __version__
from certifl.errors import StoreError
from certifl.paper.claims.section import verdicts_section
from certifl.paper.drawing import Curve, GridPanel, paper_figure
from certifl.report.figures import image_bytes, save
from certifl.report.page.html import Markup, el, join, table
from certifl.report.page.page import write_report
from certifl.report.results import RunResults, load_run
from certifl.report.summary import accuracy_share, client_acr, largest_radius, spread
from certifl.report.units import family_words, scales, sigma_text
from certifl.report.wording import percent
from certifl.runs.atomic import read_json, write_text

_STYLES = ("page.css", "claims.css")
_INDEX, _PAGE, _PAGES = "figure.json", "report.html", "pages"


def complete(folder: str | Path) -> bool:
    """Whether everything that `write_paper_figure` makes is there."""
    place = Path(folder)
    if not (place / _INDEX).is_file():
        return False
    index = _read(place)
    name = str(index["figure"])
    files = [place / f"{name}.{kind}" for kind in ("png", "pdf", "svg", "csv")]
    pages = [_page_path(place, page) for page in index["pages"]]
    return all(path.is_file() for path in (*files, *pages, place / _PAGE))


def write_paper_figure(folder: str | Path) -> Path:
    """Draw the figure whose `figure.json` lies in a folder, and write its pages.

    Args:
        folder: of the figure; run folders are named relative to it.

    Returns:
        The index page. Equal results give equal files.

    Raises:
        StoreMismatch: a run that is missing or unfinished, or runs that cannot be compared.
        StoreError: a file that is damaged or a place that cannot be written.
    """
    place = Path(folder)
    index = _read(place)
    runs = _Runs(place)
    panels = [
        GridPanel(
            panel["kind"],
            int(panel["row"]),
            int(panel["column"]),
            tuple(Curve(runs.labelled(c), c.get("personalization")) for c in panel["curves"]),
        )
        for panel in index["panels"]
    ]
    drawing = paper_figure(panels, str(index["title"]))
    save(drawing, place, str(index["figure"]))
    sections = []
    for page in index["pages"]:
        compared = [runs.labelled(run) for run in page["runs"]]
        title = _page_title(compared[0])
        write_report(
            compared, _page_path(place, page), title, figures=False, claims=verdicts_section
        )
        link = f"{_PAGES}/{page['name']}.html"
        sections.append(_section(title, link, compared))
    sections.insert(0, verdicts_section(runs.all()))
    picture = image_bytes(drawing, "svg")
    write_text(place / _PAGE, _page(index, picture, sections))
    return place / _PAGE


def _read(place: Path) -> dict[str, Any]:
    path = place / _INDEX
    held = read_json(path)
    if not isinstance(held, dict) or not {"figure", "title", "panels", "pages"} <= set(held):
        raise StoreError(
            f"{path} is damaged: it must name figure, title, panels and pages. Repeat the command "
            "that made the figure."
        )
    return held


class _Runs:
    """Run folders read once, however many panels show them."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._read: dict[str, RunResults] = {}

    def labelled(self, curve: Mapping[str, Any]) -> RunResults:
        """The run of a curve under the label of its legend."""
        name = str(curve["run"])
        if name not in self._read:
            self._read[name] = load_run(self._place / name)
        return dataclasses.replace(self._read[name], label=str(curve["label"]))

    def all(self) -> list[RunResults]:
        """Every run that was read, once."""
        return list(self._read.values())


def _page_path(place: Path, page: Mapping[str, Any]) -> Path:
    return place / _PAGES / f"{page['name']}.html"


def _page_title(run: RunResults) -> str:
    data: Any = run.manifest.get("data") or {}
    what = f"{family_words(run.conditions)}, σ = {sigma_text(run.conditions)}"
    return f"{data.get('name', 'images')}, {len(run.clients)} clients, {what}"


def _section(title: str, link: str, runs: list[RunResults]) -> Markup:
    """One comparison: its numbers, and the way to its page."""
    scale = scales(runs[0].conditions, largest_radius(runs))[0]
    head = ("regime", "ACR", "spread over clients", "correct and certified")
    rows = [
        (
            run.label,
            scale.text(float(client_acr(run).mean())),
            scale.text(spread(run)[2]),
            percent(accuracy_share(run, 0.0).value),
        )
        for run in runs
    ]
    more = el("p", None, el("a", {"href": link}, "Curves, comparison and clients"))
    return el(
        "section", None, el("h2", None, title), table("Numbers at a glance", head, rows), more
    )


def _page(index: Mapping[str, Any], picture: bytes, sections: list[Markup]) -> Markup:
    assets = resources.files("certifl.report") / "assets"
    style = "".join((assets / name).read_text(encoding="utf-8") for name in _STYLES)
    source = f"data:image/svg+xml;base64,{base64.b64encode(picture).decode()}"
    shown = el("img", {"src": source, "alt": str(index["title"]), "class": "fallback"})
    name = str(index["figure"])
    scale = ", ".join([str(index.get("scale", "")), *map(str, index.get("settings", ()))])
    numbers = el("a", {"href": f"{name}.csv"}, f"{name}.csv")
    head = el(
        "head",
        None,
        Markup('<meta charset="utf-8">'),
        Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Markup('<meta name="color-scheme" content="light dark">'),
        el("title", None, f"{name}: {index['title']}"),
        el("style", None, Markup(style + ".fallback { max-width: none; }")),
    )
    top = el(
        "header",
        None,
        el("p", {"class": "eyebrow"}, f"{name} · scale {scale}"),
        el("h1", None, str(index["title"])),
    )
    caption = el(
        "p",
        None,
        "Lines are means over clients; shaded bands reach from the smallest to the largest "
        "client. ACR is the average certified radius. The numbers: ",
        numbers,
        ".",
    )
    made = f"Made by certifl {__version__} from stored results with "
    command = el("code", None, str(index.get("command", "certifl reproduce")))
    body = el(
        "body",
        None,
        el("main", None, top, el("section", None, shown, caption), *sections),
        el("footer", None, el("p", None, made, command, ".")),
    )
    return join([Markup("<!doctype html>\n"), el("html", {"lang": "en"}, head, body)])
