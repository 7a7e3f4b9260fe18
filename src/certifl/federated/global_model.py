"""What algorithms with a global model share: a client's round from it, its average, a pull to it.

An algorithm composes these and says in its own file what is special about it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from certifl.federated import together
from certifl.federated.averaging import average_models
from certifl.federated.bench import gradients_of
from certifl.federated.states import ClientData, ClientState, ModelState, ServerState, Update

if TYPE_CHECKING:
    from certifl.federated.client import GradientHook, LocalTraining, Step

__all__ = ["averaged", "pull_towards", "trained_and_sent"]


def trained_and_sent(
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
    trained = training.passes(
        broadcast.parts["model"],
        data,
        broadcast.round,
        momentum=client_state.parts.get("momentum"),
        hook=hook,
        step=step,
    )
    update = Update(data.client, len(data), trained.state, trained.metrics)
    return update, ClientState(trained.kept)


def averaged(
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


def pull_towards(center: ModelState, mu: float, loss_weight: float = 1.0) -> GradientHook | None:
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
    """The hook of `pull_towards`."""

    center: ModelState
    mu: float
    loss_weight: float

    def __call__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        gradients = gradients_of(parameters.values())
        if self.loss_weight != 1:
            together.scale(gradients, self.loss_weight)
        centers = [self.center[name] for name in parameters]
        apart = together.differences(list(parameters.values()), centers)
        together.add(gradients, apart, self.mu)
