"""The images below the class folders of a split: every file is read, named or refused."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from certifl.data.decode import IMAGE_SUFFIXES
from certifl.errors import InputError

_TEXTS = (
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
    says so.

    Args:
        split: the split's folder.
        may_be_empty: whether a class may have no images. Of the training images none may: leaving
            the class out would give the classes after it other numbers.

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
        if not images:
            _without_images(entry, may_be_empty)
        found.extend(sorted(images))
    if texts:
        more = f" and {len(texts) - 1} more" if len(texts) > 1 else ""
        _log.warning("Text files beside images are passed over: %s%s.", texts[0], more)
    return tuple(found)


def _without_images(folder: Path, may_be_empty: bool) -> None:
    if not may_be_empty:
        raise InputError(
            f"The class folder {folder} holds no image. Remove the folder, or put the images of "
            "that class into it."
        )
    _log.warning("The class folder %s holds no image: no certificate is about that class.", folder)


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
