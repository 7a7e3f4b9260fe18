"""Per-FedAvg: a global model that is good after one gradient step on a client's own images."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch

from certifl.federated.algorithms.base import GlobalModel
from certifl.federated.batches import Batch
from certifl.federated.local_training import LocalTraining
from certifl.federated.states import ClientData, ClientState, ModelState, ServerState, Update
from certifl.federated.steps import Outcome, Step, StepContext

_DELTA = 1e-3
_FEWEST = 2


@dataclass(frozen=True)
class PerFedAvg(GlobalModel):
    """Per-FedAvg: federated averaging of what is good AFTER a step of personalization.

      min over theta of mean_i L_i(theta - alpha grad L_i(theta)),    alpha = inner_lr.

    Each local step, with disjoint parts D, D', D'' of its batch:

      u = theta - alpha grad L_i(theta; D),      g = grad L_i(u; D')
      theta <- theta - gamma (g - alpha H g),    H the Hessian of L_i at theta on D''.

    "first-order" leaves H g out and halves the batch. "hessian-free" cuts it into three and takes
    H g = (grad L_i(theta + delta g) - grad L_i(theta - delta g)) / (2 delta), for twice the work.
    Batches too small to be cut serve as all of the parts. Weight decay acts on theta; the inner
    step has none.

    After the schedule's rounds every client takes the step it was trained for, with the gradient
    over all its images (one pass), in one extra round without communication. BatchNorm's running
    statistics follow that pass.

    Deployed by client i: theta - alpha grad L_i(theta) (theta until the extra round).

    Attributes:
        inner_lr: alpha, from 0; 0 = federated averaging, bit for bit.
        approximation: "first-order" or "hessian-free".
        weighting: "uniform" (1/n) or "size" (by number of training images).

    Source: Fallah, Mokhtari, Ozdaglar, Personalized Federated Learning with Theoretical
    Guarantees: A Model-Agnostic Meta-Learning Approach, 2020, Algorithm 1 and its two
    approximations in section 5.
    """

    inner_lr: float = 0.01
    approximation: str = "first-order"
    weighting: str = "uniform"

    name = "perfedavg"
    deploys = "the global model after one gradient step on its own images"
    keeps_client_state = True
    extra_rounds = 1

    def sends(self, round: int, scheduled: int) -> tuple[str, ...]:
        """The model; the adapted one stays with the client."""
        return ("model",) if round < scheduled else ()

    def client_round(
        self, broadcast: ServerState, state: ClientState, data: ClientData, training: LocalTraining
    ) -> tuple[Update, ClientState]:
        """Train the global model for its step; after the schedule's rounds, take the step."""
        if broadcast.round >= training.schedule.rounds:
            return self._adapted(broadcast.parts["model"], data, broadcast.round, training)
        return super().client_round(broadcast, state, data, training)

    def step(self) -> Step | None:
        """The gradient after the inner step."""
        return None if self.inner_lr == 0 else self._step

    def deployed(self, server_state: ServerState, client_state: ClientState) -> ModelState:
        """The adapted model; the global one until the extra round."""
        return client_state.parts.get("adapted", server_state.parts["model"])

    def _step(self, context: StepContext, batch: Batch) -> Outcome:
        first = self.approximation == "first-order"
        inner, outer, *curved = _parts(batch, 2 if first else 3)
        context.compute_gradients(inner)
        weights = context.copy_weights()
        with context.at_weights(_ahead(weights, context.copy_gradients(), -self.inner_lr)):
            outcome = context.compute_gradients(outer)
        if not first:
            gradient = context.copy_gradients()
            bent = _curvature(context, curved[0], weights, gradient)
            context.set_gradients(_ahead(gradient, bent, -self.inner_lr))
        context.optimizer_step()
        return replace(outcome, images=len(outer))

    def _adapted(
        self, start: ModelState, data: ClientData, round: int, training: LocalTraining
    ) -> tuple[Update, ClientState]:
        """One gradient step over all images of the client."""
        if self.inner_lr == 0:
            return Update(data.client, len(data), None, {}), ClientState()
        total: ModelState = {}

        def step(context: StepContext, batch: Batch) -> Outcome:
            outcome = context.compute_gradients(batch)
            for name, gradient in context.copy_gradients().items():
                share = gradient * (len(batch) / len(data))
                total[name] = total[name] + share if name in total else share
            return outcome

        seen = training.train_epochs(start, data, round, step=step, epochs=1)
        gradient = {name: value.to("cpu") for name, value in total.items()}
        adapted = {**seen.state, **_ahead(start, gradient, -self.inner_lr)}
        update = Update(data.client, len(data), None, seen.metrics)
        return update, ClientState({"adapted": adapted})


def _parts(batch: Batch, count: int) -> list[Batch]:
    """Disjoint parts of about the same size; the batch itself where they would be too small."""
    size = len(batch) // count
    if size < _FEWEST:
        return [batch] * count
    cuts = [*range(0, size * count, size), len(batch)]
    return [batch.part(start, stop) for start, stop in itertools.pairwise(cuts)]


def _ahead(weights: ModelState, along: ModelState, far: float) -> ModelState:
    """The weights, moved along something."""
    return {name: torch.add(weights[name], value, alpha=far) for name, value in along.items()}


def _curvature(
    context: StepContext, batch: Batch, weights: ModelState, gradient: ModelState
) -> ModelState:
    """The product of the Hessian and a vector: a central difference of gradients."""
    with context.preserve_rng_state(), context.at_weights(_ahead(weights, gradient, _DELTA)):
        context.compute_gradients(batch.again())
        above = context.copy_gradients()
    with context.at_weights(_ahead(weights, gradient, -_DELTA)):
        context.compute_gradients(batch)
        below = context.copy_gradients()
    return {name: (value - below[name]) / (2 * _DELTA) for name, value in above.items()}
