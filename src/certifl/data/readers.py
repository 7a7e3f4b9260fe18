"""One reader for each layout of files: from a split's files to its images and labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from certifl.data.decode import NamedImage, decode_all
from certifl.data.preparation import AS_THEY_ARE, Preparation
from certifl.errors import InputError
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
    return RawSplit(decode_all(_named(files), columns.prepare), labels)


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


def _named(files: tuple[Path, ...]) -> Iterator[NamedImage]:
    for file in files:
        yield file.__str__, file


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
