"""Averages of model states, one update at a time, with a policy per key.

The paper's theta_bar = 1/n sum_i theta_i (Eq. 4). A model state holds more than theta, so every
key has a policy:

| policy | keys | result |
|---|---|---|
| average | floating tensors: weights, running means and variances | weighted mean in float64 |
| maximum | integers and booleans: BatchNorm's `num_batches_tracked` | largest value, dtype kept |

The mean is accumulated as deviations from the first model in float64. So the average
of equal models is exact, whatever the weights and the dtype; and since updates arrive in client
order, rounding does not depend on which client finished first.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import torch

from certifl.errors import InputError
from certifl.federated.states import ModelState, Parts, Update
from certifl.registry import check_choice


def policy_of(value: torch.Tensor) -> str:
    """How a tensor of a model state is combined over clients: "average" or "maximum"."""
    return "average" if value.is_floating_point() or value.is_complex() else "maximum"


def is_statistic(name: str) -> bool:
    """Whether a key names a running mean or variance of BatchNorm, by torch's names for them."""
    return name.rpartition(".")[2] in ("running_mean", "running_var")


def average_models(updates: Iterable[Update], weighting: str = "uniform") -> ModelState | None:
    """The average of the updates' models; None where no update has one.

    Args:
        updates: in client order; each is dropped before the next arrives. InputError names one of
            other keys or shapes.
        weighting: "uniform" (1/n) or "size" (by `Update.weight`).
    """
    # A generator expression would keep each update until the next one has arrived.
    return average_parts(map(partial(replace, extra={}), updates), weighting).get("model")


class _RunningMean:
    """First model, float64 sum of weighted deviations from it, running maxima of counters."""

    def __init__(self, first: ModelState, weight: float) -> None:
        self._first = first
        self._weight = weight
        self._deviations: dict[str, torch.Tensor] = {}
        self._maxima = {k: v for k, v in first.items() if policy_of(v) == "maximum"}

    def add(self, client: int, model: ModelState, weight: float) -> None:
        check_alike(self._first, client, model)
        self._weight += weight
        for name, value in model.items():
            if name in self._maxima:
                self._maxima[name] = torch.maximum(self._maxima[name], value)
                continue
            wide = torch.complex128 if value.is_complex() else torch.float64
            deviation = value.to(wide, copy=True).sub_(self._first[name])
            if name in self._deviations:
                self._deviations[name].add_(deviation, alpha=weight)
            else:
                self._deviations[name] = deviation.mul_(weight)

    def result(self) -> ModelState:
        """The weighted mean; call it once: each sum is dropped with its mean."""
        first, self._first = self._first, {}
        return {name: self._mean(name, value) for name, value in first.items()}

    def _mean(self, name: str, first: torch.Tensor) -> torch.Tensor:
        if name in self._maxima:
            return self._maxima[name].clone()
        total = self._deviations.pop(name, None)
        if total is None:
            return first.clone()
        same = total == 0
        mean = total.div_(self._weight).add_(first).to(first.dtype)
        # -0.0 + 0.0 is 0.0: without this, equal models would lose the sign of their zeros.
        return torch.where(same, first, mean)


def check_alike(first: ModelState, client: int, model: ModelState) -> None:
    """Refuse a model of other keys or shapes than the first; names both (InputError)."""
    shapes = {name: tuple(value.shape) for name, value in first.items()}
    sent = {name: tuple(value.shape) for name, value in model.items()}
    if sent != shapes:
        wrong = sorted(k for k in shapes.keys() | sent.keys() if shapes.get(k) != sent.get(k))
        raise InputError(
            f"Client {client} sent a model of another architecture (first difference: "
            f"{wrong[0]}). All clients of a federation must train the same network."
        )


def average_parts(updates: Iterable[Update], weighting: str = "uniform") -> Parts:
    """The average of every part ("model" is the models') over the updates that have it.

    Arguments and errors are those of `average_models`.
    """
    check_choice("weighting", weighting, ("uniform", "size"))
    means: dict[str, _RunningMean] = {}
    for update in updates:
        weight = 1.0 if weighting == "uniform" else float(update.weight)
        for part, tensors in update.parts.items():
            if part in means:
                means[part].add(update.client, tensors, weight)
            else:
                means[part] = _RunningMean(tensors, weight)
            del tensors
        del update  # frees it before the next one arrives
    return {part: mean.result() for part, mean in means.items()}


def change(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """New - old in float64."""
    return new.to(torch.float64) - old.to(torch.float64)


def moved(old: ModelState, average: ModelState, factor: float, names: Iterable[str]) -> ModelState:
    """A step of the server: old + factor (average - old) for the named tensors.

    All others become the average. With factor 1 the result is the average, and where average and
    old agree it is both, bit for bit.
    """
    chosen = set(names)
    result = dict(average)
    for name, value in average.items():
        if factor != 1 and name in chosen and policy_of(value) == "average":
            far = change(old[name], value)
            step = (value.to(torch.float64) + (factor - 1) * far).to(value.dtype)
            result[name] = torch.where(far == 0, value, step)
    return result
