"""Algorithms that deploy the global model mixed with the client's own: APFL and FLIX."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from certifl.federated.algorithms.base import GlobalModel
from certifl.federated.batches import Batch
from certifl.federated.local_training import LocalTraining
from certifl.federated.states import (
    ClientData,
    ClientState,
    ModelState,
    Parts,
    ServerState,
    Update,
)
from certifl.federated.steps import Outcome, Step, StepContext


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
        shared, stored = broadcast.parts["model"], state.parts
        own = training.second_model(
            {**shared, **stored.get("own", {}), **stored.get("statistics", {})},
            momentum=stored.get("own_momentum"),
            weight_decay=0.0,
        )
        alpha, decay = self._alpha(state), training.schedule.weight_decay
        step = _SideBySide(own, alpha, decay, self.adaptive)
        trained = training.train_epochs(
            shared, data, broadcast.round, momentum=stored.get("momentum"), step=step
        )
        personal = training.result_of(own, data.client, broadcast.round)
        parts = {
            **_own_model(personal.state, training),
            "mix": {"alpha": torch.tensor(step.alpha, dtype=torch.float64)},
            **({"own_momentum": personal.momentum} if personal.momentum else {}),
            **trained.momentum_part,
        }
        metrics = {**trained.metrics, "alpha": step.alpha}
        return Update(data.client, len(data), trained.state, metrics), ClientState(parts)

    def deployed(self, server_state: ServerState, client_state: ClientState) -> ModelState:
        """The mixture of the client's own model and the global one."""
        return _mixed(server_state.parts["model"], client_state.parts, self._alpha(client_state))

    def _alpha(self, client_state: ClientState) -> float:
        mix = client_state.parts.get("mix")
        return float(self.alpha if mix is None else mix["alpha"])


@dataclass
class _SideBySide:
    """A step that moves the client's own model, then the global one, with the same draws."""

    own: StepContext
    alpha: float
    weight_decay: float
    adapts: bool

    def __call__(self, context: StepContext, batch: Batch) -> Outcome:
        shared, weights, alpha = context.copy_weights(), self.own.copy_weights(), self.alpha
        mixed = {n: torch.lerp(value, weights[n], alpha) for n, value in shared.items()}
        self.own.lr = context.lr
        with context.preserve_rng_state(), self.own.at_weights(mixed):
            outcome = self.own.compute_gradients(batch.again())
            self.own.scale_gradients(1.0, self.weight_decay)
            if self.adapts:  # once in a round: alpha against its own gradient, within [0, 1]
                gradients = self.own.copy_gradients().items()
                slope = sum(float((g * (weights[n] - shared[n])).sum()) for n, g in gradients)
                self.alpha = min(max(alpha - context.lr * slope, 0.0), 1.0)
                self.adapts = False
        self.own.scale_gradients(alpha)
        self.own.optimizer_step()
        context.compute_gradients(batch)
        context.optimizer_step()
        return outcome


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
        return () if self.personalization == 1 else ("model",)

    def client_round(
        self, broadcast: ServerState, state: ClientState, data: ClientData, training: LocalTraining
    ) -> tuple[Update, ClientState]:
        """Train the global model where it is mixed with the client's own; send it."""
        shared, mix = broadcast.parts["model"], self.personalization
        stored, metrics = dict(state.parts), dict[str, float]()
        if mix > 0 and "own" not in stored:
            stored, metrics = _alone(shared, data, training)
        if mix == 1:  # nothing else to train
            return Update(data.client, len(data), None, metrics), ClientState(stored)
        trained = training.train_epochs(
            {**shared, **stored.get("statistics", {})},
            data,
            broadcast.round,
            momentum=stored.get("momentum"),
            weight_decay=None if mix == 0 else 0.0,
            step=self._step(stored, training),
        )
        if "statistics" in stored:
            stored["statistics"] = {n: trained.state[n] for n in stored["statistics"]}
        update = Update(data.client, len(data), trained.state, trained.metrics)
        return update, ClientState({**stored, **trained.momentum_part})

    def deployed(self, server_state: ServerState, client_state: ClientState) -> ModelState:
        """The mixture of the global model and the client's own."""
        return _mixed(server_state.parts["model"], client_state.parts, self.personalization)

    def _step(self, stored: Parts, training: LocalTraining) -> Step | None:
        """A step on theta with the gradient at T_i(theta); None = a plain one."""
        if self.personalization == 0:
            return None
        own, decay = training.on_device(stored["own"]), training.schedule.weight_decay
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
    """The client's own model after all rounds of local training, and its metrics."""
    momentum, trained = None, None
    for round in range(training.schedule.rounds):
        trained = training.train_epochs(start, data, round, momentum=momentum)
        start, momentum = trained.state, trained.momentum
    assert trained is not None
    return _own_model(start, training), trained.metrics


def _own_model(state: ModelState, training: LocalTraining) -> Parts:
    """A client's own model as parts of its state: weights that are trained, and all else."""
    own = {name: state[name] for name in training.trainable}
    statistics = {name: value for name, value in state.items() if name not in own}
    return {"own": own, "statistics": statistics} if statistics else {"own": own}


def _mixed(shared: ModelState, stored: Parts, share: float) -> ModelState:
    """(1 - share) shared + share own, with the client's own statistics."""
    if share == 0 or "own" not in stored:
        return shared
    weights = {n: torch.lerp(shared[n], value, share) for n, value in stored["own"].items()}
    return {**shared, **weights, **stored.get("statistics", {})}
