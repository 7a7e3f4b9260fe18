"""What algorithms with a global model share: a client's round from it, its average, a pull to it.

An algorithm composes these and says in its own file what is special about it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from certifl.errors import SpecError
from certifl.federated.averaging import average_models
from certifl.federated.states import ClientData, ClientState, ModelState, ServerState, Update
from certifl.federated.training import foreach
from certifl.federated.training.steps import gradients_of

if TYPE_CHECKING:
    from certifl.federated.training.local_training import GradientHook, LocalTraining, Step


def train_global_model(
    broadcast: ServerState,
    client_state: ClientState,
    data: ClientData,
    training: LocalTraining,
    *,
    hook: GradientHook | None = None,
    step: Step | None = None,
) -> tuple[Update, ClientState]:
    """A client's round of federated averaging: train the global model and send the result.

    Args:
        broadcast: its part "model" is where the client starts.
        client_state: momentum that the client kept, or nothing.
        data: the client's images.
        training: the schedule's passes.
        hook: changes gradients before each step.
        step: what is done with each batch; None = gradient, hook, optimiser.

    Returns:
        The update with the whole model and weight n; momentum to keep where the schedule says so.
    """
    trained = training.train_epochs(
        broadcast.parts["model"],
        data,
        broadcast.round,
        momentum=client_state.parts.get("momentum"),
        hook=hook,
        step=step,
    )
    update = Update(data.client, len(data), trained.state, trained.metrics)
    return update, ClientState(trained.kept)


def average_global_model(
    server_state: ServerState, updates: Iterable[Update], weighting: str = "uniform"
) -> ServerState:
    """The next round's global model: the average of those that arrived, the old one if none did.

    Args:
        server_state: before the round.
        updates: in client order; each is dropped before the next is asked for.
        weighting: "uniform" (1/n) or "size" (by number of training images).
    """
    average = average_models(updates, weighting)
    parts = server_state.parts if average is None else {"model": average}
    return ServerState(server_state.round + 1, parts)


def proximal_hook(center: ModelState, mu: float, loss_weight: float = 1.0) -> GradientHook | None:
    """The gradient of theta becomes loss_weight times itself plus mu (theta - center).

    Args:
        center: on the device of the passes (`LocalTraining.on_device`).
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
    """Keys of all normalisation layers: affine weights, running statistics, counters."""
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
    return sent, split_state(trained, names)[0]
