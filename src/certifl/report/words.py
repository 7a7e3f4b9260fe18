"""What the comparison says, in sentences that are true of the data at hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from certifl.report.compare import Comparison, Difference, standing
from certifl.report.results import RunResults
from certifl.report.scale import RadiusScale
from certifl.report.summary import accuracy_share, client_acr, spread

__all__ = [
    "NOT_PAIRED",
    "NO_DIFFERENCE",
    "Recommendation",
    "by_margin",
    "client_list",
    "grouped",
    "headline",
    "listed",
    "percent",
    "recommendations",
    "tenths",
]

NO_DIFFERENCE = "no difference shown"
NOT_PAIRED = (
    "Regimes are compared image by image, on the same test images; clients that told only curves "
    "kept the certificates of theirs. So this page has no interval of a difference, no "
    "recommendation and no claim put to the test. Clients that share rows make them possible "
    '(`share = "rows"`).'
)
_MOST_NAMED = 3


@dataclass(frozen=True)
class Recommendation:
    """Which regime gives one client the largest average certified radius.

    Attributes:
        client: number of the client. images: its test images.
        best: position of the leading run.
        tied: runs of which no difference to the leader is shown.
        acr: the leader's average certified radius.
        margin: leader minus the next best run.
        alone: leader minus training alone; None where that was not run or leads itself.
    """

    client: int
    images: int
    best: int
    tied: tuple[int, ...]
    acr: float
    margin: Difference | None
    alone: Difference | None


def recommendations(runs: Sequence[RunResults], comparison: Comparison) -> list[Recommendation]:
    """One recommendation per client, from its own test images alone."""
    local = next((i for i, run in enumerate(runs) if run.regime == "local"), None)
    found = []
    for part in comparison.clients:
        place = standing(part.acr, part.pairs)
        alone = None
        if local is not None and local != place.best:
            pair = min(local, place.best), max(local, place.best)
            alone = part.pairs[pair].seen_from(place.best)
        found.append(
            Recommendation(
                part.client,
                part.images,
                place.best,
                place.tied,
                part.acr[place.best],
                place.margin,
                alone,
            )
        )
    return found


def grouped(found: Sequence[Recommendation]) -> list[tuple[tuple[int, ...], list[int]]]:
    """Clients with one answer: (runs that cannot be told apart, clients), most clients first."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for one in found:
        groups.setdefault(tuple(sorted((one.best, *one.tied))), []).append(one.client)
    return sorted(groups.items(), key=lambda item: (-len(item[1]), len(item[0]), item[0]))


def headline(
    runs: Sequence[RunResults], comparison: Comparison, scale: RadiusScale
) -> tuple[str, list[str]]:
    """The finding in one sentence, and the sentences that support it."""
    if not comparison.paired:
        return _side_by_side(runs, comparison, scale)
    return _one_run(runs[0], scale) if len(runs) == 1 else _several(runs, comparison, scale)


def _one_run(run: RunResults, scale: RadiusScale) -> tuple[str, list[str]]:
    at_zero = accuracy_share(run, 0.0)
    radius = scale.text(float(client_acr(run).mean()))
    best, worst, gap = spread(run)
    finding = f"{run.label} certifies {percent(at_zero.value)} of the test images correctly"
    support = [
        f"The average certified radius is {radius}, the mean over "
        f"{len(run.clients)} {'clients' if len(run.clients) > 1 else 'client'}."
    ]
    if len(run.clients) > 1:
        support.append(
            f"Between the best client ({best}) and the worst ({worst}) lie {scale.text(gap)}."
        )
    return f"{finding}.", support


def _several(
    runs: Sequence[RunResults], comparison: Comparison, scale: RadiusScale
) -> tuple[str, list[str]]:
    place = standing(comparison.acr, comparison.pairs)
    best = runs[place.best].label
    radius = scale.text(comparison.acr[place.best])
    behind = [i for i in _by_acr(comparison) if i not in (place.best, *place.tied)]
    if not behind:
        low, high = min(comparison.acr), max(comparison.acr)
        finding = f"No difference shown between {listed([run.label for run in runs])}."
        support = [f"Their average certified radii lie between {scale.text(low)} and {radius}."]
        return finding, support if high > low else [f"All have {radius}."]
    if place.tied:
        tied = listed([runs[i].label for i in place.tied])
        finding = (
            f"{best} has the largest average certified radius, {radius}; "
            f"{NO_DIFFERENCE} from {tied}."
        )
    else:
        finding = f"{best} gives the largest average certified radius: {radius}."
    ahead = [
        f"{by_margin(_from(comparison, place.best, i), scale)} ahead of {runs[i].label}"
        for i in behind[:_MOST_NAMED]
    ]
    if len(behind) > _MOST_NAMED:
        ahead.append(f"further ahead of the other {len(behind) - _MOST_NAMED}")
    brackets = "In brackets: 95 % intervals over test images"
    together = ", wide enough for all comparisons at once" if len(comparison.pairs) > 1 else ""
    return finding, [f"It is {listed(ahead)}.", f"{brackets}{together}."]


def _side_by_side(
    runs: Sequence[RunResults], comparison: Comparison, scale: RadiusScale
) -> tuple[str, list[str]]:
    """Average radii of regimes that cannot be told apart image by image."""
    order = _by_acr(comparison)
    radii = [f"{runs[i].label} {scale.text(comparison.acr[i])}" for i in order]
    largest = f"The largest average certified radius at hand is that of {runs[order[0]].label}"
    return f"{largest}: {listed(radii)}.", [NOT_PAIRED]


def _by_acr(comparison: Comparison) -> list[int]:
    return sorted(range(len(comparison.acr)), key=lambda i: (-comparison.acr[i], i))


def _from(comparison: Comparison, run: int, other: int) -> Difference:
    return comparison.pairs[min(run, other), max(run, other)].seen_from(run)


def by_margin(difference: Difference, scale: RadiusScale) -> str:
    """A difference with its interval; the estimate is rounded down, the interval outward."""
    if not (difference.low > -float("inf") and difference.high < float("inf")):
        return f"{scale.down(difference.estimate)}{scale.suffix} (too few images for an interval)"
    interval = scale.interval(difference.low, difference.high)
    return f"{scale.down(difference.estimate)}{scale.suffix} ({interval})"


def percent(value: float) -> str:
    """A share of images, to a tenth of a per cent."""
    return f"{tenths(value)} %"


def tenths(value: float) -> str:
    """A share in per cent; halves go up, here and in the page's script, so that both agree."""
    return f"{math.floor(1000 * value + 0.5 + 1e-9) / 10:.1f}"


def listed(names: Sequence[str]) -> str:
    """a, b and c; at least one name."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def client_list(clients: Sequence[int]) -> str:
    """Numbers of clients with runs of neighbours drawn together: 0-3, 7."""
    parts: list[list[int]] = []
    for client in sorted(clients):
        if parts and client == parts[-1][-1] + 1:
            parts[-1].append(client)
        else:
            parts.append([client])
    texts = []
    for part in parts:
        if len(part) < 3:
            texts += [str(client) for client in part]
        else:
            texts.append(f"{part[0]}–{part[-1]}")
    return f"client{'s' if len(clients) > 1 else ''} {', '.join(texts)}"
