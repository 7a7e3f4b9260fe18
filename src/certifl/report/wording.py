"""What the comparison says, in sentences that are true of the data at hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from certifl.report.compare import Comparison, Difference, Standing, ranking, standing
from certifl.report.results import Row
from certifl.report.summary import accuracy_share, mean_acr, spread
from certifl.report.units import RadiusScale

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
        why: why there is no recommendation; empty where there is one.
    """

    client: int
    images: int
    best: int
    tied: tuple[int, ...]
    acr: float
    margin: Difference | None
    alone: Difference | None
    why: str = ""


def recommendations(runs: Sequence[Row], comparison: Comparison) -> list[Recommendation]:
    """One recommendation per client, from its own test images alone."""
    local = next((i for i, run in enumerate(runs) if run.regime == "local"), None)
    found = []
    for part in comparison.clients if len(runs) > 1 else ():
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
                "" if place.margin else next(iter(part.pairs.values())).why,
            )
        )
    return found


def grouped(found: Sequence[Recommendation]) -> list[tuple[tuple[int, ...], list[int]]]:
    """Clients with one answer: (regimes that cannot be told apart, clients), most clients first.

    Clients without a recommendation are a group without regimes.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for one in found:
        places = () if one.why else tuple(sorted((one.best, *one.tied)))
        groups.setdefault(places, []).append(one.client)
    return sorted(groups.items(), key=lambda item: (-len(item[1]), len(item[0]), item[0]))


def headline(
    runs: Sequence[Row], comparison: Comparison, scale: RadiusScale
) -> tuple[str, list[str]]:
    """The finding in one sentence, and the sentences that support it."""
    if not comparison.paired:
        return _side_by_side(runs, comparison, scale)
    return _one_run(runs[0], scale) if len(runs) == 1 else _several(runs, comparison, scale)


def _one_run(run: Row, scale: RadiusScale) -> tuple[str, list[str]]:
    at_zero = accuracy_share(run, 0.0)
    radius = scale.text(mean_acr(run))
    best, worst, gap = spread(run)
    finding = f"{run.label} certifies {percent(at_zero.value)} of the test images correctly"
    over = f"{len(run.clients)} {'clients' if len(run.clients) > 1 else 'client'}"
    seeds = len(run.runs)
    support = [
        f"The average certified radius is {radius}, the mean over {over}"
        f"{f' and {seeds} seeds' if seeds > 1 else ''}."
    ]
    if len(run.clients) > 1:
        ends = (" and the worst", "") if seeds > 1 else (f" ({best}) and the worst", f" ({worst})")
        support.append(f"Between the best client{ends[0]}{ends[1]} lie {scale.text(gap)}.")
    return f"{finding}.", support


def _several(
    runs: Sequence[Row], comparison: Comparison, scale: RadiusScale
) -> tuple[str, list[str]]:
    place = standing(comparison.acr, comparison.pairs)
    if place.margin is None:
        return _not_compared(runs, comparison)
    ranked = ranking(comparison.acr, comparison.pairs)
    stated = [i for i in ranked if i not in place.unknown]
    behind = [i for i in stated if i not in (place.best, *place.tied)]
    finding, support = _finding(runs, comparison, scale, place)
    if behind:
        support = [_lead(runs, comparison, scale, place.best, behind), _brackets(comparison)]
    return finding, [*support, *_left_apart(runs, comparison, place)]


def _finding(
    runs: Sequence[Row], comparison: Comparison, scale: RadiusScale, place: Standing
) -> tuple[str, list[str]]:
    """Who leads; where nobody does, between which values the radii lie."""
    labels = [run.label for run in runs]
    best, radius = labels[place.best], scale.text(comparison.acr[place.best])
    among = "Of those compared, " if place.unknown else ""
    if len(place.tied) + len(place.unknown) == len(runs) - 1:
        level = sorted((place.best, *place.tied))
        low, high = (end(comparison.acr[i] for i in level) for end in (min, max))
        finding = f"No difference shown between {listed([labels[i] for i in level])}."
        between = f"lie between {scale.text(low)} and {scale.text(high)}"
        said = f"Their average certified radii {between}." if high > low else f"All have {radius}."
        return finding, [said]
    if place.tied:
        tied = listed([labels[i] for i in place.tied])
        said = f"has the largest average certified radius, {radius}; {NO_DIFFERENCE} from {tied}."
    else:
        said = f"gives the largest average certified radius: {radius}."
    return f"{among}{best} {said}", []


def _lead(
    runs: Sequence[Row], comparison: Comparison, scale: RadiusScale, best: int, behind: list[int]
) -> str:
    """How far the leader is ahead of those that the images show to be behind."""
    ahead = [
        f"{by_margin(_from(comparison, best, i), scale)} ahead of {runs[i].label}"
        for i in behind[:_MOST_NAMED]
    ]
    if len(behind) > _MOST_NAMED:
        ahead.append(f"further ahead of the other {len(behind) - _MOST_NAMED}")
    return f"It is {listed(ahead)}."


def _brackets(comparison: Comparison) -> str:
    seeds = any(pair.seeds > 1 for pair in comparison.pairs.values())
    over = "test images and seeds" if seeds else "test images"
    together = ", wide enough for all comparisons at once" if len(comparison.pairs) > 1 else ""
    return f"In brackets: 95 % intervals over {over}{together}."


def _left_apart(runs: Sequence[Row], comparison: Comparison, place: Standing) -> list[str]:
    """Which regimes the leader is not compared with, and why."""
    best = runs[place.best].label
    return [
        f"{runs[i].label} is not compared with {best}: {_from(comparison, place.best, i).why}."
        for i in place.unknown
    ]


def _not_compared(runs: Sequence[Row], comparison: Comparison) -> tuple[str, list[str]]:
    """That no difference and no leader is stated, and why."""
    whys = list(dict.fromkeys(pair.why for pair in comparison.pairs.values()))
    names = listed([run.label for run in runs])
    none = "No two of " if len(runs) > 2 else ""
    finding = f"{none}{names} are {'' if none else 'not '}compared: {'; '.join(whys)}."
    return finding, ["So no radius, difference or recommendation is stated here."]


def why_clients_are_open(
    runs: Sequence[Row], comparison: Comparison, found: Sequence[Recommendation]
) -> str | None:
    """Why the mean shows a difference that single clients do not; None where none is open.

    A reader who sees "ahead" above and "no difference shown" below takes one of them for wrong.
    """
    if not found or not comparison.paired:
        return None
    place = standing(comparison.acr, comparison.pairs)
    ahead = [i for i in range(len(runs)) if i not in (place.best, *place.tied, *place.unknown)]
    both = [one for one in found if not one.why and place.best in (one.best, *one.tied)]
    still = [one for one in both if any(i in (one.best, *one.tied) for i in ahead)]
    if not still:
        return None
    images = range_of([one.images for one in still])
    return (
        f"{runs[place.best].label} is ahead of {listed([runs[i].label for i in ahead])} on "
        f"average over all clients, and yet {NO_DIFFERENCE} is what {len(still)} of {len(found)} "
        f"clients see of them: a client has {images} test images of its own, the mean over "
        f"clients rests on {comparison.images:,}, and fewer images tell only larger differences."
    )


def range_of(counts: Sequence[int]) -> str:
    """Smallest to largest count."""
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _side_by_side(
    runs: Sequence[Row], comparison: Comparison, scale: RadiusScale
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
    if not difference.stated:
        return f"not stated: {difference.why}"
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
