"""Decoded data sets kept on disk, so that images are decoded once.

A cache file is a safetensors file with the images and labels of both splits. Its name holds a key
made of everything that decides the content: the source files' paths, sizes and times of change,
the columns asked for, and the version of the decoding rules. What is read is checked against the
fingerprint stored with it. The cache never makes a run fail: it is rebuilt or done without.

A data set of the hub is kept under its name alone, so that it loads without network from then on;
delete its file to fetch it anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from certifl.data.dataset import Dataset, ImageSplit, fingerprint
from certifl.errors import InputError
from certifl.safe_io import replacing

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
        digest.update(f"\n{file.absolute()}\0{status.st_size}\0{status.st_mtime_ns}".encode())
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
