"""Data sets by name: embedded, from a folder, or from the Hugging Face hub.

`load(name)` looks in this order: the embedded `digits`; the folder `name`, if it is written as a
path; `<data_dir>/<name>`; the hub. The network is not touched unless all others have failed.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from certifl.data.dataset import (
    SMALLEST_SIDE,
    Dataset,
    ImageSplit,
    cache_folder,
    cache_key,
    cache_path,
    fingerprint,
    read_cached,
    write_cached,
)
from certifl.data.decode import ONE_SIZE, size_text
from certifl.data.preparation import preparation_of
from certifl.data.readers import (
    HUB_NAMES,
    READERS,
    TEST_NAMES,
    Layout,
    RawSplit,
    ReadOptions,
    find_layout,
    read_digits,
    read_hub,
)
from certifl.errors import DataUnavailable, InputError

_log = logging.getLogger(__name__)

DATA_ENV = "CERTIFL_DATA"
EMBEDDED: dict[str, Callable[[], tuple[RawSplit, RawSplit]]] = {"digits": read_digits}
_KNOWN_NAMES = {
    "fashionmnist": (
        *("T - shirt / top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    )
}
"""Class names of data sets in IDX files, which cannot say them; written as the hub writes them."""
_LAYOUTS = (
    "train-*.parquet and test-*.parquet, or train/CLASS/*.png and test/CLASS/*.png, or the IDX "
    "files train-images-idx3-ubyte[.gz] and so on"
)

_Source = tuple[tuple[Path, ...], tuple[str | None, ...], Callable[[], tuple[RawSplit, RawSplit]]]
"""Files whose change makes a cached copy stale, other choices that matter, and how to read."""


def load(
    name: str,
    data_dir: str | Path | None = None,
    cache_dir: str | Path | None = None,
    *,
    label_column: str | None = None,
    image_column: str | None = None,
    keep_column: str | None = None,
    test_split: str | None = None,
    resize: int | Sequence[int] | None = None,
    crop: str | None = None,
    window: Sequence[float] | None = None,
    offline: bool = False,
) -> Dataset:
    """Load a data set, decoding its images once.

    Args:
        name: `digits` (embedded), `mnist`, `cifar10`, `fashion_mnist`, any name below `data_dir`
            or on the hub ("owner/name"), or the path of a folder. "name[column]" chooses the label
            column of a table.
        data_dir: the folder that holds `<name>/`; None takes the environment's CERTIFL_DATA.
        cache_dir: where decoded images are kept; None takes CERTIFL_CACHE, else ~/.cache/certifl.
        label_column: the same choice as in "name[column]".
        image_column: the image column of a table that has several.
        keep_column: a further column of a table to keep, such as the writer of each image.
        test_split: the split whose images are certified, of "test", "validation", "valid" and
            "val"; None takes the first of them that is there.
        resize, crop, window: what is done to every image, see `Preparation`.
        offline: never ask the network; a copy decoded before is still read.

    Returns:
        Both splits as uint8 (n, c, h, w), of one size; the same content from whatever file.

    Raises:
        DataUnavailable: the data set is nowhere to be found, or has no test images.
        InputError: its content cannot be used; the message says why.
    """
    base, columns = _parse(name, label_column, image_column)
    prepare = preparation_of(resize, crop, window)
    columns = replace(columns, keep_column=keep_column, prepare=prepare)
    if test_split not in (None, *TEST_NAMES):
        raise InputError(
            f"test_split = {test_split!r} must be one of {', '.join(TEST_NAMES)}, or left out."
        )
    files, choices, build = _source(base, data_dir, columns, test_split)
    try:
        key = cache_key(files, *choices)
    except OSError as error:
        raise InputError(
            f"Cannot read the files of {name}: {error}. Check their rights."
        ) from error
    path = cache_path(cache_folder(cache_dir), name, key)
    dataset = read_cached(path, name)
    if dataset is None:
        if offline and choices[0] == "hub":
            raise DataUnavailable(f"{name} is not on this machine. {_ways(base)}")
        dataset = assemble(name, *build(), columns.prepare.described)
        write_cached(path, dataset)
    _say_order(dataset)
    return dataset


def hub_choices(base: str, columns: ReadOptions, test_split: str | None) -> tuple[str | None, ...]:
    """What the cache of a data set of the hub is named by."""
    return ("hub", base, *columns.choices, *(() if test_split is None else ("test", test_split)))


def _say_order(dataset: Dataset) -> None:
    """Say that classes whose names hold numbers are ordered as strings: 10 comes before 2."""
    names = list(dataset.class_names)
    # A key that sorts the numbers in a name by their size.
    parts = {name: [part for part in re.split(r"([0-9]{1,18})", name) if part] for name in names}
    in_numbers = sorted(
        names,
        key=lambda name: [
            (0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts[name]
        ],
    )
    if names == sorted(names) and names != in_numbers:
        _log.warning(
            "The classes of %s are ordered as strings (%s%s), so class number %d, counted from 0, "
            "is %r: outputs of a network must be in this order.",
            dataset.name,
            ", ".join(names[:5]),
            " ..." if len(names) > 5 else "",
            *next(
                (i, a) for i, (a, b) in enumerate(zip(names, in_numbers, strict=True)) if a != b
            ),
        )


def _source(
    base: str, data_dir: str | Path | None, columns: ReadOptions, test_split: str | None
) -> _Source:
    if base in EMBEDDED:
        if test_split not in (None, "test"):
            raise InputError(
                f"{base} has no split {test_split!r}; its images are split into train and test. "
                "Remove data.test_split."
            )
        if columns.keep_column is not None:
            raise InputError(
                f"{base} is not a table, so it has no column {columns.keep_column!r} to split "
                "by. Choose another split, or a data set in parquet files with such a column."
            )
        if not columns.no_columns:
            raise InputError(f"{base} has no columns to choose from. Write {base!r} alone.")
        arrays = columns.prepare.arrays

        def prepared() -> tuple[RawSplit, RawSplit]:
            train, test = EMBEDDED[base]()
            return (
                replace(train, images=arrays(train.images)),
                replace(test, images=arrays(test.images)),
            )

        return (), ("embedded", base, *columns.prepare.choices), prepared
    layout = _find(base, data_dir, test_split)
    if layout is None:
        choices = hub_choices(base, columns, test_split)
        return (), choices, lambda: read_hub(base, columns, _ways(base), test_split)
    files = (*layout.train, *layout.test)
    known = _KNOWN_NAMES.get(_plain(base)) if layout.kind == "idx" else None
    choices = (layout.kind, *(known or ()), *columns.choices)
    return files, choices, lambda: _read(layout, columns, known)


def _read(
    layout: Layout, columns: ReadOptions, known: tuple[str, ...] | None
) -> tuple[RawSplit, RawSplit]:
    read = READERS[layout.kind]
    train, test = (read(files, columns, layout.root) for files in (layout.train, layout.test))
    if known:
        train, test = (replace(split, class_names=known) for split in (train, test))
    return train, test


def _parse(
    name: str, label_column: str | None, image_column: str | None
) -> tuple[str, ReadOptions]:
    match = re.fullmatch(r"(?P<base>[^\[\]]+)(\[(?P<column>[^\[\]]+)\])?", name.strip())
    if match is None:
        raise InputError(
            f"{name!r} is not the name of a data set. Write a name, a path, or NAME[LABEL_COLUMN]."
        )
    column = match["column"]
    if column and label_column and column != label_column:
        raise InputError(
            f"The label column is {column!r} in {name!r} but {label_column!r} in label_column. "
            "Give it once."
        )
    return match["base"], ReadOptions(image_column, column or label_column)


def _find(base: str, data_dir: str | Path | None, test_split: str | None) -> Layout | None:
    """The data set's files on this machine, None where its folder does not exist."""
    for folder in _folders(base, data_dir):
        if folder.is_dir():
            layout = find_layout(folder, test_split)
            if layout is None:
                raise DataUnavailable(
                    f"The folder {folder} holds no data set in a supported layout: {_LAYOUTS}. "
                    "Arrange its files in one of these ways, or name the folder that has one."
                )
            return layout
    if _is_path(base):
        raise DataUnavailable(f"There is no folder {base}. Name a folder with {_LAYOUTS}.")
    data = _data_folder(data_dir)
    if data is not None and _plain(data.absolute().name) == _plain(base):
        raise DataUnavailable(
            f"{data} holds no folder {base}, but has that name itself. Give the folder above it: "
            f"{data.absolute().parent}."
        )
    return None


