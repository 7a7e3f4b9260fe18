"""A model's state: what is averaged, stored and named in a record."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Mapping, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from certifl.errors import ModelError


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Weights and buffers as detached copies on the CPU, by name."""
    return {
        name: tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in model.state_dict().items()
    }


def fingerprint(model: nn.Module | Mapping[str, Tensor]) -> str:
    """SHA-256 over the names, types, shapes and bytes of a state, in the order of names.

    Equal for a model and for its stored state; independent of device and memory layout.
    """
    state = model.state_dict() if isinstance(model, nn.Module) else model
    digest = hashlib.sha256()
    for name in sorted(state):
        if not isinstance(
            state[name], Tensor
        ):  # extra state of a layer, weights of a quantized one
            digest.update(f"{name}\x1f{_in_words(state[name])}\x1e".encode())
            continue
        tensor = state[name].detach().to("cpu").contiguous()
        digest.update(f"{name}\x1f{tensor.dtype}\x1f{tuple(tensor.shape)}\x1e".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _in_words(value: Any) -> str:
    """A text that is equal for equal values; addresses in memory are left out."""
    if isinstance(value, Tensor):
        plain = value.dequantize() if value.is_quantized else value
        return fingerprint({"": plain})
    if isinstance(value, (tuple, list)):
        return ",".join(_in_words(part) for part in value)
    if isinstance(value, Mapping):
        return ",".join(f"{key}={_in_words(part)}" for key, part in value.items())
    text = repr(value)
    return type(value).__qualname__ if " at 0x" in text else text


# The code behind a network: where it may come from, and what it was.
#
# Code runs because a user named it, in a spec or an option; never because a folder that somebody
# sent holds it. So no folder goes onto the import path: a finder looks for the named module alone.
# Two networks of equal weights can still be two functions, which the fingerprint tells apart.


_KNOWN_BY_VERSION = ("torch", "certifl")
_HUB = "certifl.models.huggingface"

NamedCode = dict[str, tuple[str, ...]]
"""Folders in which a module, by the first part of its name, is looked for."""


class _NamedModules:
    """Finds modules by name in the folders that a user gave for them, and nothing else there."""

    def __init__(self) -> None:
        self.folders: NamedCode = {}

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Part of Python's import protocol; submodules are found through their package."""
        if path is not None or name not in self.folders:
            return None
        return PathFinder.find_spec(name, list(self.folders[name]))


_NAMED = _NamedModules()


def allow_code(name: str, *folders: Path | str) -> None:
    """Let `module:function` be imported from folders that the user gave, its package included.

    Python's own import path comes first, so that nothing is replaced. Other files of the
    folders are not importable: `torch` and others import optional packages if they find them.

    Args:
        name: `module:function`; the name of a network of certifl's own allows nothing.
        folders: in the order in which they are searched.
    """
    if is_users_code(name):
        adopt_code({_top(name): tuple(str(Path(folder).resolve()) for folder in folders)})


def is_users_code(name: str) -> bool:
    """Whether a network's name is `module:function`; "hf:..." runs no code of its own."""
    return ":" in name and not name.startswith("hf:")


def allowed_code() -> NamedCode:
    """What was allowed so far, for `adopt_code` in processes that must find the same modules."""
    return dict(_NAMED.folders)


def adopt_code(allowed: NamedCode) -> None:
    """Allow what another process of the same command allowed."""
    if _NAMED not in sys.meta_path:
        sys.meta_path.append(_NAMED)
    _NAMED.folders.update(allowed)
    importlib.invalidate_caches()


def require_code(name: str, folder: Path) -> None:
    """Let `module:function` be imported from one folder, and from nowhere else.

    Raises:
        ModelError: there is no such folder, it does not hold the module, or Python finds another
            of that name.
    """
    top = _top(name)
    if not folder.is_dir():
        raise ModelError(
            f"{folder} is not a folder: give --code the folder that holds the module {top!r} of "
            f"the network {name!r}."
        )
    if PathFinder.find_spec(top, [str(folder.resolve())]) is None:
        raise ModelError(
            f"{folder} holds no module {top!r}, which the network {name!r} is in. Give the folder "
            f"that holds {top}.py, or the package {top}, with --code."
        )
    allow_code(name, folder)
    location = _location_of(top)
    if location is None or location != folder.resolve():
        raise ModelError(
            f"Python finds the module {top!r} of the network {name!r} in {location or 'itself'}, "
            f"not in {folder}. Give the folder that it is in with --code, or rename your module."
        )


def _top(name: str) -> str:
    return name.partition(":")[0].partition(".")[0]


def _location_of(top: str) -> Path | None:
    """The folder that a module, or its package, is found in; nothing is imported for that."""
    try:
        found = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if found is None:
        return None
    if found.submodule_search_locations:
        return Path(next(iter(found.submodule_search_locations))).resolve().parent
    return Path(found.origin).resolve().parent if found.has_location and found.origin else None


def code_fingerprint(model: nn.Module) -> str:
    """SHA-256 over the source files of the classes of a network's layers, in the order of names.

    Layers of torch and of certifl are left out (records name their versions); "" where there is
    no other. Constants from elsewhere count as code (`constants_of`). What a file imports, and
    classes that have no file (made in a notebook), are not seen: the fingerprint shows that code
    changed, not that it did not.
    """
    names = {type(layer).__module__ for layer in model.modules()}
    own = sorted(name for name in names if name.partition(".")[0] not in _KNOWN_BY_VERSION)
    digest, constants = hashlib.sha256(), constants_of(model)
    found = bool(constants)
    if constants:
        digest.update(f"{json.dumps(constants)}\x1e".encode())
    for name in own:
        source = _source(name)
        if source is not None:
            digest.update(f"{name}\x1f{source}\x1e".encode())
            found = True
    return digest.hexdigest() if found else ""


def constants_of(model: nn.Module) -> dict[str, Any]:
    """What a network computes with that is neither in its state nor in its code, as JSON.

    A model of the Hugging Face hub has its normalization from a file beside its weights, which may
    change while they stay.
    """
    return dict(getattr(model, "constants", {})) if type(model).__module__ == _HUB else {}


def _source(module: str) -> str | None:
    file = inspect.getsourcefile(sys.modules[module]) if _has_file(module) else None
    if file is None:
        return None
    try:
        with open(file, encoding="utf-8") as text:
            return text.read()
    except (OSError, UnicodeDecodeError):
        return None  # as if it had no file


def _has_file(module: str) -> bool:
    return getattr(sys.modules.get(module), "__file__", None) is not None
