"""Algorithms whose clients keep layers of their own: FedBN and FedRep."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from torch import nn

from certifl.errors import SpecError
from certifl.federated.algorithms.base import GlobalModel
from certifl.federated.local_training import (
    GradientHook,
    LocalTraining,
    with_counted_steps,
)
from certifl.federated.states import ClientData, ClientState, ModelState, ServerState, Update


@dataclass(frozen=True)
class FedBN(GlobalModel):
    """FedBN: every client keeps its own BatchNorm layers, all other weights are averaged.

    Affine weights, running statistics and counters of these layers stay with the client; in what
    it sends they are as they were broadcast, so nothing of them leaves and the server's never
    change. Without such layers this is federated averaging, bit for bit: networks with GroupNorm
    have none, `layers = "all"` keeps theirs at home instead.

    Deployed by client i: the global model with its own normalization layers (the initial ones
    where it never trained).

    Attributes:
        layers: "batch" (BatchNorm, the source's) or "all" (every normalization layer).
        weighting: "uniform" (1/n) or "size" (by number of training images).

    Source: Li, Jiang, Zhang, Kamp, Dou, FedBN: Federated Learning on Non-IID Features via Local
    Batch Normalization, 2021, Algorithm 1.
    """

    layers: str = "batch"
    weighting: str = "uniform"

    name = "fedbn"
    deploys = "the global model with its own normalization layers"
    keeps_client_state = True

    def client_round(
        self, broadcast: ServerState, state: ClientState, data: ClientData, training: LocalTraining
    ) -> tuple[Update, ClientState]:
        """Train the global model with the own layers in it; send all but these."""
        update, state = super().client_round(broadcast, state, data, training)
        private = norm_keys(training.network, self.layers)
        return withhold(update, state, broadcast, private, "layers")

    def deployed(self, server_state: ServerState, client_state: ClientState) -> ModelState:
        """The global model with the client's own layers."""
        return {**server_state.parts["model"], **client_state.parts.get("layers", {})}


@dataclass(frozen=True)
class FedRep(GlobalModel):
    """FedRep: a representation that all clients train, and a head of its own for each.

    In a round every client first trains its head with the representation frozen, then the
    representation with its head frozen, and sends the representation.

    The head is trained for `head_epochs` at the round's learning rate, with fresh momentum and its
    own random streams; the representation for the schedule's epochs. In what a client sends the
    head is as it was broadcast, so that nothing of it leaves. BatchNorm's running statistics
    of the representation follow both trainings and are averaged.

    Without a head (`head = ""`) this is federated averaging, bit for bit.

    Deployed by client i: the shared representation with its own head (the initial one where it
    never trained).

    Attributes:
        head: name of the part of the network that is personal, such as "head"; None = its last
            layer with weights; "" = nothing.
        head_epochs: of the head in each round, from 1.
        weighting: "uniform" (1/n) or "size" (by number of training images).

    Raises:
        SpecError: a hyper-parameter outside its range; in a round, a `head` that the
            network does not have.

    Source: Collins, Hassani, Mokhtari, Shakkottai, Exploiting Shared Representations for
    Personalized Federated Learning, 2021, Algorithm 1.
    """

    head: str | None = None
    head_epochs: int = 1
    weighting: str = "uniform"

    name = "fedrep"
    deploys = "the shared representation with its own head"
    keeps_client_state = True

    def client_round(
        self, broadcast: ServerState, state: ClientState, data: ClientData, training: LocalTraining
    ) -> tuple[Update, ClientState]:
        """Train the head, then the representation; send the representation, keep the head."""
        head, of_head = head_keys(training.network, self.head), dict[str, float]()
        if head:
            trained = training.train_epochs(
                self.deployed(broadcast, state),
                data,
                broadcast.round,
                hook=_freeze(training.trainable, but=head),
                stream="head-",
                epochs=self.head_epochs,
            )
            # All of it, since BatchNorm's running statistics have moved too.
            state = ClientState({**state.parts, "head": trained.state})
            of_head = trained.metrics
        update, state = super().client_round(broadcast, state, data, training)
        update = replace(update, metrics=with_counted_steps(update.metrics, of_head))
        return withhold(update, state, broadcast, head, "head")

    def hook(self, broadcast: ServerState, training: LocalTraining) -> GradientHook | None:
        """Freezes the head while the representation is trained."""
        return _freeze(head_keys(training.network, self.head), but=())

    def deployed(self, server_state: ServerState, client_state: ClientState) -> ModelState:
        """The shared representation with the client's own head."""
        return {**server_state.parts["model"], **client_state.parts.get("head", {})}


def _freeze(names: Collection[str], but: Collection[str]) -> GradientHook | None:
    """A hook that removes the gradients of these weights."""
    frozen = frozenset(names).difference(but)
    if not frozen:
        return None

    def hook(parameters: Mapping[str, nn.Parameter]) -> None:
        for name in frozen & parameters.keys():
            parameters[name].grad = None

    return hook


_NORMS = {
    "batch": (nn.modules.batchnorm._BatchNorm,),
    "all": (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm),
}


def module_keys(network: nn.Module, prefix: str) -> frozenset[str]:
    """Keys of the network's state that belong to the module of this name, and its children."""
    return frozenset(key for key in network.state_dict() if key.startswith(f"{prefix}."))


def norm_keys(network: nn.Module, layers: str) -> frozenset[str]:
    """Keys of all normalization layers: affine weights, running statistics, counters."""
    kinds = _NORMS[layers]
    named = [name for name, module in network.named_modules() if isinstance(module, kinds)]
    return frozenset().union(*(module_keys(network, name) for name in named))


def head_keys(network: nn.Module, head: str | None) -> frozenset[str]:
    """Keys of the module `head` (else SpecError): none for "", the last layer's for None."""
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


def withhold(
    update: Update, state: ClientState, broadcast: ServerState, names: Collection[str], part: str
) -> tuple[Update, ClientState]:
    """A client's round in which the entries of these names do not leave the client.

    The update has them as they were broadcast, so that their average at the server never changes;
    the client's state has the trained ones as `part`.
    """
    assert update.model is not None
    own = {name: value for name, value in update.model.items() if name in names}
    public = {**update.model, **{name: broadcast.parts["model"][name] for name in own}}
    parts = {part: own, **state.parts} if own else state.parts
    return replace(update, model=public), ClientState(parts)
