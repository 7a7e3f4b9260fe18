"""The comparison in sentences that are true of the given data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from certifl.report.compare import Comparison, Difference, Standing, difference, standing
from certifl.report.results import MODEL, Row
from certifl.report.summary import accuracy_share, mean_acr, spread
from certifl.report.units import RadiusScale

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
        client: number of the client. images: its test images.
        best: position of the leading run.
        tied: runs of which no difference to the leader is shown.
        acr: the leader's average certified radius.
        margin: leader minus the next best run.
        alone: leader minus training alone; None where that was not run or is the leader.
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
    local = position_of_local(runs)
    answers = []
    for part in comparison.clients if len(runs) > 1 else ():
        result = standing(part.acr, part.pairs)
        best, alone = result.best, None
        if local is not None and local != best:
            alone = difference(part.pairs, best, local)
        answers.append(
            Recommendation(
                part.client,
                part.images,
                best,
                result.tied,
                part.acr[best],
                result.margin,
                alone,
                "" if result.margin else next(iter(part.pairs.values())).why,
            )
        )
    return answers


def position_of_local(runs: Sequence[Row]) -> int | None:
    """Position of training alone; None where it was not run."""
    return next((i for i, run in enumerate(runs) if run.algorithm == "local"), None)


def grouped(answers: Sequence[Recommendation]) -> list[tuple[tuple[int, ...], list[int]]]:
    """Clients by answer: (best algorithm and those tied with it, clients), most clients first.

    Clients without a recommendation are a group without algorithms.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for one in answers:
        positions = () if one.why else tuple(sorted((one.best, *one.tied)))
        groups.setdefault(positions, []).append(one.client)
    return sorted(groups.items(), key=lambda item: (-len(item[1]), len(item[0]), item[0]))


def headline(
    runs: Sequence[Row], comparison: Comparison, scale: RadiusScale
) -> tuple[str, list[str]]:
    """The finding in one sentence, and the sentences that support it."""
    if not comparison.paired:
        return _side_by_side(runs, comparison, scale)
    if len(runs) == 1:
        return _one_run(runs[0], scale)
    result = standing(comparison.acr, comparison.pairs)
    if result.margin is None:
        return _not_compared(runs, comparison)
    finding, support = _finding(runs, comparison, scale, result)
    if result.behind:
        support = _margins(runs, comparison, scale, result)
    best = runs[result.best].label
    for i in result.unknown:
        why = difference(comparison.pairs, result.best, i).why
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
    runs: Sequence[Row], comparison: Comparison, scale: RadiusScale, result: Standing
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
    runs: Sequence[Row], comparison: Comparison, scale: RadiusScale, result: Standing
) -> list[str]:
    """How far the leader is ahead of those behind it, and what the intervals mean."""
    behind, pairs = result.behind, comparison.pairs
    ahead = [
        f"{by_margin(difference(pairs, result.best, i), scale)} ahead of {runs[i].label}"
        for i in behind[:_MOST_NAMED]
    ]
    if len(behind) > _MOST_NAMED:
        ahead.append(f"further ahead of the other {len(behind) - _MOST_NAMED}")
    seeds = any(pair.seeds > 1 for pair in pairs.values())
    over = "test images and seeds" if seeds else "test images"
    together = ", wide enough for all comparisons at once" if len(pairs) > 1 else ""
    meaning = f"In parentheses: 95 % intervals over {over}{together}."
    return [f"It is {listed(ahead)}.", meaning]


def _not_compared(runs: Sequence[Row], comparison: Comparison) -> tuple[str, list[str]]:
    """That no difference and no leader is stated, and why."""
    reasons = list(dict.fromkeys(pair.why for pair in comparison.pairs.values()))
    names = listed([run.label for run in runs])
    none = "No two of " if len(runs) > 2 else ""
    finding = f"{none}{names} are {'' if none else 'not '}compared: {'; '.join(reasons)}."
    return finding, ["No radius, difference or recommendation is stated."]


def why_clients_stay_undecided(
    runs: Sequence[Row], comparison: Comparison, answers: Sequence[Recommendation]
) -> str | None:
    """Why the mean shows a difference that single clients do not; None where all clients do.

    Without this, "ahead" above and "no difference shown" below look like a contradiction.
    """
    if not answers or not comparison.paired:
        return None
    result = standing(comparison.acr, comparison.pairs)
    behind = sorted(result.behind)
    both = [one for one in answers if not one.why and result.best in (one.best, *one.tied)]
    undecided = [one for one in both if any(i in (one.best, *one.tied) for i in behind)]
    if not undecided:
        return None
    images = range_of([one.images for one in undecided])
    return (
        f"{runs[result.best].label} is ahead of {listed([runs[i].label for i in behind])} on "
        f"average over all clients, but for {len(undecided)} of {len(answers)} clients no "
        f"difference is shown. A client has {images} test images, the average over "
        f"clients is based on {comparison.images:,}, and fewer images show larger differences "
        "only."
    )


def range_of(counts: Iterable[int]) -> str:
    """Smallest to largest count; empty without counts."""
    distinct = sorted(set(counts))
    return " to ".join(f"{count:,}" for count in dict.fromkeys(distinct[:1] + distinct[-1:]))


def markdown_table(
    head: Sequence[str], rows: Iterable[Sequence[str]], numbers: bool = False
) -> str:
    """A table in Markdown; with `numbers`, columns after the first are aligned on the right."""
    lines = [head, ["---", *["---:" if numbers else "---"] * (len(head) - 1)], *rows]
    # A stroke within a cell would end it.
    return "\n".join(f"| {' | '.join(c.replace('|', '/') for c in cells)} |" for cells in lines)


def _side_by_side(
    runs: Sequence[Row], comparison: Comparison, scale: RadiusScale
) -> tuple[str, list[str]]:
    """Average radii of algorithms that cannot be compared image by image."""
    order = sorted(range(len(runs)), key=lambda i: (-comparison.acr[i], i))
    radii = [f"{runs[i].label} {scale.text(comparison.acr[i])}" for i in order]
    largest = f"{runs[order[0]].label} has the largest average certified radius of these runs"
    return f"{largest}: {listed(radii)}.", [NOT_PAIRED]


def by_margin(pair: Difference, scale: RadiusScale) -> str:
    """A difference with its interval; the estimate is rounded down, the interval outward."""
    if not pair.stated:
        return f"not stated: {pair.why}"
    finite = math.isfinite(pair.low) and math.isfinite(pair.high)
    interval = scale.interval(pair.low, pair.high) if finite else "too few images for an interval"
    return f"{scale.down(pair.estimate)}{scale.suffix} ({interval})"


def percent(value: float) -> str:
    """A share of images, to a tenth of a percent."""
    return f"{tenths(value)} %"


def tenths(value: float) -> str:
    """A share in percent; halves round up, here and in the page's script, so that both agree."""
    return f"{math.floor(1000 * value + 0.5 + 1e-9) / 10:.1f}"


def listed(names: Sequence[str]) -> str:
    """a, b and c; at least one name."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def client_list(clients: Sequence[int]) -> str:
    """Numbers of clients, consecutive ones as a range: clients 0–3, 7."""
    parts: list[list[int]] = []
    for client in sorted(clients):
        if parts and client == parts[-1][-1] + 1:
            parts[-1].append(client)
        else:
            parts.append([client])
    texts = [f"{p[0]}–{p[-1]}" if len(p) > 2 else ", ".join(map(str, p)) for p in parts]
    return f"client{'s' if len(clients) > 1 else ''} {', '.join(texts)}"
