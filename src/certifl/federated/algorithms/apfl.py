"""APFL: every client learns how much of its own model to mix into the global one."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from certifl.federated.algorithms.base import GlobalModel
from certifl.federated.algorithms.common import split_state
from certifl.federated.states import ClientData, ClientState, ModelState, ServerState, Update
from certifl.federated.training.batches import Batch
from certifl.federated.training.local_training import LocalTraining
from certifl.federated.training.steps import Outcome, StepContext


@dataclass(frozen=True)
class APFL(GlobalModel):
    """APFL: with every batch a client takes a step on the global model and one on its own.

      theta <- theta - gamma grad L_i(theta)
      v_i <- v_i - gamma alpha_i grad L_i(m_i),      m_i = alpha_i v_i + (1 - alpha_i) theta.

    Both gradients are of the same batch under the same perturbation. theta is sent and averaged:
    it is the model of federated averaging, bit for bit. v_i and alpha_i stay with the client.
    Where `adaptive`, the first batch of a round also moves alpha_i, which stays in [0, 1]:

      alpha_i <- alpha_i - gamma <grad L_i(m_i), v_i - theta>.

    Weight decay belongs to L_i. v_i has momentum buffers of its own, which the schedule keeps or
    resets as it does others. BatchNorm's running statistics of m_i are its own. A round costs
    twice the work of federated averaging.

    Deployed by client i: m_i with the last global model (the global model where it never trained).

    Attributes:
        alpha: share of the client's own model, in [0, 1], at the beginning; fixed,
            0 = federated averaging and 1 = local training, both bit for bit.
        adaptive: whether alpha_i is learned.
        weighting: of the global average: "uniform" (1/n) or "size" (by number of training images).

    Source: Deng, Kamani, Mahdavi, Adaptive Personalized Federated Learning, 2020, Algorithm 1 and
    the update of alpha in its section on adaptively learning the mixing parameter.
    """

    alpha: float = 0.5
    adaptive: bool = True
    weighting: str = "uniform"

    name = "apfl"
    deploys = "the global model mixed with its own, in proportions it learned"
    keeps_client_state = True

    def client_round(
        self, broadcast: ServerState, state: ClientState, data: ClientData, training: LocalTraining
    ) -> tuple[Update, ClientState]:
        """Train both models side by side; send the global one, keep the own one and alpha."""
        shared, kept = broadcast.parts["model"], state.parts
        own = training.second_model(
            {**shared, **kept.get("own", {}), **kept.get("statistics", {})},
            momentum=kept.get("own_momentum"),
            weight_decay=0.0,
        )
        alpha, decay = self._alpha(state), training.schedule.weight_decay
        step = _SideBySide(own, alpha, decay, self.adaptive)
        trained = training.train_epochs(
            shared, data, broadcast.round, momentum=kept.get("momentum"), step=step
        )
        personal = training.result_of(own, data.client, broadcast.round)
        weights, statistics = split_state(personal.state, frozenset(training.trainable))
        parts = {
            "own": weights,
            "statistics": statistics,
            "mix": {"alpha": torch.tensor(step.alpha, dtype=torch.float64)},
            "own_momentum": personal.momentum,
            **trained.momentum_part,
        }
        metrics = {**trained.metrics, "alpha": step.alpha}
        update = Update(data.client, len(data), trained.state, metrics)
        return update, ClientState({part: tensors for part, tensors in parts.items() if tensors})

    def deployed(self, server_state: ServerState, client_state: ClientState) -> ModelState:
        """The mixture of the client's own model and the global one."""
        shared, kept = server_state.parts["model"], client_state.parts
        alpha = self._alpha(client_state)
        if alpha == 0 or "own" not in kept:
            return shared
        mixed = {n: torch.lerp(shared[n], value, alpha) for n, value in kept["own"].items()}
        return {**shared, **mixed, **kept.get("statistics", {})}

    def _alpha(self, client_state: ClientState) -> float:
        mix = client_state.parts.get("mix")
        return float(self.alpha if mix is None else mix["alpha"])


class _SideBySide:
    """A step that moves the client's own model, then the global one, with the same draws."""

    def __init__(
        self, own: StepContext, alpha: float, weight_decay: float, adaptive: bool
    ) -> None:
        self.alpha = float(alpha)
        self._own = own
        self._weight_decay = weight_decay
        self._adapts = adaptive

    def __call__(self, context: StepContext, batch: Batch) -> Outcome:
        shared, own, alpha = context.copy_weights(), self._own.copy_weights(), self.alpha
        mixed = {n: torch.lerp(value, own[n], alpha) for n, value in shared.items()}
        self._own.lr = context.lr
        with context.preserve_rng_state(), self._own.at_weights(mixed):
            outcome = self._own.compute_gradients(batch.again())
            self._own.scale_gradients(1.0, self._weight_decay)
            if self._adapts:
                self._adapt(shared, own, context.lr)
        self._own.scale_gradients(alpha)
        self._own.optimizer_step()
        context.compute_gradients(batch)
        context.optimizer_step()
        return outcome

    def _adapt(self, shared: ModelState, own: ModelState, rate: float) -> None:
        """Once in a round: alpha against its own gradient, within [0, 1]."""
        gradients = self._own.copy_gradients()
        slope = sum(float((g * (own[n] - shared[n])).sum()) for n, g in gradients.items())
        self.alpha = min(max(self.alpha - rate * slope, 0.0), 1.0)
        self._adapts = False
