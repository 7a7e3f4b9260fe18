"""Numbers and shapes of data sets, without reading those that everybody knows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from certifl.data import named_folder
from certifl.data.cache import cache_folder, cache_key, cache_path
from certifl.data.datasets import hub_choices
from certifl.data.readers import ColumnNames
from certifl.errors import DataUnavailable
from certifl.spec import Spec
from certifl.work.parts import asked_columns, load_data

__all__ = ["KNOWN", "Facts", "data_facts"]


@dataclass(frozen=True)
class Facts:
    """What must be known of a data set to plan with it.

    Attributes:
        train, test: numbers of images.
        shape: (c, h, w). classes: number of classes.
    """

    train: int
    test: int
    shape: tuple[int, int, int]
    classes: int


KNOWN = {
    "digits": Facts(1397, 400, (1, 8, 8), 10),
    "mnist": Facts(60_000, 10_000, (1, 28, 28), 10),
    "fashion_mnist": Facts(60_000, 10_000, (1, 28, 28), 10),
    "cifar10": Facts(50_000, 10_000, (3, 32, 32), 10),
    "cifar100": Facts(50_000, 10_000, (3, 32, 32), 100),
}
"""Data sets that are planned for without being read."""


def data_facts(spec: Spec, data_dir: Path | None) -> tuple[Facts, str]:
    """Sizes of a spec's data set, and a sentence on where they come from.

    Raises:
        DataUnavailable: it is neither known here nor at hand.
    """
    name, columns, test = spec.data.name, asked_columns(spec), spec.data.test_split
    if name in KNOWN and columns == ColumnNames() and test is None:
        facts = KNOWN[name]
        return facts, f"Measured on random images of the shape of {name}; it was not read."
    if not _at_hand(name, data_dir, columns, test):
        raise DataUnavailable(
            f"A plan needs the size of the images of {name!r}, which is not on this machine, and "
            "it downloads nothing. Put it into a folder and give --data-dir (or a path as "
            f"data.name), or plan with one of {', '.join(KNOWN)}."
        )
    whole = load_data(spec, data_dir)
    shape = (whole.in_channels, *whole.image_size)
    facts = Facts(len(whole.train), len(whole.test), shape, whole.num_classes)
    return facts, f"Measured on random images; numbers and shape are those of {name}."


def _at_hand(name: str, data_dir: Path | None, columns: ColumnNames, test: str | None) -> bool:
    """Whether loading finds a folder, or images decoded before, and needs no network."""
    base = name.partition("[")[0].strip()
    folders = [Path(base).expanduser()] if "/" in base or base[:1] in (".", "~") else []
    held = named_folder(data_dir)
    if held is not None:
        tail = base.rsplit("/", 1)[-1]
        names = {base, tail, tail.replace("_", "-"), tail.replace("-", "_")}
        folders += [held / one for one in names]
    decoded = cache_path(cache_folder(), name, cache_key((), *hub_choices(base, columns, test)))
    return decoded.is_file() or any(folder.is_dir() for folder in folders)
