"""Clients with perturbations of their own on the page: a panel for each, and who has none."""

from __future__ import annotations

import base64
from collections.abc import Sequence

from certifl.report.compare import own_interval
from certifl.report.figures import certified_accuracy_figure, image_bytes
from certifl.report.page.html import Markup, el, join, table
from certifl.report.results import Row, RunResults, flat
from certifl.report.summary import accuracy_share, largest_radius, mean_acr, share, spread
from certifl.report.units import family_words, scales, sigma_text
from certifl.report.wording import client_list, percent, tenths

Groups = Sequence[Sequence[Row]]


def slugs(groups: Groups) -> list[str]:
    """A short name of every group for files: its family, numbered where that is not enough."""
    families = [str(runs[0].conditions["family"]) for runs in groups]
    return [
        family if families.count(family) == 1 else f"{family}-{families[:at].count(family) + 1}"
        for at, family in enumerate(families)
    ]


def plain_rows(rows: Sequence[Row]) -> list[tuple[str, int, int, int]]:
    """(label, client, images, correct) of every client that certifies nothing."""
    return [
        (run.label, client, int((run.plain.client == client).sum()), int(hits.sum()))
        for run in flat(rows)
        if run.plain is not None
        for client in run.plain.clients
        for hits in [run.plain.correct[run.plain.client == client]]
    ]


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
    return el(
        "section",
        {"id": "own"},
        el("h2", None, "Every client its own perturbation"),
        el("p", None, _explained(groups)),
        table("What the clients certify", _HEAD, [row for runs in groups for row in _rows(runs)]),
        el("div", {"class": "panels"}, *panels) if len(groups) > 1 else Markup(),
        _plain(groups[0][0].runs[0], plain) if plain else Markup(),
    )


_HEAD = [
    "Perturbation",
    "Clients",
    "Regime",
    "Average certified radius",
    "Certified accuracy at 0",
    "Best and worst client",
]


def _explained(groups: Groups) -> str:
    if len(groups) == 1:
        return "Some clients certify nothing; all that follows is about those that do."
    return (
        "Radii of different perturbations have different meanings, so nothing is averaged over "
        "them: curves, means, bands and comparisons are those of the clients that certify the "
        "same. Below, one of them is told in full at a time, in its own unit; the tabs switch."
    )


def noise_words(runs: Sequence[Row]) -> str:
    """The perturbation of a group and its sigma."""
    facts = runs[0].conditions
    return f"{family_words(facts)}, σ = {sigma_text(facts)}"


def _rows(runs: Sequence[Row]) -> list[list[str]]:
    scale = scales(runs[0].conditions, largest_radius(runs))[0]
    rows = []
    for run in runs:
        ends, (best, worst, gap) = own_interval(run), spread(run)
        at_zero = accuracy_share(run, 0.0)
        under = scale.interval(*ends) if ends else "too few images for an interval"
        who = f"client {best} and client {worst}" if len(run.runs) == 1 else "mean over seeds"
        apart = _two(f"{scale.text(gap)} apart", who)
        rows.append(
            [
                noise_words(runs),
                client_list(run.clients.tolist()),
                run.label,
                _two(scale.text(mean_acr(run)), under),
                _two(percent(at_zero.value), f"{tenths(at_zero.low)} to {tenths(at_zero.high)}"),
                apart if len(run.clients) > 1 else "–",
            ]
        )
    return rows


def _two(first: str, second: str) -> Markup:
    return join([el("b", None, first), el("small", None, second)])


def _panel(runs: Sequence[Row], at: int) -> Markup:
    """The curves of one perturbation, with the way to its panel."""
    who = client_list(sorted({int(c) for r in runs for c in r.clients}))
    name = f"{noise_words(runs)}: {who}"
    drawing = certified_accuracy_figure(runs, title=who)
    picture = base64.b64encode(image_bytes(drawing, "svg")).decode()
    source = f"data:image/svg+xml;base64,{picture}"
    image = el("img", {"src": source, "alt": f"Certified accuracy, {name}", "class": "fallback"})
    way = el("a", {"href": f"#{panel_id(at)}"}, "in full")
    return el("figure", None, el("figcaption", None, name, " (", way, ")"), image)


def _plain(run: RunResults, rows: Sequence[tuple[str, int, int, int]]) -> Markup:
    """Plain accuracies, said to be no certificates."""
    cells = []
    for label, client, images, correct in rows:
        part = share(correct, images)
        limits = f"{tenths(part.low)} to {tenths(part.high)}"
        cells.append(
            [run.name_of(client), label, f"{images:,}", _two(percent(part.value), limits)]
        )
    note = (
        "These clients certify nothing. The accuracy is that of the network itself on images as "
        "they are, one prediction each; it promises nothing about any perturbation, and no mean, "
        "curve or comparison of this page contains it."
    )
    return join(
        [
            el("h3", None, "Clients that certify nothing"),
            table("Plain accuracy", ["Client", "Regime", "Images", "Plain accuracy"], cells),
            el("p", {"class": "note"}, note),
        ]
    )
