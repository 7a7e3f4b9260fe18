"""Which regime gives a client the largest average certified radius at an accuracy it accepts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from certifl.report.compare import ClientComparison, ranking
from certifl.report.page.context import ReportContext, named
from certifl.report.page.html import Markup, el, table, verbatim
from certifl.report.results import Row
from certifl.report.summary import Share, image_numbers, shares_over_seeds
from certifl.report.wording import (
    NO_DIFFERENCE,
    Recommendation,
    by_margin,
    client_list,
    grouped,
    listed,
    percent,
    tenths,
    why_clients_are_open,
)

MOST_GROUPS = 8
NO_ADVICE = "No recommendation, for want of images in common"
_HEAD = (
    "Client",
    "Images",
    "Recommendation",
    "Its average certified radius",
    "Its accuracy",
    "Over the next best",
    "Over training alone",
)


@dataclass(frozen=True)
class _Accuracies:
    """Certified accuracy at radius 0 of every regime on one client's images."""

    client: int
    shares: tuple[Share | None, ...]


def _accuracies(story: ReportContext) -> list[_Accuracies]:
    """Of every client that is compared, on its own images under each regime."""
    return [
        _Accuracies(part.client, tuple(_share(row, part.client) for row in story.runs))
        for part in story.comparison.clients
    ]


def _share(row: Row, client: int) -> Share | None:
    """A client's certified accuracy at radius 0; None where it has no certificates."""
    own = [(run, run.certificates.client == client) for run in row.runs]
    own = [(run, at) for run, at in own if at.any()]
    if not own:
        return None
    held = [run.certificates.correct[at] for run, at in own]
    return shares_over_seeds(held, [image_numbers(run)[at] for run, at in own])


def advice_payload(story: ReportContext) -> dict[str, Any] | None:
    """What the script needs to advise at another accuracy; None where there is no advice."""
    parts = story.comparison.clients
    if len(story.runs) < 2 or not any(p.stated for one in parts for p in one.pairs.values()):
        return None
    clients = zip(story.comparison.clients, _accuracies(story), strict=True)
    return {
        "local": _local(story.runs),
        "most": MOST_GROUPS,
        "none": NO_DIFFERENCE,
        "few": f"{NO_ADVICE}:",
        "clients": [_client(story, part, found) for part, found in clients],
    }


def _local(runs: Sequence[Row]) -> int | None:
    return next((place for place, run in enumerate(runs) if run.regime == "local"), None)


def _client(story: ReportContext, part: ClientComparison, found: _Accuracies) -> dict[str, Any]:
    order = ranking(part.acr, part.pairs)
    whys = [pair.why for pair in part.pairs.values()]
    pairs = {}
    for rank, ahead in enumerate(order):
        for behind in order[rank + 1 :]:
            pair = part.pairs[min(ahead, behind), max(ahead, behind)].seen_from(ahead)
            known = int(pair.shown) if pair.stated else None
            pairs[f"{ahead}-{behind}"] = [by_margin(pair, story.scale), known]
    return {
        "client": part.client,
        "images": str(part.images),
        "why": whys[0] if all(whys) else "",
        "order": order,
        "acr": ["–" if math.isnan(radius) else story.scale.text(radius) for radius in part.acr],
        "accuracy": [_share_numbers(one) for one in found.shares],
        "pairs": pairs,
    }


def _share_numbers(found: Share | None) -> list[Any]:
    """For the script; no accuracy that a client accepts is as small as that of no certificates."""
    if found is None:
        return [-1.0, -1.0, -1.0, _share_text(found)]
    return [found.value, found.low, found.high, _share_text(found)]


def _share_text(found: Share | None) -> str:
    if found is None:
        return "–"
    return f"{percent(found.value)} ({tenths(found.low)} to {tenths(found.high)})"


