"""Verdicts on the paper's claims: for one figure, for a whole study, and as an own page."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from certifl.paper.claims import ClaimResult, Report, claim_rows
from certifl.paper.claims.designs import Finding
from certifl.paper.claims.render import COMPARISON_HEAD, comparison_row, verdict_words
from certifl.paper.claims.rules import (
    MARGIN,
    NOT_SUPPORTED,
    NOT_TESTED,
    SUPPORTED,
    UNDECIDED,
    VERDICTS,
    all_but_one,
    any_supported,
    every,
)
from certifl.report.wording import markdown_table, range_of

_HEAD = ("claim", "verdict", "effect (points)", "95 % together", "images", "clients")
_KEYS = ("claim", "verdict", "effect", "interval", "images", "clients")
_HERE = "in this figure"


def bears_on(result: ClaimResult, figure: str) -> bool:
    """Whether the paper shows a claim in a figure ("figure5-matched" goes with Figure 5)."""
    found = re.search(r"\d+", figure)
    return found is not None and found.group() in re.findall(r"\d+", result.claim.figure)


def figure_claims(report: Report, figure: str, runs: Collection[Path]) -> tuple[str, str]:
    """A figure's claims: verdicts in words and as a table, and every comparison."""
    results = [result for result in report.results if bears_on(result, figure)]
    if not results:
        return "None of the claims that are tested here refers to this figure.", ""
    names = {run.name for run in runs}
    own = [(result, _own(result, names)) for result in results]
    judged = [t for _, comparisons in own for t in comparisons if t.verdict]
    words = "\n".join(f"- {_words(result, comparisons)}" for result, comparisons in own)
    tables = [
        f"### {result.claim.name}\n\n"
        + markdown_table(COMPARISON_HEAD, map(comparison_row, comparisons))
        for result, comparisons in own
        if comparisons
    ]
    parts = (words, _open(judged), _verdicts(report, results))
    return "\n\n".join(part for part in parts if part), "\n\n".join(tables)


def sentences(report: Report, figure: str) -> str:
    """What the paper says of a figure: the sentences of its claims."""
    return "\n".join(
        f"- {result.claim.name}: {result.claim.sentence}"
        for result in report.results
        if bears_on(result, figure)
    )


def _verdicts(report: Report, results: Sequence[ClaimResult]) -> str:
    rows = claim_rows(dataclasses.replace(report, results=tuple(results)))
    return markdown_table(_HEAD, [[str(row[key]) for key in _KEYS] for row in rows])


def _own(result: ClaimResult, names: Collection[str]) -> tuple[Finding, ...]:
    """The comparisons with runs of this figure."""
    return tuple(
        tested
        for tested in result.comparisons
        if any(Path(run).name in names for run in tested.runs)
    )


def _words(result: ClaimResult, comparisons: tuple[Finding, ...]) -> str:
    """The verdict of the study on a claim, and the part of this figure's runs in it."""
    own = dataclasses.replace(
        result, verdict=_HERE, comparisons=comparisons, missing=(), partly=False
    )
    sentences = [f"**{result.claim.name}: {result.verdict}.**"]
    if own.judged:
        sentences.append(f"{verdict_words(own)} {_reach(own.judged)}")
    else:
        sentences.append("No two runs of this figure could be compared for it.")
    if len(own.judged) < len(result.judged):
        sentences.append(
            f"The verdict is based on {len(result.judged)} comparisons of the whole study."
        )
    if result.missing and result.verdict != NOT_TESTED:
        sentences.append("Not all runs that the claim is about were computed.")
    return " ".join(sentences)


def _reach(judged: Sequence[Finding]) -> str:
    """The range of the intervals of some comparisons, and their numbers of images."""
    known = _with_interval(judged)
    images = range_of(tested.effect.images for tested in known or judged)
    if not known:
        return f"({images} images: too few of a client for an interval.)"
    low, high = min(t.together[0] for t in known), max(t.together[1] for t in known)
    each = "Intervals lie" if len(known) > 1 else "The interval lies"
    ends = math.floor(1000 * low + 1e-9) / 10 + 0.0, math.ceil(1000 * high - 1e-9) / 10 + 0.0
    text = f"{each} between {ends[0]:+.1f} and {ends[1]:+.1f} points ({images} images)"
    few = len(judged) - len(known)
    return f"{text}; for {few} there are too few images." if few else f"{text}."


