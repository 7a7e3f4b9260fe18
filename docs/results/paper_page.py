"""The page "Does the paper hold?": every claim in one row, and what follows for a choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from certifl.paper.claims import Report, claim_rows
from certifl.paper.claims.rules import NOT_SUPPORTED, NOT_TESTED, SUPPORTED, UNDECIDED
from paging import table
from verdict_words import tally

__all__ = ["paper_page"]

_HERE = {
    SUPPORTED: "**yes**",
    NOT_SUPPORTED: "**no**",
    UNDECIDED: "undecided",
    NOT_TESTED: "not computed yet",
}
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
        [str(row["claim"]), str(row["sentence"]), _HERE[str(row["verdict"])], _interval(row)]
        for row in claim_rows(report)
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
        f"Made by `python docs/results/figures.py`. {tally(report)}",
        table(("claim", "what the paper says", "here", "difference, 95 % (points)"), rows),
        "\n".join(f"- {note}" for note in notes),
        "## What it means for a choice",
        "\n".join(f"- **{question}**: {answer}" for question, answer in choices(report)),
        "[All figures and their numbers](README.md).",
    ]
    return "\n\n".join(parts) + "\n"


def choices(report: Report) -> list[tuple[str, str]]:
    """What the verdicts mean for somebody who has to choose, one answer a question."""
    verdicts = {result.claim.name: result.verdict for result in report.results}
    found = []
    for question, claims, answers in _CHOICES:
        first = verdicts.get(claims[0], NOT_TESTED)
        based = ", ".join(f"{name} {verdicts.get(name, NOT_TESTED)}" for name in claims)
        found.append((question, f"{answers.get(first, 'Not computed yet.')} ({based})"))
    return found


def _interval(row: Mapping[str, object]) -> str:
    """Effect and interval of a row; why there is none."""
    if row["verdict"] == NOT_TESTED:
        return "none: not computed yet"
    if not row["interval"]:
        return f"{row['effect']}; no interval: too few images"
    return f"{row['effect']} ({row['interval']})"
