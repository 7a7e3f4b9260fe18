"""Which regime gives a client the largest average certified radius at an accuracy it accepts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from certifl.report.compare import ClientComparison, paired_values
from certifl.report.markup import Markup, el, table, verbatim
from certifl.report.results import RunResults
from certifl.report.story import Story, named
from certifl.report.summary import Share, share
from certifl.report.words import (
    NO_DIFFERENCE,
    Recommendation,
    by_margin,
    client_list,
    grouped,
    listed,
    percent,
    tenths,
)

__all__ = ["MOST_GROUPS", "advice_payload", "advice_section"]

MOST_GROUPS = 8
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
    shares: tuple[Share, ...]


def _accuracies(runs: Sequence[RunResults]) -> list[_Accuracies]:
    """On the images that all regimes certified, as in the comparison of radii."""
    clients, values = paired_values(runs, lambda run: run.certificates.correct.astype(float))
    return [
        _Accuracies(
            int(client), tuple(share(int(right), len(own)) for right in own.sum(axis=0).tolist())
        )
        for client, own in zip(clients, values, strict=True)
    ]


def advice_payload(story: Story) -> dict[str, Any] | None:
    """What the script needs to advise at another accuracy; None where there is no advice."""
    if len(story.runs) < 2 or not story.comparison.paired:
        return None
    clients = zip(story.comparison.clients, _accuracies(story.runs), strict=True)
    return {
        "local": _local(story.runs),
        "most": MOST_GROUPS,
        "none": NO_DIFFERENCE,
        "clients": [_client(story, part, found) for part, found in clients],
    }


def _local(runs: Sequence[RunResults]) -> int | None:
    return next((place for place, run in enumerate(runs) if run.regime == "local"), None)


def _client(story: Story, part: ClientComparison, found: _Accuracies) -> dict[str, Any]:
    order = sorted(range(len(part.acr)), key=lambda i: (-part.acr[i], i))
    pairs = {}
    for rank, ahead in enumerate(order):
        for behind in order[rank + 1 :]:
            pair = part.pairs[min(ahead, behind), max(ahead, behind)].seen_from(ahead)
            pairs[f"{ahead}-{behind}"] = [by_margin(pair, story.scale), int(pair.shown)]
    return {
        "client": part.client,
        "images": str(part.images),
        "order": order,
        "acr": [story.scale.text(radius) for radius in part.acr],
        "accuracy": [[s.value, s.low, s.high, _share_text(s)] for s in found.shares],
        "pairs": pairs,
    }


def _share_text(found: Share) -> str:
    return f"{percent(found.value)} ({tenths(found.low)} to {tenths(found.high)})"


def advice_section(story: Story, found: Sequence[Recommendation]) -> Markup:
    """Which regime each client should take, grouped by answer; nothing for a single run."""
    if len(story.runs) < 2 or not story.comparison.paired:
        return Markup()
    groups = grouped(found)
    items = [_group(story, places, clients) for places, clients in groups[:MOST_GROUPS]]
    rest = [client for _, clients in groups[MOST_GROUPS:] for client in clients]
    if rest:
        others = el("span", {"class": "verdict"}, "Other answers, in the table below:")
        items.append(el("li", None, others, el("span", {"class": "who"}, client_list(rest))))
    accuracies = _accuracies(story.runs)
    rows = [_row(story, one, own) for one, own in zip(found, accuracies, strict=True)]
    caption = "Recommendation for every client, from its own test images"
    return el(
        "section",
        {"id": "recommendation"},
        el("h2", None, "Which regime for which client"),
        el("p", None, _how(story)),
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


def _how(story: Story) -> str:
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


def _group(story: Story, places: tuple[int, ...], clients: list[int]) -> Markup:
    names = [named(story, place) for place in places]
    parts = [el("span", {"class": "choice"}, *names)]
    if len(places) > 1:
        parts.append(el("span", {"class": "verdict"}, NO_DIFFERENCE))
    parts.append(el("span", {"class": "who"}, client_list(clients)))
    return el("li", None, *parts)


def _row(story: Story, one: Recommendation, own: _Accuracies) -> list[str]:
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
