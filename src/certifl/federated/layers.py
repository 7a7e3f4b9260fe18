"""Which entries of a model state belong to which layers of the network."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from certifl.errors import SpecError
from certifl.federated.states import ModelState

__all__ = [
    "NORMALIZATIONS",
    "divided",
    "entries_of",
    "head_entries",
    "kept_back",
    "norm_entries",
]

NORMALIZATIONS = {
    "batch": "BatchNorm layers, the source's",
    "all": "every normalisation layer: BatchNorm, GroupNorm, LayerNorm, InstanceNorm",
}
_BATCH = (nn.modules.batchnorm._BatchNorm,)
_ALL = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def entries_of(network: nn.Module, prefix: str) -> frozenset[str]:
    """Keys of the network's state that belong to the module of this name, and its children."""
    return frozenset(key for key in network.state_dict() if key.startswith(f"{prefix}."))


def norm_entries(network: nn.Module, layers: str) -> frozenset[str]:
    """Keys of all normalisation layers: affine weights, running statistics, counters."""
    kinds = _BATCH if layers == "batch" else _ALL
    found: frozenset[str] = frozenset()
    for name, module in network.named_modules():
        if isinstance(module, kinds):
            found |= entries_of(network, name)
    return found


def head_entries(network: nn.Module, head: str | None) -> frozenset[str]:
    """Keys of the head: the module of that name, or the last layer with weights.

    Args:
        network: its modules in the order in which they were made.
        head: name of a module; "" = no head at all; None = the last layer that has weights.

    Raises:
        SpecError: the network has no weights under that name.
    """
    if head == "":
        return frozenset()
    if head is None:
        weighted = [
            name
            for name, module in network.named_modules()
            if any(True for _ in module.parameters(recurse=False))
        ]
        return entries_of(network, weighted[-1])
    found = entries_of(network, head)
    if not found:
        modules = ", ".join(name for name, _ in network.named_children())
        raise SpecError(
            f"head = {head!r} is no part of this network that has weights: its parts are "
            f"{modules}."
        )
    return found


def divided(state: ModelState, names: Collection[str]) -> tuple[ModelState, ModelState]:
    """The state's entries of these names, and all others."""
    inside = {name: value for name, value in state.items() if name in names}
    return inside, {name: value for name, value in state.items() if name not in names}


def kept_back(
    trained: ModelState, broadcast: ModelState, names: Collection[str]
) -> tuple[ModelState, ModelState]:
    """What a client sends and what it keeps to itself of the entries of these names.

    Args:
        trained: the client's model after its passes.
        broadcast: the model it started from.
        names: entries that are personal.

    Returns:
        The model, in which these entries are as they were broadcast, and the trained entries: so
        nothing of them leaves the client, and their average at the server never changes.
    """
    sent = {n: broadcast[n] if n in names else value for n, value in trained.items()}
    return sent, divided(trained, names)[0]
