"""What a data set is once it is read, with a fingerprint, and its copy on disk.

Images are decoded once. A cache file is a safetensors file with the images and labels of both
splits. Its name holds a key made of everything that decides the content: the source files' paths,
sizes and times of change, the columns asked for, and the version of the decoding rules. What is
read is checked against the fingerprint stored with it. The cache never makes a run fail: it is
rebuilt or done without.

A data set of the hub is kept under its name alone, so that it loads without network from then on;
delete its file to fetch it anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from certifl.errors import InputError
from certifl.rng import numpy_generator
from certifl.safe_io import replacing

SMALLEST_SIDE = 8


def to_float(images: torch.Tensor) -> torch.Tensor:
    """Intensities in [0, 1]: float32 images x / 255 of uint8 images (else InputError)."""
    if images.dtype != torch.uint8:
        raise InputError(
            f"to_float expects uint8 images, got {images.dtype}; pass ImageSplit.images."
        )
    return images.to(torch.float32) / 255


@dataclass(frozen=True, eq=False)
class ImageSplit:
    """Images and labels of one split; InputError for other types and shapes.

    Args:
        images: uint8, (n, c, h, w), c = 1 (gray) or 3 (RGB).
        labels: int64, (n,), classes counted from 0.
        column: (n,), integers or strings of one further column of the data set, such as the writer
            or the hospital; None where none was asked for.
    """

    images: torch.Tensor
    labels: torch.Tensor
    column: np.ndarray | None = None

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise InputError(
                f"Images must be uint8 of shape (n, 1 or 3, h, w), got {images.dtype} "
                f"{tuple(images.shape)}. Convert them before building a split."
            )
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise InputError(
                f"Labels must be int64 of shape ({images.shape[0]},), one for each image, got "
                f"{labels.dtype} {tuple(labels.shape)}."
            )
        if self.column is not None and self.column.shape != labels.shape:
            raise InputError(
                f"A column must have one value for each of {len(labels)} images, got shape "
                f"{self.column.shape}."
            )

    def __len__(self) -> int:
        return int(self.labels.shape[0])

    def take(self, indices: np.ndarray | torch.Tensor) -> ImageSplit:
        """The images and labels at `indices`, in that order."""
        where = torch.from_numpy(np.array(indices, dtype=np.int64))
        column = None if self.column is None else self.column[where.numpy()]
        return ImageSplit(self.images[where], self.labels[where], column)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set: two splits, the names of the classes, and a hash of its content.

    Args:
        name: as it was asked for.
        train: training images.
        test: test images, of the same number of channels and the same size.
        class_names: one for each label 0..K-1.
        fingerprint: see `fingerprint`; equal content has an equal one, whatever file it came from.
        prepared: what was done to every image, `Preparation.described`; empty = nothing.
    """

    name: str
    train: ImageSplit
    test: ImageSplit
    class_names: tuple[str, ...]
    fingerprint: str
    prepared: Mapping[str, Any] = field(default_factory=dict)

    @property
    def in_channels(self) -> int:
        """1 for gray images, 3 for RGB."""
        return int(self.train.images.shape[1])

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return int(self.train.images.shape[2]), int(self.train.images.shape[3])

    @property
    def num_classes(self) -> int:
        """The number K of classes; labels are 0..K-1."""
        return len(self.class_names)


def fingerprint(
    train: ImageSplit,
    test: ImageSplit,
    class_names: tuple[str, ...],
    prepared: Mapping[str, Any] | None = None,
) -> str:
    """SHA-256 over shapes, class names, and the bytes of images and labels of both splits.

    A column that was asked for counts, too: who holds which image follows from it. So does what
    was done to the images. The lengths come first, so that no two different data sets feed the
    hash the same bytes.
    """
    shapes = [list(split.images.shape) for split in (train, test)]
    about: dict[str, Any] = {"shapes": shapes, "class_names": list(class_names)}
    header = json.dumps(about | ({"prepared": prepared} if prepared else {}), sort_keys=True)
    digest = hashlib.sha256(header.encode() + b"\0")
    for split in (train, test):
        digest.update(split.images.contiguous().reshape(-1).numpy().data)
        digest.update(split.labels.numpy().astype("<i8").tobytes())
        if split.column is not None:
            digest.update(json.dumps(split.column.tolist()).encode())
    return digest.hexdigest()


