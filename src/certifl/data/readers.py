"""Which files of a folder make up a data set; readers of its layouts, of the hub and of digits.

Layouts are parquet as on the hub, IDX, and image folders, of which every file is read, passed over
by name, or refused.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from certifl.data.decode import IMAGE_SUFFIXES, decode_all
from certifl.data.preparation import AS_THEY_ARE, Preparation
from certifl.errors import DataUnavailable, InputError, first_line
from certifl.rng import numpy_generator
from certifl.safe_io import read_bytes, read_gzip

TEST_NAMES = ("test", "validation", "valid", "val")
_IDX_NAMES = {"train": ("train-images", "train-labels"), "test": ("t10k-images", "t10k-labels")}


@dataclass(frozen=True)
class Layout:
    """The files of both splits in the folder `root`; for IDX the images, then the labels."""

    kind: Literal["parquet", "idx", "folder"]
    root: Path
    train: tuple[Path, ...]
    test: tuple[Path, ...]


def find_layout(root: Path, test_split: str | None = None) -> Layout | None:
    """The data set in a folder; None if it has none of the layouts.

    Images are certified of `test_split`; None = the first there is of TEST_NAMES.

    Raises:
        DataUnavailable: training images without test images, or without the split asked for.
        InputError: several data sets in one folder, or a file that would be lost.
    """
    return (
        _find_parquet(root, test_split)
        or _find_idx(root, test_split)
        or _find_folder(root, test_split)
    )


def choose_test(available: list[str], where: str, requested: str | None = None) -> str:
    """The split for test: as requested, `test`, or a validation split; else DataUnavailable."""
    if requested is not None:
        if requested in available:
            return requested
        raise DataUnavailable(
            f"{where} has no split {requested!r} to certify images of; it has "
            f"{', '.join(available) or 'none'}. Correct or remove data.test_split."
        )
    for name in TEST_NAMES:
        if name in available:
            return name
    raise DataUnavailable(
        f"{where} has training images but no test images. Certificates are given for images that "
        f"no model was trained on: add a split named {' or '.join(TEST_NAMES[:2])}, for example "
        "by moving some training images there."
    )


def _find_parquet(root: Path, test_split: str | None) -> Layout | None:
    folder = _parquet_folder(root)
    if folder is None:
        return None
    splits = {name: _parquet_files(folder, name) for name in ("train", *TEST_NAMES)}
    available = [name for name in TEST_NAMES if splits[name]]
    test = choose_test(available, str(folder), test_split)
    return Layout("parquet", root, splits["train"], splits[test])


def _parquet_folder(root: Path) -> Path | None:
    """The folder itself, its `data`, or the one subfolder (the hub's configuration) with files."""
    for folder in (root, root / "data"):
        if _parquet_files(folder, "train"):
            return folder
    below = [folder for folder in subfolders(root) if _parquet_files(folder, "train")]
    if len(below) > 1:
        names = ", ".join(folder.name for folder in below)
        raise InputError(
            f"{root} holds several data sets ({names}). Name one of them by its path, for example "
            f"{below[0]}."
        )
    return below[0] if below else None


def _parquet_files(folder: Path, split: str) -> tuple[Path, ...]:
    """Files `train-*.parquet`, `train.parquet` or `train/*.parquet`, complete and in order."""
    named = (*folder.glob(f"{split}-*.parquet"), *folder.glob(f"{split}.parquet"))
    inside = tuple(sorted((folder / split).glob("*.parquet")))
    if named and inside:
        raise InputError(
            f"{folder} holds files of the split {split!r} in two places, {min(named).name} and "
            f"{split}/{inside[0].name}. Move them into one place, or one of them elsewhere."
        )
    files = tuple(sorted(named)) or inside
    for total in {match[1] for file in files if (match := re.search(r"-of-(\d+)", file.stem))}:
        if int(total) != len(files):
            raise InputError(
                f"{folder} holds {len(files)} of the {int(total)} files of the split {split!r}: "
                f"{', '.join(file.name for file in files)}. Copy or download the missing ones."
            )
    return files


def _find_idx(root: Path, test_split: str | None) -> Layout | None:
    for folder in (root, root / "raw"):
        train = _idx_pair(folder, "train")
        test = _idx_pair(folder, "test")
        if train:
            choose_test(["test"] if test else [], str(folder), test_split)
            return Layout("idx", root, train, test)
    return None


def _idx_pair(folder: Path, split: str) -> tuple[Path, ...]:
    found = []
    for stem, kind in zip(_IDX_NAMES[split], ("idx3-ubyte", "idx1-ubyte"), strict=True):
        names = (f"{stem}{dot}{kind}{end}" for dot in "-." for end in ("", ".gz"))
        found.append(next((folder / name for name in names if (folder / name).is_file()), None))
    return tuple(file for file in found if file) if all(found) else ()


def _find_folder(root: Path, test_split: str | None) -> Layout | None:
    if not has_class_folders(root / "train"):
        return None
    available = [name for name in TEST_NAMES if has_class_folders(root / name)]
    test = choose_test(available, str(root), test_split)
    train = class_images(root / "train", may_be_empty=False)
    return Layout("folder", root, train, class_images(root / test, may_be_empty=True))


_TEXTS = (
    *(".txt", ".md", ".rst", ".csv", ".tsv", ".html", ".log"),
    *(".json", ".jsonl", ".xml", ".yaml", ".yml", ".toml"),
)
_TEXT_NAMES = ("readme", "license")
_OF_SYSTEMS = ("thumbs.db", "ehthumbs.db", "desktop.ini")
"""What Windows leaves behind; what other systems and programs leave begins with a dot."""

_log = logging.getLogger(__name__)


def subfolders(root: Path) -> list[Path]:
    """The folders in a folder whose names do not begin with a dot, sorted."""
    return sorted(folder for folder in _visible(root) if folder.is_dir())


def has_class_folders(split: Path) -> bool:
    """Whether a split has a folder with something in it: one of images without labels has not."""
    return any(any(_visible(folder)) for folder in subfolders(split))


def class_images(split: Path, may_be_empty: bool) -> tuple[Path, ...]:
    """All images below `<split>/<class>/`, however deep, by class, then by path.

    Hidden files and those that Windows leaves behind are passed over, text files with a line that
    says so; InputError for any other. Of the training images no class may be empty: leaving it out
    would give the classes after it other numbers.
    """
    found: list[Path] = []
    texts: list[Path] = []
    for entry in sorted(_visible(split)):
        if not entry.is_dir():
            if _is_image(entry, texts):
                raise InputError(
                    f"{entry} lies in no class folder, so it has no label. Move it into "
                    f"{split}/CLASS/, or out of {split}."
                )
            continue
        _require_text(entry)
        images = [file for file in _files(entry, ()) if _is_image(file, texts)]
        if not images and not may_be_empty:
            raise InputError(
                f"The class folder {entry} holds no image. Remove the folder, or put the images "
                "of that class into it."
            )
        if not images:
            _log.warning(
                "The class folder %s holds no image: no certificate is about that class.", entry
            )
        found.extend(sorted(images))
    if texts:
        more = f" and {len(texts) - 1} more" if len(texts) > 1 else ""
        _log.warning("Text files beside images are passed over: %s%s.", texts[0], more)
    return tuple(found)


def _require_text(entry: Path) -> None:
    """Refuse a class whose name cannot be written into a record."""
    try:
        entry.name.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"The name of the class folder {entry} is not UTF-8 text. Rename the folder."
        ) from error


