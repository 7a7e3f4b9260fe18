"""When an interval supports a hypothesis, and how verdicts of several settings combine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

SUPPORTED, NOT_SUPPORTED = "supported", "not supported"
UNDECIDED, NOT_TESTED = "undecided", "not tested"
VERDICTS = (SUPPORTED, NOT_SUPPORTED, UNDECIDED, NOT_TESTED)

MARGIN = 0.03
# Runs that certify next to nothing differ by little, however they were trained: where the better
# one has 4 points, 3 are most of it. A margin is therefore never more than this share.
QUARTER = 0.25
_NEAR_ZERO = "(a quarter of the better run's ACR or accuracy where that is less)"

Combination = Callable[[Sequence[str]], str]  # how a group's verdicts become one


@dataclass(frozen=True)
class Judgment:
    """The verdict of one interval; `why` is empty where it needs no reason."""

    verdict: str
    why: str = ""


@dataclass(frozen=True)
class Equivalence:
    """Hypothesis: the two are equal but for a margin (two one-sided tests)."""

    margin: float = MARGIN

    @property
    def words(self) -> str:
        """The rule in words."""
        return (
            f"supported if the whole interval lies within {point_words(self.margin)} of 0 "
            f"{_NEAR_ZERO}, not supported if it lies entirely outside, else undecided"
        )

    def judge(self, low: float, high: float, level: float = math.inf) -> Judgment:
        """The verdict of an interval, at the level of the better run."""
        margin = _margin_at(self.margin, level)
        if _within(low, high, margin):
            less = margin < self.margin
            return Judgment(SUPPORTED, f"within {_fraction(margin, level)}" if less else "")
        if low > margin or high < -margin:
            way = "ahead" if low > 0 else "behind"
            return Judgment(
                NOT_SUPPORTED, f"{way} by more than {point_words(margin, upward=False)}"
            )
        return Judgment(UNDECIDED, _open(low, high, self.margin, level))


@dataclass(frozen=True)
class Superiority:
    """Hypothesis: the difference is positive."""

    margin: float = MARGIN

    @property
    def words(self) -> str:
        """The rule in words."""
        return (
            "supported if the whole interval lies above 0; not supported if it lies entirely "
            "below 0 (the other way), or contains 0 and lies within "
            f"{point_words(self.margin)} of it {_NEAR_ZERO} (no difference larger than that); "
            "else undecided"
        )

    def judge(self, low: float, high: float, level: float = math.inf) -> Judgment:
        """The verdict of an interval, at the level of the better run."""
        margin = _margin_at(self.margin, level)
        size = _fraction(margin, level) if margin < self.margin else point_words(margin)
        if low > 0.0:
            return Judgment(SUPPORTED, f"but less than {size}" if high < margin else "")
        if high < 0.0:
            return Judgment(NOT_SUPPORTED, "the other way")
        if _within(low, high, margin):
            return Judgment(NOT_SUPPORTED, f"no difference larger than {size}")
        return Judgment(UNDECIDED, _open(low, high, self.margin, level))


@dataclass(frozen=True)
class MinimumEffect:
    """Hypothesis: the difference is larger than a threshold named by the claim."""

    threshold: float

    @property
    def words(self) -> str:
        """The rule in words."""
        limit = point_words(self.threshold)
        return (
            f"supported if the whole interval lies above {limit}, not supported if it lies "
            "entirely below, else undecided"
        )

    def judge(self, low: float, high: float, level: float = math.inf) -> Judgment:
        """The verdict of an interval, the same at every level."""
        if low > self.threshold:
            return Judgment(SUPPORTED)
        if high < self.threshold:
            return Judgment(NOT_SUPPORTED, f"less than {point_words(self.threshold)}")
        if math.isinf(low) or math.isinf(high):
            return Judgment(UNDECIDED, TOO_FEW)
        return Judgment(UNDECIDED, f"the interval contains {point_words(self.threshold)}")


Rule = Equivalence | Superiority | MinimumEffect


def _margin_at(margin: float, level: float) -> float:
    return min(margin, QUARTER * level)


def _within(low: float, high: float, margin: float) -> bool:
    return -margin < low and high < margin


def _fraction(margin: float, level: float) -> str:
    """A margin that is reduced next to 0."""
    return f"{point_words(margin)}, a quarter of the {point_words(level)} of the better run"


def _open(low: float, high: float, margin: float, level: float) -> str:
    here = _margin_at(margin, level)
    if here == margin or not _within(low, high, margin):
        return _width(low, high)
    return (
        f"{_width(low, high)} and lies within {point_words(margin)} of 0, but so near 0 only "
        f"{_fraction(here, level)}, count as no difference"
    )


def _width(low: float, high: float) -> str:
    if math.isinf(low) or math.isinf(high):
        return TOO_FEW
    return f"the interval is {100 * (high - low):.1f} points wide"


def every(verdicts: Sequence[str]) -> str:
    """A claim about all of several settings, judged at a level at which all hold together.

    All must be supported; one that is not supported refutes the claim.
    """
    return _tolerating(verdicts, 0)


def all_but_one(verdicts: Sequence[str]) -> str:
    """A claim about almost all settings: of three or more, one may fail."""
    return _tolerating(verdicts, 1 if len(verdicts) >= 3 else 0)


def any_supported(verdicts: Sequence[str]) -> str:
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


# How the claims' numbers are written: in points, intervals rounded outward.

TOO_FEW = "too few images for an interval"


def point_words(share: float, upward: bool = True) -> str:
    """A size, rounded to a tenth of a point to the side on which the sentence remains true."""
    tenths = _tenths(share, upward)
    return "1 point" if tenths == 10 else f"{tenths / 10:g} points"


def interval_words(ends: tuple[float, float]) -> str:
    """An interval in points, rounded outward; why there is none where it is infinite."""
    if not math.isfinite(ends[1] - ends[0]):
        return TOO_FEW
    return f"{_end(ends[0], upward=False)} to {_end(ends[1], upward=True)}"


def _end(share: float, upward: bool) -> str:
    return f"{_tenths(share, upward) / 10 + 0.0:+.1f}"


def _tenths(share: float, upward: bool) -> int:
    step = 1000 * share
    return math.ceil(step - 1e-9) if upward else math.floor(step + 1e-9)
