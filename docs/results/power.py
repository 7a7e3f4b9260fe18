"""Plan the power of a scale: how wide the intervals of the paper's claims will be.

    python docs/results/power.py [--scale overnight]

`pilot_intervals.csv` lists the half width of the interval of every judged comparison at a smaller
scale (the pilot: all figures at scale laptop, by version 0.1.0), and no effect or verdict.
The script prints how wide they will be with the images of another scale: the width goes with one
over the root of the number of images, and the images of every client count alike. A network that
certifies more images has other scatter between images, so a width may come out 1.3 times wider or
narrower.
"""

from __future__ import annotations

import argparse
import csv
import math
import re
from dataclasses import dataclass
from pathlib import Path

from certifl.paper.claims import CLAIMS
from certifl.paper.claims.catalogue import Claim
from certifl.paper.claims.rules import MARGIN, Equivalence, MinimumEffect
from certifl.paper.scales import SCALES, Scale
from certifl.report.wording import markdown_table

PILOT = Path(__file__).resolve().parent / "pilot_intervals.csv"
_TEST_IMAGES = 10_000


@dataclass(frozen=True)
class Width:
    """One judged comparison of a pilot.

    Attributes:
        half: half of its interval, in points. images: of the pilot. planned: of the scale.
    """

    half: float
    images: int
    planned: int

    @property
    def expected(self) -> float:
        """Half of the interval with the planned images, in points."""
        return self.half * math.sqrt(self.images / self.planned)


def planned_images(scale: Scale, setting: str) -> int:
    """Certified test images of a comparison's runs; of a growth, of both client counts."""
    data = scale.data["mnist" if setting.startswith("mnist") else "cifar10"]
    counts = re.search(r"(\d+)(?: and (\d+))? clients", setting)
    if counts is None:
        raise ValueError(f"no number of clients in {setting!r}")
    total = 0
    for count in map(int, filter(None, counts.groups())):
        total += count * min(data.images.get(count, 0), _TEST_IMAGES // count)
    return total


def widths(pilot: Path, claim: str, scale: Scale) -> list[Width]:
    """The judged comparisons of a claim that the scale has images for."""
    with pilot.open(newline="") as source:
        rows = [row for row in csv.DictReader(source) if row["claim"] == claim]
    found = [
        Width(float(row["half"]), int(row["images"]), planned_images(scale, row["setting"]))
        for row in rows
    ]
    return [width for width in found if width.planned]


def row(claim: Claim, found: list[Width]) -> list[str]:
    """A claim's row: what its widest and its median comparison will be."""
    if not found:
        return [claim.name, "0", "", "", "", "no pilot has an interval"]
    halves = sorted(width.expected for width in found)
    now = sorted(width.half for width in found)
    images = sorted(width.planned for width in found)
    return [
        claim.name,
        str(len(found)),
        f"±{now[len(now) // 2]:.1f}",
        f"{images[0]:,}" if images[0] == images[-1] else f"{images[0]:,} to {images[-1]:,}",
        f"±{halves[len(halves) // 2]:.1f} (widest ±{halves[-1]:.1f})",
        _decides(claim, halves[-1]),
    ]


def _decides(claim: Claim, widest: float) -> str:
    """Which estimates are decided by intervals of this half width."""
    margin, rule = 100 * MARGIN, claim.judged_by
    if isinstance(rule, Equivalence):
        if widest >= margin:
            return f"never equal: the interval is wider than ±{margin:g} points"
        return f"equal below {margin - widest:.1f}, different above {margin + widest:.1f} points"
    if isinstance(rule, MinimumEffect):
        least = 100 * rule.threshold
        return f"{least + widest:.1f} points or more, {least - widest:.1f} or fewer"
    return f"a difference of {widest:.1f} points or more"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--scale", default="overnight", choices=SCALES)
    options = parser.parse_args()
    head = ("claim", "comparisons", "pilot", "images", "planned interval", "decided if estimated")
    scale = SCALES[options.scale]
    print(markdown_table(head, [row(c, widths(PILOT, c.name, scale)) for c in CLAIMS]))


if __name__ == "__main__":
    main()
