"""Labels, order and colors that a user chooses for the rows of a figure or page."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from matplotlib.colors import is_color_like, to_hex

from certifl.errors import InputError
from certifl.report.results import RunResults, SeedGroup, by_seed

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
        runs: of one report.
        labels: new label of each row that gets one.
        order: the rows that come first; the others follow in the order of `runs`.
        colors: of each row that gets another, as matplotlib names them: "#0072B2", "tab:orange".

    Raises:
        InputError: a name that matches no row or several, equal labels, or not a color.
    """
    rows = by_seed(runs)
    new = _by_row(rows, labels or {}, names_of)
    renamed = [_relabelled(row, new.get(at)) for at, row in enumerate(rows)]
    _require_distinct(renamed)

    def old_and_new(row: SeedGroup) -> tuple[str, ...]:
        return (renamed[rows.index(row)].label, *names_of(row))

    chosen = _by_row(rows, colors or {}, old_and_new)
    colored = [_colored(row, chosen.get(at)) for at, row in enumerate(renamed)]
    first = [_position(rows, name, old_and_new) for name in order or ()]
    if len(set(first)) < len(first):
        raise InputError(f"order names a row twice: {', '.join(order or ())}.")
    rest = [at for at in range(len(rows)) if at not in first]
    return [run for at in (*first, *rest) for run in colored[at].runs]


def names_of(row: SeedGroup) -> tuple[str, ...]:
    """What a row can be called by."""
    return (row.label, row.algorithm, row.folder.name)


def known_names(runs: Sequence[RunResults]) -> list[str]:
    """What the rows of some runs can be called by."""
    return list(dict.fromkeys(name for row in by_seed(runs) for name in names_of(row)))


def _by_row(
    rows: Sequence[SeedGroup],
    values: Names,
    names: Callable[[SeedGroup], tuple[str, ...]],
) -> dict[int, str]:
    return {_position(rows, name, names): str(value) for name, value in values.items()}


def _position(
    rows: Sequence[SeedGroup], name: str, names: Callable[[SeedGroup], tuple[str, ...]]
) -> int:
    """The row that a name means: that of this label, or else the only one of another name."""
    for kind in zip(*map(names, rows), strict=True):
        found = [at for at, own in enumerate(kind) if own == name]
        if len(found) == 1:
            return found[0]
        if found:
            labels = ", ".join(rows[at].label for at in found)
            raise InputError(f"{name!r} could be any of {labels}: name its label or folder.")
    known = ", ".join(dict.fromkeys(repr(names(row)[0]) for row in rows))
    raise InputError(f"There is no row {name!r}. There are {known}.")


def _relabelled(row: SeedGroup, label: str | None) -> SeedGroup:
    if label is None:
        return row
    if not label.strip():
        raise InputError(f"The new label of {row.label!r} is empty.")
    runs = tuple(
        dataclasses.replace(
            run,
            label=label if len(row.runs) == 1 else f"{label}, seed {run.seed}",
            manifest={**run.manifest, "label": label},
        )
        for run in row.runs
    )
    return SeedGroup(label, runs)


def _require_distinct(rows: Sequence[SeedGroup]) -> None:
    labels = [row.label for row in rows]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise InputError(f"Two rows would be labelled {twice!r}: give each its own label.")


def _colored(row: SeedGroup, color: str | None) -> SeedGroup:
    if color is None:
        return row
    if not is_color_like(color):
        raise InputError(
            f"{color!r} is not a color. Give one such as '#0072B2', 'tab:orange' or 'black'."
        )
    return SeedGroup(
        row.label, tuple(dataclasses.replace(run, color=to_hex(color)) for run in row.runs)
    )


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