def _files(folder: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    """Every file below a folder, following links but never in a circle."""
    real = folder.resolve()
    if real in above:
        raise InputError(f"{folder} is a link to a folder that it lies in. Remove the link.")
    for entry in _visible(folder):
        if entry.is_dir():
            yield from _files(entry, (*above, real))
        else:
            yield entry


def _is_image(file: Path, texts: list[Path]) -> bool:
    """Whether a file is read; texts are added to `texts`; InputError for what would be lost."""
    name, ending = file.name.lower(), file.suffix.lower()
    if name in _OF_SYSTEMS:
        return False
    if not file.is_file():
        raise InputError(f"{file} cannot be read (a broken link?). Remove it.")
    if ending in IMAGE_SUFFIXES:
        return True
    if ending in _TEXTS or name in _TEXT_NAMES:
        texts.append(file)
        return False
    raise InputError(
        f"{file} is not read: images end in {' '.join(IMAGE_SUFFIXES)}, in small or capital "
        "letters. Convert or rename it if it is an image, else move it elsewhere."
    )


def _visible(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        yield from (entry for entry in folder.iterdir() if not entry.name.startswith("."))


# Readers.


@dataclass(frozen=True)
class ReadOptions:
    """The columns asked for in a table, where None lets the reader find them, and what images get.

    Args:
        image, label: the columns of images and labels.
        keep_column: one further column to keep beside them; None keeps none.
        prepare: what is done to every image.
    """

    image: str | None = None
    label: str | None = None
    keep_column: str | None = None
    prepare: Preparation = AS_THEY_ARE

    @property
    def choices(self) -> tuple[str | None, ...]:
        """As a cache is named by them."""
        kept = () if self.keep_column is None else ("kept", self.keep_column)
        return (self.image, self.label, *kept, *self.prepare.choices)

    @property
    def no_columns(self) -> bool:
        """Whether no column is named."""
        return self.image is self.label is self.keep_column is None


@dataclass(frozen=True, eq=False)
class RawSplit:
    """A split as its files say it.

    Args:
        images: uint8, (n, c, h, w).
        labels: (n,), integers, or texts where the files hold the names of classes.
        class_names: names of the classes 0..K-1, or None where the files do not say them.
        column: (n,), integers or strings of the column that was to be kept; None without one.
        label_column: name of the column with the labels; None where there is no table.
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...] | None = None
    column: np.ndarray | None = None
    label_column: str | None = None


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
    if columns.keep_column is not None:
        raise InputError(
            f"{where} is not a table, so it has no column {columns.keep_column!r}. Store the "
            "data set as parquet files with that column beside the images and labels."
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
    """Download (or take from the hub's own cache) and decode both splits; else DataUnavailable.

    Args:
        name: a short name of `HUB_NAMES` or the hub's own, "owner/name". columns: asked for.
        ways: what the user can do instead; ends the message if the hub does not help.
        test_split: the split whose images are certified; None = the first there is of TEST_NAMES.
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
            f"{hub_id} is not on this machine, and cannot be fetched from the Hugging Face hub "
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
