"""Plan the power of a scale: how wide the intervals of the paper's claims will be.

    python docs/results/power.py [--scale overnight] [--pages docs/results]

Reads the intervals of every comparison on result pages that are there already (those of a smaller
scale: the pilot), and says how wide they will be with the images of another scale: the width goes
with one over the root of the number of images, and the images of every client count alike. Only
widths are read, no effect and no verdict. A network that certifies more images has other scatter
between images, so a width may come out 1.3 times wider or narrower.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from certifl.paper.claims import CLAIMS
from certifl.paper.claims.catalogue import Claim
from certifl.paper.claims.rules import MARGIN, Equivalence, MinimumEffect
from certifl.paper.scales import SCALES, Scale
from certifl.report.wording import markdown_table
from certifl.safe_io import read_text

HERE = Path(__file__).resolve().parent
_TEST_IMAGES = 10_000
_ENDS = re.compile(r"^([+-]\d+\.\d) to ([+-]\d+\.\d)$")


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


def widths(pages: Path, claim: str, scale: Scale) -> dict[str, Width]:
    """The judged comparisons of a claim on all pages, by setting and difference."""
    found: dict[str, Width] = {}
    for page in sorted(pages.glob("figure*.md")):
        for cells in _rows(read_text(page), claim):
            setting, difference, of, _, ends, images, verdict = cells
            interval = _ENDS.match(ends)
            if interval is None or verdict.startswith("reported"):
                continue
            low, high = map(float, interval.groups())
            planned = planned_images(scale, setting)
            width = Width((high - low) / 2, int(images.replace(",", "")), planned)
            if planned:
                found.setdefault(f"{setting}; {difference}; {of}", width)
    return found


def _rows(page: str, claim: str) -> Iterator[list[str]]:
    """The rows of a claim's table of comparisons."""
    _, heading, rest = page.partition(f"### {claim}\n\n")
    for line in rest.partition("\n\n")[0].splitlines()[2:] if heading else ():
        cells = [cell.strip() for cell in line.strip().strip("|").split(" | ")]
        if len(cells) == 7:
            yield cells


def row(claim: Claim, found: dict[str, Width]) -> list[str]:
    """A claim's row: what its widest and its median comparison will be."""
    if not found:
        return [claim.name, "0", "", "", "", "no pilot has an interval"]
    halves = sorted(width.expected for width in found.values())
    now = sorted(width.half for width in found.values())
    images = sorted(width.planned for width in found.values())
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
    parser.add_argument("--pages", type=Path, default=HERE)
    options = parser.parse_args()
    head = ("claim", "comparisons", "pilot", "images", "planned interval", "decided if estimated")
    scale = SCALES[options.scale]
    print(markdown_table(head, [row(c, widths(options.pages, c.name, scale)) for c in CLAIMS]))


if __name__ == "__main__":
    main()
