"""How algorithms and numbers look everywhere, in figures and on the page.

An algorithm has one color, dash and marker. Colors are those of Okabe and Ito (2008), which can be
distinguished with any common color blindness, and two more in place of black and gray: gray means
"too close to call". Dash and marker repeat the distinction for print in black and white.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass

from certifl.errors import InputError
from certifl.report.results import Row

FORMATS = ("png", "pdf", "svg")
_LEAST, _MOST = 1.0, 30.0
_NBSP = "\N{NO-BREAK SPACE}"
_PER_CENT = re.compile(r"(?<=\d) (?=%)")
_NAMED = re.compile(r"\b(λ|lambda) = (?=[\d.])")


def unbroken(text: str) -> str:
    """The text with no line break within "95 %" or "λ = 0.5"; for people, never for data."""
    if " " not in text:
        return text
    return _NAMED.sub(rf"\1{_NBSP}={_NBSP}", _PER_CENT.sub(_NBSP, text))


@dataclass(frozen=True)
class Look:
    """The look of one algorithm.

    Attributes:
        slot: its position in `LOOKS`; the page's style sheet has one color per slot.
        color: on white.
        dash: lengths of dash and gap in line widths; empty for a solid line.
        marker: as matplotlib names it; the page draws the same shapes.
    """

    slot: int
    color: str
    dash: tuple[float, ...]
    marker: str


LOOKS = (
    Look(0, "#D55E00", (2.0, 1.6), "s"),
    Look(1, "#0072B2", (), "o"),
    Look(2, "#009E73", (5.0, 2.0), "^"),
    Look(3, "#B4588F", (6.0, 1.8, 1.2, 1.8), "D"),
    Look(4, "#E69F00", (1.0, 1.2), "v"),
    Look(5, "#56B4E9", (8.0, 2.5), "P"),
    Look(6, "#5B2C83", (3.5, 1.2, 1.0, 1.2, 1.0, 1.2), "X"),
    Look(7, "#7A5C2E", (1.2, 3.0), "*"),
)

_OWN_SLOT = {"local": 0, "fedavg": 1, "model": 1, "personalized": 2, "mixture": 3}


@dataclass(frozen=True)
class FigureStyle:
    """What is drawn and how large, as a paper wants it.

    Attributes:
        size: width and height in inches, of the figures with a single panel. They then have no
            title, which a caption gives, and text of 7 and 8 points. None = their own size.
        unit: that radii are shown in, such as "degrees" or "radians"; None = the one that is read
            first, with the others above.
        bands: whether the area from the smallest to the largest client is shaded.
        formats: of the image files.
    """

    size: tuple[float, float] | None = None
    unit: str | None = None
    bands: bool = True
    formats: tuple[str, ...] = FORMATS

    def __post_init__(self) -> None:
        if self.size is not None and not all(_LEAST <= side <= _MOST for side in self.size):
            raise InputError(
                f"A figure measures {_LEAST:g} to {_MOST:g} inches each way; got {self.size}."
            )
        if unknown := [kind for kind in self.formats if kind not in FORMATS]:
            raise InputError(f"Figures are {', '.join(FORMATS)}; got {unknown[0]!r}.")


def looks_of(runs: Sequence[Row]) -> list[Look]:
    """One look per run: common algorithms have fixed looks, others take the free ones.

    A color that the user chose replaces that of the look.
    """
    looks = _usual_looks(runs)
    return [
        look if run.color is None else dataclasses.replace(look, color=run.color)
        for run, look in zip(runs, looks, strict=True)
    ]


def _usual_looks(runs: Sequence[Row]) -> list[Look]:
    taken: list[int | None] = []
    for run in runs:
        own = _OWN_SLOT.get(run.algorithm)
        taken.append(own if own is not None and own not in taken else None)
    # Slots without a fixed algorithm go first, so one more fixed look changes no other color.
    order = [4, 5, 6, 7, 0, 1, 2, 3]
    free = [slot for slot in order if slot not in taken]
    looks = []
    for position, slot in enumerate(taken):
        if slot is None and not free:
            looks.append(_mixed(position))
        else:
            looks.append(LOOKS[slot if slot is not None else free.pop(0)])
    return looks


def look_number(position: int) -> Look:
    """The look of the curve at a position, where curves are the clients of one run."""
    return LOOKS[position] if position < len(LOOKS) else _mixed(position)


def _mixed(position: int) -> Look:
    """Looks from the ninth on: a color again, with another dash and another marker."""
    count = len(LOOKS)
    dash, marker = LOOKS[(position + 3) % count].dash, LOOKS[(position + 5) % count].marker
    return dataclasses.replace(LOOKS[position % count], dash=dash, marker=marker)
