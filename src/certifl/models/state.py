"""A model's state: what is averaged, stored and named in a record."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import itertools
import json
import pickle
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from certifl.errors import InputError, ModelError


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
_HUB = "certifl.models.building"

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
    """Let `module:function` be imported from one folder alone; ModelError if it is elsewhere."""
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
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations))).resolve().parent
    return Path(spec.origin).resolve().parent if spec.has_location and spec.origin else None


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
    if constants:
        digest.update(f"{json.dumps(constants)}\x1e".encode())
    anything = bool(constants)
    for name in own:
        source = _source(name)
        if source is not None:
            digest.update(f"{name}\x1f{source}\x1e".encode())
            anything = True
    return digest.hexdigest() if anything else ""


def constants_of(model: nn.Module) -> dict[str, Any]:
    """What a network computes with that is neither in its state nor in its code, as JSON.

    A model of the Hugging Face hub has its normalization and configuration from files beside its
    weights, which may change while they stay.
    """
    return dict(getattr(model, "constants", {})) if type(model).__module__ == _HUB else {}


def _source(module: str) -> str | None:
    has_file = getattr(sys.modules.get(module), "__file__", None) is not None
    file = inspect.getsourcefile(sys.modules[module]) if has_file else None
    if file is None:
        return None
    try:
        with open(file, encoding="utf-8") as text:
            return text.read()
    except (OSError, UnicodeDecodeError):
        return None  # as if it had no file


State = Mapping[str, Tensor]

# Under which keys training scripts keep the weights; others are looked at where none of these is.
_USUAL = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "weights")
# Parts of names that wrappers add: DataParallel and torch.compile.
_WRAPPERS = ("module", "_orig_mod")
_COUNTER = "num_batches_tracked"  # absent in old files; nothing in evaluation mode reads it
_DEEPEST = 4
# What a NumPy number beside the weights is made of, where a file does not list what it needs.
_NUMPY = (
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "numpy.dtypes.Float32DType",
    "numpy.dtypes.Float64DType",
    "numpy.dtypes.Int64DType",
)


class _Inert(dict):
    """Stands for an object that is not rebuilt: takes whatever it is given and does nothing."""

    def __new__(cls, *_args: object) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *_args: object) -> None:
        super().__init__()

    def __setstate__(self, _state: object) -> None:
        """Ignored."""


def read_checkpoint(path: Path) -> object:
    """What `torch.save` wrote, with stand-ins for all but plain values; else InputError."""
    advice = "Save model.state_dict() as .safetensors, or with torch.save."
    try:
        with torch.serialization.safe_globals([_inert(name) for name in _needed(path)]):
            # weights_only: a file of weights must never be able to run code.
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the file is, it is not a plain file of weights
        raise InputError(
            f"{path} is not a plain file of weights ({type(error).__name__}). {advice}"
        ) from error
    if isinstance(content, _Inert) and not content:
        raise InputError(
            f"{path} is not a plain file of weights but a whole pickled object, whose code is "
            f"never run here. {advice}"
        )
    return content


def _inert(name: str) -> type[_Inert]:
    """A stand-in that torch finds under the full name of a class or function."""
    module, _, own = name.rpartition(".")
    return type(own, (_Inert,), {"__module__": module, "__qualname__": own})


def _needed(path: Path) -> Iterable[str]:
    """Names of the classes and functions in a file that stand-ins must take the place of."""
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (ValueError, pickle.UnpicklingError):  # written before torch 1.6
        return _NUMPY


def weights_in(content: object, where: str) -> State:
    """The weights by name inside what a file holds, however they are wrapped; else InputError.

    Args:
        content: tensors by name, with numbers or texts beside them or not; or a table that has
            such under a key like "state_dict", "model" or "net".
        where: the file, for messages.
    """
    tables = _states(content, _DEEPEST)
    usual = {key: state for key, state in tables.items() if key.split(".")[-1] in _USUAL}
    tables = usual or tables
    if len(tables) > 1:
        keys = ", ".join(key or "the file itself" for key in sorted(tables))
        raise InputError(
            f"{where} holds weights in several places ({keys}): save the intended ones alone."
        )
    if not tables:
        raise InputError(f"{where} holds no weights by name. Save model.state_dict() into it.")
    return next(iter(tables.values()))


def _states(content: Any, depth: int, key: str = "") -> dict[str, State]:
    """Tables of tensors inside `content`, by the keys that lead there, joined by points."""
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        return {}
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    tables: dict[str, State] = {}
    for name, value in content.items() if depth else ():
        tables.update(_states(value, depth - 1, f"{key}.{name}" if key else name))
    # Beside a table of weights, a single number is a result such as the best accuracy so far.
    if tensors and (not tables or any(value.ndim for value in tensors.values())):
        # The table itself where it holds nothing else: it knows its versions of layers.
        tables[key] = content if len(tensors) == len(content) else tensors
    return tables


def load_weights(model: nn.Module, state: State, what: str) -> str:
    """Load weights by name; names that differ by wrappers or by one prefix are understood.

    Returns what was done about a prefix, as a sentence ("" where the names fit, wrappers aside). A
    ModelError, "`what`: ...", has a name of either side that does not fit.
    """
    if _loaded(model, state):
        return ""
    own = model.state_dict()
    renamed, change = _renamed(state, own)
    complete = {n: v for n, v in own.items() if n.split(".")[-1] == _COUNTER} | renamed
    if not _loaded(model, complete):
        raise ModelError(f"{what}: {_misfit(complete, own, state)}")
    return change


def _loaded(model: nn.Module, state: State) -> bool:
    try:
        model.load_state_dict(state)
    except RuntimeError:  # names or shapes that do not fit
        return False
    return True


def _renamed(state: State, own: State) -> tuple[dict[str, Tensor], str]:
    """The weights under the network's names where they match, and what was changed."""
    bare = {_bare(name): value for name, value in state.items()}
    theirs = {_bare(name): name for name in own}
    if len(bare) < len(state) or len(theirs) < len(own):
        return dict(state), ""  # names that only a wrapper tells apart
    weights = {name for name in theirs if not name.endswith(_COUNTER)}
    prefix, change = "", ""
    if not weights <= bare.keys():
        prefix, new = _common_prefix(bare), _common_prefix(weights)
        moved = {new + name.removeprefix(prefix): value for name, value in bare.items()}
        if weights <= moved.keys() <= theirs.keys():
            bare, change = moved, _prefix_in_words(prefix, new)
    return {theirs.get(name, name): value for name, value in bare.items()}, change


