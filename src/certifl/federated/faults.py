"""Faults of clients: what counts as one, checks of results, how many clients a round requires.

A client that fails is left out of the round. Its own state is unchanged, and the round continues
with the others while enough of them remain (`required_clients`).

| a fault of the client | not a fault: training stops, and can be resumed after a repair |
|---|---|
| it raises, its training diverges | the request is wrong (`RequestError`: no images) |
| NaN or infinity in what it sends or keeps | a checkpoint cannot be written (`StoreError`) |
| wrong keys, shapes, dtypes, numbers | memory ran out: this machine's fault |
| no answer in time, its process ends | Ctrl-C |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from certifl.errors import (
    InputError,
    RandomSourceBroken,
    RequestError,
    StoreError,
    TrainingDiverged,
    WorkError,
    first_line,
    one_line,
)
from certifl.federated.states import ClientState, ModelState, Parts, ServerState, Update
from certifl.torch_env import out_of_memory

Result = TypeVar("Result")

_LONGEST_REASON = 500
_LARGEST = 1e18
"""Larger than any weight of a working training; its square is still finite in float32, so that a
server's optimizer cannot be made to overflow."""
RESERVED = frozenset({"client", "seconds", "reason", "round", "epsilon", "participants"})
"""Keys that the server writes into the history; no metric may have such a name."""
_MOST_METRICS = 32
_STOP = (RequestError, StoreError, RandomSourceBroken)
_ADVICE = {
    "diverged": "Lower training.lr or training.momentum.",
    "raised": "Check the exceptions that they raised.",
    "wrong": "Check what they send.",
    "late": "Raise the time limit.",
    "ended": "Processes often end because memory ran out: take fewer workers.",
}


@dataclass(frozen=True)
class Fault:
    """Why a client is left out of a round.

    Attributes:
        kind: "diverged", "raised", "wrong" (what it sent), "late" or "ended" (its process).
        reason: completes "client 3:"; sanitized for printing, since a client may have written it.
        error: the exception, where there is one.
    """

    kind: str
    reason: str
    error: Exception | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "reason", one_line(self.reason, _LONGEST_REASON))


@dataclass(frozen=True)
class ClientResult:
    """What one client returned, not checked yet, or its fault.

    Attributes:
        content: update and client state, if they pass `ResultChecker`; None with a fault.
    """

    client: int
    seconds: float
    content: object
    fault: Fault | None = None


def try_client(client: int, work: Callable[[], Result]) -> Result | Fault:
    """The result of a client's work, or its fault; what is none (table above) is raised."""
    try:
        return work()
    except _STOP:
        raise
    except TrainingDiverged as error:
        return Fault("diverged", f"its training diverged, {error.reason}", error)
    except Exception as error:
        if out_of_memory(error):
            raise WorkError(
                f"Memory ran out while client {client} trained ({first_line(error)}). Make "
                "training.batch_size or the number of workers smaller, or free memory; finished "
                "rounds are kept, and the same command resumes after the last one."
            ) from error
        return Fault("raised", f"it raised {type(error).__name__}: {first_line(error)}", error)


def required_clients(participants: int, min_clients: int | None) -> int:
    """Participants that must not fail: half, rounded up, or min_clients (else InputError)."""
    if min_clients is None:
        return math.ceil(participants / 2)
    if min_clients > participants:
        raise InputError(
            f"min_clients = {min_clients} is more than the {participants} clients that take part "
            "in a round: lower it, or let more clients take part."
        )
    return min_clients


def suggestions(faults: Iterable[Fault]) -> str:
    """What to do about these faults."""
    kinds = {fault.kind for fault in faults}
    hints = [text for kind, text in _ADVICE.items() if kind in kinds]
    return " ".join([*hints, "Training can continue with fewer if min_clients is smaller."])


Signature = dict[str, tuple[tuple[int, ...], torch.dtype]]


