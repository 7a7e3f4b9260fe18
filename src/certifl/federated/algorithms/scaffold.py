"""SCAFFOLD: federated averaging with control variates against client drift."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from certifl.federated.algorithms.base import GlobalModel
from certifl.federated.averaging import average_parts, moved
from certifl.federated.states import ClientData, ClientState, ModelState, ServerState, Update
from certifl.federated.training import foreach
from certifl.federated.training.local_training import LocalTraining
from certifl.federated.training.steps import gradients_of


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
    have taken part so far, because a server need not know who else there is; once everybody has
    taken part, and always with full participation, the two agree.

    BatchNorm's running statistics are averaged, without `server_lr`.

    Deployed by client i: the global model of the last round, the same for all.

    Attributes:
        server_lr: step of the server towards the average, above 0; 1 = the average itself.

    Raises:
        SpecError: a hyper-parameter outside its range.

    Source: Karimireddy, Kale, Mohri, Reddi, Stich, Suresh, SCAFFOLD: Stochastic Controlled
    Averaging for Federated Learning, 2020, Algorithm 1 and Eq. (3) to (5).
    """

    server_lr: float = 1.0

    name = "scaffold"
    deploys = "the global model of the last round"

    def sends(self, round: int, scheduled: int) -> tuple[str, ...]:
        """The model and the change of the control variate."""
        del round, scheduled
        return "model", "control_step"

    def client_round(
        self,
        broadcast: ServerState,
        client_state: ClientState,
        data: ClientData,
        training: LocalTraining,
    ) -> tuple[Update, ClientState]:
        """Train with corrected gradients; send the model and the control variate's change."""
        common, own = broadcast.parts.get("control"), client_state.parts.get("control")
        gradients = _MeanGradient(_difference(common, own, training.on_device))
        trained = training.train_epochs(
            broadcast.parts["model"],
            data,
            broadcast.round,
            momentum=client_state.parts.get("momentum"),
            hook=gradients,
        )
        control = gradients.result(broadcast.parts["model"], training.trainable)
        step = control if own is None else {n: value - own[n] for n, value in control.items()}
        update = Update(
            data.client, len(data), trained.state, trained.metrics, {"control_step": step}
        )
        return update, ClientState({"control": control, **trained.kept})

    def aggregate(self, server_state: ServerState, updates: Iterable[Update]) -> ServerState:
        """A step towards the average, and the mean of all control variates known so far."""
        old, controlled = server_state.parts, list[int]()
        average = average_parts(_noted(updates, controlled))
        parts = dict(old)
        if "control_step" in average:
            parts |= _controls(old, average["control_step"], controlled)
        if "model" in average:
            names = parts.get("control", average["model"])
            parts["model"] = moved(old["model"], average["model"], self.server_lr, names)
        return ServerState(server_state.round + 1, parts)


class _MeanGradient:
    """A gradient hook: remembers the mean of what it sees, then adds the correction c - c_i."""

    def __init__(self, correction: ModelState) -> None:
        self._correction = correction
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}

    def __call__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        gradients = dict(zip(parameters, gradients_of(parameters.values()), strict=True))
        self._count(gradients)
        corrected = [name for name in gradients if name in self._correction]
        foreach.add(
            [gradients[name] for name in corrected], [self._correction[n] for n in corrected]
        )

    def _count(self, gradients: ModelState) -> None:
        known = [name for name in gradients if name in self._sums]
        foreach.add([self._sums[name] for name in known], [gradients[name] for name in known])
        for name, gradient in gradients.items():
            self._counts[name] = self._counts.get(name, 0) + 1
            if name not in self._sums:
                self._sums[name] = gradient.clone()

    def result(self, like: ModelState, names: Iterable[str]) -> ModelState:
        """The means on the CPU; zero for a weight that no gradient reached."""
        return {
            name: (self._sums[name] / self._counts[name]).to("cpu")
            if name in self._sums
            else torch.zeros_like(like[name])
            for name in names
        }


def _difference(
    common: ModelState | None,
    own: ModelState | None,
    on_device: Callable[[ModelState], ModelState],
) -> ModelState:
    """The correction c - c_i, where a missing one is zero; nothing where both are."""
    if common is None:
        return {} if own is None else on_device({n: -value for n, value in own.items()})
    if own is None:
        return on_device(common)
    return on_device({name: value - own[name] for name, value in common.items()})


def _noted(updates: Iterable[Update], controlled: list[int]) -> Iterable[Update]:
    """The updates as they are; whoever sends a control variate is written down."""
    for update in updates:
        if "control_step" in update.extra:
            controlled.append(update.client)
        yield update
        del update  # or it would be held while the next one arrives


def _controls(
    old: dict[str, ModelState], step: ModelState, controlled: list[int]
) -> dict[str, ModelState]:
    """The new c = (m c + sum of steps) / m' and its m' clients, of whom m were known before."""
    known = old.get("known", {}).get("clients", torch.empty(0, dtype=torch.int64))
    clients = torch.unique(torch.cat([known, torch.tensor(controlled, dtype=torch.int64)]))
    before, after = len(known) / len(clients), len(controlled) / len(clients)
    control = {name: value.to(torch.float64) * after for name, value in step.items()}
    for name, value in old.get("control", {}).items():
        control[name] += value.to(torch.float64) * before
    made = {name: value.to(step[name].dtype) for name, value in control.items()}
    return {"control": made, "known": {"clients": clients}}