def _bare(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _common_prefix(names: Iterable[str]) -> str:
    """The parts that all names begin with, up to and with a point."""
    parents = [name.split(".")[:-1] for name in names]
    shared = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*parents, strict=False))
    return "".join(f"{parts[0]}." for parts in shared)


def _prefix_in_words(old: str, new: str) -> str:
    while old and new and old.split(".")[-2] == new.split(".")[-2]:  # the part both end with
        old, new = (f"{text[:-1].rpartition('.')[0]}." for text in (old, new))
        old, new = old.removeprefix("."), new.removeprefix(".")
    if not new:
        return f"The prefix {old!r} of all its names was left out."
    if not old:
        return f"The prefix {new!r} was put before all its names."
    return f"The prefix {old!r} of all its names was taken for {new!r}."


def _misfit(state: State, own: Mapping[str, Any], given: State) -> str:
    """What does not fit, with a name of either side, and what to do."""
    missing = [name for name in own if name not in state]
    unknown = [name for name in state if name not in own]
    shapes = [
        f"{name} is {tuple(state[name].shape)} where the network for these data has "
        f"{tuple(value.shape)}"
        for name, value in own.items()
        if name in state and state[name].shape != value.shape
    ]
    if not missing and not unknown:
        more = f", and {len(shapes) - 1} more" if len(shapes) > 1 else ""
        return f"{shapes[0]}{more}." if shapes else "torch cannot load it."
    theirs = next((name for name in given if name in unknown), next(iter(given)))
    counted = f"{len(missing)} of the network's {len(own)} names are not in the file"
    if not missing:
        counted = f"{len(unknown)} of the file's {len(state)} names are not in the network"
    ours = missing[0] if missing else next(iter(own))
    return (
        f"{counted}; the file has {theirs!r}, the network has {ours!r}. Give the network that the "
        "weights were saved from, or save them under the network's own names."
    )
