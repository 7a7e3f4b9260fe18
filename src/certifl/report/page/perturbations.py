"""Clients that certify different perturbations, or none: an overview above the panels."""

from __future__ import annotations

from collections.abc import Sequence

from certifl.report.figures import certified_accuracy_figure
from certifl.report.page.context import acr_cell, share_cell, spread_cell
from certifl.report.page.html import Markup, el, join, note, paragraph, picture, section, table
from certifl.report.results import Row, RunResults, all_clients
from certifl.report.summary import (
    accuracy_share,
    first_unit,
    group_words,
    noise_words,
    plain_rows,
    share,
)
from certifl.report.wording import client_list

Groups = Sequence[Sequence[Row]]

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


def panel_id(at: int) -> str:
    """Name of a perturbation's panel on the page, for links."""
    return f"perturbation-{at + 1}"


def overview(groups: Groups) -> Markup:
    """What each client certifies, and how well; nothing where all clients certify the same.

    Args:
        groups: the runs once for every perturbation.
    """
    plain = plain_rows(groups[0])
    if len(groups) == 1 and not plain:
        return Markup()
    panels = [_panel(runs, at) for at, runs in enumerate(groups)]
    return section(
        "perturbations",
        "Groups of clients" if groups[0][0].group else "Perturbations of the clients",
        *(paragraph(text) for text in _explanations(groups)),
        table("What the clients certify", _HEAD, [row for runs in groups for row in _rows(runs)]),
        el("div", {"class": "panels"}, *panels) if len(groups) > 1 else Markup(),
        _plain(groups[0][0].runs[0], plain) if plain else Markup(),
    )


def _explanations(groups: Groups) -> list[str]:
    """Why the clients are in groups."""
    if len(groups) == 1:
        return ["Some clients certify nothing; everything below is about those that do."]
    apart = [_APART] if groups[0][0].group else []
    noises = {noise_words(runs[0].conditions) for runs in groups}
    return [*apart, *([_SEVERAL] if len(noises) > 1 or not apart else [])]


def _rows(runs: Sequence[Row]) -> list[list[str]]:
    scale = first_unit(runs)
    return [
        [
            group_words(run),
            client_list(run.clients.tolist()),
            run.label,
            acr_cell(run, scale),
            share_cell(accuracy_share(run, 0.0)),
            spread_cell(run, scale),
        ]
        for run in runs
    ]


def _panel(runs: Sequence[Row], at: int) -> Markup:
    """The curves of one perturbation, with a link to its panel."""
    clients = client_list(all_clients(runs))
    name = f"{group_words(runs[0])}: {clients}"
    image = picture(certified_accuracy_figure(runs, title=clients), f"Certified accuracy, {name}")
    link = el("a", {"href": f"#{panel_id(at)}"}, "details")
    return el("figure", None, el("figcaption", None, name, " (", link, ")"), image)


def _plain(run: RunResults, rows: Sequence[tuple[str, int, int, int]]) -> Markup:
    """Plain accuracies, which are no certificates."""
    cells = [
        [run.client_name(client), label, f"{images:,}", share_cell(share(correct, images))]
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
