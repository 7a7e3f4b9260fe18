"""A figure of a study as files: the picture, its numbers, one page per comparison, an index page.

Reads `figure.json`, which names the panels, their curves and runs, and the run folders.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from certifl._version import __version__
from certifl.errors import CertiflError, StoreError
from certifl.paper.claims.catalogue import CLAIMS, Claim
from certifl.paper.claims.render import verdict_words, verdicts_section
from certifl.paper.claims.rules import NOT_TESTED
from certifl.paper.claims.runs import read_run
from certifl.paper.claims.testing import check_runs
from certifl.paper.drawing import Curve, GridPanel, paper_figure
from certifl.paper.figures import EXTRA, FIGURES
from certifl.report.compare import compare
from certifl.report.figures import Drawing, save
from certifl.report.page.html import (
    Markup,
    asset,
    el,
    join,
    paragraph,
    picture,
    section,
    table,
)
from certifl.report.page.page import write_report
from certifl.report.results import RunResults, by_seed, load_run
from certifl.report.summary import accuracy_share, client_acr, first_unit, noise_words, spread
from certifl.report.wording import headline, percent
from certifl.runs.atomic import read_json, write_text

_STYLES = ("page.css", "claims.css")
_INDEX, _PAGE, _PAGES = "figure.json", "report.html", "pages"


def complete(folder: str | Path) -> bool:
    """Whether all files of `write_paper_figure` exist."""
    path = Path(folder)
    if not (path / _INDEX).is_file():
        return False
    index = _read(path)
    name = str(index["figure"])
    files = [path / f"{name}.{kind}" for kind in ("png", "pdf", "svg", "csv")]
    pages = [_page_path(path, page) for page in index["pages"]]
    return all(file.is_file() for file in (*files, *pages, path / _PAGE))


def write_paper_figure(folder: str | Path) -> Path:
    """Draw the figure of the `figure.json` in a folder, and write its pages.

    Args:
        folder: of the figure; run folders are named relative to it.

    Returns:
        The index page. Equal results give equal files.

    Raises:
        StoreMismatch: a run that is missing or unfinished, or runs that cannot be compared.
        StoreError: a file that is damaged or cannot be written.
    """
    path = Path(folder)
    index = _read(path)
    runs = _Runs(path)
    drawing = _drawing(index, runs)
    save(drawing, path, str(index["figure"]))
    sections, comparisons = [], []
    for page in index["pages"]:
        compared = [runs.labeled(run) for run in page["runs"]]
        first = compared[0]
        clients, noise = len(first.clients), noise_words(first.conditions)
        title = f"{first.data_name or 'images'}, {clients} clients, {noise}"
        comparisons.append((title, compared))
        write_report(
            compared, _page_path(path, page), title, figures=False, claims=verdicts_section
        )
        link = f"{_PAGES}/{page['name']}.html"
        sections.append(_section(title, link, compared))
    sections.insert(0, verdicts_section(runs.all()))
    sections.insert(0, beside_section(str(index["figure"]), runs.all(), comparisons))
    write_text(path / _PAGE, _page(index, drawing, sections))
    return path / _PAGE


def draw_paper_figure(folder: str | Path) -> Drawing:
    """The figure of the `figure.json` in a folder, of runs that may be published ones.

    Raises:
        StoreMismatch: a run that is missing or unfinished, or runs that cannot be compared.
        StoreError: a file that is damaged.
    """
    path = Path(folder)
    return _drawing(_read(path), _Runs(path))


def _drawing(index: Mapping[str, Any], runs: _Runs) -> Drawing:
    panels = [
        GridPanel(
            panel["kind"],
            int(panel["row"]),
            int(panel["column"]),
            tuple(Curve(runs.labeled(c), c.get("personalization")) for c in panel["curves"]),
        )
        for panel in index["panels"]
    ]
    return paper_figure(panels, str(index["title"]))


def _read(path: Path) -> dict[str, Any]:
    index_path = path / _INDEX
    index = read_json(index_path)
    if not isinstance(index, dict) or not {"figure", "title", "panels", "pages"} <= set(index):
        raise StoreError(
            f"{index_path} is damaged: it must name figure, title, panels and pages. Repeat the "
            "command that made the figure."
        )
    return index


class _Runs:
    """Run folders, each read once."""

    def __init__(self, path: Path) -> None:
        self._folder = path
        self._read: dict[str, RunResults] = {}

    def labeled(self, curve: Mapping[str, Any]) -> RunResults:
        """The run of a curve with the label of its legend."""
        name = str(curve["run"])
        if name not in self._read:
            self._read[name] = load_run(self._folder / name)
        return dataclasses.replace(self._read[name], label=str(curve["label"]))

    def all(self) -> list[RunResults]:
        """Every run that was read, once."""
        return list(self._read.values())


def _page_path(path: Path, page: Mapping[str, Any]) -> Path:
    return path / _PAGES / f"{page['name']}.html"


def _section(title: str, link: str, runs: list[RunResults]) -> Markup:
    """One comparison: its numbers, and a link to its page."""
    scale = first_unit(runs)
    head = ("algorithm", "ACR", "spread over clients", "correct and certified")
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
    summary = table("Numbers at a glance", head, rows)
    return el("section", None, el("h2", None, title), summary, more)


def _page(index: Mapping[str, Any], drawing: Drawing, sections: list[Markup]) -> Markup:
    name, title = str(index["figure"]), str(index["title"])
    scale = ", ".join([str(index.get("scale", "")), *map(str, index.get("settings", ()))])
    parts = {
        "title": el("title", None, f"{name}: {title}"),
        "style": "".join(map(asset, _STYLES)),
        "eyebrow": el("p", {"class": "eyebrow"}, f"{name} · scale {scale}"),
        "heading": el("h1", None, title),
        "picture": picture(drawing, title),
        "numbers": el("a", {"href": f"{name}.csv"}, f"{name}.csv"),
        "sections": join(sections),
        "version": __version__,
        "command": el("code", None, str(index.get("command", "certifl reproduce"))),
    }
    return Markup(Template(asset("figure.html")).substitute(parts))


# What the paper says of a figure in words, beside what the runs of this figure show.


Comparisons = Sequence[tuple[str, Sequence[RunResults]]]

_FINDINGS = (
    "One line for each comparison of the figure: which algorithm leads in the average certified "
    "radius on the images of these runs."
)


def beside_section(name: str, runs: Sequence[RunResults], comparisons: Comparisons) -> Markup:
    """The paper's words about a figure, and what is seen here; nothing for other figures.

    Args:
        name: of the figure. runs: all of its runs.
        comparisons: titles, with runs that can be compared image by image.
    """
    figure = {**FIGURES, **EXTRA}.get(name)
    if figure is None or not figure.says:
        return Markup()
    claims, findings = claims_of(name), []
    for title, own in comparisons:
        rows = by_seed(own)
        finding = headline(rows, compare(rows), first_unit(rows))[0]
        findings.append(el("li", None, el("b", None, title), ": ", finding))
    return section(
        "beside",
        "What the paper says of it, and what is seen here",
        paragraph(figure.says),
        _statements(claims, runs) if claims else Markup(),
        paragraph(_FINDINGS),
        el("ul", {"class": "limits"}, *findings),
    )


def claims_of(name: str) -> list[Claim]:
    """The claims that the paper shows in a figure."""
    if name in EXTRA:
        return [claim for claim in CLAIMS if "further runs" in claim.figure]
    number = name.removeprefix("figure")
    shown = [claim for claim in CLAIMS if "further runs" not in claim.figure]
    return [claim for claim in shown if number in re.findall(r"\d+", claim.figure)]


def _statements(claims: Sequence[Claim], runs: Sequence[RunResults]) -> Markup:
    """A row for each claim: the paper's statement, and its verdict on these runs alone."""
    try:
        report = check_runs([read_run(run) for run in runs], claims=claims)
    except CertiflError as error:
        return paragraph(f"Its statements were not tested: {error}")
    rows = []
    for result in report.results:
        first, _, rest = verdict_words(result).partition(": ")
        verdict = join([el("b", None, first), ": ", el("span", None, rest)])
        if result.verdict == NOT_TESTED:
            verdict = el("span", None, "Not tested: the figure's runs cannot decide it.")
        rows.append([el("span", None, result.claim.sentence), verdict])
    return table("Statements", ["The paper", "These runs"], rows)
