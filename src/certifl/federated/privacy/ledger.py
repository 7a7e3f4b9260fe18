"""What was spent so far, written into the history of the rounds.

A ledger is a pure function of the rounds that were committed, so a resumed training counts the
same, and a round that is repeated counts once: it repeats its noise with its sums (`noise`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from certifl.federated.privacy.accounting import composed, epsilon

Entry = dict[str, Any]
Ledger = Callable[[Sequence[Mapping[str, Any]], Entry], Entry]
"""From the history so far and the entry of a round to that entry with what was spent."""

STEPS, EPSILON = "private_steps", "epsilon"
_PUBLIC = ("client", "seconds", "reason")


@dataclass(frozen=True)
class ExampleLedger:
    """What each client spent: its steps of all rounds composed.

    In a round of the schedule every participant takes the planned steps, also one that was left
    out: it may have sent its update all the same, too late or to a server that dropped it. In
    later rounds (fine-tuning) it is what the client says.

    Attributes:
        rates: sampling rate of each client's steps.
        multipliers: noise multiplier of each client.
        planned: steps of each client in a round of the schedule.
        rounds: of the schedule.
        delta: for which epsilon is given.
    """

    rates: tuple[float, ...]
    multipliers: tuple[float, ...]
    planned: tuple[int, ...]
    rounds: int
    delta: float

    def __call__(self, history: Sequence[Mapping[str, Any]], entry: Entry) -> Entry:
        """The entry with "epsilon" of each participant up to now, and the largest of all."""
        made, before = dict(entry), self._steps(history)
        for group in ("clients", "left_out"):
            if group in entry:
                made[group] = [self._row(row, entry["round"], before) for row in entry[group]]
        return made | _finite(max(self.spent([*history, made]), default=0.0))

    def _row(self, row: Entry, round: int, before: Mapping[int, int]) -> Entry:
        """A client's row with the steps that count for it, and its epsilon after them."""
        client, steps = row["client"], row.get(STEPS, 0)
        if round < self.rounds:
            steps = max(steps, self.planned[client])
        spent = _finite(self._epsilon(client, before.get(client, 0) + steps))
        return _public(row) | {STEPS: steps} | spent

    def spent(self, history: Sequence[Mapping[str, Any]]) -> list[float]:
        """Epsilon of every client after these rounds."""
        steps = self._steps(history)
        return [self._epsilon(client, steps.get(client, 0)) for client in range(len(self.rates))]

    def _steps(self, history: Iterable[Mapping[str, Any]]) -> dict[int, int]:
        taken: dict[int, int] = {}
        for entry in history:
            for row in (*entry["clients"], *entry.get("left_out", ())):
                taken[row["client"]] = taken.get(row["client"], 0) + row.get(STEPS, 0)
        return taken

    def _epsilon(self, client: int, steps: int) -> float:
        return epsilon(self.multipliers[client], self.rates[client], steps, self.delta)


@dataclass(frozen=True)
class ClientLedger:
    """What was spent on every client alike: one noisy sum per round of the schedule.

    Attributes:
        rate: probability of each client to take part in a round.
        multiplier: noise multiplier.
        rounds: of the schedule; later ones send nothing.
        delta: for which epsilon is given.
    """

    rate: float
    multiplier: float
    rounds: int
    delta: float

    def __call__(self, history: Sequence[Mapping[str, Any]], entry: Entry) -> Entry:
        """The entry with "epsilon", without what the clients measured: that is not protected."""
        spent = _finite(self.spent([*history, entry]))
        rows = [_public(row) | spent for row in entry["clients"]]
        return entry | {"clients": rows} | spent

    def spent(self, history: Sequence[Mapping[str, Any]]) -> float:
        """Epsilon of every client after these rounds."""
        return epsilon(self.multiplier, self.rate, min(len(history), self.rounds), self.delta)


def _public(row: Mapping[str, Any]) -> Entry:
    """A row without what the client measured on its images: nothing protects that."""
    return {key: row[key] for key in _PUBLIC if key in row}


def _finite(value: float) -> Entry:
    """As an entry; without noise there is no epsilon, and JSON has no infinity."""
    return {EPSILON: value} if math.isfinite(value) else {}


# What a client gave away, counted by itself: passes by the answers that came from them.
#
# A server's ledger counts committed rounds, and must be believed. A client that asks itself "what
# have I let go of that depends on my images?" needs nobody: every pass has a sample and noise
# of its
# own (their key depends on where it began), so the steps of all passes add up, whoever asked for
# them and how often. What must not be is one pass with two outcomes: equal sums have equal noise
# (`noise`), so two answers from one sample would show WHETHER their sums differ, which no noise
# hides. `conflict` finds that out beforehand.


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
