"""Claims with their verdicts as sentences, rows, Markdown and JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from certifl.errors import InputError
from certifl.paper.claims.rules import (
    NOT_SUPPORTED,
    NOT_TESTED,
    SUPPORTED,
    TOO_FEW,
    UNDECIDED,
    MinimumEffect,
    change_words,
    interval_words,
    point_words,
    range_words,
    some,
)
from certifl.paper.claims.testing import ClaimResult, Outcome, Report
from certifl.report.wording import listed
from certifl.runs.atomic import write_text

COMPARISON_HEAD = (
    "setting",
    "difference",
    "of",
    "points",
    "95 % together",
    "images",
    "verdict",
)
_MOST_MISSING = 3


def write_claims(report: Report, path: Path) -> Path:
    """Write the claims as `.json` or `.md`, by the file's ending.

    Args:
        report: what `check_claims` found.
        path: where to; what is there is replaced as a whole.

    Returns:
        The path.

    Raises:
        InputError: another ending.
        StoreError: the file cannot be written.
    """
    ending = path.suffix.lower()
    if ending not in (".json", ".md"):
        raise InputError(f"Cannot write claims to {path.name!r}: the ending must be .json or .md.")
    text = as_markdown(report)
    if ending == ".json":
        text = json.dumps(as_json(report), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_text(path, text)
    return path


def claim_rows(report: Report) -> list[dict[str, Any]]:
    """One row per claim for a table: the verdict and its strongest and weakest comparison."""
    return [
        {
            "claim": result.claim.name,
            "sentence": result.claim.sentence,
            "verdict": result.verdict,
            "effect": _estimates(deciding(result)),
            "interval": _hull(deciding(result)),
            "comparisons": len(result.judged),
            "deciding": len(deciding(result)),
            "images": range_words([t.finding.effect.images for t in result.judged]),
            "clients": _clients(result.judged),
            "words": verdict_words(result),
        }
        for result in report.results
    ]


def deciding(result: ClaimResult) -> tuple[Outcome, ...]:
    """The comparisons on which a verdict rests.

    Of a claim that something can happen, the supported ones: the intervals of the others may
    extend far below what is claimed, and would seem to contradict the verdict.
    """
    if result.claim.across is some and result.verdict == SUPPORTED:
        return tuple(t for t in result.judged if t.verdict == SUPPORTED)
    return result.judged


def explanation(report: Report) -> list[str]:
    """Notes on all numbers."""
    seeds = len(report.seeds)
    training = (
        "One training seed: the verdicts are about the trained models, tested on other images "
        "like these; they say nothing about training again."
        if seeds < 2
        else f"{seeds} training seeds: where a comparison has several, its interval includes "
        "their variation (Student's t)."
    )
    return [
        "1 point is 1 % of the largest possible radius for ACR (the mean of the certified "
        "accuracy over all radii), and 1 % of the images for a certified accuracy.",
        "Intervals: 95 %, Student's t, paired over images within clients, no narrower than "
        f"unsampled kinds of images allow (spreads: {report.draws:,} bootstrap draws), wide "
        "enough for all judged comparisons of one claim at once; claims are not corrected for "
        "each other. A comparison that is reported but not judged has its own 95 % interval, "
        "marked (alone).",
        training,
        *report.notes,
    ]


def verdict_words(result: ClaimResult) -> str:
    """The verdict in a few sentences that are true of the given runs."""
    if result.verdict == NOT_TESTED:
        return f"Not tested: runs are missing. {_missing_words(result)}".strip()
    judged = result.judged
    if len(judged) == 1:
        sentence = f"{result.verdict.capitalize()}: {_one(judged[0])}."
    else:
        sentence = f"{result.verdict.capitalize()}: {_several(judged)}."
    sentence += _threshold_words(result)
    if result.claim.show_details:
        sentence += _details(judged)
    if result.partly:
        sentence += f" Not all of the claim was tested. {_missing_words(result)}"
    return sentence


def _threshold_words(result: ClaimResult) -> str:
    """That a claim about a threshold is decided by the whole interval, not by the estimate."""
    rule, supporting = result.claim.judged_by, deciding(result)
    if not isinstance(rule, MinimumEffect) or result.verdict != SUPPORTED or not supporting:
        return ""
    limit = point_words(rule.threshold, upward=True)
    enough = "this" if len(supporting) == 1 else "one"
    others = [tested for tested in result.judged if tested not in supporting]
    smaller = f"; elsewhere the interval contains smaller values too ({_hull(others)})"
    return (
        f" In {len(supporting)} of {len(result.judged)} comparisons the whole interval is above "
        f"{limit} ({_hull(supporting)}): the lower limit was tested, not the estimate. The claim "
        f"is that it can happen, so {enough} is enough{smaller if others else ''}."
    )


def _one(tested: Outcome) -> str:
    finding = tested.finding
    why = f" ({tested.why})" if tested.why else ""
    return (
        f"{finding.difference} is {change_words(finding.effect.estimate)} "
        f"({interval_words(tested.together)}) of {finding.quantity}{why}"
    )


def _details(judged: Sequence[Outcome]) -> str:
    """Details of the comparisons, each setting named once."""
    lines: dict[str, dict[str, None]] = {}
    for finding in (t.finding for t in judged):
        if finding.detail:
            lines.setdefault(finding.setting, {})[finding.detail] = None
    return "".join(f" {setting}: {'; '.join(details)}." for setting, details in lines.items())


def _several(judged: Sequence[Outcome]) -> str:
    by_verdict = {
        verdict: [t for t in judged if t.verdict == verdict]
        for verdict in (SUPPORTED, NOT_SUPPORTED, UNDECIDED)
    }
    parts = []
    for verdict, group in by_verdict.items():
        if group:
            whys = sorted({t.why for t in group if t.why})
            reasons = f": {'; '.join(whys)}" if whys and verdict == NOT_SUPPORTED else ""
            few = sum(t.why == TOO_FEW for t in group)
            if few:
                reasons = f": {f'{few} with ' if few < len(group) else ''}{TOO_FEW}"
            parts.append(f"{verdict} in {len(group)} ({_estimates(group)} points{reasons})")
    return f"of {len(judged)} comparisons, {listed(parts)}"


def _missing_words(result: ClaimResult) -> str:
    if not result.missing:
        return ""
    shown = "; ".join(result.missing[:_MOST_MISSING])
    more = len(result.missing) - _MOST_MISSING
    return f"Missing: {shown}{f'; and {more} more' if more > 0 else ''}."


def _estimates(judged: Sequence[Outcome]) -> str:
    values = sorted({f"{100 * t.finding.effect.estimate:+.1f}" for t in judged}, key=float)
    return "" if not values else values[0] if len(values) == 1 else f"{values[0]} to {values[-1]}"


def _hull(judged: Sequence[Outcome]) -> str:
    """The range of the intervals that could be given, and their number."""
    if not judged:
        return ""
    known = [t.together for t in judged if math.isfinite(t.together[0])]
    if not known:
        return TOO_FEW
    hull = interval_words((min(low for low, _ in known), max(high for _, high in known)))
    return hull if len(known) == len(judged) else f"{hull} (of {len(known)} of {len(judged)})"


def _clients(judged: Sequence[Outcome]) -> str:
    counts = sorted({count for t in judged for count in t.finding.effect.clients})
    return ", ".join(str(count) for count in counts)


def as_json(report: Report) -> dict[str, Any]:
    """Everything, for further processing; infinite ends are null."""
    return {
        "runs": report.runs,
        "seeds": list(report.seeds),
        "draws": report.draws,
        "notes": explanation(report),
        "claims": [
            {
                "claim": result.claim.name,
                "figure": result.claim.figure,
                "sentence": result.claim.sentence,
                "hypothesis": result.claim.hypothesis,
                "rule": result.claim.rule,
                "verdict": result.verdict,
                "words": verdict_words(result),
                "partly_tested": result.partly,
                "missing": list(result.missing),
                "comparisons": [_comparison(tested) for tested in result.comparisons],
            }
            for result in report.results
        ],
    }


def _comparison(tested: Outcome) -> dict[str, Any]:
    finding, effect, judgment = tested.finding, tested.finding.effect, tested.judgment
    return {
        "setting": finding.setting,
        "difference": finding.difference,
        "quantity": finding.quantity,
        "estimate": effect.estimate,
        "low": _finite(tested.together[0]),
        "high": _finite(tested.together[1]),
        "low_and_high_hold": "alone" if tested.judgment is None else "together",
        "low_alone": _finite(tested.alone[0]),
        "high_alone": _finite(tested.alone[1]),
        "images": effect.images,
        "clients": list(effect.clients),
        "seeds": effect.seeds,
        "level": _finite(effect.level),
        "verdict": None if judgment is None else judgment.verdict,
        "why": None if judgment is None else judgment.why,
        "detail": finding.detail,
        "runs": list(finding.runs),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def as_markdown(report: Report) -> str:
    """A table of all claims, then every claim with its comparisons."""
    head = ("claim", "verdict", "effect (points)", "95 % together", "images", "clients")
    keys = ("claim", "verdict", "effect", "interval", "images", "clients")
    rows = [[str(row[key]) for key in keys] for row in claim_rows(report)]
    parts = [
        "# Claims of the paper, tested on these runs",
        "\n".join(f"- {line}" for line in explanation(report)),
        _markdown_table(head, rows),
        *(_markdown_claim(result) for result in report.results),
    ]
    return "\n\n".join(parts) + "\n"


def _markdown_claim(result: ClaimResult) -> str:
    parts = [
        f"## {result.claim.name}: {result.verdict}",
        f"{result.claim.sentence} ({result.claim.figure})",
        verdict_words(result),
    ]
    if result.comparisons:
        parts.append(
            _markdown_table(COMPARISON_HEAD, [comparison_row(t) for t in result.comparisons])
        )
    if result.missing and result.verdict != NOT_TESTED:
        parts.append("Missing: " + "; ".join(result.missing) + ".")
    return "\n\n".join(parts)


def comparison_row(tested: Outcome) -> list[str]:
    """One comparison as texts, in the order of `COMPARISON_HEAD`."""
    finding = tested.finding
    verdict = tested.verdict or "reported only"
    why = f" ({tested.why})" if tested.why else ""
    detail = f"; {finding.detail}" if finding.detail else ""
    return [
        finding.setting,
        finding.difference,
        finding.quantity,
        f"{100 * finding.effect.estimate:+.1f}",
        f"{interval_words(tested.together)}{'' if tested.verdict else ' (alone)'}",
        f"{finding.effect.images:,}",
        f"{verdict}{why}{detail}",
    ]


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(c.replace('|', '/') for c in cells)} |" for cells in lines)
