"""What the page tells of one perturbation, from the finding to the cost, and the switch between.

Radii of different perturbations have no common axis, so each has a panel of its own with its own
charts, tables, units and explorer. Without the page's script the panels stand one below the other.
"""

from __future__ import annotations

import base64
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
    image_bytes,
)
from certifl.report.page import background
from certifl.report.page import results as sections
from certifl.report.page.attacks import threats_section
from certifl.report.page.context import ReportContext, payload
from certifl.report.page.explorer import explorer_payload, explorer_section
from certifl.report.page.html import Markup, el, join
from certifl.report.page.perturbations import noise_words, panel_id
from certifl.report.page.privacy import privacy_section
from certifl.report.page.recommendation import advice_payload, advice_section
from certifl.report.page.results import chart_controls, notices
from certifl.report.results import Row
from certifl.report.wording import client_list, headline, recommendations

ClaimsSection = Callable[[Sequence[Row]], Markup]
"""Makes the section that holds runs against published claims; empty where none applies."""


@dataclass(frozen=True)
class PageFrame:
    """What stands around a panel.

    Attributes:
        header: above its finding. own: below its facts. attributes: of its element.
    """

    header: Markup
    own: Markup
    attributes: Markup


@dataclass(frozen=True, eq=False)
class Panel:
    """One perturbation on the page: the panel itself, and the numbers its script draws."""

    html: Markup
    numbers: dict[str, Any]


def asset(name: str) -> str:
    """A file of the page's own: style, script or template."""
    return (resources.files("certifl.report") / "assets" / name).read_text(encoding="utf-8")


def panel_of(
    story: ReportContext,
    at: int,
    frame: PageFrame,
    pictures: bool,
    most: int,
    claims: ClaimsSection | None = None,
) -> Panel:
    """The panel of one perturbation.

    Args:
        story: the runs and their comparison. at: its number on the page. frame: what is around it.
        pictures: whether test images are shown. most: characters they may take.
        claims: makes the section about published claims; None = no section.
    """
    explored = explorer_payload(story, pictures, most)
    numbers = payload(story.runs, story.units)
    numbers |= {"advice": advice_payload(story), "explorer": explored}
    found, support = headline(story.runs, story.comparison, story.scale)
    parts = {
        "at": str(at),
        "attributes": frame.attributes,
        "header": frame.header,
        "own": frame.own,
        "headline": el("p", {"class": "headline"}, found),
        "support": join(el("p", {"class": "support"}, sentence) for sentence in support),
        "notices": notices(story),
        "facts": background.facts_list(story),
        "recommendation": advice_section(story, recommendations(story.runs, story.comparison)),
        "controls": chart_controls(story),
        "curves_fallback": _fallback(
            certified_accuracy_figure(story.runs), "Certified accuracy against the radius"
        ),
        "acr_fallback": _fallback(
            average_radius_figure(story.runs), "Average certified radius per regime and client"
        ),
        "results": sections.results_section(story),
        "comparison": sections.comparison_section(story),
        "clients": sections.clients_section(story),
        "claims": Markup() if claims is None else claims(story.runs),
        "explorer": explorer_section(story, explored),
        "threats": threats_section(story),
        "training": sections.training_section(story),
        "meaning": join([background.meaning_section(story), privacy_section(story)]),
        "cost": background.cost_section(story),
    }
    html = Markup(Template(asset("panel.html")).substitute(parts))
    return Panel(_numbered(html, at), numbers)


def _numbered(html: Markup, at: int) -> Markup:
    """Names of elements made unique among the panels; the script takes the numbers off again.

    Every quotation mark in text is escaped (`markup.el`), so what looks like an attribute is one.
    """
    if at == 0:
        return html
    own = re.compile(rf'( (?:id|for|aria-describedby)="(?!{panel_id(at)}")[^"]*)"')
    return Markup(own.sub(rf'\1--{at}"', html))


def _fallback(drawing: Drawing, words: str) -> Markup:
    picture = base64.b64encode(image_bytes(drawing, "svg")).decode()
    source = f"data:image/svg+xml;base64,{picture}"
    return el("noscript", None, el("img", {"src": source, "alt": words, "class": "fallback"}))


def eyebrow(story: ReportContext, count: int | None = None) -> str:
    """Data, clients and regimes in a few words; `count` clients, where these are not only its."""
    run = story.runs[0]
    count = len(run.clients) if count is None else count
    data: Any = run.manifest.get("data") or {}
    regimes = f"{len(story.runs)} regimes" if len(story.runs) > 1 else run.label
    clients = f"{count} client{'s' if count > 1 else ''}"
    everybody = run.manifest.get("clients")
    if isinstance(everybody, int) and count < everybody:
        clients = f"{count} of {everybody} clients"
    return f"{data.get('name', 'images')} · {clients} · {regimes}"


def tab_frame(story: ReportContext, at: int) -> PageFrame:
    """The frame of a panel that is shown with a tab."""
    header = join([el("p", {"class": "eyebrow"}, eyebrow(story)), el("h2", None, _name(story))])
    attributes = f' id="{panel_id(at)}" role="tabpanel" aria-labelledby="{_tab_id(at)}"'
    return PageFrame(header, Markup(), Markup(attributes))


def switch(stories: Sequence[ReportContext]) -> Markup:
    """Tabs, one for each perturbation."""
    tabs = [
        el(
            "button",
            {
                "type": "button",
                "role": "tab",
                "id": _tab_id(at),
                "aria-selected": "true" if at == 0 else "false",
                "tabindex": "0" if at == 0 else "-1",
            },
            el("span", None, _name(story)),
            el("small", None, client_list(story.runs[0].clients.tolist())),
        )
        for at, story in enumerate(stories)
    ]
    bar = {"class": "tabs", "role": "tablist", "aria-label": "Perturbation", "hidden": True}
    return el("div", bar, *tabs)


def _tab_id(at: int) -> str:
    return f"tab-{at + 1}"


def _name(story: ReportContext) -> str:
    words = noise_words(story.runs)
    return words[0].upper() + words[1:]
