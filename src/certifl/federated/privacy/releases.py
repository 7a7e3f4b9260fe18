"""What a client gave away, counted by itself: passes by the answers that came from them.

A server's ledger counts committed rounds, and must be believed. A client that asks itself "what
have I let go of that depends on my images?" needs nobody: every pass has a sample and noise of its
own (their key depends on where it began), so the steps of all passes add up, whoever asked for
them and how often. What must not be is one pass with two outcomes: equal sums have equal noise
(`noise`), so two answers from one sample would show WHETHER their sums differ, which no noise
hides. `conflict` finds that out beforehand.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from certifl.federated.privacy.accounting import composed

__all__ = ["Pass", "Release", "conflict", "released_epsilon", "released_steps"]


@dataclass(frozen=True)
class Pass:
    """Private steps on one stream of samples.

    Attributes:
        sample: name of the sample and its noise.
        multiplier: z.
        batches: of an epoch; every image is in a batch with probability 1 / batches.
        steps: how many noisy sums were taken.
    """

    sample: str
    multiplier: float
    batches: int
    steps: int


@dataclass(frozen=True)
class Release:
    """One answer that came from private passes.

    Attributes:
        asked: name of all that the answer follows from: question, state, images.
        output: name of the answer with what was kept for later ones; "" = it failed underway.
        sent: whether it left the client; otherwise it lives on in the client's own model.
        passes: that it came from.
    """

    asked: str
    output: str
    sent: bool
    passes: tuple[Pass, ...]


def conflict(releases: Iterable[Release], asked: str, sample: str) -> bool:
    """Whether the sample served another question before."""
    return any(
        release.asked != asked and any(one.sample == sample for one in release.passes)
        for release in releases
    )


def released_steps(releases: Iterable[Release]) -> Counter[tuple[float, float]]:
    """Steps by (noise multiplier z, sampling rate q)."""
    counted: Counter[tuple[float, float]] = Counter()
    for release in releases:
        for one in release.passes:
            counted[one.multiplier, 1 / one.batches] += one.steps
    return counted


def released_epsilon(releases: Iterable[Release], delta: float) -> float:
    """What all releases together spent of one image's privacy, as epsilon at this delta."""
    return composed(released_steps(releases), delta)
