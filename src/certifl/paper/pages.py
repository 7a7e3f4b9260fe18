"""A figure of a study, drawn, and as files: picture, numbers, a page per comparison, an index.

Reads `figure.json`, which names the panels, their curves and runs, and the run folders.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from certifl._version import __version__
from certifl.errors import CertiflError, StoreError, StoreMismatch
from certifl.paper.claims.catalogue import CLAIMS, Claim, check_runs
from certifl.paper.claims.render import verdict_words, verdicts_section
from certifl.paper.claims.rules import NOT_TESTED
from certifl.paper.claims.runs import read_run
from certifl.paper.figures import EXTRA, FIGURES
from certifl.report import summary
from certifl.report.compare import compare
from certifl.report.figures import Drawing, curve_rows, save
from certifl.report.page.html import Markup, asset, el, join, paragraph, picture, section, table
from certifl.report.page.page import write_report
from certifl.report.page.recommendation import headline
from certifl.report.results import RunResults, by_seed, check_comparable, load_run
from certifl.report.style import (
    INK,
    LOOKS,
    Look,
    band,
    frame,
    line,
    look_number,
    looks_of,
    named_legend,
    panel,
    short_name,
)
from certifl.report.wording import RadiusScale, family_words, percent, sigma_text
from certifl.runs.atomic import read_json, write_text
from certifl.smoothing.curves import mean_and_band

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

    Returns:
        The index page. Equal results give equal files.

    Raises:
        StoreMismatch, StoreError: as `load_runs`, or a file that cannot be written.
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
        clients, noise = len(first.clients), summary.noise_words(*compared)
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
        StoreMismatch, StoreError: as `load_runs`.
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
    scale = summary.first_unit(runs)
    head = ("algorithm", "ACR", "spread over clients", "correct and certified")
    rows = [
        (
            run.label,
            scale.text(float(summary.client_acr(run).mean())),
            scale.text(summary.spread(run)[2]),
            percent(summary.accuracy_share(run, 0.0).value),
        )
        for run in runs
    ]
    more = el("p", None, el("a", {"href": link}, "Curves, comparison and clients"))
    glance = table("Numbers at a glance", head, rows)
    return el("section", None, el("h2", None, title), glance, more)


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

    Comparisons are titles, with runs that can be compared image by image.
    """
    figure = {**FIGURES, **EXTRA}.get(name)
    if figure is None or not figure.says:
        return Markup()
    claims, findings = claims_of(name), []
    for title, own in comparisons:
        rows = by_seed(own)
        finding = headline(rows, compare(rows), summary.first_unit(rows))[0]
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


# Grids of panels as in the paper: certified accuracy, clients' curves, ACR against lambda.

COLUMNS = ("panel", "measure", "regime", "client", "x", "value", "unit")
_WIDTH, _HEIGHT = 3.0, 2.35
_LEGEND_COLUMNS = 5
# Sigmas of one panel differ in shade, dash and marker, in their order.
_SIGMA_LOOKS = (LOOKS[3], LOOKS[6], LOOKS[4])


@dataclass(frozen=True, eq=False)
class Curve:
    """One run in one panel.

    Attributes:
        run: finished; its label is the one in the legend.
        personalization: lambda of Eq. (4); None for algorithms without one.
    """

    run: RunResults
    personalization: float | None = None


@dataclass(frozen=True, eq=False)
class GridPanel:
    """One panel and its position.

    Attributes:
        kind: "curves": a mean with its band per run; "clients": a curve per client of one run;
            "mixture": average certified radius against lambda, a line per sigma.
        row, column: from the top left, counted from 0. curves: what it shows.
    """

    kind: Literal["curves", "clients", "mixture"]
    row: int
    column: int
    curves: tuple[Curve, ...]

    @property
    def runs(self) -> tuple[RunResults, ...]:
        """The runs in it."""
        return tuple(curve.run for curve in self.curves)


