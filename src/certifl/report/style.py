"""How a regime looks everywhere: one colour, dash and marker, the same in figures and on the page.

Colours are those of Okabe and Ito (2008), chosen to be told apart with any common colour
blindness, and two more in place of black and grey: grey stands for "too close to call". Dash and
marker repeat the distinction for print in black and white.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from certifl.report.results import Row


@dataclass(frozen=True)
class Look:
    """The look of one regime.

    Attributes:
        slot: its position in `LOOKS`; the page's style sheet has one colour per slot.
        colour: on white.
        dash: lengths of dash and gap in line widths; empty for a whole line.
        marker: as matplotlib names it; the page draws the same shapes.
    """

    slot: int
    colour: str
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

_OWN_SLOT = {"local": 0, "fedavg": 1, "personalized": 2, "mixture": 3}


def looks_of(runs: Sequence[Row]) -> list[Look]:
    """One look per run: a regime keeps its own wherever it appears; others take what is free."""
    taken: list[int | None] = []
    for run in runs:
        own = _OWN_SLOT.get(run.regime)
        taken.append(own if own is not None and own not in taken else None)
    # Slots that belong to no regime go first: one known regime more then changes no other colour.
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
    """The look of the curve at a position, where curves are no regimes: the clients of one run."""
    return LOOKS[position] if position < len(LOOKS) else _mixed(position)


def _mixed(position: int) -> Look:
    """A ninth look and more: a colour again, with another dash and another marker."""
    count = len(LOOKS)
    dash, marker = LOOKS[(position + 3) % count].dash, LOOKS[(position + 5) % count].marker
    return dataclasses.replace(LOOKS[position % count], dash=dash, marker=marker)
