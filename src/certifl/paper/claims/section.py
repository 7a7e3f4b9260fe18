"""The paper's claims on the page: verdict, effect and interval, with all comparisons."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from certifl.errors import StoreError
from certifl.paper.claims.render import (
    COMPARISON_HEAD,
    claim_rows,
    comparison_row,
    explanation,
    verdict_words,
)
from certifl.paper.claims.rules import NOT_SUPPORTED, NOT_TESTED, SUPPORTED, UNDECIDED
from certifl.paper.claims.runs import has_own_perturbations, read_run
from certifl.paper.claims.testing import ClaimResult, Report, check_runs
from certifl.report.page.html import Markup, details, el, join, note, paragraph, section, table
from certifl.report.results import Row, flat

_SIGNS = {SUPPORTED: "✓", NOT_SUPPORTED: "✗", UNDECIDED: "?"}
_KINDS = {SUPPORTED: "supported", NOT_SUPPORTED: "refuted", UNDECIDED: "open"}
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
    tested = [result for result in report.results if result.verdict != NOT_TESTED]
    if not tested:
        return Markup()
    by_claim = {row["claim"]: row for row in claim_rows(report)}
    cards = [_card(one, by_claim[one.claim.name]) for one in tested]
    notes = el("ul", {"class": "limits"}, *(el("li", None, line) for line in explanation(report)))
    summary = paragraph(_summary(report, tested))
    return section("claims", _HEADING, summary, *cards, details("What the numbers mean", notes))


def _summary(report: Report, tested: Sequence[ClaimResult]) -> str:
    counts = {verdict: sum(one.verdict == verdict for one in tested) for verdict in _SIGNS}
    verdicts = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    return (
        f"{len(tested)} of {len(report.results)} claims of the paper are about runs like these: "
        f"{verdicts}. Effects are in points, 1 % of the largest possible radius or of the images, "
        "with 95 % intervals over test images that hold for all comparisons of a claim at once."
    )


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
    body = el("dl", {"class": "claim-facts"}, *pairs)
    head_row = [text[0].upper() + text[1:] for text in COMPARISON_HEAD]
    whole = table(f"All comparisons of claim {claim.name}", head_row, comparisons)
    return el("details", {"class": "claim"}, head, body, whole)


def _forest(result: ClaimResult) -> Markup:
    """The judged intervals as lines around 0; endless ones leave the picture."""
    judged = result.judged[:_MOST_LINES]
    ends = [abs(v) for t in judged for v in (*t.together, t.finding.effect.estimate)]
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
        spot = {"class": "estimate", "cx": x(one.finding.effect.estimate), "cy": y, "r": "3"}
        shapes.append(el("circle", spot))
    box = {"class": "forest", "viewBox": f"0 0 {_WIDTH:g} {height:g}", "aria-hidden": "true"}
    return el("svg", box, *shapes)