def random_part(available: int, count: int | None, seed: int, which: str) -> np.ndarray:
    """Ascending positions, int64 (count,), of a fixed random part of a split; None takes all.

    The choice depends on the arguments alone, and a larger part contains every smaller one of the
    same seed. Those of "train" and "test" are independent. InputError for an impossible count.
    """
    if count is None:
        return np.arange(available)
    if not 1 <= count <= available:
        raise InputError(
            f"{which}_images = {count}, but the {which} split has {available} images. "
            f"Choose a number from 1 to {available}, or leave it out to take all."
        )
    return np.sort(numpy_generator(seed, "part", which).permutation(available)[:count])


# Decoded data sets kept on disk.

CACHE_ENV = "CERTIFL_CACHE"
_DECODING_RULES = "2"  # raise when pixels, labels or class names of the same files would differ

logger = logging.getLogger(__name__)


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """The folder given, else the environment's CERTIFL_CACHE, else ~/.cache/certifl."""
    chosen = cache_dir or os.environ.get(CACHE_ENV) or Path.home() / ".cache" / "certifl"
    return Path(chosen).expanduser()


def cache_key(files: Iterable[Path], *choices: str | None) -> str:
    """A hash of the files' absolute paths, sizes, times of change, and the choices made.

    The paths count: IDX files of different data sets agree in name and size, and archives may set
    equal times.
    """
    digest = hashlib.sha256(json.dumps([_DECODING_RULES, *choices]).encode())
    for file in files:
        status = file.stat()
        digest.update(b"\n" + os.fsencode(file.absolute()))
        digest.update(f"\0{status.st_size}\0{status.st_mtime_ns}".encode())
    return digest.hexdigest()


def cache_path(folder: Path, name: str, key: str) -> Path:
    """The file of a data set; the readable part of its name is for people only."""
    readable = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(name).name).strip("-")[:40] or "data"
    return folder / f"{readable}-{key[:20]}.safetensors"


def read_cached(path: Path, name: str) -> Dataset | None:
    """The data set in a cache file; None if there is none or it is damaged."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            about = file.metadata() or {}
            values = json.loads(about.get("column_values", "null"))
            train, test = (_cached_split(file, which, values) for which in ("train", "test"))
        class_names = tuple(json.loads(about["class_names"]))
        prepared = json.loads(about.get("prepared", "{}"))
        found = fingerprint(train, test, class_names, prepared)
        if found != about["fingerprint"]:
            raise ValueError("its content does not match its fingerprint")
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, InputError, LookupError, ValueError, TypeError) as error:
        logger.warning(
            "The cache file %s is damaged (%s); the images are decoded again.", path, error
        )
        return None
    return Dataset(name, train, test, class_names, found, prepared)


def _cached_split(file: Any, which: str, values: list[Any] | None) -> ImageSplit:
    """One split; `values` are those of the column that was kept, by the numbers in the file."""
    images, labels = (file.get_tensor(f"{which}.{part}") for part in ("images", "labels"))
    column = None
    if values is not None:
        column = np.array(values)[file.get_tensor(f"{which}.column").numpy()]
    return ImageSplit(images, labels, column)


def write_cached(path: Path, dataset: Dataset) -> None:
    """Write a cache file, whole or not at all; if that fails, warn and go on without."""
    tensors = {
        "train.images": dataset.train.images.contiguous(),
        "train.labels": dataset.train.labels.contiguous(),
        "test.images": dataset.test.images.contiguous(),
        "test.labels": dataset.test.labels.contiguous(),
    }
    about = {
        "class_names": json.dumps(list(dataset.class_names)),
        "fingerprint": dataset.fingerprint,
    }
    if dataset.prepared:
        about["prepared"] = json.dumps(dataset.prepared)
    if dataset.train.column is not None and dataset.test.column is not None:
        both = np.concatenate([dataset.train.column, dataset.test.column])
        values, codes = np.unique(both, return_inverse=True)
        about["column_values"] = json.dumps(values.tolist())
        parts = np.split(codes.astype(np.int64), [len(dataset.train)])
        tensors["train.column"], tensors["test.column"] = map(torch.from_numpy, parts)
    try:
        with replacing(path) as part:
            save_file(tensors, part, metadata=about)
    except (OSError, SafetensorError) as error:
        logger.warning(
            "Cannot keep the decoded images in %s (%s); they are decoded again next time. "
            "Set %s to a folder that can be written.",
            path.parent,
            error,
            CACHE_ENV,
        )
