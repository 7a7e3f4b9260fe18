"""Radii, shares and lists for people: in which unit, with how many digits, never rounded up."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from certifl.perturbations import family_label
from certifl.perturbations.units import ANGLE
from certifl.smoothing.curves import floor_text


def range_of(counts: Iterable[int]) -> str:
    """Smallest to largest count; empty without counts."""
    distinct = sorted(set(counts))
    return " to ".join(f"{count:,}" for count in dict.fromkeys(distinct[:1] + distinct[-1:]))


def markdown_table(
    head: Sequence[str], rows: Iterable[Sequence[str]], numbers: bool = False
) -> str:
    """A table in Markdown; with `numbers`, columns after the first are aligned on the right."""
    lines = [head, ["---", *["---:" if numbers else "---"] * (len(head) - 1)], *rows]
    # A stroke within a cell would end it.
    return "\n".join(f"| {' | '.join(c.replace('|', '/') for c in cells)} |" for cells in lines)


def percent(value: float) -> str:
    """A share of images, to a tenth of a percent."""
    return f"{tenths(value)} %"


def tenths(value: float) -> str:
    """A share in percent; halves round up, here and in the page's script, so that both agree."""
    return f"{math.floor(1000 * value + 0.5 + 1e-9) / 10:.1f}"


def outward(low: float, high: float) -> str:
    """The limits of a share in percent, to tenths, rounded outward."""
    return f"{floor_text(100.0 * low, 1)} to {abs(float(floor_text(-100.0 * high, 1))):.1f}"


def listed(names: Sequence[str]) -> str:
    """a, b and c; at least one name."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def client_list(clients: Sequence[int]) -> str:
    """Numbers of clients, consecutive ones as a range: clients 0–3, 7."""
    parts: list[list[int]] = []
    for client in sorted(clients):
        if parts and client == parts[-1][-1] + 1:
            parts[-1].append(client)
        else:
            parts.append([client])
    texts = [f"{p[0]}–{p[-1]}" if len(p) > 2 else ", ".join(map(str, p)) for p in parts]
    return f"client{'s' if len(clients) > 1 else ''} {', '.join(texts)}"


_SIGNIFICANT = 4
# The factor, two products and the reading of the text are off by at most 2**-53 of the result
# each; twice their sum is taken off.
_CONVERSION_ERROR = 2.0**-50


@dataclass(frozen=True)
class RadiusScale:
    """One unit to show radii in.

    Attributes:
        name: the unit as an axis names it, e.g. "degrees".
        suffix: what follows a number, e.g. "°" or " radians".
        factor: shown = stored * factor; 1 for the unit in which radii are stored.
        digits: decimals of a shown radius.
    """

    name: str
    suffix: str
    factor: float
    digits: int

    def shown(self, radius: float) -> float:
        """The radius in this unit; never more than the stored radius."""
        return radius * self.factor * (1.0 - self._slack)

    def stored(self, shown: float) -> float:
        """The stored radius that a shown one asks for; never less."""
        return shown / self.factor * (1.0 + self._slack)

    def number(self, radius: float) -> str:
        """The radius as a decimal, rounded down."""
        return floor_text(self.shown(radius), self.digits)

    def text(self, radius: float) -> str:
        """The radius with its unit, rounded down."""
        return self.number(radius) + self.suffix

    def interval(self, low: float, high: float) -> str:
        """Two ends, each possibly negative, rounded outward, with the unit."""
        return f"{self.down(low)} to {self.up(high)}{self.suffix}"

    def down(self, value: float) -> str:
        """A number that may be negative, rounded down."""
        shown = value * self.factor
        return floor_text(shown - abs(shown) * self._slack, self.digits)

    def up(self, value: float) -> str:
        """A number that may be negative, rounded up."""
        mirrored = self.down(-value)
        if not mirrored.strip("-0."):
            return mirrored.lstrip("-")
        return mirrored[1:] if mirrored.startswith("-") else f"-{mirrored}"

    @property
    def _slack(self) -> float:
        return 0.0 if self.factor == 1.0 else _CONVERSION_ERROR

    def threshold(self, shown: float) -> str:
        """A radius somebody chose in this unit: written as chosen."""
        return f"{shown:.6g}{self.suffix}"


def scales(conditions: Mapping[str, Any], largest: float) -> tuple[RadiusScale, ...]:
    """The units to show radii of these conditions in; the first is the one to read first.

    Args:
        conditions: of the certificates: `family` and `unit`.
        largest: the largest radius that will be shown, in the stored unit; it sets the digits.
    """
    unit = str(conditions["unit"])
    stored = RadiusScale(unit, f" {unit}", 1.0, _digits(largest))
    if unit != ANGLE:
        return (stored,)
    factor = 180.0 / math.pi
    return (RadiusScale("degrees", "°", factor, _digits(largest * factor)), stored)


def share_of_sigma(sigma: float, largest: float) -> RadiusScale:
    """Radii as a share of sigma, in per cent: 100 is the most that a uniform law can certify."""
    factor = 100.0 / sigma
    return RadiusScale("% of σ", " % of σ", factor, _digits(largest * factor))


def _digits(largest: float) -> int:
    if not largest > 0:
        return _SIGNIFICANT - 1
    return max(0, _SIGNIFICANT - 1 - math.floor(math.log10(largest)))


def family_words(conditions: Mapping[str, Any]) -> str:
    """The family's name in plain words."""
    return family_label(conditions["family"])


def sigma_text(conditions: Mapping[str, Any]) -> str:
    """Sigma with its unit; an angle in degrees and in multiples of pi."""
    sigma = float(conditions["sigma"])
    if conditions["unit"] == ANGLE:
        return f"{math.degrees(sigma):.4g}° ({sigma / math.pi:.4g} π {conditions['unit']})"
    return f"{sigma:.4g} {conditions['unit']}"
