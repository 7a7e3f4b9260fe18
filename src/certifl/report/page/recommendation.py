"""The comparison in sentences that are true of the data, and which algorithm for which client."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from certifl.report import compare
from certifl.report.page.context import ReportContext, named
from certifl.report.page.html import Markup, details, el, paragraph, section, table, verbatim
from certifl.report.results import MODEL, Row
from certifl.report.summary import Share, accuracy_share, mean_acr, spread
from certifl.report.wording import RadiusScale, client_list, listed, outward, percent, range_of

NO_DIFFERENCE = "no difference shown"
NOT_PAIRED = (
    "Algorithms are compared image by image, on the same test images. Clients that share curves "
    "only keep the certificates of their images, so this page has no interval of a difference, no "
    "recommendation and no test of a claim. Clients that share rows make these possible "
    '(`share = "rows"`).'
)
_MOST_NAMED = 3


@dataclass(frozen=True)
class Recommendation:
    """The algorithm that gives one client the largest average certified radius.

    Attributes:
        part: all algorithms on the client's own test images. result: which of them leads.
    """

    part: compare.ClientComparison
    result: compare.Standing

    @property
    def tied(self) -> tuple[int, ...]:
        """Those of which no difference to the leader is shown."""
        return self.result.tied

    @property
    def why(self) -> str:
        """Why there is no recommendation; empty where there is one."""
        return "" if self.result.margin else next(iter(self.part.pairs.values())).why

    @property
    def choice(self) -> tuple[int, ...]:
        """The leader and those tied with it; empty without a recommendation."""
        return () if self.why else tuple(sorted((self.result.best, *self.tied)))


def recommendations(runs: Sequence[Row], comparison: compare.Comparison) -> list[Recommendation]:
    """One recommendation per client, from its own test images alone."""
    parts = comparison.clients if len(runs) > 1 else ()
    return [Recommendation(part, compare.standing(part.acr, part.pairs)) for part in parts]


def position_of_local(runs: Sequence[Row]) -> int | None:
    """Position of training alone; None where it was not run."""
    return next((i for i, run in enumerate(runs) if run.algorithm == "local"), None)


def grouped(answers: Sequence[Recommendation]) -> list[tuple[tuple[int, ...], list[int]]]:
    """Clients by answer: (best algorithm and those tied with it, clients), most clients first."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for one in answers:
        groups.setdefault(one.choice, []).append(one.part.client)
    return sorted(groups.items(), key=lambda item: (-len(item[1]), len(item[0]), item[0]))


def headline(
    runs: Sequence[Row], comparison: compare.Comparison, scale: RadiusScale
) -> tuple[str, list[str]]:
    """The finding in one sentence, and the sentences that support it."""
    if not comparison.paired:  # not image by image
        order = sorted(range(len(runs)), key=lambda i: (-comparison.acr[i], i))
        radii = [f"{runs[i].label} {scale.text(comparison.acr[i])}" for i in order]
        largest = f"{runs[order[0]].label} has the largest average certified radius of these runs"
        return f"{largest}: {listed(radii)}.", [NOT_PAIRED]
    if len(runs) == 1:
        return _one_run(runs[0], scale)
    result = compare.standing(comparison.acr, comparison.pairs)
    if result.margin is None:
        reasons = list(dict.fromkeys(pair.why for pair in comparison.pairs.values()))
        names, none = listed([run.label for run in runs]), "No two of " if len(runs) > 2 else ""
        finding = f"{none}{names} are {'' if none else 'not '}compared: {'; '.join(reasons)}."
        return finding, ["No radius, difference or recommendation is stated."]
    finding, support = _finding(runs, comparison, scale, result)
    if result.behind:
        support = _margins(runs, comparison, scale, result)
    best = runs[result.best].label
    for i in result.unknown:
        why = compare.difference(comparison.pairs, result.best, i).why
        support.append(f"{runs[i].label} is not compared with {best}: {why}.")
    return finding, support


def _one_run(run: Row, scale: RadiusScale) -> tuple[str, list[str]]:
    at_zero = accuracy_share(run, 0.0)
    radius = scale.text(mean_acr(run))
    best, worst, gap = spread(run)
    finding = f"{run.label} certifies {percent(at_zero.value)} of the test images correctly"
    over = f"{len(run.clients)} {'clients' if len(run.clients) > 1 else 'client'}"
    seeds = len(run.runs)
    mean = f", the mean over {over}{f' and {seeds} seeds' if seeds > 1 else ''}"
    if run.algorithm == MODEL and len(run.clients) == 1:
        mean = ""
    support = [f"The average certified radius is {radius}{mean}."]
    if len(run.clients) > 1:
        numbers = ("", "") if seeds > 1 else (f" ({best})", f" ({worst})")
        support.append(
            f"The best client{numbers[0]} and the worst{numbers[1]} are {scale.text(gap)} apart."
        )
    return f"{finding}.", support


