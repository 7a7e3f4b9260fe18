"""Which algorithm gives a client the largest average certified radius at an accepted accuracy."""

from __future__ import annotations

import math
from typing import Any

from certifl.report.compare import ClientComparison, difference, ranking
from certifl.report.page.context import ReportContext, named
from certifl.report.page.html import (
    Markup,
    details,
    el,
    paragraph,
    section,
    table,
    verbatim,
)
from certifl.report.summary import Share
from certifl.report.wording import (
    NO_DIFFERENCE,
    Recommendation,
    by_margin,
    client_list,
    grouped,
    listed,
    percent,
    position_of_local,
    recommendations,
    tenths,
    why_clients_stay_undecided,
)

MOST_GROUPS = 8
NO_RECOMMENDATION = "No recommendation: too few images in common"
_HEADING = "Which algorithm for which client"
_HEAD = (
    "Client",
    "Images",
    "Recommendation",
    "Its average certified radius",
    "Its accuracy",
    "Ahead of the next best",
    "Ahead of training alone",
)


def recommendation_payload(context: ReportContext) -> dict[str, Any] | None:
    """What the script needs to recommend at another accuracy; None without recommendations."""
    parts = context.comparison.clients
    if len(context.runs) < 2 or not any(p.stated for one in parts for p in one.pairs.values()):
        return None
    return {
        "local": position_of_local(context.runs),
        "most": MOST_GROUPS,
        "none": NO_DIFFERENCE,
        "few": f"{NO_RECOMMENDATION}:",
        "clients": [_client(context, part) for part in parts],
    }


def _client(context: ReportContext, part: ClientComparison) -> dict[str, Any]:
    order = ranking(part.acr, part.pairs)
    reasons = [pair.why for pair in part.pairs.values()]
    pairs = {}
    for rank, ahead in enumerate(order):
        for behind in order[rank + 1 :]:
            pair = difference(part.pairs, ahead, behind)
            shown = int(pair.shown) if pair.stated else None
            pairs[f"{ahead}-{behind}"] = [by_margin(pair, context.scale), shown]
    return {
        "client": part.client,
        "images": str(part.images),
        "why": reasons[0] if all(reasons) else "",
        "order": order,
        "acr": ["–" if math.isnan(radius) else context.scale.text(radius) for radius in part.acr],
        # A client without certificates is below every accuracy.
        "accuracy": [
            [*((-1.0,) * 3 if one is None else (one.value, one.low, one.high)), _share_text(one)]
            for one in context.accuracies[part.client]
        ],
        "pairs": pairs,
    }


def _share_text(share: Share | None) -> str:
    if share is None:
        return "–"
    return f"{percent(share.value)} ({tenths(share.low)} to {tenths(share.high)})"


def recommendation_section(context: ReportContext) -> Markup:
    """Which algorithm each client should use, grouped by answer; nothing for a single run."""
    if len(context.runs) < 2 or not context.comparison.paired:
        return Markup()
    answers = recommendations(context.runs, context.comparison)
    if not answers or all(one.why for one in answers):
        pairs = [p for part in context.comparison.clients for p in part.pairs.values()]
        reasons = dict.fromkeys(p.why for p in pairs or context.comparison.pairs.values() if p.why)
        text = f"No recommendation for any client: {'; '.join(reasons)}."
        return section("recommendation", _HEADING, paragraph(text))
    groups, items = grouped(answers), []
    for rows, clients in groups[:MOST_GROUPS]:
        names = el("span", {"class": "choice"}, *(named(context, row) for row in rows))
        answer = NO_DIFFERENCE if len(rows) > 1 else ""
        items.append(
            _item(answer, clients, names) if rows else _item(f"{NO_RECOMMENDATION}:", clients)
        )
    rest = [client for _, clients in groups[MOST_GROUPS:] for client in clients]
    if rest:
        items.append(_item("Other answers, in the table below:", rest))
    undecided = why_clients_stay_undecided(context.runs, context.comparison, answers)
    status = {"class": "note js-only", "id": "recommendation-status", "role": "status"}
    caption = "Recommendation for every client, from its own test images"
    rows = [_row(context, one) for one in answers]
    return section(
        "recommendation",
        _HEADING,
        paragraph(_method(context)),
        *([] if undecided is None else [paragraph(undecided)]),
        _accepted(),
        el("ul", {"class": "groups", "id": "recommendations"}, *items),
        el("p", {**status, "hidden": True}),
        details(
            "Every client, with numbers",
            table(caption, _HEAD, rows, {"id": "recommendation-table"}),
        ),
    )


def _accepted() -> Markup:
    """The one thing a client chooses: the accuracy it needs at least."""
    slider = {"type": "range", "id": "accepted", "min": "0", "max": "100", "step": "1"}
    label = "A client accepts a certified accuracy of at least"
    return el(
        "div",
        {"class": "accepted js-only", "hidden": True},
        el("label", {"for": "accepted"}, label, " ", el("output", {"id": "accepted-text"}, "0 %")),
        el("input", {**slider, "value": "0"}),
    )


def _method(context: ReportContext) -> str:
    clients = len(context.comparison.clients)
    pairs = clients * len(context.runs) * (len(context.runs) - 1) // 2
    wide = f" (wide enough for all {pairs} comparisons of all clients at once)"
    wide = wide if pairs > 1 else ""
    return (
        "The recommendation is the algorithm with the largest average certified radius on the "
        "client's own test images, among those that reach the accuracy the client accepts "
        f"(correct with a certificate). Where the 95 % interval of a paired difference{wide} "
        f"contains 0, these images do not show which is better: {NO_DIFFERENCE}, and other "
        "reasons may decide."
    )


def _item(answer: str, clients: list[int], names: str = "") -> Markup:
    words = el("span", {"class": "verdict"}, answer) if answer else Markup()
    return el("li", None, names, words, el("span", {"class": "who"}, client_list(clients)))


def _row(context: ReportContext, one: Recommendation) -> list[str]:
    if one.why:
        return [str(one.client), str(one.images), f"none: {one.why}", *["–"] * 4]
    scale, labels = context.scale, [run.label for run in context.runs]
    best = labels[one.best]
    if one.tied:
        others = listed([labels[i] for i in sorted(one.tied)])
        best = f"{best}; {NO_DIFFERENCE} from {others}"
    return [
        str(one.client),
        str(one.images),
        verbatim(best),
        scale.text(one.acr),
        _share_text(context.accuracies[one.client][one.best]),
        by_margin(one.margin, scale) if one.margin else "–",
        by_margin(one.alone, scale) if one.alone else "–",
    ]