def paper_figure(panels: Sequence[GridPanel], title: str) -> Drawing:
    """Panels in a grid with one legend; the numbers name the panel they belong to.

    Raises:
        StoreMismatch: no panel, or runs in one panel that cannot be in one figure.
    """
    if not panels:
        raise StoreMismatch("A figure needs at least one panel.")
    rows = 1 + max(p.row for p in panels)
    columns = 1 + max(p.column for p in panels)
    size = (_WIDTH * columns + 0.5, _HEIGHT * rows + 0.9)
    figure = Figure(figsize=size, layout="constrained")
    axes: Any = figure.subplots(rows, columns, squeeze=False)
    names = _panel_names(panels)
    numbers: list[tuple[Any, ...]] = []
    for part, name in zip(panels, names, strict=True):
        check_comparable(part.runs)
        for row in _DRAWERS[part.kind](axes[part.row, part.column], part, name):
            numbers.append((name, *row))
    used = {(p.row, p.column) for p in panels}
    for row, column in np.ndindex(*axes.shape):
        axes[row, column].set_visible((row, column) in used)
    heading = short_name(_heading(panels, title), 34 * columns)
    figure.suptitle(heading, fontsize=11, color=INK, parse_math=False)
    looks, labels = _legend_entries(panels)
    ncols = min(_LEGEND_COLUMNS, max(2, columns * 2 - 1), len(looks))
    named_legend(figure, looks, labels, "outside lower center", ncols)
    return Drawing(figure, COLUMNS, tuple(numbers))


def _panel_names(panels: Sequence[GridPanel]) -> list[str]:
    """The perturbation, and what else differs between the panels."""
    many_clients = len({len(p.runs[0].clients) for p in panels}) > 1
    many_data = len({p.runs[0].data_name for p in panels}) > 1
    names = []
    for part in panels:
        run = part.runs[0]
        words = [run.data_name] if many_data else []
        words.append(family_words(run.conditions))
        if part.kind != "mixture":
            words[-1] += f", σ = {_short_sigma(run)}"
        if many_clients:
            words.append(f"{len(run.clients)} clients")
        if part.kind == "clients":
            words.append(run.label)
        if part.kind == "mixture":
            words.append("ACR")
        names.append(" · ".join(words))
    return names


def _heading(panels: Sequence[GridPanel], title: str) -> str:
    data = {p.runs[0].data_name for p in panels}
    clients = {len(p.runs[0].clients) for p in panels}
    same = [*data] if len(data) == 1 else []
    same += [f"{count} clients" for count in clients if len(clients) == 1]
    return f"{title} ({', '.join(same)})" if same else title


def _short_sigma(run: RunResults) -> str:
    """Degrees for angles, otherwise the bare number: the axis names the unit."""
    text = sigma_text(run.conditions)
    return text.split(" (")[0] if run.conditions["family"] == "rotation" else text.split()[0]


def _legend_entries(panels: Sequence[GridPanel]) -> tuple[list[Look], list[str]]:
    looks: dict[str, Look] = {}
    for part in panels:
        if part.kind == "clients":
            for at, client in enumerate(part.runs[0].clients):
                looks.setdefault(f"client {client}", look_number(at))
        elif part.kind == "curves":
            for run, look in zip(part.runs, looks_of(part.runs), strict=True):
                looks.setdefault(run.label, look)
    return list(looks.values()), list(looks)


Rows = Iterator[tuple[Any, ...]]


def _draw_curves(axes: Axes, part: GridPanel, name: str) -> Rows:
    radii, unit = _radius_axes(axes, part, name)
    for run, look in zip(part.runs, looks_of(part.runs), strict=True):
        curves = summary.client_curves(run, radii)
        band(axes, look, radii * unit.factor, *mean_and_band(curves), run.label)
        for row in curve_rows(run, radii, curves):
            yield "certified accuracy", *row, run.conditions["unit"]