def advice_section(story: ReportContext, found: Sequence[Recommendation]) -> Markup:
    """Which regime each client should take, grouped by answer; nothing for a single run."""
    if len(story.runs) < 2 or not story.comparison.paired:
        return Markup()
    if not found or all(one.why for one in found):
        return _no_advice(story)
    groups = grouped(found)
    items = [_group(story, places, clients) for places, clients in groups[:MOST_GROUPS]]
    rest = [client for _, clients in groups[MOST_GROUPS:] for client in clients]
    if rest:
        others = el("span", {"class": "verdict"}, "Other answers, in the table below:")
        items.append(el("li", None, others, el("span", {"class": "who"}, client_list(rest))))
    accuracies = _accuracies(story)
    rows = [_row(story, one, own) for one, own in zip(found, accuracies, strict=True)]
    open_words = why_clients_are_open(story.runs, story.comparison, found)
    caption = "Recommendation for every client, from its own test images"
    return el(
        "section",
        {"id": "recommendation"},
        el("h2", None, "Which regime for which client"),
        el("p", None, _how(story)),
        *([] if open_words is None else [el("p", None, open_words)]),
        _accepted(),
        el("ul", {"class": "groups", "id": "advice"}, *items),
        el("p", {"class": "note js-only", "id": "advice-told", "role": "status", "hidden": True}),
        el(
            "details",
            None,
            el("summary", None, "Every client, with numbers"),
            table(caption, _HEAD, rows, {"id": "advice-table"}),
        ),
    )


def _no_advice(story: ReportContext) -> Markup:
    """That no client gets a recommendation, and why."""
    pairs = [p for part in story.comparison.clients for p in part.pairs.values()]
    whys = dict.fromkeys(p.why for p in pairs or story.comparison.pairs.values() if p.why)
    heading = el("h2", None, "Which regime for which client")
    said = el("p", None, f"No recommendation for any client: {'; '.join(whys)}.")
    return el("section", {"id": "recommendation"}, heading, said)


def _accepted() -> Markup:
    """The one thing a client must say: which accuracy it needs at least."""
    slider = {"type": "range", "id": "accepted", "min": "0", "max": "100", "step": "1"}
    label = "A client accepts a certified accuracy of at least"
    return el(
        "div",
        {"class": "accepted js-only", "hidden": True},
        el("label", {"for": "accepted"}, label, " ", el("output", {"id": "accepted-text"}, "0 %")),
        el("input", {**slider, "value": "0"}),
    )


def _how(story: ReportContext) -> str:
    clients = len(story.comparison.clients)
    pairs = clients * len(story.runs) * (len(story.runs) - 1) // 2
    wide = f" (wide enough for all {pairs} comparisons of all clients at once)"
    wide = wide if pairs > 1 else ""
    return (
        "The regime with the largest average certified radius on the client's own test images, "
        "among those that reach the accuracy it accepts (correct with a certificate). "
        f"Where the 95 % interval of a paired difference{wide} contains 0, these images do not "
        f"tell the regimes apart: {NO_DIFFERENCE}, and other reasons may decide."
    )


def _group(story: ReportContext, places: tuple[int, ...], clients: list[int]) -> Markup:
    if not places:
        told = el("span", {"class": "verdict"}, f"{NO_ADVICE}:")
        return el("li", None, told, el("span", {"class": "who"}, client_list(clients)))
    names = [named(story, place) for place in places]
    parts = [el("span", {"class": "choice"}, *names)]
    if len(places) > 1:
        parts.append(el("span", {"class": "verdict"}, NO_DIFFERENCE))
    parts.append(el("span", {"class": "who"}, client_list(clients)))
    return el("li", None, *parts)


def _row(story: ReportContext, one: Recommendation, own: _Accuracies) -> list[str]:
    if one.why:
        return [str(one.client), str(one.images), f"none: {one.why}", *["–"] * 4]
    scale, labels = story.scale, [run.label for run in story.runs]
    advice = labels[one.best]
    if one.tied:
        others = listed([labels[i] for i in sorted(one.tied)])
        advice = f"{advice}; {NO_DIFFERENCE} from {others}"
    return [
        str(one.client),
        str(one.images),
        verbatim(advice),
        scale.text(one.acr),
        _share_text(own.shares[one.best]),
        by_margin(one.margin, scale) if one.margin else "–",
        by_margin(one.alone, scale) if one.alone else "–",
    ]