def _with_interval(tested: Sequence[Finding]) -> list[Finding]:
    return [one for one in tested if math.isfinite(one.together[0] - one.together[1])]


def _open(judged: Sequence[Finding]) -> str:
    """Why comparisons are undecided: the width of their intervals and their number of images."""
    still = [t for t in judged if t.verdict == UNDECIDED]
    known = _with_interval(still)
    if not known:
        return ""
    widths = [100 * (t.together[1] - t.together[0]) for t in known]
    images = range_of(tested.effect.images for tested in known)
    few = len(still) - len(known)
    none = f" For {few} of them a client has too few images for an interval." if few else ""
    return (
        f"{len(still)} of {len(judged)} comparisons are undecided: with {images} images their "
        f"intervals are {min(widths):.1f} to {max(widths):.1f} points wide, where "
        f"{100 * MARGIN:g} points, or less near 0, count as a difference.{none} With more images "
        "they would be narrower."
    )


def overview(report: Report, pages: Mapping[str, str], missing: Sequence[str] = ()) -> str:
    """All claims with their verdicts over a whole study, and links to the figures' pages."""
    rows = []
    for result, row in zip(report.results, claim_rows(report), strict=True):
        links = [f"[{name}]({page})" for name, page in pages.items() if bears_on(result, name)]
        numbers = (str(row[key]) for key in _KEYS[2:])
        rows.append([row["claim"], result.claim.sentence, _verdict(result, missing), *numbers])
        rows[-1].append(", ".join(links) or result.claim.figure)
    return markdown_table(("claim", "what the paper says", *_HEAD[1:], "shown in"), rows)


def tally(report: Report, missing: Sequence[str] = ()) -> str:
    """How many claims have which verdict."""
    found = [_verdict(result, missing) for result in report.results]
    verdicts = [verdict + so_far for verdict in VERDICTS for so_far in ("", _SO_FAR)]
    counts = [f"{found.count(verdict)} {verdict}" for verdict in verdicts if verdict in found]
    return f"Of {len(found)} claims: {', '.join(counts)}."


# The page "Does the paper hold?": every claim in one row, and what follows for a choice.


_ANSWERS = {
    SUPPORTED: "**yes**",
    NOT_SUPPORTED: "**no**",
    UNDECIDED: "undecided",
    NOT_TESTED: "not computed yet",
}
_SO_FAR = " so far"
# By question of somebody who has to choose: the claims it rests on, and what each verdict on the
# first of them means. Nothing here depends on a number.
_CHOICES: tuple[tuple[str, tuple[str, ...], Mapping[str, str]], ...] = (
    (
        "Alone or together, with many clients",
        ("4.1 (ii)", "4.1 (ii) by over 20 points"),
        {
            SUPPORTED: "Train together: with 10 or 20 clients FedAvg certifies more in every "
            "setting.",
            NOT_SUPPORTED: "Training together does not pay in every setting: compare both on your "
            "own data.",
            UNDECIDED: "These runs do not decide it for every setting: see the comparisons.",
        },
    ),
    (
        "Alone or together, with few clients that have many images",
        ("4.1 (i)",),
        {
            SUPPORTED: "It makes little difference: training alone certifies about as much.",
            NOT_SUPPORTED: "It does make a difference: with 4 clients, training alone and FedAvg "
            "are not equal.",
            UNDECIDED: "These runs do not show that they are equal, nor that they differ.",
        },
    ),
    (
        "Personalize a model that was trained robustly",
        ("4.1 (iii)",),
        {
            SUPPORTED: "No need, and no harm: it certifies as much as the global model.",
            NOT_SUPPORTED: "It changes what is certified: fine-tune only if a comparison on your "
            "own data says so.",
            UNDECIDED: "These runs do not decide it in every setting.",
        },
    ),
    (
        "Personalize a model that was trained without noise",
        ("4.2 from nominal", "4.3 (i)", "A.2"),
        {
            SUPPORTED: "Yes: a few epochs with the perturbation make it certify more.",
            NOT_SUPPORTED: "Not against every perturbation: a few epochs do not always make it "
            "certify more.",
            UNDECIDED: "These runs do not decide it for every perturbation.",
        },
    ),
    (
        "Mix the global and the local model",
        ("4.4 (i)", "4.4 (i) matched steps"),
        {
            SUPPORTED: "Yes: the mixture certifies more than FedAvg for almost every λ.",
            NOT_SUPPORTED: "Not as a rule: the mixture does not certify more than FedAvg for "
            "almost every λ.",
            UNDECIDED: "These runs do not decide it.",
        },
    ),
)


