"""One self-contained page about one run, or about several side by side.

Everything is inside the file: style, script, numbers and fallback pictures. The page's own
security policy forbids the browser to load anything or to run any script but this one.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from certifl._version import __version__
from certifl.path_checks import REPORT_ENDINGS, check_ending
from certifl.report import summary
from certifl.report.figures import average_radius_figure, certified_accuracy_figure, write_figures
from certifl.report.page import background
from certifl.report.page import results as sections
from certifl.report.page.context import (
    ReportContext,
    acr_cell,
    chart_payload,
    share_cell,
    spread_cell,
)
from certifl.report.page.explorer import MOST_PICTURES, explorer_payload, explorer_section
from certifl.report.page.html import (
    Markup,
    asset,
    el,
    embedded_json,
    join,
    note,
    paragraph,
    picture,
    section,
    table,
)
from certifl.report.page.recommendation import (
    headline,
    recommendation_payload,
    recommendation_section,
)
from certifl.report.results import (
    Row,
    RunResults,
    all_clients,
    by_perturbation,
    by_seed,
    load_runs,
)
from certifl.report.style import USUAL, FigureStyle, looks_of
from certifl.report.wording import client_list, family_words, listed
from certifl.runs.atomic import write_text

ClaimsSection = Callable[[Sequence[Row]], Markup]
"""Makes the section that compares runs with published claims; empty where none applies."""
Groups = Sequence[Sequence[Row]]

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
    style: FigureStyle = USUAL,
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
        InputError: the page is not an .html file.
        InputError, StoreMismatch, StoreError: as `load_runs`, or a path that cannot be written.
    """
    page = Path(out_path)
    check_ending(page, "A report", *REPORT_ENDINGS)
    runs = load_runs(run_folders)
    groups = [by_seed(group) for group in by_perturbation(runs)]
    if images is None:
        before = page.read_text(encoding="utf-8", errors="replace") if page.is_file() else ""
        images = _BARE not in before
    if figures:
        write_figures(runs, page.parent / "figures", style)
    write_text(page, _page(groups, page, title, images, claims))
    return page


def _page(
    groups: Groups, page: Path, title: str | None, images: bool, claims: ClaimsSection | None
) -> str:
    contexts = [ReportContext.of(group) for group in groups]
    if title is None:
        words = [family_words(context.runs[0].conditions) for context in contexts]
        title = f"Certified robustness to {listed(list(dict.fromkeys(words)))}"
    frames, above = _frames(groups, contexts, title)
    most = MOST_PICTURES // len(contexts)
    panels = [
        _panel(context, at, frame, images, most, claims)
        for at, (context, frame) in enumerate(zip(contexts, frames, strict=True))
    ]
    style, script = ("".join(map(asset, names)) for names in (_STYLES, _SCRIPTS))
    style += _chosen_colors(contexts[0].runs)
    parts = {
        "title": el("title", None, title),
        "policy": join([_policy(style, script), Markup("" if images else f"\n{_BARE}")]),
        "style": Markup(style),
        "script": Markup(script),
        "data": embedded_json("report-data", {"groups": [numbers for _, numbers in panels]}),
        "above": above,
        "panels": join(html for html, _ in panels),
        "reproduce": background.reproduce_section(contexts[0], page),
        "version": join([f"certifl {__version__}"]),
        "bare": "" if images else " It contains no test images.",
    }
    return Template(asset("page.html")).substitute(parts)


def _chosen_colors(rows: Sequence[Row]) -> str:
    """Style rules for colors that the user chose; lighter on a dark page."""
    looks = [
        (look.slot, look.color)
        for row, look in zip(rows, looks_of(rows), strict=True)
        if row.runs[0].color is not None
    ]
    light = "".join(f".s{slot} {{ --c: {color}; }}\n" for slot, color in looks)
    dark = "".join(
        f".s{slot} {{ --c: color-mix(in srgb, {color} 45%, white); }}\n" for slot, color in looks
    )
    return f"{light}@media (prefers-color-scheme: dark) {{\n{dark}}}\n" if looks else ""


