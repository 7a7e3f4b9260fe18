"""When an interval supports a hypothesis, and what several settings say together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = [
    "MARGIN",
    "NOT_SUPPORTED",
    "NOT_TESTED",
    "SUPPORTED",
    "TOO_FEW",
    "UNDECIDED",
    "VERDICTS",
    "About",
    "Above",
    "Beyond",
    "Combination",
    "Judged",
    "Rule",
    "all_but_one",
    "every",
    "some",
]

SUPPORTED, NOT_SUPPORTED = "supported", "not supported"
UNDECIDED, NOT_TESTED = "undecided", "not tested"
VERDICTS = (SUPPORTED, NOT_SUPPORTED, UNDECIDED, NOT_TESTED)

MARGIN = 0.03
TOO_FEW = "too few images for an interval"

Combination = Callable[[Sequence[str]], str]
"""How the verdicts of one group of comparisons become one."""


@dataclass(frozen=True)
class Judged:
    """What one interval says. `why` is empty where the verdict says it all."""

    verdict: str
    why: str = ""


@dataclass(frozen=True)
class About:
    """Hypothesis: the two are equal but for a margin (two one-sided tests)."""

    margin: float = MARGIN

    @property
    def words(self) -> str:
        """The rule in words."""
        return (
            f"supported if the whole interval lies within {_points(self.margin)} of 0, not "
            "supported if it lies entirely outside, else undecided"
        )

    def judge(self, low: float, high: float) -> Judged:
        """The verdict of an interval."""
        if -self.margin < low and high < self.margin:
            return Judged(SUPPORTED)
        if low > self.margin or high < -self.margin:
            way = "ahead" if low > 0 else "behind"
            return Judged(NOT_SUPPORTED, f"{way} by more than {_points(self.margin)}")
        return Judged(UNDECIDED, _width(low, high))


@dataclass(frozen=True)
class Above:
    """Hypothesis: the difference is positive."""

    margin: float = MARGIN

    @property
    def words(self) -> str:
        """The rule in words."""
        return (
            "supported if the whole interval lies above 0; not supported if it lies entirely "
            f"below 0 (the other way), or contains 0 and lies within {_points(self.margin)} of it "
            "(no difference larger than that); else undecided"
        )

    def judge(self, low: float, high: float) -> Judged:
        """The verdict of an interval."""
        if low > 0.0:
            small = high < self.margin
            return Judged(SUPPORTED, f"but less than {_points(self.margin)}" if small else "")
        if high < 0.0:
            return Judged(NOT_SUPPORTED, "the other way")
        if -self.margin < low and high < self.margin:
            return Judged(NOT_SUPPORTED, f"no difference larger than {_points(self.margin)}")
        return Judged(UNDECIDED, _width(low, high))


@dataclass(frozen=True)
class Beyond:
    """Hypothesis: the difference is larger than a threshold."""

    threshold: float

    @property
    def words(self) -> str:
        """The rule in words."""
        limit = _points(self.threshold)
        return (
            f"supported if the whole interval lies above {limit}, not supported if it lies "
            "entirely below, else undecided"
        )

    def judge(self, low: float, high: float) -> Judged:
        """The verdict of an interval."""
        if low > self.threshold:
            return Judged(SUPPORTED)
        if high < self.threshold:
            return Judged(NOT_SUPPORTED, f"less than {_points(self.threshold)}")
        return Judged(UNDECIDED, _width(low, high))


Rule = About | Above | Beyond


def _points(share: float) -> str:
    return f"{100 * share:g} points"


def _width(low: float, high: float) -> str:
    if math.isinf(low) or math.isinf(high):
        return TOO_FEW
    return f"the interval is {100 * (high - low):.1f} points wide"


def every(verdicts: Sequence[str]) -> str:
    """A claim about all of several settings, each judged at a level that makes all hold together.

    All must be supported; one that is not supported refutes the claim.
    """
    return _tolerating(verdicts, 0)


def all_but_one(verdicts: Sequence[str]) -> str:
    """A claim about almost all settings: of three or more, one may fail."""
    return _tolerating(verdicts, 1 if len(verdicts) >= 3 else 0)


def some(verdicts: Sequence[str]) -> str:
    """A claim that something can happen: one supported setting is enough."""
    if SUPPORTED in verdicts or not verdicts:
        return SUPPORTED if verdicts else NOT_TESTED
    return UNDECIDED if UNDECIDED in verdicts else NOT_SUPPORTED


def _tolerating(verdicts: Sequence[str], failures: int) -> str:
    if not verdicts:
        return NOT_TESTED
    if verdicts.count(SUPPORTED) >= len(verdicts) - failures:
        return SUPPORTED
    return NOT_SUPPORTED if verdicts.count(NOT_SUPPORTED) > failures else UNDECIDED
