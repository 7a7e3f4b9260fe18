"""What a rule of aggregation is, and what all of them share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from certifl.federated.averaging import check_alike, policy_of
from certifl.federated.states import ModelState, Parts, ServerState, Update

_COORDINATES = 1 << 16


class Rule(Protocol):
    """What the server does with the updates of a round before the algorithm aggregates them.

    A frozen record of hyper-parameters. Everything a client sends is treated: its model and the
    further parts that some algorithms send, each part on its own. Averaging equal models gives
    them back bit for bit, so a rule that hands every client's update on with the robust
    combination in it works with every algorithm; updates that carry nothing pass as they are.

    Attributes:
        name: its key in `RULES`.
    """

    name: ClassVar[str]

    def __call__(self, broadcast: ServerState, updates: Iterable[Update]) -> Iterator[Update]:
        """The updates as the algorithm is to see them; as many as arrived, in client order."""
        ...

    def check(self, participants: int) -> None:
        """Refuse to promise what so few clients cannot give.

        Raises:
            SpecError: with so many participants in a round, the hyper-parameters make no sense.
        """
        ...


def parts_of(update: Update) -> Parts:
    """Everything that an update carries, by name; its model is the part "model"."""
    return dict(update.extra) if update.model is None else {**update.extra, "model": update.model}


def with_parts(update: Update, parts: Parts) -> Update:
    """The update with other contents."""
    extra = {part: held for part, held in parts.items() if part != "model"}
    return replace(update, model=parts.get("model"), extra=extra)


def combined(
    updates: Iterable[Update], combine: Callable[[Sequence[ModelState]], ModelState]
) -> Iterator[Update]:
    """Every update with the combination of all in place of its own parts.

    The combination sees clients in the order of their numbers, however they arrived.

    Args:
        updates: all of them are held in memory until the last one has arrived.
        combine: one table of tensors from several of the same keys and shapes.

    Raises:
        InputError: a client sent other keys or shapes than the first one.
    """
    held = list(updates)
    sent: dict[str, list[ModelState]] = {}
    for update in sorted(held, key=lambda update: update.client):
        for part, tensors in parts_of(update).items():
            same = sent.setdefault(part, [])
            same.append(tensors)
            check_alike(same[0], update.client, tensors)
    made = {part: combine(tables) for part, tables in sent.items()}
    del sent
    for update in held:
        yield with_parts(update, {part: made[part] for part in parts_of(update)})


def largest_counters(tables: Sequence[ModelState]) -> ModelState:
    """Maxima of what is no floating tensor: BatchNorm's counters of steps."""
    counters = [k for k, value in tables[0].items() if policy_of(value) == "maximum"]
    largest = {name: tables[0][name].clone() for name in counters}
    for table in tables[1:]:
        for name in counters:
            largest[name] = torch.maximum(largest[name], table[name])
    return largest


def is_statistic(name: str) -> bool:
    """Whether a key names a running mean or variance of BatchNorm, by torch's names for them."""
    return name.rpartition(".")[2] in ("running_mean", "running_var")


def blocks(values: Sequence[torch.Tensor]) -> Iterator[NDArray[np.float64]]:
    """Tensors of one shape as rows of (n, coordinates) in float64, a block of columns at a time.

    A complex number is two coordinates.
    """
    flat = [(torch.view_as_real(v) if v.is_complex() else v).reshape(-1) for v in values]
    for start in range(0, flat[0].numel(), _COORDINATES):
        rows = [row[start : start + _COORDINATES].to(torch.float64) for row in flat]
        yield torch.stack(rows).numpy()
