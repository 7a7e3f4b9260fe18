"""FLIX: federated training of a model that every client mixes with one of its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from certifl.federated.algorithms.base import GlobalModel
from certifl.federated.algorithms.common import split_state
from certifl.federated.states import (
    ClientData,
    ClientState,
    ModelState,
    Parts,
    ServerState,
    Update,
)
from certifl.federated.training.batches import Batch
from certifl.federated.training.local_training import LocalTraining
from certifl.federated.training.steps import Outcome, Step, StepContext


@dataclass(frozen=True)
class FLIX(GlobalModel):
    """FLIX: one global model is trained for how good its mixtures with local models are.

      min over theta of mean_i L_i(T_i(theta)),  T_i(theta) = (1 - lambda) theta + lambda theta_i.

    theta_i is client i's own model, trained alone BEFORE the first of its rounds (the schedule's
    rounds of local training, in one go) and never changed afterwards. In its rounds a client takes
    the schedule's steps on theta, with the gradient (1 - lambda) grad L_i(T_i(theta)); weight
    decay belongs to L_i. The source solves the problem with gradient descent, one step a round;
    here clients take local steps, as in federated averaging. Both trainings see the same batches.

    BatchNorm's running statistics are those of the mixture, and each client keeps its own.

    Deployed by client i: T_i(theta) (the global model where it never trained).

    Attributes:
        personalization: lambda in [0, 1], 1 - alpha_i of the source, equal for all clients:
            0 = federated averaging, 1 = local training, both bit for bit.
        weighting: "uniform" (1/n) or "size" (by number of training images).

    Source: Gasanov, Khaled, Horvath, Richtarik, FLIX: A Simple and Communication-Efficient
    Alternative to Local Methods in Federated Learning, 2022, the FLIX formulation and Algorithm 1.
    """

    personalization: float
    weighting: str = "uniform"

    name = "flix"
    deploys = "the global model mixed with its own, which it trained alone"
    keeps_client_state = True

    def sends(self, round: int, scheduled: int) -> tuple[str, ...]:
        """The model, unless nothing of it is shared."""
        del round, scheduled
        return () if self.personalization == 1 else ("model",)

    def client_round(
        self, broadcast: ServerState, state: ClientState, data: ClientData, training: LocalTraining
    ) -> tuple[Update, ClientState]:
        """Train the global model where it is mixed with the client's own; send it."""
        shared, mix = broadcast.parts["model"], self.personalization
        kept, metrics = dict(state.parts), dict[str, float]()
        if mix > 0 and "own" not in kept:
            kept, metrics = _alone(shared, data, training)
        if mix == 1:  # nothing else to train
            return Update(data.client, len(data), None, metrics), ClientState(kept)
        trained = training.train_epochs(
            {**shared, **kept.get("statistics", {})},
            data,
            broadcast.round,
            momentum=kept.get("momentum"),
            weight_decay=None if mix == 0 else 0.0,
            step=self._step(kept, training),
        )
        if "statistics" in kept:
            kept["statistics"] = {n: trained.state[n] for n in kept["statistics"]}
        update = Update(data.client, len(data), trained.state, trained.metrics)
        return update, ClientState({**kept, **trained.momentum_part})

    def deployed(self, server_state: ServerState, client_state: ClientState) -> ModelState:
        """The mixture of the global model and the client's own."""
        shared, kept = server_state.parts["model"], client_state.parts
        if self.personalization == 0 or "own" not in kept:
            return shared
        share = self.personalization
        mixed = {n: torch.lerp(shared[n], value, share) for n, value in kept["own"].items()}
        return {**mixed, **kept.get("statistics", {})}

    def _step(self, kept: Parts, training: LocalTraining) -> Step | None:
        """A step on theta with the gradient at T_i(theta); None = a plain one."""
        if self.personalization == 0:
            return None
        own, decay = training.on_device(kept["own"]), training.schedule.weight_decay
        share = 1 - self.personalization

        def step(context: StepContext, batch: Batch) -> Outcome:
            weights = context.copy_weights()
            point = {n: torch.lerp(w, own[n], self.personalization) for n, w in weights.items()}
            with context.at_weights(point):
                outcome = context.compute_gradients(batch)
                context.scale_gradients(share, decay)
            context.optimizer_step()
            return outcome

        return step


def _alone(
    start: ModelState, data: ClientData, training: LocalTraining
) -> tuple[Parts, dict[str, float]]:
    """The client's own model: all rounds of local training; its weights, and all else apart."""
    momentum, trained = None, None
    for round in range(training.schedule.rounds):
        trained = training.train_epochs(start, data, round, momentum=momentum)
        start, momentum = trained.state, trained.momentum
    assert trained is not None
    weights, statistics = split_state(start, set(training.trainable))
    parts = {"own": weights, "statistics": statistics}
    return {part: tensors for part, tensors in parts.items() if tensors}, trained.metrics
