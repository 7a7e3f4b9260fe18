"""SCAFFOLD: federated averaging with control variates against client drift."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from certifl.federated.algorithms.base import GlobalModel
from certifl.federated.averaging import average_parts, moved
from certifl.federated.local_training import LocalTraining
from certifl.federated.states import ClientData, ClientState, ModelState, ServerState, Update
from certifl.federated.steps import foreach_add, gradients_of


@dataclass(frozen=True)
class Scaffold(GlobalModel):
    """SCAFFOLD: every local step is corrected by how the client differs from all others.

      y_i <- y_i - gamma (g_i(y_i) - c_i + c),

    with c_i the client's control variate (its own mean gradient of its last round) and c that of
    the server. After its steps the client sends y_i and the change of its control variate; then

      theta <- theta + server_lr mean_i (y_i - theta),      c = mean_i c_i.

    The new c_i is the mean of the uncorrected gradients g_i(y_i) over the round's steps. For plain
    SGD with a constant rate this IS option II of the source, c_i - c + (theta - y_i) / (K gamma);
    unlike that formula it stays right with momentum and a decaying rate. Weight decay is the same
    for all clients and is corrected by nothing. All control variates begin at zero, so the first
    round is federated averaging.

    The source divides sums by the number of all clients. Here c is the mean over the clients that
    have taken part so far, because a server need not know the others; once all clients have
    taken part, and always with full participation, the two agree.

    BatchNorm's running statistics are averaged, without `server_lr`.

    Deployed by client i: the global model of the last round, the same for all.

    Attributes:
        server_lr: step of the server towards the average, above 0; 1 = the average itself.

    Source: Karimireddy, Kale, Mohri, Reddi, Stich, Suresh, SCAFFOLD: Stochastic Controlled
    Averaging for Federated Learning, 2020, Algorithm 1 and Eq. (3) to (5).
    """

    server_lr: float = 1.0

    name = "scaffold"
    deploys = "the global model of the last round"
    sent = ("model", "control_step")

    def client_round(
        self, broadcast: ServerState, state: ClientState, data: ClientData, training: LocalTraining
    ) -> tuple[Update, ClientState]:
        """Train with corrected gradients; send the model and the control variate's change."""
        start, own = broadcast.parts["model"], state.parts.get("control", {})
        correction = _difference(broadcast.parts.get("control", {}), own)
        gradients = _MeanGradient(training.on_device(correction))
        momentum = state.parts.get("momentum")
        trained = training.train_epochs(
            start, data, broadcast.round, momentum=momentum, hook=gradients
        )
        control = gradients.result(start, training.trainable)
        step = {"control_step": _difference(control, own)}
        update = Update(data.client, len(data), trained.state, trained.metrics, step)
        return update, ClientState({"control": control, **trained.momentum_part})

    def aggregate(self, server_state: ServerState, updates: Iterable[Update]) -> ServerState:
        """A step towards the average, and the mean of all control variates so far."""
        old, senders = server_state.parts, list[int]()

        def recorded(update: Update) -> Update:
            if "control_step" in update.extra:
                senders.append(update.client)
            return update

        average = average_parts(map(recorded, updates))
        parts = dict(old)
        if "control_step" in average:
            parts |= _mean_control(old, average["control_step"], senders)
        if "model" in average:
            names = parts.get("control", average["model"])
            parts["model"] = moved(old["model"], average["model"], self.server_lr, names)
        return ServerState(server_state.round + 1, parts)


class _MeanGradient:
    """A gradient hook: averages the gradients that it sees, then adds the correction c - c_i."""

    def __init__(self, correction: ModelState) -> None:
        self._correction = correction
        self._sums: ModelState = {}
        self._counts = Counter[str]()

    def __call__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        gradients = dict(zip(parameters, gradients_of(parameters.values()), strict=True))
        self._counts.update(gradients.keys())
        _add(self._sums, gradients)
        self._sums |= {n: g.clone() for n, g in gradients.items() if self._counts[n] == 1}
        _add(gradients, self._correction)

    def result(self, like: ModelState, names: Iterable[str]) -> ModelState:
        """The means on the CPU; zero for a weight that no gradient reached."""
        return {
            name: (self._sums[name] / self._counts[name]).to("cpu")
            if name in self._sums
            else torch.zeros_like(like[name])
            for name in names
        }


def _add(values: ModelState, others: ModelState) -> None:
    both = [name for name in values if name in others]
    foreach_add([values[name] for name in both], [others[name] for name in both])


def _difference(one: ModelState, other: ModelState) -> ModelState:
    """One - other, where a state without tensors is zero."""
    if not one or not other:
        return one or {name: -value for name, value in other.items()}
    return {name: value - other[name] for name, value in one.items()}


def _mean_control(
    old: Mapping[str, ModelState], step: ModelState, senders: list[int]
) -> dict[str, ModelState]:
    """The new c = (m c + sum of steps) / m' and its m' clients, of whom m were known before."""
    known = old.get("known", {}).get("clients", torch.empty(0, dtype=torch.int64))
    clients = torch.unique(torch.cat([known, torch.tensor(senders, dtype=torch.int64)]))
    before, after = len(known) / len(clients), len(senders) / len(clients)
    control = {name: value.to(torch.float64) * after for name, value in step.items()}
    for name, value in old.get("control", {}).items():
        control[name] += value.to(torch.float64) * before
    mean = {name: value.to(step[name].dtype) for name, value in control.items()}
    return {"control": mean, "known": {"clients": clients}}
