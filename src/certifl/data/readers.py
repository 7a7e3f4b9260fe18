"""Readers of parquet, IDX and image folders, of the hub, and of the embedded digits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from certifl.data.decode import decode_all
from certifl.data.layouts import choose_test
from certifl.data.preparation import AS_THEY_ARE, Preparation
from certifl.errors import DataUnavailable, InputError, first_line
from certifl.rng import numpy_generator
from certifl.safe_io import read_bytes, read_gzip


@dataclass(frozen=True)
class ReadOptions:
    """The columns asked for in a table, where None lets the reader find them, and what images get.

    Args:
        image, label: the columns of images and labels.
        kept: one further column to keep beside them; None keeps none.
        prepare: what is done to every image.
    """

    image: str | None = None
    label: str | None = None
    kept: str | None = None
    prepare: Preparation = AS_THEY_ARE

    @property
    def choices(self) -> tuple[str | None, ...]:
        """As a cache is named by them."""
        kept = () if self.kept is None else ("kept", self.kept)
        return (self.image, self.label, *kept, *self.prepare.choices)

    @property
    def no_columns(self) -> bool:
        """Whether no column is named."""
        return self.image is self.label is self.kept is None


@dataclass(frozen=True, eq=False)
class RawSplit:
    """A split as its files say it.

    Args:
        images: uint8, (n, c, h, w).
        labels: (n,), integers, or texts where the files hold the names of classes.
        class_names: names of the classes 0..K-1, or None where the files do not say them.
        column: (n,), integers or texts of the column that was to be kept; None without one.
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...] | None = None
    column: np.ndarray | None = None


def read_parquet(files: tuple[Path, ...], columns: ReadOptions) -> RawSplit:
    """Read parquet files in the hub's layout, in the order given."""
    from certifl.data.tables import read_tables

    return read_tables(files, columns)


def read_folder(files: tuple[Path, ...], columns: ReadOptions, root: Path) -> RawSplit:
    """Read the images `root/<split>/<class>/...`, however deep below the folder of their class."""
    _refuse_columns(columns, root)
    labels = np.array([file.relative_to(root).parts[1] for file in files])
    return RawSplit(decode_all(((file.__str__, file) for file in files), columns.prepare), labels)


def read_idx(files: tuple[Path, ...], columns: ReadOptions) -> RawSplit:
    """Read an image file and a label file in the IDX format of MNIST, gzipped or not."""
    images_file, labels_file = files
    _refuse_columns(columns, images_file.parent)
    images, labels = _idx_array(images_file, 3), _idx_array(labels_file, 1)
    if len(images) != len(labels):
        raise InputError(
            f"{images_file} holds {len(images)} images, but {labels_file.name} {len(labels)} "
            "labels. One of the two belongs to another data set or is incomplete; copy both again."
        )
    prepared = columns.prepare.arrays(images[:, None])
    return RawSplit(prepared, labels.astype(np.int64))


READERS: dict[str, Callable[[tuple[Path, ...], ReadOptions, Path], RawSplit]] = {
    "parquet": lambda files, columns, _root: read_parquet(files, columns),
    "idx": lambda files, columns, _root: read_idx(files, columns),
    "folder": read_folder,
}
"""How each layout is read: a split's files, the columns asked for, the data set's folder."""


def _refuse_columns(columns: ReadOptions, where: Path) -> None:
    if columns.kept is not None:
        raise InputError(
            f"{where} is not a table, so it has no column {columns.kept!r}. Store the data set as "
            "parquet files with that column beside the images and labels."
        )
    if not columns.no_columns:
        raise InputError(
            f"{where} is not a table, so it has no columns. Leave out the column's name."
        )


def _idx_array(file: Path, rank: int) -> np.ndarray:
    """IDX: two zero bytes, a type (8 = uint8), the rank, big-endian sizes, then the bytes."""
    header = 4 + 4 * rank
    try:
        pieces = read_gzip(file, header) if file.suffix == ".gz" else iter([read_bytes(file)])
        content = bytearray(next(pieces, b""))
        sizes = tuple(np.frombuffer(content[4:header], dtype=">u4").tolist())
        whole = len(content) >= header and content[:4] == bytes((0, 0, 8, rank))
        most = header + math.prod(sizes) if whole else -1
        while len(content) <= most and (piece := next(pieces, b"")):
            content += piece
    except (OSError, InputError) as error:
        raise InputError(f"Cannot read {file}: {error}. Copy or download it again.") from error
    if len(content) != most:
        raise InputError(
            f"{file} is not an IDX file of bytes with {rank} dimension(s), or it is cut off. "
            "Copy or download it again."
        )
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(sizes)


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
    chosen = choose_columns(schema, features, columns, where)
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
