"""One self-contained page about one run, or about several side by side.

Everything is inside the file: style, script, numbers and fallback pictures. The page's own
security policy forbids the browser to load anything or to run any script but this one.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from string import Template

from certifl._version import __version__
from certifl.errors import InputError
from certifl.report.figures import (
    Drawing,
    average_radius_figure,
    certified_accuracy_figure,
    history_figure,
    per_client_figure,
    save,
)
from certifl.report.page import background
from certifl.report.page.context import ReportContext
from certifl.report.page.explorer import MOST_PICTURES
from certifl.report.page.html import Markup, el, embedded_json, join
from certifl.report.page.panels import (
    ClaimsSection,
    PageFrame,
    asset,
    eyebrow,
    panel_of,
    tab_frame,
    tabs,
)
from certifl.report.page.perturbations import Groups, overview
from certifl.report.results import UNSEEN, Row, RunResults, by_perturbation, by_seed, load_runs
from certifl.report.style import FigureStyle, looks_of
from certifl.report.units import family_words
from certifl.report.wording import listed
from certifl.runs.atomic import write_text

_USUAL = FigureStyle()
_LONGEST_NAME = 80
_STYLES = ("page.css", "recommendation.css", "claims.css", "explorer.css", "print.css")
_SCRIPTS = ("drawing.js", "page.js", "recommendation.js", "explorer.js", "switch.js")
_BARE = '<meta name="certifl-images" content="left out">'


def page_beside(run_folders: Sequence[Path]) -> Path:
    """Default path of the page about some runs.

    Returns:
        `report.html` in the folder of a single run; for several runs, or a file of certificates,
        in a new folder beside the first, so that neither another page nor its figures are
        replaced.
    """
    folders = [folder.resolve() for folder in run_folders]
    if len(folders) == 1 and run_folders[0].is_file():
        return run_folders[0].with_name(f"{run_folders[0].stem}-report") / "report.html"
    if len(folders) == 1:
        return run_folders[0] / "report.html"
    name = "-".join(folder.name for folder in folders)
    if len(name) > _LONGEST_NAME:
        digest = hashlib.sha256("\n".join(map(str, folders)).encode()).hexdigest()[:8]
        name = f"{len(folders)}-runs-{digest}"
    return run_folders[0].parent / f"comparison-{name}" / "report.html"


def write_report(
    run_folders: Sequence[str | Path | RunResults],
    out_path: str | Path,
    title: str | None = None,
    figures: bool = True,
    images: bool | None = None,
    claims: ClaimsSection | None = None,
    style: FigureStyle = _USUAL,
) -> Path:
    """Write the page, and the figures beside it.

    Where clients certify different perturbations, the page has a panel for each, one of which is
    shown at a time.

    Args:
        run_folders: finished runs of the same data and perturbation; those that differ in their
            seed alone share a row.
        out_path: the page; figures go to the folder `figures` beside it.
        title: the page's heading; the data and perturbation where None.
        figures: whether the figures are written as files too.
        images: whether test images are shown on the page; None = as on the page that is replaced,
            or shown if there is none. Without them no pixel of an image is in the file.
        claims: makes a section that compares the runs with published claims; None = no section.
        style: of the figures that are written as files.

    Returns:
        The page's path. Equal results give an equal page.

    Raises:
        InputError: the page is not an .html file, or a run is named twice.
        StoreMismatch: a run that is missing or unfinished, or runs that cannot be compared.
        StoreError: a run that is damaged, or a path that cannot be written.
    """
    page = Path(out_path)
    _check_request(run_folders, page)
    runs = load_runs(run_folders)
    groups = [by_seed(group) for group in by_perturbation(runs)]
    if images is None:
        images = not _without_images(page)
    if figures:
        write_figures(runs, page.parent / "figures", style)
    write_text(page, _page(groups, page, title, images, claims))
    return page


def _check_request(runs: Sequence[str | Path | RunResults], page: Path) -> None:
    if page.suffix.lower() not in (".html", ".htm") or page.is_dir():
        raise InputError(f"A report must be an .html file; got {str(page)!r}.")


def _without_images(page: Path) -> bool:
    """Whether an existing page was made without test images."""
    return page.is_file() and _BARE in page.read_text(encoding="utf-8", errors="replace")


def write_figures(
    runs: Sequence[RunResults], folder: str | Path, style: FigureStyle = _USUAL
) -> list[Path]:
    """Write all figures of some runs as PNG, PDF, SVG and CSV, or in the formats of `style`.

    Where clients certify different perturbations, each has its own folder inside.

    Returns:
        The files: curves, clients, average_radius, and history where training was recorded.

    Raises:
        StoreMismatch: runs that cannot be compared. StoreError: the folder cannot be written.
    """
    groups = by_perturbation(runs)
    if len(groups) > 1:
        inside = zip(groups, _folder_names(groups), strict=True)
        written = [write_figures(part, Path(folder) / name, style) for part, name in inside]
        return [path for paths in written for path in paths]
    rows = by_seed(runs)
    drawings: dict[str, Drawing] = {
        "curves": certified_accuracy_figure(rows, style=style),
        "clients": per_client_figure(rows, style=style),
        "average_radius": average_radius_figure(rows, style=style),
    }
    if any(run.history for run in runs):
        drawings["history"] = history_figure(rows, style=style)
    return [
        path
        for stem, drawn in drawings.items()
        for path in save(drawn, folder, stem, style.formats)
    ]


def _folder_names(groups: Groups) -> list[str]:
    """A short name for each group: its family, numbered where several share it."""
    families = [
        f"{runs[0].conditions['family']}{'-unseen' if runs[0].group == UNSEEN else ''}"
        for runs in groups
    ]
    return [
        family if families.count(family) == 1 else f"{family}-{families[:at].count(family) + 1}"
        for at, family in enumerate(families)
    ]


def _page(
    groups: Groups,
    page: Path,
    title: str | None,
    images: bool,
    claims: ClaimsSection | None,
) -> str:
    contexts = [ReportContext.of(group) for group in groups]
    frames, above = _frames(groups, contexts, title)
    most = MOST_PICTURES // len(contexts)
    panels = [
        panel_of(context, at, frame, images, most, claims)
        for at, (context, frame) in enumerate(zip(contexts, frames, strict=True))
    ]
    style, script = ("".join(map(asset, names)) for names in (_STYLES, _SCRIPTS))
    style += _chosen_colors(contexts[0].runs)
    parts = {
        "title": el("title", None, _heading(contexts) if title is None else title),
        "policy": join([_policy(style, script), Markup("" if images else f"\n{_BARE}")]),
        "style": Markup(style),
        "script": Markup(script),
        "data": embedded_json("report-data", {"groups": [panel.numbers for panel in panels]}),
        "above": above,
        "panels": join(panel.html for panel in panels),
        "reproduce": background.reproduce_section(contexts[0], page),
        "version": join([f"certifl {__version__}"]),
        "bare": "" if images else " It contains no test images.",
    }
    return Template(asset("page.html")).substitute(parts)


def _frames(
    groups: Groups, contexts: Sequence[ReportContext], title: str | None
) -> tuple[list[PageFrame], Markup]:
    """What surrounds every panel, and what is above all of them where there are several."""
    heading = el("h1", None, _heading(contexts) if title is None else title)
    clients = {client for context in contexts for client in context.runs[0].clients.tolist()}
    top = join([el("p", {"class": "eyebrow"}, eyebrow(contexts[0], len(clients))), heading])
    if len(contexts) == 1:
        return [PageFrame(top, overview(groups), Markup())], Markup()
    frames = [tab_frame(context, at) for at, context in enumerate(contexts)]
    return frames, join([el("header", None, top), overview(groups), tabs(contexts)])


def _chosen_colors(rows: Sequence[Row]) -> str:
    """Style rules for colors that the user chose; lighter on a dark page."""
    looks = [
        (look.slot, row.color)
        for row, look in zip(rows, looks_of(rows), strict=True)
        if row.color is not None
    ]
    light = "".join(f".s{slot} {{ --c: {color}; }}\n" for slot, color in looks)
    dark = "".join(
        f".s{slot} {{ --c: color-mix(in srgb, {color} 45%, white); }}\n" for slot, color in looks
    )
    return f"{light}@media (prefers-color-scheme: dark) {{\n{dark}}}\n" if looks else ""


def _policy(style: str, script: str) -> Markup:
    """Nothing may be loaded, and only the page's own script and style count."""
    rules = [
        "default-src 'none'",
        f"script-src '{_digest(script)}'",
        f"style-src '{_digest(style)}'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    name = "Content-Security-Policy"
    return el("meta", {"http-equiv": name, "content": "; ".join(rules)})


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _heading(contexts: Sequence[ReportContext]) -> str:
    words = [family_words(context.runs[0].conditions) for context in contexts]
    return f"Certified robustness to {listed(list(dict.fromkeys(words)))}"
