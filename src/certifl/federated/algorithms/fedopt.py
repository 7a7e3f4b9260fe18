"""Server optimisers: the average's change is a gradient for momentum, Adam, Yogi or Adagrad."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from certifl.federated.aggregation.base import is_statistic
from certifl.federated.algorithms.base import GlobalModel
from certifl.federated.averaging import average_models, change
from certifl.federated.states import ModelState, ServerState, Update

ServerStep = Callable[[torch.Tensor, ModelState], tuple[torch.Tensor, ModelState]]


def _stepped(
    server_state: ServerState, updates: Iterable[Update], weighting: str, step: ServerStep
) -> ServerState:
    """The server's next state: theta moved along Delta = average - theta by a server optimizer.

    The server moves weights. BatchNorm's running statistics (recognized by their names) and
    counters are averaged: a step of Adam could make a variance negative.

    Args:
        server_state: before the round.
        updates: in client order.
        weighting: of the average.
        step: (Delta, the optimizer's state) of one tensor -> (what is added to theta, its next
            state), all in float64.
    """
    average = average_models(updates, weighting)
    number = server_state.round + 1
    if average is None:
        return ServerState(number, server_state.parts)
    old, made, model = server_state.parts, dict[str, ModelState](), average
    for name in list(model):
        value = model[name]
        if not value.is_floating_point() or is_statistic(name):
            continue
        delta = change(old["model"][name], value)
        before = {p: part[name].to(torch.float64) for p, part in old.items() if name in part}
        moved, states = step(delta, before)
        # Exact where the step is the change itself, and where there is none.
        new = (value.to(torch.float64) + (moved - delta)).to(value.dtype)
        model[name] = torch.where(moved == delta, value, new)
        for part, state in states.items():
            made.setdefault(part, {})[name] = state.to(value.dtype)
    return ServerState(number, {"model": model, **made})


@dataclass(frozen=True)
class FedAvgM(GlobalModel):
    """FedAvgM: federated averaging with momentum on the server.

      v <- beta v + Delta,      theta <- theta + server_lr v.

    Clients train as in federated averaging. BatchNorm's running statistics are averaged.

    Deployed by client i: the global model of the last round, the same for all.

    Attributes:
        beta: the server's momentum, from 0 to below 1.
        server_lr: its learning rate, above 0; with beta = 0 and server_lr = 1 this is federated
            averaging, bit for bit.
        weighting: "uniform" (1/n) or "size" (by number of training images).

    Raises:
        SpecError: a hyper-parameter outside its range.

    Source: Hsu, Qi, Brown, Measuring the Effects of Non-Identical Data Distribution for Federated
    Visual Classification, 2019, section 4.2.
    """

    beta: float = 0.9
    server_lr: float = 1.0
    weighting: str = "uniform"

    name = "fedavgm"
    client_needs = ("model",)

    def aggregate(self, server_state: ServerState, updates: Iterable[Update]) -> ServerState:
        """The server's step along the average change; nothing where no model arrived."""
        return _stepped(server_state, updates, self.weighting, self._step)

    def _step(self, delta: torch.Tensor, held: ModelState) -> tuple[torch.Tensor, ModelState]:
        velocity = delta + self.beta * held["velocity"] if "velocity" in held else delta
        return self.server_lr * velocity, {"velocity": velocity}


@dataclass(frozen=True)
class FedAdam(GlobalModel):
    """FedAdam: the server takes steps of Adam along the average change Delta.

      m <- beta1 m + (1 - beta1) Delta,      v <- beta2 v + (1 - beta2) Delta^2,
      theta <- theta + server_lr m / (sqrt(v) + tau),

    from m = 0 and v = tau^2, without bias correction, as in the source. One round moves a weight
    by about `server_lr` at most, so few rounds need a larger one.

    Deployed by client i: the global model of the last round, the same for all.

    Attributes:
        server_lr: the server's learning rate, above 0.
        beta1: momentum, from 0 to below 1.
        beta2: memory of the scale, from 0 to below 1.
        tau: degree of adaptivity, above 0; the larger, the nearer to FedAvgM.
        weighting: "uniform" (1/n) or "size" (by number of training images).

    Raises:
        SpecError: a hyper-parameter outside its range.

    Source: Reddi, Charles, Zaheer, Garrett, Rush, Konecny, Kumar, McMahan, Adaptive Federated
    Optimization, 2021, Algorithm 2 (FedAdam).
    """

    server_lr: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3
    weighting: str = "uniform"

    name = "fedadam"
    client_needs = ("model",)

    def aggregate(self, server_state: ServerState, updates: Iterable[Update]) -> ServerState:
        """The server's step along the average change; nothing where no model arrived."""
        return _stepped(server_state, updates, self.weighting, self._step)

    def _step(self, delta: torch.Tensor, held: ModelState) -> tuple[torch.Tensor, ModelState]:
        square, second = delta.square(), _second(self, delta, held)
        return _adaptive(self, delta, held, self.beta2 * second + (1 - self.beta2) * square)