def _finding(
    runs: Sequence[Row],
    comparison: compare.Comparison,
    scale: RadiusScale,
    result: compare.Standing,
) -> tuple[str, list[str]]:
    """The leader; where there is none, the range of the radii."""
    labels = [run.label for run in runs]
    best, radius = labels[result.best], scale.text(comparison.acr[result.best])
    among = "Of those compared, " if result.unknown else ""
    if len(result.tied) + len(result.unknown) == len(runs) - 1:
        level = sorted((result.best, *result.tied))
        low, high = (end(comparison.acr[i] for i in level) for end in (min, max))
        finding = f"No difference shown between {listed([labels[i] for i in level])}."
        span = f"from {scale.text(low)} to {scale.text(high)}" if high > low else radius
        return finding, [f"Their average certified radius is {span}."]
    if result.tied:
        tied = listed([labels[i] for i in result.tied])
        text = f"has the largest average certified radius, {radius}; {NO_DIFFERENCE} from {tied}."
    else:
        text = f"gives the largest average certified radius: {radius}."
    return f"{among}{best} {text}", []


def _margins(
    runs: Sequence[Row],
    comparison: compare.Comparison,
    scale: RadiusScale,
    result: compare.Standing,
) -> list[str]:
    """How far the leader is ahead of those behind it, and what the intervals mean."""
    behind, pairs = result.behind, comparison.pairs
    ahead = [
        f"{by_margin(compare.difference(pairs, result.best, i), scale)} ahead of {runs[i].label}"
        for i in behind[:_MOST_NAMED]
    ]
    if len(behind) > _MOST_NAMED:
        ahead.append(f"further ahead of the other {len(behind) - _MOST_NAMED}")
    seeds = any(pair.seeds > 1 for pair in pairs.values())
    over = "test images and seeds" if seeds else "test images"
    together = ", wide enough for all comparisons at once" if len(pairs) > 1 else ""
    meaning = f"In parentheses: 95 % intervals over {over}{together}."
    return [f"It is {listed(ahead)}.", meaning]


def why_clients_stay_undecided(
    runs: Sequence[Row], comparison: compare.Comparison, answers: Sequence[Recommendation]
) -> str | None:
    """Why the mean shows a difference that single clients do not; None where all clients do.

    Without this, "ahead" above and "no difference shown" below look like a contradiction.
    """
    if not answers or not comparison.paired:
        return None
    result = compare.standing(comparison.acr, comparison.pairs)
    behind = sorted(result.behind)
    both = [one for one in answers if result.best in one.choice]
    undecided = [one for one in both if any(i in one.choice for i in behind)]
    if not undecided:
        return None
    images = range_of([one.part.images for one in undecided])
    whose = "" if len(behind) == 1 else " from at least one of them"
    return (
        f"{runs[result.best].label} is ahead of {listed([runs[i].label for i in behind])} on "
        f"average over all clients, but for {len(undecided)} of {len(answers)} clients no "
        f"difference{whose} is shown. A client has {images} test images, the average over "
        f"clients is based on {comparison.images:,}, and fewer images show larger differences "
        "only."
    )


def by_margin(pair: compare.Difference, scale: RadiusScale) -> str:
    """A difference with its interval; the estimate is rounded down, the interval outward."""
    if not pair.stated:
        return f"not stated: {pair.why}"
    finite = math.isfinite(pair.low) and math.isfinite(pair.high)
    interval = scale.interval(pair.low, pair.high) if finite else "too few images for an interval"
    return f"{scale.down(pair.estimate)}{scale.suffix} ({interval})"


# The section: clients by answer, and every client with numbers.

MOST_GROUPS = 8
NO_RECOMMENDATION = "No recommendation: too few images in common"
_ACCEPTS = "A client accepts a certified accuracy of at least "
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


def _client(context: ReportContext, part: compare.ClientComparison) -> dict[str, Any]:
    order = compare.ranking(part.acr, part.pairs)
    reasons = [pair.why for pair in part.pairs.values()]
    pairs = {}
    for rank, ahead in enumerate(order):
        for behind in order[rank + 1 :]:
            pair = compare.difference(part.pairs, ahead, behind)
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
    return f"{percent(share.value)} ({outward(share.low, share.high)})"


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
    slider = {"type": "range", "id": "accepted", "min": "0", "max": "100", "step": "1"}
    output = el("output", {"id": "accepted-text"}, "0 %")
    caption = "Recommendation for every client, from its own test images"
    rows = [_row(context, one) for one in answers]
    return section(
        "recommendation",
        _HEADING,
        paragraph(_method(context)),
        *([] if undecided is None else [paragraph(undecided)]),
        el(
            "div",
            {"class": "accepted js-only", "hidden": True},
            el("label", {"for": "accepted"}, _ACCEPTS, output),
            el("input", {**slider, "value": "0"}),
        ),
        el("ul", {"class": "groups", "id": "recommendations"}, *items),
        el("p", {**status, "hidden": True}),
        details(
            "Every client, with numbers",
            table(caption, _HEAD, rows, {"id": "recommendation-table"}),
        ),
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
    part, best, margin = one.part, one.result.best, one.result.margin
    known = [str(part.client), str(part.images)]
    if one.why:
        return [*known, f"none: {one.why}", *["–"] * 4]
    scale, labels = context.scale, [run.label for run in context.runs]
    others = listed([labels[i] for i in sorted(one.tied)]) if one.tied else ""
    local = position_of_local(context.runs)
    alone = None
    if local is not None and local != best:
        alone = compare.difference(part.pairs, best, local)
    return [
        *known,
        verbatim(labels[best] + (f"; {NO_DIFFERENCE} from {others}" if others else "")),
        scale.text(part.acr[best]),
        _share_text(context.accuracies[part.client][best]),
        by_margin(margin, scale) if margin else "–",
        by_margin(alone, scale) if alone else "–",
    ]
