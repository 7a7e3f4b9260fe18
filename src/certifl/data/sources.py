"""Data sets of the Hugging Face hub, by name; the only module that imports `datasets`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from certifl.data.layouts import choose_test
from certifl.data.readers import RawSplit, ReadOptions
from certifl.errors import DataUnavailable, first_line
from certifl.rng import numpy_generator

if TYPE_CHECKING:
    import pyarrow as pa


HUB_NAMES = {
    "mnist": "ylecun/mnist",
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "fashion_mnist": "zalando-datasets/fashion_mnist",
}
_BATCH = 2048


class _HubSplit(Protocol):
    """What is used of a `datasets.Dataset`."""

    features: Any

    def select_columns(self, column_names: list[str]) -> _HubSplit: ...
    def with_format(self, type: str) -> _HubSplit: ...
    def iter(self, batch_size: int) -> Iterator[pa.Table]: ...


def read_hub(
    name: str, columns: ReadOptions, ways: str, test_split: str | None = None
) -> tuple[RawSplit, RawSplit]:
    """Download (or take from the hub's own cache) and decode both splits.

    Args:
        name: a short name of `HUB_NAMES` or the hub's own, "owner/name".
        columns: the image and the label column, or None for each to be found.
        ways: what the user can do instead; ends the message if the hub does not help.
        test_split: the split whose images are certified; None = the first there is of TEST_NAMES.

    Raises:
        DataUnavailable: `datasets` is not installed, or the hub did not give the data set.
    """
    splits = _download(HUB_NAMES.get(name, name), ways)
    if "train" not in splits:
        raise DataUnavailable(
            f"{name} on the hub has the splits {', '.join(splits)}, but no train. {ways}"
        )
    test = choose_test([one for one in splits if one != "train"], f"{name} on the hub", test_split)
    return _read(splits["train"], columns, f"{name}, train"), _read(
        splits[test], columns, f"{name}, {test}"
    )


def _download(hub_id: str, ways: str) -> dict[str, _HubSplit]:
    try:
        import datasets  # pyright: ignore[reportMissingImports]  # optional, slow to import
    except ImportError as error:
        raise DataUnavailable(
            f"{hub_id} is not on this machine, and the package `datasets`, which fetches from the "
            f"Hugging Face hub, is not installed. {ways}"
        ) from error
    try:
        return dict(datasets.load_dataset(hub_id))
    except Exception as error:  # the hub's client raises many unrelated types when it cannot help
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise DataUnavailable(
            f"{hub_id} is not on this machine, and the Hugging Face hub did not give it "
            f"({reason}). {ways}"
        ) from error


def _read(split: _HubSplit, columns: ReadOptions, where: str) -> RawSplit:
    from certifl.data.tables import choose_columns, read_rows

    features = {
        name: {"_type": type(feature).__name__, "names": getattr(feature, "names", None)}
        for name, feature in split.features.items()
    }
    schema = split.features.arrow_schema
    chosen = choose_columns(schema, features, columns.image, columns.label, where, columns.kept)
    parts = split.select_columns(chosen.read).with_format("arrow").iter(_BATCH)
    return read_rows(((where, Path(), part) for part in parts), chosen, columns.prepare)


# The data set that comes with the installation: scikit-learn's handwritten digits.


DIGITS_TEST_IMAGES = 400
_SPLIT_SEED = 0


def read_digits() -> tuple[RawSplit, RawSplit]:
    """1797 gray images of 8 x 8 pixels, split once and for all into 1397 and 400.

    The original intensities v in {0, ..., 16} become floor((255 v + 8) / 16), that is 255 v / 16
    rounded to the nearest integer, halves up. The split is stratified: each class gives test
    images in proportion to its size, to the nearest image, chosen by a fixed stream.

    Source: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning
    Repository (1998), test part, as bundled with scikit-learn.
    """
    from sklearn.datasets import (
        load_digits,
    )  # slow to import, and needed once: the cache has it then

    values, target = load_digits(return_X_y=True)
    whole = np.asarray(values).astype(np.int64).reshape(-1, 1, 8, 8)
    images = ((whole * 255 + 8) // 16).astype(np.uint8)
    labels = np.asarray(target).astype(np.int64)
    names = tuple(str(digit) for digit in range(10))
    is_test = _stratified(labels, DIGITS_TEST_IMAGES)
    return (
        RawSplit(images[~is_test], labels[~is_test], names),
        RawSplit(images[is_test], labels[is_test], names),
    )


def _stratified(labels: np.ndarray, count: int) -> np.ndarray:
    """Mark `count` images, of each class its share rounded by largest remainder."""
    sizes = np.bincount(labels)
    share = sizes * count / labels.size
    taken = np.floor(share).astype(np.int64)
    largest_first = np.argsort(taken - share, kind="stable")
    taken[largest_first[: count - taken.sum()]] += 1
    marked = np.zeros(labels.size, dtype=bool)
    for label, quota in enumerate(taken):
        members = np.flatnonzero(labels == label)
        order = numpy_generator(_SPLIT_SEED, "digits split", label).permutation(members.size)
        marked[members[order[:quota]]] = True
    return marked
