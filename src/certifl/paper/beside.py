"""What the paper says of a figure in words, beside what the runs of this figure show."""

from __future__ import annotations

import re
from collections.abc import Sequence

from certifl.errors import CertiflError
from certifl.paper.claims.catalogue import CLAIMS, Claim
from certifl.paper.claims.render import verdict_words
from certifl.paper.claims.rules import NOT_TESTED
from certifl.paper.claims.runs import read_run
from certifl.paper.claims.testing import check_runs
from certifl.paper.figures import EXTRA, FIGURES
from certifl.report.compare import compare
from certifl.report.page.html import Markup, el, join, paragraph, section, table
from certifl.report.results import RunResults, by_seed
from certifl.report.summary import first_unit
from certifl.report.wording import headline

Comparisons = Sequence[tuple[str, Sequence[RunResults]]]

_FINDINGS = (
    "One line for each comparison of the figure: which algorithm leads in the average certified "
    "radius on the images of these runs."
)


def beside_section(name: str, runs: Sequence[RunResults], comparisons: Comparisons) -> Markup:
    """The paper's words about a figure, and what is seen here; nothing for other figures.

    Args:
        name: of the figure. runs: all of its runs.
        comparisons: titles, with runs that can be compared image by image.
    """
    figure = {**FIGURES, **EXTRA}.get(name)
    if figure is None or not figure.says:
        return Markup()
    claims = claims_of(name)
    found = [
        el("li", None, el("b", None, title), ": ", _finding(own)) for title, own in comparisons
    ]
    return section(
        "beside",
        "What the paper says of it, and what is seen here",
        paragraph(figure.says),
        _statements(claims, runs) if claims else Markup(),
        paragraph(_FINDINGS),
        el("ul", {"class": "limits"}, *found),
    )


def claims_of(name: str) -> list[Claim]:
    """The claims that the paper shows in a figure."""
    if name in EXTRA:
        return [claim for claim in CLAIMS if "further runs" in claim.figure]
    number = name.removeprefix("figure")
    shown = [claim for claim in CLAIMS if "further runs" not in claim.figure]
    return [claim for claim in shown if number in re.findall(r"\d+", claim.figure)]


def _statements(claims: Sequence[Claim], runs: Sequence[RunResults]) -> Markup:
    """A row for each claim: the paper's statement, and its verdict on these runs alone."""
    try:
        report = check_runs([read_run(run) for run in runs], claims=claims)
    except CertiflError as error:
        return paragraph(f"Its statements were not tested: {error}")
    rows = [
        [el("span", None, result.claim.sentence), _verdict(result.verdict, verdict_words(result))]
        for result in report.results
    ]
    return table("Statements", ["The paper", "These runs"], rows)


def _verdict(verdict: str, words: str) -> Markup:
    if verdict == NOT_TESTED:
        return join([el("span", None, "Not tested: the figure's runs cannot decide it.")])
    first, _, rest = words.partition(": ")
    return join([el("b", None, first), ": ", el("span", None, rest)])


def _finding(runs: Sequence[RunResults]) -> str:
    rows = by_seed(runs)
    return headline(rows, compare(rows), first_unit(rows))[0]