def _policy(style: str, script: str) -> Markup:
    """Nothing may be loaded, and only the page's own script and style count."""
    own = [
        "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for text in (script, style)
    ]
    rules = (
        f"default-src 'none'; script-src '{own[0]}'; style-src '{own[1]}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    return el("meta", {"http-equiv": "Content-Security-Policy", "content": rules})


# The part of the page about one perturbation, and the tabs that switch between them.

_CURVES_WORDS = (
    " Lines are means over clients; the shaded band reaches from the smallest to the largest "
    "client."
)
_ACR_WORDS = Markup(
    "The mean of radius × correct over a client's test images, which is the area under its curve. "
    "One mark per client; the tall stroke is the mean over clients, the line through it its "
    "95&nbsp;% interval."
)
_MODEL_ACR_WORDS = Markup(
    "The mean of radius × correct over the test images, which is the area under the curve; the "
    "line through it is its 95&nbsp;% interval."
)


def _frames(
    groups: Groups, contexts: Sequence[ReportContext], title: str
) -> tuple[list[dict[str, Markup]], Markup]:
    """Parts around every panel by name, and what is above all of them where there are several."""
    clients = {client for context in contexts for client in context.runs[0].clients.tolist()}
    eyebrow = el("p", {"class": "eyebrow"}, _eyebrow(contexts[0], len(clients)))
    top = join([eyebrow, el("h1", None, title)])
    if len(contexts) == 1:
        own = {"header": top, "overview": overview(groups), "attributes": Markup()}
        return [own], Markup()
    frames = []
    for at, context in enumerate(contexts):
        who = el("p", {"class": "eyebrow"}, _eyebrow(context, len(context.runs[0].clients)))
        header = join([who, el("h2", None, _name(context))])
        attributes = f' id="{_panel_id(at)}" role="tabpanel" aria-labelledby="{_tab_id(at)}"'
        own = {"header": header, "overview": Markup(), "attributes": Markup(attributes)}
        frames.append(own)
    return frames, join([el("header", None, top), overview(groups), _tabs(contexts)])


def _panel(
    context: ReportContext,
    at: int,
    frame: Mapping[str, Markup],
    pictures: bool,
    most: int,
    claims: ClaimsSection | None,
) -> tuple[Markup, dict[str, Any]]:
    """The panel of one perturbation, number `at` on the page, and the numbers its script draws.

    Pictures of test images, if there are to be any, may take `most` characters.
    """
    explored = explorer_payload(context, pictures, most)
    numbers = chart_payload(context)
    numbers |= {"recommendation": recommendation_payload(context), "explorer": explored}
    model = context.of_model
    finding, support = headline(context.runs, context.comparison, context.scale)
    parts = {
        **frame,
        "at": str(at),
        "headline": el("p", {"class": "headline"}, finding),
        "support": join(el("p", {"class": "support"}, sentence) for sentence in support),
        "notices": sections.notices(context),
        "key_figures": background.overview_list(context),
        "recommendation": recommendation_section(context),
        "controls": sections.chart_controls(context),
        "curves_fallback": el(
            "noscript",
            None,
            picture(
                certified_accuracy_figure(context.runs), "Certified accuracy against the radius"
            ),
        ),
        "acr_fallback": el(
            "noscript",
            None,
            picture(
                average_radius_figure(context.runs),
                f"Average certified radius{'' if model else ' per algorithm and client'}",
            ),
        ),
        "results": sections.results_section(context),
        "comparison": sections.comparison_section(context),
        "curves_words": "" if model else _CURVES_WORDS,
        "curves_lines": "" if model else ", one line per algorithm",
        "acr_marks": "" if model else " per algorithm, one mark per client",
        "acr_words": _MODEL_ACR_WORDS if model else _ACR_WORDS,
        "clients": sections.clients_section(context),
        "classes": sections.classes_section(context),
        "claims": Markup() if claims is None else claims(context.runs),
        "explorer": explorer_section(context, explored),
        "attacks": background.attacks_section(context),
        "training": sections.training_section(context),
        "meaning": background.meaning_section(context),
        "privacy": background.privacy_section(context),
        "cost": background.cost_section(context),
    }
    html = Markup(Template(asset("panel.html")).substitute(parts))
    return _numbered(html, at), numbers


def _numbered(html: Markup, at: int) -> Markup:
    """Make names of elements unique among the panels; the script takes the numbers off again.

    Every quotation mark in text is escaped (`html.el`), so what looks like an attribute is one.
    """
    if at == 0:
        return html
    own = re.compile(rf'( (?:id|for|aria-describedby)="(?!{_panel_id(at)}")[^"]*)"')
    return Markup(own.sub(rf'\1--{at}"', html))


def _eyebrow(context: ReportContext, clients: int) -> str:
    """Data, number of clients and algorithms in a few words."""
    first = context.runs[0]
    run = first.runs[0]
    if context.of_model:
        return f"{first.label} · {len(run.certificates):,} test images"
    algorithms = f"{len(context.runs)} algorithms" if len(context.runs) > 1 else first.label
    words = f"{clients} client{'s' if clients > 1 else ''}"
    total = run.manifest.get("clients")
    if isinstance(total, int) and clients < total:
        words = f"{clients} of {total} clients"
    return f"{run.data_name or 'images'} · {words} · {algorithms}"


def _tabs(contexts: Sequence[ReportContext]) -> Markup:
    buttons = []
    for at, context in enumerate(contexts):
        button = {"type": "button", "role": "tab", "id": _tab_id(at)}
        button |= {"aria-selected": "false", "tabindex": "-1"}
        button |= {"aria-selected": "true", "tabindex": "0"} if at == 0 else {}
        clients = el("small", None, client_list(context.runs[0].clients.tolist()))
        buttons.append(el("button", button, el("span", None, _name(context)), clients))
    bar = {"class": "tabs", "role": "tablist", "aria-label": "Perturbation", "hidden": True}
    return el("div", bar, *buttons)


def _tab_id(at: int) -> str:
    return f"tab-{at + 1}"


def _panel_id(at: int) -> str:
    return f"perturbation-{at + 1}"


def _name(context: ReportContext) -> str:
    words = summary.group_words(context.runs[0])
    return words[0].upper() + words[1:]


# Clients that certify different perturbations, or none: an overview above the panels.

_HEAD = [
    "Perturbation",
    "Clients",
    "Algorithm",
    "Average certified radius",
    "Certified accuracy at 0",
    "Best and worst client",
]
_SEVERAL = (
    "Radii of different perturbations mean different things, so nothing is averaged over them: "
    "curves, means, bands and comparisons cover the clients that certify the same perturbation. "
    "Below, one perturbation is shown at a time, in its own unit; the tabs switch between them."
)
_APART = (
    "Some clients took part in no round of training. They were given the global model "
    "afterwards, fine-tuned on their own images where the algorithm does so. They are shown "
    "apart: no mean, curve or comparison covers both groups. An algorithm that cannot leave them "
    "out has trained with them."
)
_PLAIN = (
    "These clients certify nothing. The accuracy is that of the network itself on unchanged "
    "images, one prediction each. It promises nothing about any perturbation, and no mean, curve "
    "or comparison of this page includes it."
)


def overview(groups: Groups) -> Markup:
    """What each client certifies, and how well; nothing where all clients certify the same."""
    plain = summary.plain_rows(groups[0])
    if len(groups) == 1 and not plain:
        return Markup()
    pictures = [_small_picture(runs, at) for at, runs in enumerate(groups)]
    rows = [
        [
            summary.group_words(run),
            client_list(run.clients.tolist()),
            run.label,
            acr_cell(run, scale),
            share_cell(summary.accuracy_share(run, 0.0)),
            spread_cell(run, scale),
        ]
        for runs, scale in ((runs, summary.first_unit(runs)) for runs in groups)
        for run in runs
    ]
    apart = [_APART] if groups[0][0].runs[0].group else []
    noises = {summary.noise_words(runs[0].conditions) for runs in groups}
    why = [*apart, *([_SEVERAL] if len(noises) > 1 or not apart else [])]
    if len(groups) == 1:
        why = ["Some clients certify nothing; everything below is about those that do."]
    return section(
        "perturbations",
        "Groups of clients" if apart else "Perturbations of the clients",
        *map(paragraph, why),
        table("What the clients certify", _HEAD, rows),
        el("div", {"class": "panels"}, *pictures) if len(groups) > 1 else Markup(),
        _plain(groups[0][0].runs[0], plain) if plain else Markup(),
    )


def _small_picture(runs: Sequence[Row], at: int) -> Markup:
    clients = client_list(all_clients(runs))
    name = f"{summary.group_words(runs[0])}: {clients}"
    image = picture(certified_accuracy_figure(runs, title=clients), f"Certified accuracy, {name}")
    link = el("a", {"href": f"#{_panel_id(at)}"}, "details")
    return el("figure", None, el("figcaption", None, name, " (", link, ")"), image)


def _plain(run: RunResults, rows: Sequence[tuple[str, int, int, int]]) -> Markup:
    cells = [
        [run.client_name(client), label, f"{images:,}", share_cell(summary.share(correct, images))]
        for label, client, images, correct in rows
    ]
    head = ["Client", "Algorithm", "Images", "Plain accuracy"]
    return join(
        [
            el("h3", None, "Clients that certify nothing"),
            table("Plain accuracy", head, cells),
            note(_PLAIN),
        ]
    )
