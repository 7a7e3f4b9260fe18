"""Files that are either whole or absent: written beside their path, flushed, then renamed.

Some of them, and their folders, can be read by their owner alone, from the moment they appear.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from certifl import safe_io
from certifl.errors import InputError, StoreError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on leaving without error it replaces `path`.

    Raises:
        StoreError: the folder cannot be written, or the disk is full; `path` is as it was.
    """
    try:
        with safe_io.replacing(path) as part:
            yield part
    except (OSError, SafetensorError) as error:
        raise StoreError(
            f"Cannot write {path}: {error}. The previous file is unchanged; "
            "free some space or choose another folder with --out, then repeat the command."
        ) from error


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file or none of it."""
    with replacing(path) as part:
        part.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    """Write a whole UTF-8 text or none of it."""
    write_bytes(path, content.encode())


def write_json(path: Path, content: Any) -> None:
    """Write JSON with sorted keys, so that equal contents are equal files."""
    write_text(path, json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        StoreError: the file is missing or is not JSON.
    """
    try:
        return safe_io.read_json(path)
    except OSError as error:
        raise StoreError(f"Cannot read {path}: {error}. Is this a run folder?") from error
    except InputError as error:
        raise StoreError(
            f"{path} is damaged: {error}. The command that wrote it writes it again "
            "with --overwrite."
        ) from error


def save_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write named tensors as safetensors (never pickle); the metadata are short strings."""
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with replacing(path) as part:
        save_file(plain, part, metadata=dict(metadata or {}))


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read named tensors onto the CPU.

    Raises:
        StoreError: the file is missing or damaged.
    """
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def tensor_metadata(path: Path) -> dict[str, str]:
    """The short strings stored beside the tensors."""
    with _opened(path) as file:
        return dict(file.metadata() or {})


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        safe_io.require_regular(path)
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise StoreError(f"Cannot read {path}: {error}.") from error


# Files and folders that only their owner can read.


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
