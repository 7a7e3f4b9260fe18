"""Which files of a folder make up a data set: parquet as on the hub, IDX, or image folders.

Of an image folder every file is read, passed over by name, or refused.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from certifl.data.decode import IMAGE_SUFFIXES
from certifl.errors import DataUnavailable, InputError

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
    """Recognize the data set in a folder; None if the folder holds none of the layouts.

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


def choose_test(available: list[str], where: str, asked: str | None = None) -> str:
    """The split that serves as test: as asked for, else `test`, else a validation split.

    Raises:
        DataUnavailable: it is not there, or none of them is.
    """
    if asked is not None:
        if asked in available:
            return asked
        raise DataUnavailable(
            f"{where} has no split {asked!r} to certify images of; it has "
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


_TEXTS = [
    ".txt",
    ".md",
    ".rst",
    ".csv",
    ".tsv",
    ".json",
    ".jsonl",
    ".xml",
    ".yaml",
    ".yml",
    ".toml",
    ".html",
    ".log",
]
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
    says so. Of the training images no class may be empty: leaving it out would give the classes
    after it other numbers.

    Raises:
        InputError: a file is neither read nor passed over, or a class folder is empty.
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
    """Whether a file is read; what is passed over as text is added to `texts`.

    Raises:
        InputError: it is neither, so it may be an image that would be lost.
    """
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
