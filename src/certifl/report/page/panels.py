"""The part of the page about one perturbation, and the tabs that switch between perturbations.

Radii of different perturbations have no common axis, so each has its own panel with its own
charts, tables, units and explorer. Without the page's script the panels follow one another.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from string import Template
from typing import Any

from certifl.report.figures import (
    Drawing,
    average_radius_figure,
    certified_accuracy_figure,
)
from certifl.report.page import background
from certifl.report.page import results as sections
from certifl.report.page.attacks import attacks_section
from certifl.report.page.classes import classes_section
from certifl.report.page.context import ReportContext, chart_payload
from certifl.report.page.explorer import explorer_payload, explorer_section
from certifl.report.page.html import Markup, el, join, picture
from certifl.report.page.perturbations import panel_id
from certifl.report.page.recommendation import recommendation_payload, recommendation_section
from certifl.report.results import Row
from certifl.report.summary import group_words
from certifl.report.wording import client_list, headline

ClaimsSection = Callable[[Sequence[Row]], Markup]
"""Makes the section that compares runs with published claims; empty where none applies."""


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


@dataclass(frozen=True)
class PageFrame:
    """What surrounds a panel.

    Attributes:
        header: above its finding. overview: below its key figures. attributes: of its element.
    """

    header: Markup
    overview: Markup
    attributes: Markup


@dataclass(frozen=True, eq=False)
class Panel:
    """One perturbation on the page: the panel itself, and the numbers its script draws."""

    html: Markup
    numbers: dict[str, Any]


def asset(name: str) -> str:
    """A file that belongs to the page: style, script or template."""
    return (resources.files("certifl.report") / "assets" / name).read_text(encoding="utf-8")


def panel_of(
    context: ReportContext,
    at: int,
    frame: PageFrame,
    pictures: bool,
    most: int,
    claims: ClaimsSection | None = None,
) -> Panel:
    """The panel of one perturbation.

    Args:
        context: the runs and their comparison. at: its number on the page. frame: around it.
        pictures: whether test images are shown. most: characters they may take.
        claims: makes the section about published claims; None = no section.
    """
    explored = explorer_payload(context, pictures, most)
    numbers = chart_payload(context)
    numbers |= {"recommendation": recommendation_payload(context), "explorer": explored}
    model = context.of_model
    finding, support = headline(context.runs, context.comparison, context.scale)
    parts = {
        "at": str(at),
        "attributes": frame.attributes,
        "header": frame.header,
        "overview": frame.overview,
        "headline": el("p", {"class": "headline"}, finding),
        "support": join(el("p", {"class": "support"}, sentence) for sentence in support),
        "notices": sections.notices(context),
        "facts": background.overview_list(context),
        "recommendation": recommendation_section(context),
        "controls": sections.chart_controls(context),
        "curves_fallback": _fallback(
            certified_accuracy_figure(context.runs), "Certified accuracy against the radius"
        ),
        "acr_fallback": _fallback(
            average_radius_figure(context.runs),
            f"Average certified radius{'' if model else ' per algorithm and client'}",
        ),
        "results": sections.results_section(context),
        "comparison": sections.comparison_section(context),
        "curves_words": "" if model else _CURVES_WORDS,
        "curves_lines": "" if model else ", one line per algorithm",
        "acr_marks": "" if model else " per algorithm, one mark per client",
        "acr_words": _MODEL_ACR_WORDS if model else _ACR_WORDS,
        "clients": sections.clients_section(context),
        "classes": classes_section(context),
        "claims": Markup() if claims is None else claims(context.runs),
        "explorer": explorer_section(context, explored),
        "attacks": attacks_section(context),
        "training": sections.training_section(context),
        "meaning": background.meaning_section(context),
        "privacy": background.privacy_section(context),
        "cost": background.cost_section(context),
    }
    html = Markup(Template(asset("panel.html")).substitute(parts))
    return Panel(_numbered(html, at), numbers)


def _numbered(html: Markup, at: int) -> Markup:
    """Make names of elements unique among the panels; the script takes the numbers off again.

    Every quotation mark in text is escaped (`html.el`), so what looks like an attribute is one.
    """
    if at == 0:
        return html
    own = re.compile(rf'( (?:id|for|aria-describedby)="(?!{panel_id(at)}")[^"]*)"')
    return Markup(own.sub(rf'\1--{at}"', html))


def _fallback(drawing: Drawing, words: str) -> Markup:
    return el("noscript", None, picture(drawing, words))


def eyebrow(context: ReportContext, clients: int) -> str:
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


def tab_frame(context: ReportContext, at: int) -> PageFrame:
    """The frame of a panel that is shown with a tab."""
    who = eyebrow(context, len(context.runs[0].clients))
    header = join([el("p", {"class": "eyebrow"}, who), el("h2", None, _name(context))])
    attributes = f' id="{panel_id(at)}" role="tabpanel" aria-labelledby="{_tab_id(at)}"'
    return PageFrame(header, Markup(), Markup(attributes))


def tabs(contexts: Sequence[ReportContext]) -> Markup:
    """One tab for each perturbation."""
    buttons = [
        el(
            "button",
            {
                "type": "button",
                "role": "tab",
                "id": _tab_id(at),
                "aria-selected": "true" if at == 0 else "false",
                "tabindex": "0" if at == 0 else "-1",
            },
            el("span", None, _name(context)),
            el("small", None, client_list(context.runs[0].clients.tolist())),
        )
        for at, context in enumerate(contexts)
    ]
    bar = {"class": "tabs", "role": "tablist", "aria-label": "Perturbation", "hidden": True}
    return el("div", bar, *buttons)


def _tab_id(at: int) -> str:
    return f"tab-{at + 1}"


def _name(context: ReportContext) -> str:
    words = group_words(context.runs[0])
    return words[0].upper() + words[1:]