def _folders(base: str, data_dir: str | Path | None) -> list[Path]:
    """Folders to look into; owner/name may lie under its name alone, and - may stand for _."""
    own = [Path(base).expanduser()] if "/" in base or os.sep in base or base[0] in ".~" else []
    data = None if _is_path(base) else _data_folder(data_dir)
    if data is None:
        return own
    tail = base.rsplit("/", 1)[-1]
    names = dict.fromkeys((base, tail, tail.replace("_", "-"), tail.replace("-", "_")))
    return [*own, *(data / name for name in names)]


def _is_path(base: str) -> bool:
    """Whether a name can only be a path (the hub's names are `name` or `owner/name`)."""
    return base[0] in ".~" or Path(base).is_absolute() or base.count("/") > 1


def named_folder(data_dir: str | Path | None) -> Path | None:
    """The folder of data sets: the one given, else the environment's, else none."""
    chosen = data_dir or os.environ.get(DATA_ENV)
    return Path(chosen).expanduser() if chosen else None


def _data_folder(data_dir: str | Path | None) -> Path | None:
    folder = named_folder(data_dir)
    if folder is not None and not folder.is_dir():
        raise DataUnavailable(
            f"The data folder {folder} does not exist. Correct --data-dir or {DATA_ENV}."
        )
    return folder


