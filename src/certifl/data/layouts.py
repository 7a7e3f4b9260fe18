"""Which files of a folder make up a data set: parquet as on the hub, IDX, or image folders."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from certifl.data.decode import IMAGE_SUFFIXES
from certifl.errors import DataUnavailable, InputError

__all__ = ["TEST_NAMES", "Layout", "choose_test", "find_layout"]

TEST_NAMES = ("test", "validation", "valid", "val")
_IDX_NAMES = {
    "train": ("train-images", "train-labels"),
    "test": ("t10k-images", "t10k-labels"),
}


@dataclass(frozen=True)
class Layout:
    """The files of both splits.

    Args:
        kind: how they are read.
        root: the data set's folder.
        train: files of the training split; for IDX the images, then the labels.
        test: files of the test split.
    """

    kind: Literal["parquet", "idx", "folder"]
    root: Path
    train: tuple[Path, ...]
    test: tuple[Path, ...]


def find_layout(root: Path) -> Layout | None:
    """Recognise the data set in a folder; None if the folder holds none of the layouts.

    Raises:
        DataUnavailable: training images without test images.
        InputError: several data sets in one folder.
    """
    return _find_parquet(root) or _find_idx(root) or _find_folder(root)


def choose_test(available: list[str], where: str) -> str:
    """The split that serves as test: `test`, else a validation split.

    Raises:
        DataUnavailable: none of them is there.
    """
    for name in TEST_NAMES:
        if name in available:
            return name
    raise DataUnavailable(
        f"{where} has training images but no test images. Certificates are given for images that "
        f"no model was trained on: add a split named {' or '.join(TEST_NAMES[:2])}, for example "
        "by moving some training images there."
    )


def _find_parquet(root: Path) -> Layout | None:
    folder = _parquet_folder(root)
    if folder is None:
        return None
    splits = {name: _parquet_files(folder, name) for name in ("train", *TEST_NAMES)}
    test = choose_test([name for name, files in splits.items() if files], str(folder))
    return Layout("parquet", root, splits["train"], splits[test])


def _parquet_folder(root: Path) -> Path | None:
    """The folder itself, its `data`, or the one subfolder (the hub's configuration) with files."""
    for folder in (root, root / "data"):
        if _parquet_files(folder, "train"):
            return folder
    below = [folder for folder in _folders(root) if _parquet_files(folder, "train")]
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
    files = tuple(sorted(named)) or tuple(sorted((folder / split).glob("*.parquet")))
    for total in {_parts_of(file) for file in files} - {None}:
        if total != len(files):
            raise InputError(
                f"{folder} holds {len(files)} of the {total} files of the split {split!r}: "
                f"{', '.join(file.name for file in files)}. Copy or download the missing ones."
            )
    return files


def _parts_of(file: Path) -> int | None:
    """The M in `train-00000-of-M.parquet`."""
    match = re.search(r"-of-(\d+)", file.stem)
    return int(match.group(1)) if match else None


def _find_idx(root: Path) -> Layout | None:
    for folder in (root, root / "raw"):
        train = _idx_pair(folder, "train")
        test = _idx_pair(folder, "test")
        if train:
            if not test:
                choose_test([], str(folder))
            return Layout("idx", root, train, test)
    return None


def _idx_pair(folder: Path, split: str) -> tuple[Path, ...]:
    found = []
    for stem, kind in zip(_IDX_NAMES[split], ("idx3-ubyte", "idx1-ubyte"), strict=True):
        names = (f"{stem}{dot}{kind}{end}" for dot in "-." for end in ("", ".gz"))
        found.append(next((folder / name for name in names if (folder / name).is_file()), None))
    return tuple(file for file in found if file) if all(found) else ()


def _find_folder(root: Path) -> Layout | None:
    train = _class_images(root / "train")
    if not train:
        return None
    splits = {name: _class_images(root / name) for name in TEST_NAMES}
    test = choose_test([name for name, files in splits.items() if files], str(root))
    return Layout("folder", root, train, splits[test])


def _class_images(folder: Path) -> tuple[Path, ...]:
    """All `<class>/<image>` below a split's folder, by class, then by name."""
    found: list[Path] = []
    for below in _folders(folder):
        images = sorted(file for file in _visible(below) if file.suffix.lower() in IMAGE_SUFFIXES)
        found.extend(images)
    return tuple(found)


def _folders(root: Path) -> list[Path]:
    return sorted(folder for folder in _visible(root) if folder.is_dir())


def _visible(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        yield from (entry for entry in folder.iterdir() if not entry.name.startswith("."))
