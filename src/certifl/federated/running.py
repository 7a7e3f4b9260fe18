"""Averages of several parts of an update in one pass, and steps of a server towards an average."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from certifl.federated.averaging import WEIGHTINGS, RunningMean, policy_of
from certifl.federated.states import ModelState, Parts, Update
from certifl.registry import check_choice

__all__ = ["MODEL", "average_parts", "change", "moved", "sent_parts"]

MODEL = "model"


def sent_parts(update: Update) -> Iterator[tuple[str, ModelState]]:
    """Everything an update carries: its model (if it has one) and its extra parts, by name."""
    if update.model is not None:
        yield MODEL, update.model
    yield from update.extra.items()


def average_parts(updates: Iterable[Update], weighting: str = "uniform") -> Parts:
    """The average of every part that arrives, over the updates that have it.

    Args:
        updates: in client order; each is dropped before the next is asked for, so memory does not
            grow with the number of clients.
        weighting: "uniform" (1/n) or "size" (by `Update.weight`).

    Returns:
        Averages by name, that of the models as "model"; none of a part that nobody sent.

    Raises:
        InputError: a client sent other keys or shapes than the first one; it is named.
    """
    check_choice("weighting", weighting, WEIGHTINGS)
    means: dict[str, RunningMean] = {}
    for update in updates:
        weight = 1.0 if weighting == "uniform" else float(update.weight)
        for part, held in sent_parts(update):
            if part in means:
                means[part].add(replace(update, model=held), weight)
            else:
                means[part] = RunningMean(held, weight)
            del held
        del update  # or it would be held while the next one arrives
    return {part: mean.result() for part, mean in means.items()}


def change(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """How far new is from old, in float64."""
    return new.to(torch.float64) - old.to(torch.float64)


def moved(old: ModelState, average: ModelState, factor: float, names: Iterable[str]) -> ModelState:
    """A step of the server: old + factor (average - old) for the named tensors.

    All others become the average. With factor 1 the result is the average, and where average and
    old agree it is both, bit for bit.
    """
    chosen = set(names)
    made = dict(average)
    for name, value in average.items():
        if factor != 1 and name in chosen and policy_of(value) == "average":
            far = change(old[name], value)
            step = (value.to(torch.float64) + (factor - 1) * far).to(value.dtype)
            made[name] = torch.where(far == 0, value, step)
    return made