def _plain(base: str) -> str:
    return re.sub(r"[-_]", "", Path(base).name).lower()


def _ways(base: str) -> str:
    hub_id = HUB_NAMES.get(base, base)
    return (
        f"Three ways to get images: (1) put the files into a folder DIR/{base} ({_LAYOUTS}) and "
        f"give --data-dir DIR or set {DATA_ENV}=DIR; (2) with network, install the extra "
        f"`certifl[hub]`, which fetches {hub_id} from the Hugging Face hub; (3) use the embedded "
        f"data set {', '.join(EMBEDDED)}."
    )


_INSTEAD = {
    "training": "Remove those images, from test or validation images too.",
    "test": (
        "If there is a validation split with labels, certify its images: data.test_split = "
        '"validation" (from Python test_split="validation"), or move the test files elsewhere, so '
        "that validation serves as test. Else remove those images."
    ),
}
"""What to do where images of a split have no label."""


def assemble(
    name: str, train: RawSplit, test: RawSplit, prepared: Mapping[str, Any] | None = None
) -> Dataset:
    """Check two splits against each other and build the data set.

    Class names come from the files where they say them. Otherwise the classes are the sorted
    different labels of the training split, and labels are renumbered 0..K-1 in that order (texts
    sort as strings: "10" comes before "2").

    Raises:
        InputError: sizes differ, images are smaller than 8 x 8, labels do not fit the classes.
    """
    _require_fitting_sizes(name, train.images, test.images)
    kinds = {raw.column.dtype.kind for raw in (train, test) if raw.column is not None}
    if len(kinds) > 1:
        raise InputError(
            f"The column to split {name} by holds integers in one split and strings in the other. "
            "Store its values alike in both."
        )
    channels = max(train.images.shape[1], test.images.shape[1])
    labels, class_names = _classes(name, train, test)
    splits = []
    for raw, numbers in zip((train, test), labels, strict=True):
        images = raw.images  # gray images of a set that has RGB ones get three equal channels
        if images.shape[1] != channels:
            images = np.repeat(images, channels, axis=1)
        pixels = torch.from_numpy(np.ascontiguousarray(images))
        splits.append(ImageSplit(pixels, torch.from_numpy(numbers), raw.column))
    found = fingerprint(splits[0], splits[1], class_names, prepared)
    return Dataset(name, splits[0], splits[1], class_names, found, prepared or {})


