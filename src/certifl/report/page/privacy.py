"""What training was kept private, and what was spent of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from certifl.report.page.context import ReportContext, named_run
from certifl.report.page.html import Markup, el, table
from certifl.report.results import RunResults

_OF = {"example": "image", "client": "client"}
_NOISE = {
    "example": "every client, in every step: also the server learns no more",
    "client": "the server, which sees what every client sends",
}
_LIMITS = (
    "ε bounds what the trained models tell of one training image, or of one client, at the δ "
    "given; the smaller, the less. It is an upper bound over all rounds, the largest of all "
    "clients. Not covered: the test images that certificates and accuracies on this page are of, "
    "how many images each client has, how settings were chosen. The certificates mean what they "
    "mean without privacy."
)


def privacy_words(run: RunResults) -> str | None:
    """One sentence: epsilon, of what, at which delta; None for a run without privacy."""
    facts = _facts(run)
    if not facts:
        return None
    sent, total = (max(facts[name]) for name in ("epsilon_sent", "epsilon"))
    words = f"private per {_OF[facts['kind']]}, ε = {_up(sent)} at δ = {facts['delta']:g}"
    if total > sent:
        words += f" for what clients send, {_up(total)} with what they keep"
    if facts["noise_key"] == "seed":
        words += "; the noise follows from the seed: whoever has the spec can take it away"
    return words


def privacy_section(story: ReportContext) -> Markup:
    """A row for each run that was trained with privacy; nothing where none was."""
    rows = [_row(story, run) for run in story.trained if _facts(run)]
    if not rows:
        return Markup()
    head = ["Regime", "Protects one", "ε of what is sent", "ε with fine-tuning", "δ"]
    head += ["Noise multiplier", "Clipped to", "Noise is added by", "Its key"]
    return el(
        "section",
        {"id": "privacy"},
        el("h2", None, "Privacy of training"),
        el("p", None, _LIMITS),
        table("Differential privacy of every private run", head, rows),
    )


def _row(story: ReportContext, run: RunResults) -> list[Any]:
    facts = _facts(run)
    return [
        named_run(story, run),
        _OF[facts["kind"]],
        _up(max(facts["epsilon_sent"])),
        _up(max(facts["epsilon"])),
        f"{facts['delta']:g}",
        _range(facts["noise_multiplier"]),
        f"{facts['max_norm']:g}",
        _NOISE[facts["kind"]],
        "the seed, known to who has the spec" if facts["noise_key"] == "seed" else "a secret",
    ]


def _facts(run: RunResults) -> Mapping[str, Any]:
    facts = run.manifest.get("privacy")
    return facts if isinstance(facts, Mapping) else {}


def _up(epsilon: float) -> str:
    """Rounded up: a bound stays one."""
    return f"{math.ceil(100 * epsilon - 1e-9) / 100:.2f}"


def _range(values: list[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
