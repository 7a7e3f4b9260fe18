"""The accountant: epsilon of noisy steps, the noise for a budget, ledgers of what was spent.

Both kinds of privacy are one mechanism: a Poisson sample (every record with
probability q, independently) is summed with each record's share clipped to norm C, and Gaussian
noise of standard deviation z C is added. Its Renyi divergences compose by addition, and

    epsilon(delta) = min_a [ T rho_a(q, z) - (ln delta + ln a) / (a - 1) + ln((a - 1) / a) ]

after T steps is an upper bound for data sets of which one has nothing in the place of a record of
the other. Their size is public and sets q, so it is the same in both.

Source: Mironov, Talwar, Zhang, Renyi Differential Privacy of the Sampled Gaussian Mechanism, 2019
(rho_a); Balle et al., Hypothesis Testing Interpretations and Renyi Differential Privacy, 2020,
Theorem 21 (the conversion). Both are computed by opacus.
"""

from __future__ import annotations

import functools
import importlib
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from certifl.errors import SpecError
from certifl.federated.batches import batch_bounds

ACCOUNTANT = "rdp"
# Orders to minimize over: each gives a valid bound.
_ORDERS = (
    *(1 + tenth / 10 for tenth in range(1, 10)),
    *(2 + quarter / 4 for quarter in range(24)),
    *range(8, 65),
    *(80, 96, 128, 192, 256, 512),
)
_LEAST_NOISE, _MOST_NOISE = 1e-3, 1e4
_MOST_IN_SERIES = 256.0
"""Beyond this noise the series for orders that are not whole needs minutes, or never ends."""
_PRECISION = 1e-3


def opacus(name: str) -> ModuleType:
    """A module of opacus; SpecError where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise SpecError(
            f"[privacy] needs opacus, which cannot be imported here ({error}). Install it with "
            "pip install 'certifl[dp]', or remove [privacy]."
        ) from error


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Steps of a pass over so many images; every image is drawn with probability 1 / steps."""
    return len(batch_bounds(images, batch_size))


def epsilon(noise_multiplier: float, rate: float, steps: int, delta: float) -> float:
    """The privacy loss after `steps` steps, as epsilon at this delta: an upper bound.

    Args:
        noise_multiplier: z, noise in units of the clipping norm; below 0.001 gives infinity.
        rate: q, probability of each record to be in a step.
        steps, delta: T, and the probability of the guarantee to fail.
    """
    return composed({(noise_multiplier, rate): steps}, delta)


def composed(steps: Mapping[tuple[float, float], int], delta: float) -> float:
    """The privacy loss after steps of several kinds, whose divergences add up: an upper bound.

    Args:
        steps: how many, by (noise multiplier z, sampling rate q); every step has its own
            sample and noise. With next to no noise, the loss is infinite.
        delta: as in `epsilon`.
    """
    taken = {kind: count for kind, count in steps.items() if count}
    if not taken:
        return 0.0
    if any(noise_multiplier < _LEAST_NOISE for noise_multiplier, _ in taken):
        return math.inf
    analysis = opacus("opacus.accountants.analysis.rdp")
    kinds = [count * _divergences(*kind) for kind, count in taken.items()]
    with warnings.catch_warnings():
        # At either end of the orders a smaller bound may exist; this one is valid.
        warnings.filterwarnings("ignore", message="Optimal order is the")
        spent, _ = analysis.get_privacy_spent(
            orders=_ORDERS, rdp=functools.reduce(np.add, kinds), delta=delta
        )
    return max(0.0, float(spent))


@functools.lru_cache(maxsize=4096)
def _divergences(noise_multiplier: float, rate: float) -> NDArray[np.float64]:
    """rho_a(q, z) of one step, for all orders: an upper bound, as more noise costs no more.

    (a - 1) rho_a is the logarithm of a moment, so it is convex in a, and 0 at a = 1: between whole
    orders it lies below the straight line. There this line is taken where noise is large.
    """
    analysis, z = opacus("opacus.accountants.analysis.rdp"), min(noise_multiplier, _MOST_NOISE)
    if z <= _MOST_IN_SERIES:
        return analysis.compute_rdp(q=rate, noise_multiplier=z, steps=1, orders=_ORDERS)
    whole = sorted({math.ceil(order) for order in _ORDERS})
    exact = analysis.compute_rdp(q=rate, noise_multiplier=z, steps=1, orders=whole)
    orders, knots = np.array(_ORDERS), np.array([1, *whole])
    return np.interp(orders, knots, [0.0, *(knots[1:] - 1) * exact]) / (orders - 1)


@functools.lru_cache(maxsize=4096)
def noise_for(target_epsilon: float, rate: float, steps: int, delta: float) -> float:
    """The noise multiplier that spends no more than the target in so many steps.

    At most a thousandth above the smallest one; SpecError where even 10 000 spends more.
    """
    high = 1.0
    while epsilon(high, rate, steps, delta) > target_epsilon:
        high *= 2
        if high > _MOST_NOISE:
            raise SpecError(
                f"privacy.target_epsilon = {target_epsilon} cannot be met over {steps} steps at "
                f"a sampling rate of {rate:.3g}: raise it, train fewer rounds, or raise delta."
            )
    low = 0.0
    while high - low > _PRECISION * high:
        middle = (low + high) / 2
        if epsilon(middle, rate, steps, delta) > target_epsilon:
            low = middle
        else:
            high = middle
    return high