class ResultChecker:
    """Checks the results of one round before any of them is stored.

    A model must have the keys, shapes and dtypes of the part "model" of the broadcast, or of the
    network where the broadcast has none. An extra part must look like the broadcast's part of the
    same name, otherwise like the first one that was accepted in this round.
    """

    def __init__(self, broadcast: ServerState, network: ModelState) -> None:
        self._expected = {part: _signature(tensors) for part, tensors in broadcast.parts.items()}
        self._expected.setdefault("model", _signature(network))

    def fault(self, client: int, result: object) -> Fault | None:
        """What is wrong with a result; None if it is valid."""
        if not (isinstance(result, tuple) and len(result) == 2):
            return Fault("wrong", f"it returned {type(result).__name__}, not update and state")
        update, state = result
        if not (isinstance(update, Update) and isinstance(state, ClientState)):
            kinds = f"{type(update).__name__} and {type(state).__name__}"
            return Fault("wrong", f"it returned {kinds}, not update and state")
        sent = update.parts
        wrong = _wrong_numbers(client, update) or self._wrong_parts(sent, state.parts)
        if wrong is not None:
            return Fault("wrong", wrong)
        own = {
            part: tensors for part, tensors in state.parts.items() if tensors is not sent.get(part)
        }
        if (bad := not_finite(sent) or not_finite(own)) is not None:
            return Fault("diverged", f"{bad} is not finite")
        for part, tensors in sent.items():
            for name, value in tensors.items():
                if value.is_floating_point() and bool((value.abs() > _LARGEST).any()):
                    reason = f"{name} of its {part} is larger than {_LARGEST:g}"
                    return Fault("diverged", reason)
        for part, tensors in sent.items():
            self._expected.setdefault(part, _signature(tensors))
        return None

    def _wrong_parts(self, sent: Parts, stored: Parts) -> str | None:
        for part, tensors in (*sent.items(), *stored.items()):
            if not isinstance(tensors, Mapping) or not all(map(torch.is_tensor, tensors.values())):
                return f"its {part} is not a dictionary of tensors"
        for part, tensors in sent.items():
            expected = self._expected.get(part)
            different = None if expected is None else _difference(expected, _signature(tensors))
            if different is not None:
                return f"its {part} does not fit, {different}"
            for name, value in tensors.items():
                if name.endswith("running_var") and bool((value < 0).any()):
                    return f"its {part} holds a variance below 0 ({name})"
        return None


def not_finite(parts: Parts) -> str | None:
    """The first tensor with NaN or infinity, in words; None if all are finite."""
    for part, tensors in parts.items():
        for name, value in tensors.items():
            floating = value.is_floating_point() or value.is_complex()
            if floating and not bool(value.isfinite().all()):
                return f"{name} of its {part}"
    return None


def mismatch(expected: ModelState, found: ModelState) -> str | None:
    """The first key in which two states differ in shape or dtype; None if none does."""
    return _difference(_signature(expected), _signature(found))


def _wrong_numbers(client: int, update: Update) -> str | None:
    if isinstance(update.client, bool) or update.client != client:
        return f"it answered as client {update.client!r}"
    if not (_is_finite_number(update.weight) and update.weight > 0):
        return f"its weight is {update.weight!r}"
    if len(update.metrics) > _MOST_METRICS:
        return f"it sends {len(update.metrics)} metrics; at most {_MOST_METRICS} are accepted"
    for name, value in update.metrics.items():
        if name in RESERVED:
            return f"its metric {name!r} has a name that is reserved in the history"
        if not _is_finite_number(value):
            return f"its {name} is {value!r}"
    return None


def _is_finite_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer too large for a float
        return False


def _signature(tensors: ModelState) -> Signature:
    return {name: (tuple(value.shape), value.dtype) for name, value in tensors.items()}


def _difference(expected: Signature, found: Signature) -> str | None:
    """The first key in which two states differ, in words."""
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            return f"{name} is missing"
        if name not in expected:
            return f"{name} is unexpected"
        if expected[name] != found[name]:
            shapes = [f"{dtype} {shape}" for shape, dtype in (expected[name], found[name])]
            return f"{name} is {shapes[1]} instead of {shapes[0]}"
    return None