def _require_fitting_sizes(name: str, train: np.ndarray, test: np.ndarray) -> None:
    if train.shape[2:] != test.shape[2:]:
        raise InputError(
            f"The training images of {name} are {size_text(train.shape)}, its test images "
            f"{size_text(test.shape)}. {ONE_SIZE}"
        )
    if min(train.shape[2:]) < SMALLEST_SIDE:
        raise InputError(
            f"The images of {name} are {size_text(train.shape)}; they must be at least "
            f"{SMALLEST_SIDE} x {SMALLEST_SIDE} pixels. Enlarge them beforehand."
        )


def _classes(
    name: str, train: RawSplit, test: RawSplit
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[str, ...]]:
    """Labels of both splits as 0..K-1, and the K names."""
    if train.label_column != test.label_column:
        raise InputError(
            f"The labels of {name} are in the column {train.label_column!r} of the training split "
            f"but in {test.label_column!r} of the test split. If both mean the same, give the "
            "columns one name."
        )
    if train.class_names != test.class_names:
        raise InputError(
            f"The two splits of {name} name their classes differently"
            f"{'' if train.class_names and test.class_names else ' (one of them not at all)'}. "
            "Export them with the same class names in the same order."
        )
    if train.class_names is None:
        names, both = _numbered(name, train.labels, test.labels)
    else:
        names, both = train.class_names, (train.labels, test.labels)
        _require_named(name, train, test)
    if len(names) < 2:
        raise InputError(
            f"{name} has {len(names)} class; a classifier needs at least two. Check the labels."
        )
    return both, names


def _numbered(
    name: str, train: np.ndarray, test: np.ndarray
) -> tuple[tuple[str, ...], tuple[np.ndarray, np.ndarray]]:
    for which, labels in (("training", train), ("test", test)):
        if labels.dtype.kind == "i" and labels.min() < 0:
            raise InputError(_hidden(name, which, int(labels.min())))
    values, train_numbers = np.unique(train, return_inverse=True)
    if train.dtype.kind != test.dtype.kind or not np.isin(test, values).all():
        extra = sorted(set(map(str, np.unique(test))) - set(map(str, values)))
        raise InputError(
            f"{name} has test images of classes without training images: "
            f"{', '.join(extra[:10]) or 'the labels differ in type'}. Both splits need the same "
            "classes, written the same way; where test images have no labels, data.test_split "
            "takes another split."
        )
    numbers = (train_numbers.astype(np.int64), np.searchsorted(values, test).astype(np.int64))
    return tuple(str(value) for value in values), numbers


def _require_named(name: str, train: RawSplit, test: RawSplit) -> None:
    names = train.class_names or ()
    for which, labels in (("training", train.labels), ("test", test.labels)):
        if labels.dtype.kind != "i":
            raise InputError(
                f"{name} names its classes, but its {which} labels are strings. Store "
                "class numbers."
            )
        if labels.min() < 0:
            raise InputError(_hidden(name, which, int(labels.min())))
        if labels.max() >= len(names):
            raise InputError(
                f"{name} has the {which} label {labels.max()}, but its {len(names)} classes are "
                f"numbered 0 to {len(names) - 1}. Correct the labels or the names of the classes."
            )


def _hidden(name: str, which: str, label: int) -> str:
    """What a label below 0 means, and what to do."""
    means = "usually marks images whose label is not public" if label == -1 else "is not a class"
    return (
        f"{name} has the {which} label {label}, which {means}. {_INSTEAD[which]} If {label} is a "
        "class of yours, store the labels as strings."
    )
