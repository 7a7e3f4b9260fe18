"""Two raw splits made one data set: the same channels, one size, labels 0..K-1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from certifl.data.dataset import SMALLEST_SIDE, Dataset, ImageSplit, fingerprint
from certifl.data.decode import ONE_SIZE, size_text
from certifl.data.readers import RawSplit
from certifl.errors import InputError

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
    sort as texts: "10" comes before "2").

    Args:
        name: of the data set. train, test: as they were read.
        prepared: what was done to every image, `Preparation.described`.

    Raises:
        InputError: sizes differ, images are smaller than 8 x 8, labels do not fit the classes.
    """
    _require_fitting_sizes(name, train.images, test.images)
    _require_one_kind(name, train.column, test.column)
    channels = max(train.images.shape[1], test.images.shape[1])
    labels, class_names = _classes(name, train, test)
    made = [
        ImageSplit(_with_channels(raw.images, channels), torch.from_numpy(numbers), raw.column)
        for raw, numbers in zip((train, test), labels, strict=True)
    ]
    found = fingerprint(made[0], made[1], class_names, prepared)
    return Dataset(name, made[0], made[1], class_names, found, prepared or {})


def _with_channels(images: np.ndarray, channels: int) -> torch.Tensor:
    """Gray images of a set that has RGB ones get three equal channels."""
    if images.shape[1] != channels:
        images = np.repeat(images, channels, axis=1)
    return torch.from_numpy(np.ascontiguousarray(images))


def _require_one_kind(name: str, train: np.ndarray | None, test: np.ndarray | None) -> None:
    if train is not None and test is not None and train.dtype.kind != test.dtype.kind:
        raise InputError(
            f"The column to split {name} by holds integers in one split and texts in the other. "
            "Store its values alike in both."
        )


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
                f"{name} names its classes, but its {which} labels are texts. Store class numbers."
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
        "class of yours, store the labels as texts."
    )
