"""Weights from files as people have them: what is in a checkpoint, and which name is whose.

Nothing in a file is ever run. Objects that are neither tensors nor plain values (an argparse
namespace, a NumPy number, a whole pickled model) become inert stand-ins.
"""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from certifl.errors import InputError, ModelError

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
    """What `torch.save` wrote, with stand-ins for all that is not a tensor or a plain value.

    Raises:
        InputError: the file cannot be read, or holds a whole pickled object.
    """
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
    """The weights by name inside what a file holds, however they are wrapped.

    Args:
        content: tensors by name, with numbers or texts beside them or not; or a table that has
            such under a key like "state_dict", "model" or "net".
        where: the file, for messages.

    Raises:
        InputError: there are none, or several and nothing says which are meant.
    """
    found = _states(content, _DEEPEST)
    usual = {key: state for key, state in found.items() if key.split(".")[-1] in _USUAL}
    found = usual if usual else found
    if len(found) > 1:
        keys = ", ".join(key or "the file itself" for key in sorted(found))
        raise InputError(
            f"{where} holds weights in several places ({keys}): save the intended ones alone."
        )
    if not found:
        raise InputError(f"{where} holds no weights by name. Save model.state_dict() into it.")
    return next(iter(found.values()))


def _states(content: Any, depth: int, key: str = "") -> dict[str, State]:
    """Tables of tensors inside `content`, by the keys that lead there, joined by points."""
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        return {}
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    found: dict[str, State] = {}
    for name, value in content.items() if depth else ():
        found.update(_states(value, depth - 1, f"{key}.{name}" if key else name))
    # Beside a table of weights, a single number is a result such as the best accuracy so far.
    if tensors and (not found or any(value.ndim for value in tensors.values())):
        # The table itself where it holds nothing else: it knows its versions of layers.
        found[key] = content if len(tensors) == len(content) else tensors
    return found


def load_weights(model: nn.Module, state: State, what: str) -> str:
    """Load weights by name; names that differ by wrappers or by one prefix are understood.

    Args:
        model: gets the weights.
        state: weights by name.
        what: "FILE does not fit MODEL", for messages.

    Returns:
        What was done about a prefix, as a sentence; "" where the names fit, wrappers aside.

    Raises:
        ModelError: the names or shapes do not fit; a name of either side is in the message.
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
    wanted = {name for name in theirs if not name.endswith(_COUNTER)}
    prefix, change = "", ""
    if not wanted <= bare.keys():
        prefix, new = _common_prefix(bare), _common_prefix(wanted)
        moved = {new + name.removeprefix(prefix): value for name, value in bare.items()}
        if wanted <= moved.keys() <= theirs.keys():
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
