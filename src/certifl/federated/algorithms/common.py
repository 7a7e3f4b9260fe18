"""Building blocks of algorithms: a pull to a center, and layers that stay with the client."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from torch import nn

from certifl.errors import SpecError
from certifl.federated.states import ClientState, ModelState, ServerState, Update
from certifl.federated.training import foreach
from certifl.federated.training.steps import GradientHook, gradients_of


def proximal_hook(center: ModelState, mu: float, loss_weight: float = 1.0) -> GradientHook | None:
    """The gradient of theta becomes loss_weight times itself plus mu (theta - center).

    Args:
        center: on the training device (`LocalTraining.on_device`).
        mu: weight of the proximal term mu/2 ||theta - center||^2; at 0 there is nothing to hold,
            and no hook.
        loss_weight: of the loss beside it.
    """
    return None if mu == 0 else _Pull(center, mu, loss_weight)


@dataclass(frozen=True, eq=False)
class _Pull:
    """The hook of `proximal_hook`."""

    center: ModelState
    mu: float
    loss_weight: float

    def __call__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        gradients = gradients_of(parameters.values())
        if self.loss_weight != 1:
            foreach.scale(gradients, self.loss_weight)
        centers = [self.center[name] for name in parameters]
        apart = foreach.differences(list(parameters.values()), centers)
        foreach.add(gradients, apart, self.mu)


# Which entries of a model state belong to which layers of the network.


_BATCH = (nn.modules.batchnorm._BatchNorm,)
_ALL = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def module_keys(network: nn.Module, prefix: str) -> frozenset[str]:
    """Keys of the network's state that belong to the module of this name, and its children."""
    return frozenset(key for key in network.state_dict() if key.startswith(f"{prefix}."))


def norm_keys(network: nn.Module, layers: str) -> frozenset[str]:
    """Keys of all normalization layers: affine weights, running statistics, counters."""
    kinds = _BATCH if layers == "batch" else _ALL
    found: frozenset[str] = frozenset()
    for name, module in network.named_modules():
        if isinstance(module, kinds):
            found |= module_keys(network, name)
    return found


def head_keys(network: nn.Module, head: str | None) -> frozenset[str]:
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
        return module_keys(network, weighted[-1])
    found = module_keys(network, head)
    if not found:
        modules = ", ".join(name for name, _ in network.named_children())
        raise SpecError(
            f"head = {head!r} is no part of this network that has weights: its parts are "
            f"{modules}."
        )
    return found


def split_state(state: ModelState, names: Collection[str]) -> tuple[ModelState, ModelState]:
    """The state's entries of these names, and all others."""
    inside = {name: value for name, value in state.items() if name in names}
    return inside, {name: value for name, value in state.items() if name not in names}


def withhold(
    sent: Update, kept: ClientState, broadcast: ServerState, names: Collection[str], part: str
) -> tuple[Update, ClientState]:
    """A client's round in which the entries of these names do not leave the client.

    Args:
        sent, kept: the round without anything withheld.
        broadcast: what the client started from.
        names: entries of the model that are personal.
        part: the part of the client's state that holds them.

    Returns:
        The update with these entries as they were broadcast, so that their average at the server
        never changes; and the client's state with the trained ones.
    """
    assert sent.model is not None
    own, _ = split_state(sent.model, names)
    public = {n: broadcast.parts["model"][n] if n in names else v for n, v in sent.model.items()}
    parts = {part: own, **kept.parts} if own else kept.parts
    return replace(sent, model=public), ClientState(parts)
