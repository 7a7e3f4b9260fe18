"""Files and folders that only their owner can read, from the moment they appear."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from certifl.errors import StoreError
from certifl.runs.atomic import replacing


@contextlib.contextmanager
def private_files() -> Iterator[None]:
    """Files and folders created meanwhile, also by started processes, belong to their owner alone.

    Removing permissions afterwards would be too late.
    """
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def private_folder(folder: Path) -> None:
    """Make a folder private, also an existing one that others could read until now.

    Raises:
        StoreError: it cannot be made, or belongs to another user.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if folder.stat().st_mode & 0o077:
            folder.chmod(0o700)
    except OSError as error:
        raise StoreError(
            f"{folder} cannot be made readable by its owner alone: {error}. It must belong to the "
            "user that starts the client."
        ) from error


def write_secret(path: Path, content: bytes) -> None:
    """Write a private file, whole or not at all."""
    with replacing(path) as part:
        handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