def paper_page(report: Report, missing: Sequence[str]) -> str:
    """The page.

    Args:
        report: all claims, tested.
        missing: names of the figures that are not computed yet.
    """
    rows = [
        [str(row["claim"]), str(row["sentence"]), _answer(result, missing), _interval(row)]
        for result, row in zip(report.results, claim_rows(report), strict=True)
    ]
    seeds = len(report.seeds)
    notes = [
        "Points are hundredths of the largest possible radius, or of the images. Each interval "
        "covers all judged comparisons of its claim, at 95 % for all of them at once.",
        f"{'One training seed' if seeds < 2 else f'{seeds} training seeds'}, "
        f"{report.runs} runs. [Rules](../claims.md) and margins were fixed before computing.",
    ]
    if missing:
        notes.append(f"Not computed yet: {', '.join(missing)}.")
    parts = [
        "# Does the paper hold?",
        f"Made by `python docs/results/figures.py`. {tally(report, missing)}",
        markdown_table(
            ("claim", "what the paper says", "here", "difference, 95 % (points)"), rows
        ),
        "\n".join(f"- {note}" for note in notes),
        "## What it means for a choice",
        "\n".join(f"- **{question}**: {answer}" for question, answer in choices(report, missing)),
        "[All figures and their numbers](README.md).",
    ]
    return "\n\n".join(parts) + "\n"


def _answer(result: ClaimResult, missing: Sequence[str]) -> str:
    """The verdict in a word; preliminary where figures of the claim may change it."""
    answer = _ANSWERS[result.verdict]
    return f"so far {answer}" if _unfinished(result, missing) else answer


def _unfinished(result: ClaimResult, missing: Sequence[str]) -> bool:
    """Whether figures that are not computed yet may change the verdict.

    One setting refutes a claim about every setting, and supports one that something can happen.
    Where one value of λ may fail, two that fail refute a claim.
    """
    claim = result.claim
    failed = [t.group for t in result.judged if t.verdict == NOT_SUPPORTED]
    if result.verdict == SUPPORTED:
        open_ = claim.across is every
    elif claim.combination is all_but_one:
        open_ = result.verdict == NOT_SUPPORTED and len(set(failed)) == len(failed)
    else:
        open_ = result.verdict == NOT_SUPPORTED and claim.across is any_supported
    return open_ and any(bears_on(result, figure) for figure in missing)


def _verdict(result: ClaimResult, missing: Sequence[str]) -> str:
    return result.verdict + _SO_FAR * _unfinished(result, missing)


def choices(report: Report, missing: Sequence[str] = ()) -> list[tuple[str, str]]:
    """What the verdicts mean for somebody who has to choose, one answer a question."""
    results = {result.claim.name: result for result in report.results}
    found = []
    for question, claims, answers in _CHOICES:
        first = results[claims[0]]
        verdict = UNDECIDED if _unfinished(first, missing) else first.verdict
        based = ", ".join(f"{name} {_verdict(results[name], missing)}" for name in claims)
        found.append((question, f"{answers.get(verdict, 'Not computed yet.')} ({based})"))
    return found


def _interval(row: Mapping[str, object]) -> str:
    """Effect and interval of a row; why there is none."""
    if row["verdict"] == NOT_TESTED:
        return "–"
    if not row["interval"]:
        return f"{row['effect']}; no interval: too few images"
    return f"{row['effect']} ({row['interval']})"
