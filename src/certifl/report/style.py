"""How rows look everywhere, in figures and on the page: labels, order, colors, looks, axes.

An algorithm has one color, dash and marker. Colors are those of Okabe and Ito (2008), which can be
distinguished with any common color blindness, and two more in place of black and gray: gray means
"too close to call". Dash and marker repeat the distinction for print in black and white.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import is_color_like, to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from certifl.errors import InputError
from certifl.report.results import Row, RunResults, SeedGroup, by_seed

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


USUAL = FigureStyle()


def looks_of(runs: Sequence[Row]) -> list[Look]:
    """One look per run: common algorithms have fixed looks, others take the free ones.

    A color that the user chose replaces that of the look.
    """
    taken: list[int | None] = []
    for run in runs:
        own = _OWN_SLOT.get(run.algorithm)
        taken.append(own if own is not None and own not in taken else None)
    # Slots without a fixed algorithm go first, so one more fixed look changes no other color.
    free = [slot for slot in (4, 5, 6, 7, 0, 1, 2, 3) if slot not in taken]
    looks = []
    for position, (run, slot) in enumerate(zip(runs, taken, strict=True)):
        if slot is None:
            slot = free.pop(0) if free else None
        look = _mixed(position) if slot is None else LOOKS[slot]
        looks.append(dataclasses.replace(look, color=run.runs[0].color or look.color))
    return looks


def look_number(position: int) -> Look:
    """The look of the curve at a position, where curves are the clients of one run."""
    return LOOKS[position] if position < len(LOOKS) else _mixed(position)


def _mixed(position: int) -> Look:
    """Looks from the ninth on: a color again, with another dash and another marker."""
    count = len(LOOKS)
    dash, marker = LOOKS[(position + 3) % count].dash, LOOKS[(position + 5) % count].marker
    return dataclasses.replace(LOOKS[position % count], dash=dash, marker=marker)


# Labels, order and colors that a user chooses for the rows of a figure or page.

Names = Mapping[str, str]


def arranged(
    runs: Sequence[RunResults],
    labels: Names | None = None,
    order: Sequence[str] | None = None,
    colors: Names | None = None,
) -> list[RunResults]:
    """The runs with other labels and colors, in another order.

    A row is named by its label, by its algorithm, by its folder or, in `order` and `colors`, by
    its new label.

    Args:
        runs: of one report. labels: new label of each row that gets one.
        order: the rows that come first; the others follow in the order of `runs`.
        colors: of each row that gets another, as matplotlib names them: "#0072B2", "tab:orange".

    Raises:
        InputError: a name that matches no row or several, equal labels, or not a color.
    """
    rows = by_seed(runs)
    names = [_names_of(row) for row in rows]
    new = _by_row(names, labels or {})
    renamed = [_relabelled(row, new.get(at)) for at, row in enumerate(rows)]
    shown = [row.label for row in renamed]
    twice = next((label for label in shown if shown.count(label) > 1), None)
    if twice is not None:
        raise InputError(f"Two rows would be labeled {twice!r}: give each its own label.")
    names = [(label, *own) for label, own in zip(shown, names, strict=True)]
    chosen = _by_row(names, colors or {})
    colored = [_colored(row, chosen.get(at)) for at, row in enumerate(renamed)]
    first = [_position(names, name) for name in order or ()]
    if len(set(first)) < len(first):
        raise InputError(f"order names a row twice: {', '.join(order or ())}.")
    rest = [at for at in range(len(rows)) if at not in first]
    return [run for at in (*first, *rest) for run in colored[at].runs]


def _names_of(row: SeedGroup) -> tuple[str, ...]:
    return (row.label, row.algorithm, row.runs[0].folder.name)


def known_names(runs: Sequence[RunResults]) -> list[str]:
    """What the rows of some runs can be called by."""
    return list(dict.fromkeys(name for row in by_seed(runs) for name in _names_of(row)))


def _by_row(names: Sequence[tuple[str, ...]], values: Names) -> dict[int, str]:
    return {_position(names, name): str(value) for name, value in values.items()}


def _position(names: Sequence[tuple[str, ...]], name: str) -> int:
    """The row that a name means: that of this label, or else the only one of another name."""
    for kind in zip(*names, strict=True):
        matching = [at for at, own in enumerate(kind) if own == name]
        if len(matching) == 1:
            return matching[0]
        if matching:
            labels = ", ".join(names[at][0] for at in matching)
            raise InputError(f"{name!r} could be any of {labels}: name its label or folder.")
    known = ", ".join(dict.fromkeys(repr(own[0]) for own in names))
    raise InputError(f"There is no row {name!r}. There are {known}.")


def _relabelled(row: SeedGroup, label: str | None) -> SeedGroup:
    if label is None:
        return row
    if not label.strip():
        raise InputError(f"The new label of {row.label!r} is empty.")
    several = len(row.runs) > 1
    runs = tuple(
        dataclasses.replace(
            run,
            label=f"{label}, seed {run.seed}" if several else label,
            manifest={**run.manifest, "label": label},
        )
        for run in row.runs
    )
    return SeedGroup(label, runs)


def _colored(row: SeedGroup, color: str | None) -> SeedGroup:
    if color is None:
        return row
    if not is_color_like(color):
        raise InputError(
            f"{color!r} is not a color. Give one such as '#0072B2', 'tab:orange' or 'black'."
        )
    runs = tuple(dataclasses.replace(run, color=to_hex(color)) for run in row.runs)
    return SeedGroup(row.label, runs)


# Lists and assignments as they are written on a command line. A label may contain a comma or an
# equals sign ("Mixture, λ = 0.5"), so names are recognized, not cut out.


def assignments(texts: Sequence[str], known: Sequence[str], option: str) -> dict[str, str]:
    """Values by name, from texts such as "FedAvg=Global model,Local=Alone".

    Raises:
        InputError: a text does not begin with a known name and an equals sign.
    """
    values: dict[str, str] = {}
    for text in texts:
        rest = text
        while rest:
            name = _beginning(rest, known, "=")
            if name is None:
                raise InputError(
                    f"{option} takes NAME=VALUE, where NAME is one of {', '.join(known)}; got "
                    f"{rest!r}."
                )
            rest = rest[len(name) + 1 :]
            commas = [at for at, character in enumerate(rest) if character == ","]
            ends = [at for at in commas if _beginning(rest[at + 1 :].lstrip(), known, "=")]
            end = min(ends, default=len(rest))
            values[name], rest = rest[:end].strip(), rest[end + 1 :].lstrip()
    return values


def listed_names(texts: Sequence[str], known: Sequence[str], option: str) -> list[str]:
    """Names from texts such as "Local,FedAvg".

    Raises:
        InputError: a text does not begin with a known name.
    """
    names: list[str] = []
    for text in texts:
        rest = text
        while rest:
            name = rest if rest in known else _beginning(rest, known, ",")
            if name is None:
                raise InputError(f"{option} takes names of {', '.join(known)}; got {rest!r}.")
            names.append(name)
            rest = rest[len(name) + 1 :].lstrip()
    return names


def _beginning(text: str, known: Sequence[str], then: str) -> str | None:
    """The longest known name that a text begins with, before `then`."""
    found = [name for name in known if text.startswith(name + then)]
    return max(found, key=len, default=None)


# Parts of all figures: a curve with its band, a panel, a legend.

_MARKERS_PER_CURVE = 8
_LONGEST_NAME = 32
INK, FAINT = "#222222", "#DDDDDD"


def band(
    axes: Axes,
    look: Look,
    x: np.ndarray,
    mean: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    label: str,
    style: FigureStyle = USUAL,
) -> None:
    """A mean, with its band from low to high if the style has bands; thin edges for print."""
    if style.bands:
        axes.fill_between(x, low, high, color=look.color, alpha=0.13, linewidth=0)
        edges: dict[str, Any] = {"color": look.color, "alpha": 0.35, "lw": 0.6}
        for edge in (low, high):
            axes.plot(x, edge, dashes=look.dash or (None, None), **edges)
    line(axes, look, x, mean, label, style)


def line(
    axes: Axes, look: Look, x: np.ndarray, y: np.ndarray, label: str, style: FigureStyle = USUAL
) -> None:
    """One curve; markers of different looks start at different points, so that none is hidden."""
    every = max(1, len(x) // _MARKERS_PER_CURVE)
    marked = (look.slot * every // 4 % every, every)
    axes.plot(x, y, markevery=marked, label=label, **_drawn(look, style))


def _drawn(look: Look, style: FigureStyle) -> dict[str, Any]:
    """A look as matplotlib takes it."""
    lw, ms = (1.2, 3.2) if style.size else (1.7, 4.5)
    form = {"color": look.color, "lw": lw, "dashes": look.dash or (None, None)}
    return form | {"marker": look.marker, "ms": ms, "mec": "white", "mew": 0.6}


def panel(axes: Axes, name: str, end: float, left: bool, lowest: bool) -> None:
    """One small panel; only those at the edges are labeled."""
    frame(axes)
    axes.set_title(name, fontsize=9, color=INK)
    axes.set(xlim=(0, end), ylim=(0, 1))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol="\N{NO-BREAK SPACE}%"))
    axes.xaxis.set_major_locator(MaxNLocator(3))
    axes.tick_params(labelleft=left, labelbottom=lowest)


def frame(axes: Axes, style: FigureStyle = USUAL) -> None:
    """Two spines, a faint grid, small ticks."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#888888")
    axes.grid(color=FAINT, lw=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=7 if style.size else 8, colors=INK, length=3)


def named_legend(
    target: Axes | Figure,
    looks: Sequence[Look],
    names: Sequence[str],
    loc: Any,
    ncols: int,
    style: FigureStyle = USUAL,
) -> None:
    """One entry per look; `loc` as in matplotlib."""
    handles = [Line2D([], [], **_drawn(look, style)) for look in looks]
    numbers = [str(number) for number in range(len(looks))]
    form: dict[str, Any] = {"frameon": False, "fontsize": 7 if style.size else 9}
    form |= {"handlelength": 3.6, "labelspacing": 0.3 if style.size else 0.5}
    legend = target.legend(handles, numbers, loc=loc, ncols=ncols, **form)
    # The names come last: as labels, those that begin with an underscore would be left out.
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set(text=short_name(name), parse_math=False, color=INK)


def short_name(text: str, longest: int = _LONGEST_NAME) -> str:
    """A name that leaves room for the axes; the numbers beside the figure have it in full."""
    return unbroken(text if len(text) <= longest else text[: longest - 1] + "…")
