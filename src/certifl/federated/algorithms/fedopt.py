"""Server optimizers: momentum, Adam, Yogi or Adagrad along the change of the average."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from certifl.federated.algorithms.base import GlobalModel
from certifl.federated.averaging import average_models, change, is_statistic
from certifl.federated.states import ModelState, ServerState, Update

ServerStep = tuple[torch.Tensor, ModelState]
"""What is added to a tensor of theta, and the optimizer's next state, in float64."""


def _aggregate(
    self: FedAvgM | FedAdam | FedYogi | FedAdagrad,
    server_state: ServerState,
    updates: Iterable[Update],
) -> ServerState:
    """The server's step along Delta = average - theta; no step where no model arrived.

    The server moves weights. BatchNorm's running statistics (recognized by their names) and
    counters are averaged: a step of Adam could make a variance negative.
    """
    average = average_models(updates, self.weighting)
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
        moved, states = self.server_step(delta, before)
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

    Source: Hsu, Qi, Brown, Measuring the Effects of Non-Identical Data Distribution for Federated
    Visual Classification, 2019, section 4.2.
    """

    beta: float = 0.9
    server_lr: float = 1.0
    weighting: str = "uniform"

    name = "fedavgm"
    client_needs = ("model",)
    aggregate = _aggregate

    def server_step(self, delta: torch.Tensor, state: ModelState) -> ServerStep:
        """A step of SGD with momentum."""
        velocity = delta + self.beta * state["velocity"] if "velocity" in state else delta
        return self.server_lr * velocity, {"velocity": velocity}


def _adaptive_step(
    self: FedAdam | FedYogi | FedAdagrad, delta: torch.Tensor, state: ModelState
) -> ServerStep:
    before = state.get("second", torch.full_like(delta, self.tau**2))
    first, second = (1 - self.beta1) * delta, self.scale(before, delta.square())
    if "first" in state:
        first += self.beta1 * state["first"]
    step = self.server_lr * first / (second.sqrt() + self.tau)
    return step, {"first": first, "second": second}


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
    aggregate = _aggregate
    server_step = _adaptive_step

    def scale(self, second: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
        """The next v from the last one and Delta^2."""
        return self.beta2 * second + (1 - self.beta2) * square


@dataclass(frozen=True)
class FedYogi(GlobalModel):
    """FedYogi: as FedAdam, hyper-parameters included, with a scale that grows and shrinks slowly.

      v <- v - (1 - beta2) Delta^2 sign(v - Delta^2).

    Deployed by client i: the global model of the last round, the same for all.

    Source: Reddi et al., Adaptive Federated Optimization, 2021, Algorithm 2 (FedYogi).
    """

    server_lr: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3
    weighting: str = "uniform"

    name = "fedyogi"
    client_needs = ("model",)
    aggregate = _aggregate
    server_step = _adaptive_step

    def scale(self, second: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
        """The next v from the last one and Delta^2."""
        return second - (1 - self.beta2) * square * torch.sign(second - square)


@dataclass(frozen=True)
class FedAdagrad(GlobalModel):
    """FedAdagrad: as FedAdam, with a scale that only grows: v <- v + Delta^2.

    Deployed by client i: the global model of the last round, the same for all.

    Attributes:
        beta1: momentum, from 0 to below 1; 0 in the source's experiments.
        server_lr, tau, weighting: as of `FedAdam`.

    Source: Reddi et al., Adaptive Federated Optimization, 2021, Algorithm 2 (FedAdagrad).
    """

    server_lr: float = 0.01
    beta1: float = 0.0
    tau: float = 1e-3
    weighting: str = "uniform"

    name = "fedadagrad"
    client_needs = ("model",)
    aggregate = _aggregate
    server_step = _adaptive_step

    def scale(self, second: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
        """The next v from the last one and Delta^2."""
        return second + square