def _draw_clients(axes: Axes, part: GridPanel, name: str) -> Rows:
    radii, unit = _radius_axes(axes, part, name)
    run = part.runs[0]
    curves = summary.client_curves(run, radii)
    for at, (client, curve) in enumerate(zip(run.clients, curves, strict=True)):
        line(axes, look_number(at), radii * unit.factor, curve, f"client {client}")
    for row in curve_rows(run, radii, curves)[: curves.size]:  # without mean, min and max
        yield "certified accuracy", *row, run.conditions["unit"]


def _radius_axes(axes: Axes, part: GridPanel, name: str) -> tuple[np.ndarray, RadiusScale]:
    """Axes of certified accuracy against the radius in the unit that is read first."""
    radii, unit = summary.radius_grid(part.runs), summary.first_unit(part.runs)
    norm = part.runs[0].conditions["norm"]
    panel(axes, name, radii[-1] * unit.factor, left=True, lowest=True)
    axes.set_xlabel(f"radius in {unit.name} ({norm})", fontsize=8, color=INK, parse_math=False)
    if part.column == 0:
        axes.set_ylabel("certified accuracy", fontsize=8, color=INK)
    return radii, unit


def _draw_mixture(axes: Axes, part: GridPanel, name: str) -> Rows:
    """ACR in units of sigma, so that small and large sigma share an axis."""
    frame(axes)
    axes.set_title(name, fontsize=9, color=INK)
    axes.set_xlabel("personalization λ", fontsize=8, color=INK)
    axes.set_ylabel("ACR / σ", fontsize=8, color=INK)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    top, styles = 0.0, []
    by_sigma: dict[float, list[Curve]] = {}
    for curve in part.curves:
        by_sigma.setdefault(float(curve.run.conditions["sigma"]), []).append(curve)
    for look, (sigma, curves) in zip(_SIGMA_LOOKS, by_sigma.items(), strict=False):
        curves.sort(key=lambda c: -1.0 if c.personalization is None else c.personalization)
        clients = [(c, summary.client_acr(c.run)) for c in curves]
        top = max(top, *(float(radii.max()) / sigma for _, radii in clients))
        _draw_against_lambda(axes, look, sigma, clients)
        styles.append((look, _short_sigma(curves[0].run)))
        for curve, radii in clients:
            yield from _radius_rows(curve, radii)
    axes.set(xlim=(0, 1.04), ylim=(0, top * 1.45 or 1.0))
    named_legend(axes, [s[0] for s in styles], [f"σ = {s[1]}" for s in styles], "upper left", 2)
    legend = axes.get_legend()
    if legend is not None:
        legend.set_title("dotted: FedAvg")
        legend.get_title().set_color(INK)
        for text in (legend.get_title(), *legend.get_texts()):
            text.set_fontsize(7.5)


def _draw_against_lambda(
    axes: Axes, look: Look, sigma: float, clients: Sequence[tuple[Curve, np.ndarray]]
) -> None:
    """Mean and band over clients against lambda; algorithms without lambda as level lines."""
    along = [(c.personalization, r / sigma) for c, r in clients if c.personalization is not None]
    if along:
        x = np.array([value for value, _ in along])
        mean, low, high = mean_and_band(np.stack([radii for _, radii in along], axis=1))
        band(axes, look, x, mean, low, high, "")
    for curve, radii in clients:
        if curve.personalization is None:
            level = float(radii.mean()) / sigma
            axes.axhline(level, color=look.color, lw=1.1, dashes=(1.0, 1.6))


def _radius_rows(curve: Curve, radii: np.ndarray) -> Rows:
    run, unit = curve.run, str(curve.run.conditions["unit"])
    x = "" if curve.personalization is None else curve.personalization
    measure = f"ACR, sigma = {float(run.conditions['sigma']):.6g}"
    named: dict[Any, float] = {int(c): float(r) for c, r in zip(run.clients, radii, strict=True)}
    named.update(mean=float(radii.mean()), min=float(radii.min()), max=float(radii.max()))
    for name, value in named.items():
        yield measure, run.label, name, x, value, unit


_DRAWERS = {"curves": _draw_curves, "clients": _draw_clients, "mixture": _draw_mixture}