# Ledgers: what was spent so far, written into the history of the rounds.
#
# A ledger is a pure function of the committed rounds, so a resumed training counts the same, and a
# round that is repeated counts once: it repeats its noise with its sums (`mechanisms.add_noise`).

Entry = dict[str, Any]
Ledger = Callable[[Sequence[Mapping[str, Any]], Entry], Entry]
"""Maps the history so far and the entry of a round to that entry with what was spent."""

STEPS, EPSILON = "private_steps", "epsilon"
_PUBLIC = ("client", "seconds", "reason")  # not what a client measured on its images


@dataclass(frozen=True)
class ExampleLedger:
    """What each client spent: its steps of all rounds composed.

    In a scheduled round every participant counts with the planned steps, also one that was left
    out: it may have sent its update too late, or to a server that dropped it. In later rounds
    (fine-tuning) whoever took part counts with them: those left out sent nothing.

    Attributes:
        rates: sampling rate of each client's steps.
        multipliers: noise multiplier of each client.
        planned: steps of each client in a round of the schedule.
        rounds: of the schedule.
        delta: at which epsilon is given.
        finetuning: epochs of a later round.
    """

    rates: tuple[float, ...]
    multipliers: tuple[float, ...]
    planned: tuple[int, ...]
    rounds: int
    delta: float
    finetuning: int = 0

    def steps(self, client: int, number: int) -> int:
        """Planned steps of a client in a round."""
        if number < self.rounds:
            return self.planned[client]
        return self.finetuning * round(1 / self.rates[client])

    def __call__(self, history: Sequence[Mapping[str, Any]], entry: Entry) -> Entry:
        """The entry with "epsilon" of each participant up to now, and the largest of all."""
        counted, before = dict(entry), self._steps(history)
        for group in ("clients", "left_out"):
            if group in entry:
                planned = group == "clients" or entry["round"] < self.rounds
                counted[group] = [
                    self._row(row, self.steps(row["client"], entry["round"]) * planned, before)
                    for row in entry[group]
                ]
        return counted | _finite(max(self.spent([*history, counted]), default=0.0))

    def _row(self, row: Entry, planned: int, before: Counter[int]) -> Entry:
        """A client's row with the steps that count for it, and its epsilon after them."""
        client, steps = row["client"], max(row.get(STEPS, 0), planned)
        spent = _finite(self._epsilon(client, before[client] + steps))
        return _public(row) | {STEPS: steps} | spent

    def spent(self, history: Sequence[Mapping[str, Any]]) -> list[float]:
        """Epsilon of every client after these rounds."""
        steps = self._steps(history)
        return [self._epsilon(client, steps[client]) for client in range(len(self.rates))]

    def _steps(self, history: Iterable[Mapping[str, Any]]) -> Counter[int]:
        taken = Counter[int]()
        for entry in history:
            for row in (*entry["clients"], *entry.get("left_out", ())):
                taken[row["client"]] += row.get(STEPS, 0)
        return taken

    def _epsilon(self, client: int, steps: int) -> float:
        return epsilon(self.multipliers[client], self.rates[client], steps, self.delta)


@dataclass(frozen=True)
class ClientLedger:
    """What was spent on every client alike: one noisy sum per scheduled round.

    Attributes:
        rate: probability of each client to take part in a round.
        multiplier: noise multiplier.
        rounds: of the schedule; later ones send nothing.
        delta: at which epsilon is given.
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
    """A row without what is not protected."""
    return {key: row[key] for key in _PUBLIC if key in row}


def _finite(value: float) -> Entry:
    """An entry; without noise epsilon is infinite, which JSON does not have."""
    return {EPSILON: value} if math.isfinite(value) else {}


# What a client disclosed, by its own account: passes by the answers that came from them.
#
# A server's ledger counts committed rounds, and the server must be trusted. A client that counts
# its own answers need not trust it: every pass has its own sample and noise (their key depends on
# the model it started from), so the steps of all passes add up, however often and by whatever
# server they were requested. One pass must not have two outcomes: equal sums have equal noise
# (`mechanisms.add_noise`), so two answers from one sample would show WHETHER their sums differ,
# which no noise hides. `conflict` detects that beforehand.


@dataclass(frozen=True)
class Pass:
    """Private steps on one stream of samples.

    Attributes:
        sample: fingerprint of the sample and its noise.
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
        asked: fingerprint of all that the answer depends on: request, state, images.
        output: fingerprint of the answer and the new state; "" = it failed.
        sent: whether anything that depends on it leaves the client: the answer itself, or
            certificates of the client's own model, in which it is; otherwise nothing does.
        passes: that it depends on.
    """

    asked: str
    output: str
    sent: bool
    passes: tuple[Pass, ...]


def conflict(releases: Iterable[Release], asked: str, sample: str) -> bool:
    """Whether the sample was used for another request before."""
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
