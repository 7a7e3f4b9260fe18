"""Files that are either whole or absent: written beside their place, flushed, then renamed.

A process killed at any moment leaves the old file or the new one, never half of either; what a
kill leaves behind is a file ending in `.tmp`, which no reader looks at.
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

from certifl import safe_io as outside
from certifl.errors import InputError, StoreError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Hand out a temporary path beside `path`; on leaving without error it takes `path`'s place.

    Raises:
        StoreError: the folder cannot be written, or the disk is full; `path` is as it was.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if part.is_symlink():  # somebody else's: it could lead anywhere
            part.unlink()
        yield part
        flush(part)
        os.replace(part, path)
        flush(path.parent)
    except (OSError, SafetensorError) as error:
        raise StoreError(
            f"Cannot write {path}: {error}. What was there before is unchanged; "
            "free some space or choose another folder with --out, then repeat the command."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """What was written to a file, or the names in a folder, is on the disk when this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
        StoreError: the file is missing or is no JSON.
    """
    try:
        return outside.read_json(path)
    except OSError as error:
        raise StoreError(f"Cannot read {path}: {error}. Is this a run folder?") from error
    except InputError as error:
        raise StoreError(
            f"{path} is damaged: {error}. The command that made it makes it again "
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
        outside.require_regular(path)
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise StoreError(f"Cannot read {path}: {error}.") from error