@dataclass(frozen=True)
class FedYogi(GlobalModel):
    """FedYogi: as FedAdam, with a scale that grows and shrinks at the same pace.

      v <- v - (1 - beta2) Delta^2 sign(v - Delta^2).

    Deployed by client i: the global model of the last round, the same for all.

    Attributes:
        server_lr: the server's learning rate, above 0.
        beta1: momentum, from 0 to below 1.
        beta2: memory of the scale, from 0 to below 1.
        tau: degree of adaptivity, above 0.
        weighting: "uniform" (1/n) or "size" (by number of training images).

    Raises:
        SpecError: a hyper-parameter outside its range.

    Source: Reddi et al., Adaptive Federated Optimization, 2021, Algorithm 2 (FedYogi).
    """

    server_lr: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3
    weighting: str = "uniform"

    name = "fedyogi"
    client_needs = ("model",)

    def aggregate(self, server_state: ServerState, updates: Iterable[Update]) -> ServerState:
        """The server's step along the average change; nothing where no model arrived."""
        return _stepped(server_state, updates, self.weighting, self._step)

    def _step(self, delta: torch.Tensor, held: ModelState) -> tuple[torch.Tensor, ModelState]:
        square, second = delta.square(), _second(self, delta, held)
        pace = (1 - self.beta2) * square * torch.sign(second - square)
        return _adaptive(self, delta, held, second - pace)


@dataclass(frozen=True)
class FedAdagrad(GlobalModel):
    """FedAdagrad: as FedAdam, with a scale that only grows: v <- v + Delta^2.

    Deployed by client i: the global model of the last round, the same for all.

    Attributes:
        server_lr: the server's learning rate, above 0.
        beta1: momentum, from 0 to below 1; 0 in the source's experiments.
        tau: degree of adaptivity, above 0.
        weighting: "uniform" (1/n) or "size" (by number of training images).

    Raises:
        SpecError: a hyper-parameter outside its range.

    Source: Reddi et al., Adaptive Federated Optimization, 2021, Algorithm 2 (FedAdagrad).
    """

    server_lr: float = 0.01
    beta1: float = 0.0
    tau: float = 1e-3
    weighting: str = "uniform"

    name = "fedadagrad"
    client_needs = ("model",)

    def aggregate(self, server_state: ServerState, updates: Iterable[Update]) -> ServerState:
        """The server's step along the average change; nothing where no model arrived."""
        return _stepped(server_state, updates, self.weighting, self._step)

    def _step(self, delta: torch.Tensor, held: ModelState) -> tuple[torch.Tensor, ModelState]:
        return _adaptive(self, delta, held, _second(self, delta, held) + delta.square())


def _second(
    options: FedAdam | FedYogi | FedAdagrad, delta: torch.Tensor, held: ModelState
) -> torch.Tensor:
    """The scale v of the round before; tau^2 before the first."""
    return held.get("second", torch.full_like(delta, options.tau**2))


def _adaptive(
    options: FedAdam | FedYogi | FedAdagrad,
    delta: torch.Tensor,
    held: ModelState,
    second: torch.Tensor,
) -> tuple[torch.Tensor, ModelState]:
    """server_lr m / (sqrt(v) + tau), and what m and v are from now on."""
    first = (1 - options.beta1) * delta
    if "first" in held:
        first += options.beta1 * held["first"]
    step = options.server_lr * first / (second.sqrt() + options.tau)
    return step, {"first": first, "second": second}
