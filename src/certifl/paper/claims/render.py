"""Claims with their verdicts as sentences, rows, Markdown, JSON and a section of a page."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from certifl.errors import StoreError
from certifl.paper.claims import rules
from certifl.paper.claims.catalogue import ClaimResult, Report, check_runs
from certifl.paper.claims.designs import Finding
from certifl.paper.claims.runs import has_own_perturbations, read_run
from certifl.path_checks import CLAIMS_ENDINGS, check_ending
from certifl.report.page.html import Markup, details, el, join, note, paragraph, section, table
from certifl.report.results import Row, flat
from certifl.report.wording import listed, markdown_table, range_of
from certifl.runs.atomic import write_text

COMPARISON_HEAD = ("setting", "difference", "of", "points", "95 % together", "images", "verdict")
_MOST_MISSING = 3


def write_claims(report: Report, path: Path) -> Path:
    """Write the claims as `.json` or `.md`, by the file's ending; returns the path.

    Raises:
        InputError: another ending. StoreError: the file cannot be written.
    """
    check_ending(path, "A table of claims", *CLAIMS_ENDINGS)
    text = as_markdown(report)
    if path.suffix.lower() == ".json":
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
            "images": range_of(t.effect.images for t in result.judged),
            "clients": ", ".join(
                map(str, sorted({n for t in result.judged for n in t.effect.clients}))
            ),
            "words": verdict_words(result),
        }
        for result in report.results
    ]


def deciding(result: ClaimResult) -> tuple[Finding, ...]:
    """The comparisons on which a verdict rests.

    Of a claim that something can happen, the supported ones: the intervals of the others may
    extend far below what is claimed, and would seem to contradict the verdict.
    """
    if result.claim.across is rules.some and result.verdict == rules.SUPPORTED:
        return tuple(t for t in result.judged if t.verdict == rules.SUPPORTED)
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
    if result.verdict == rules.NOT_TESTED:
        return f"Not tested: runs are missing. {_missing_words(result)}".strip()
    judged = result.judged
    words = _one(judged[0]) if len(judged) == 1 else _several(judged)
    sentence = f"{result.verdict.capitalize()}: {words}.{_threshold_words(result)}"
    if result.claim.show_details:  # each setting is named once
        lines: dict[str, dict[str, None]] = {}
        for one in (t for t in judged if t.detail):
            lines.setdefault(one.setting, {})[one.detail] = None
        sentence += "".join(f" {where}: {'; '.join(details)}." for where, details in lines.items())
    if result.partly:
        sentence += f" Not all of the claim was tested. {_missing_words(result)}"
    return sentence


def _threshold_words(result: ClaimResult) -> str:
    """That a claim about a threshold is decided by the whole interval, not by the estimate."""
    rule, supporting = result.claim.judged_by, deciding(result)
    if (
        not isinstance(rule, rules.MinimumEffect)
        or result.verdict != rules.SUPPORTED
        or not supporting
    ):
        return ""
    limit = rules.point_words(rule.threshold, upward=True)
    enough = "this" if len(supporting) == 1 else "one"
    others = [tested for tested in result.judged if tested not in supporting]
    smaller = f"; elsewhere the interval contains smaller values too ({_hull(others)})"
    return (
        f" In {len(supporting)} of {len(result.judged)} comparisons the whole interval is above "
        f"{limit} ({_hull(supporting)}): the lower limit was tested, not the estimate. The claim "
        f"is that it can happen, so {enough} is enough{smaller if others else ''}."
    )


def _one(tested: Finding) -> str:
    why = f" ({tested.why})" if tested.why else ""
    return (
        f"{tested.difference} is {100 * tested.effect.estimate:+.1f} points "
        f"({rules.interval_words(tested.together)}) of {tested.quantity}{why}"
    )


def _several(judged: Sequence[Finding]) -> str:
    by_verdict = {
        verdict: [t for t in judged if t.verdict == verdict]
        for verdict in (rules.SUPPORTED, rules.NOT_SUPPORTED, rules.UNDECIDED)
    }
    parts = []
    for verdict, group in by_verdict.items():
        if group:
            whys = sorted({t.why for t in group if t.why})
            reasons = f": {'; '.join(whys)}" if whys and verdict == rules.NOT_SUPPORTED else ""
            few = sum(t.why == rules.TOO_FEW for t in group)
            if few:
                reasons = f": {f'{few} with ' if few < len(group) else ''}{rules.TOO_FEW}"
            parts.append(f"{verdict} in {len(group)} ({_estimates(group)} points{reasons})")
    return f"of {len(judged)} comparisons, {listed(parts)}"


def _missing_words(result: ClaimResult) -> str:
    if not result.missing:
        return ""
    shown = "; ".join(result.missing[:_MOST_MISSING])
    more = len(result.missing) - _MOST_MISSING
    return f"Missing: {shown}{f'; and {more} more' if more > 0 else ''}."


def _estimates(judged: Sequence[Finding]) -> str:
    values = sorted({f"{100 * t.effect.estimate:+.1f}" for t in judged}, key=float)
    return "" if not values else values[0] if len(values) == 1 else f"{values[0]} to {values[-1]}"


def _hull(judged: Sequence[Finding]) -> str:
    if not judged:
        return ""
    known = [t.together for t in judged if math.isfinite(t.together[0])]
    if not known:
        return rules.TOO_FEW
    hull = rules.interval_words((min(low for low, _ in known), max(high for _, high in known)))
    return hull if len(known) == len(judged) else f"{hull} (of {len(known)} of {len(judged)})"


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


def _comparison(tested: Finding) -> dict[str, Any]:
    effect, judged = tested.effect, bool(tested.verdict)
    return {
        "setting": tested.setting,
        "difference": tested.difference,
        "quantity": tested.quantity,
        "estimate": effect.estimate,
        "low": _finite(tested.together[0]),
        "high": _finite(tested.together[1]),
        "low_and_high_hold": "together" if judged else "alone",
        "low_alone": _finite(tested.alone[0]),
        "high_alone": _finite(tested.alone[1]),
        "images": effect.images,
        "clients": list(effect.clients),
        "seeds": effect.seeds,
        "level": _finite(effect.level),
        "verdict": tested.verdict if judged else None,
        "why": tested.why if judged else None,
        "detail": tested.detail,
        "runs": list(tested.runs),
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
        markdown_table(head, rows),
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
            markdown_table(COMPARISON_HEAD, [comparison_row(t) for t in result.comparisons])
        )
    if result.missing and result.verdict != rules.NOT_TESTED:
        parts.append("Missing: " + "; ".join(result.missing) + ".")
    return "\n\n".join(parts)


def comparison_row(tested: Finding) -> list[str]:
    """One comparison as texts, in the order of `COMPARISON_HEAD`."""
    verdict = tested.verdict or "reported only"
    why = f" ({tested.why})" if tested.why else ""
    detail = f"; {tested.detail}" if tested.detail else ""
    return [
        tested.setting,
        tested.difference,
        tested.quantity,
        f"{100 * tested.effect.estimate:+.1f}",
        f"{rules.interval_words(tested.together)}{'' if tested.verdict else ' (alone)'}",
        f"{tested.effect.images:,}",
        f"{verdict}{why}{detail}",
    ]


# The claims on a page: verdict, effect and interval, with all comparisons.

_SIGNS = {rules.SUPPORTED: "✓", rules.NOT_SUPPORTED: "✗", rules.UNDECIDED: "?"}
_KINDS = {rules.SUPPORTED: "supported", rules.NOT_SUPPORTED: "refuted", rules.UNDECIDED: "open"}
_WIDTH, _LINE, _MOST_LINES = 150.0, 9.0, 12
_HEADING = "Tests of the paper’s claims"


def verdicts_section(rows: Sequence[Row]) -> Markup:
    """The claims that these runs can test; nothing where there are none.

    A claim is shown as soon as one of its comparisons could be made. Its verdict says what was not
    tested.
    """
    runs = flat(rows)
    unfit = (run.curves_only or run.unseen or has_own_perturbations(run) for run in runs)
    if len(runs) < 2 or any(unfit):
        return Markup()
    try:
        report = check_runs([read_run(run) for run in runs])
    except StoreError as error:
        return section("claims", _HEADING, note(f"They were not tested. {error}"))
    tested = [result for result in report.results if result.verdict != rules.NOT_TESTED]
    if not tested:
        return Markup()
    by_claim = {row["claim"]: row for row in claim_rows(report)}
    cards = [_card(one, by_claim[one.claim.name]) for one in tested]
    notes = el("ul", {"class": "limits"}, *(el("li", None, line) for line in explanation(report)))
    counts = {verdict: sum(one.verdict == verdict for one in tested) for verdict in _SIGNS}
    verdicts = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    summary = paragraph(
        f"{len(tested)} of {len(report.results)} claims of the paper are about runs like these: "
        f"{verdicts}. Effects are in points, 1 % of the largest possible radius or of the images, "
        "with 95 % intervals over test images that hold for all comparisons of a claim at once."
    )
    return section("claims", _HEADING, summary, *cards, details("What the numbers mean", notes))


def _card(result: ClaimResult, row: Mapping[str, Any]) -> Markup:
    """One claim: verdict and effect, and everything else when unfolded."""
    claim, verdict = result.claim, result.verdict
    badge = el("span", {"class": f"badge {_KINDS[verdict]}"}, f"{_SIGNS[verdict]} {verdict}")
    numbers = el("b", None, f"{row['effect']} points" if row["effect"] else "no number")
    count, decide = len(result.judged), row["deciding"]
    many = f"{count} comparisons, " if count == decide else f"{decide} of {count} comparisons, "
    many = many if count > 1 else ""
    ends = el("small", None, f"{many}95 %: {row['interval']}" if row["interval"] else "")
    head = el(
        "summary",
        None,
        el("span", {"class": "claim-name"}, badge, el("small", None, f"Section {claim.name}")),
        el("span", {"class": "claim-says"}, claim.sentence),
        el("span", {"class": "claim-size"}, numbers, ends, _forest(result)),
    )
    metadata = (
        ("Shown in", claim.figure),
        ("Hypothesis", claim.hypothesis),
        ("Rule", claim.rule),
        ("Outcome", verdict_words(result)),
    )
    pairs = [join([el("dt", None, k), el("dd", None, v)]) for k, v in metadata]
    comparisons = [comparison_row(one) for one in result.comparisons]
    body = el("dl", {"class": "claim-details"}, *pairs)
    head_row = [text[0].upper() + text[1:] for text in COMPARISON_HEAD]
    whole = table(f"All comparisons of claim {claim.name}", head_row, comparisons)
    return el("details", {"class": "claim"}, head, body, whole)


def _forest(result: ClaimResult) -> Markup:
    """The judged intervals as lines around 0; endless ones leave the picture."""
    judged = result.judged[:_MOST_LINES]
    ends = [abs(v) for t in judged for v in (*t.together, t.effect.estimate)]
    largest = max((v for v in ends if math.isfinite(v)), default=0.0)
    if not largest > 0:
        return Markup()

    def x(value: float) -> str:
        shown = min(1.0, max(-1.0, value / largest))
        return f"{_WIDTH / 2 + shown * (_WIDTH / 2 - 5):.1f}"

    height = _LINE * len(judged) + 4
    zero = el("line", {"class": "zero", "x1": x(0), "x2": x(0), "y1": "0", "y2": f"{height:g}"})
    shapes = [zero]
    for row, one in enumerate(judged):
        y = f"{_LINE * (row + 0.5) + 2:g}"
        low, high = one.together
        shapes.append(
            el("line", {"class": "reach", "x1": x(low), "x2": x(high), "y1": y, "y2": y})
        )
        spot = {"class": "estimate", "cx": x(one.effect.estimate), "cy": y, "r": "3"}
        shapes.append(el("circle", spot))
    box = {"class": "forest", "viewBox": f"0 0 {_WIDTH:g} {height:g}", "aria-hidden": "true"}
    return el("svg", box, *shapes)
