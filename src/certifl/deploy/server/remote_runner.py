"""The rounds of a training whose clients are elsewhere: a runner of `federated.rounds`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ArrayRecord

from certifl.deploy.client.state import NEVER
from certifl.deploy.server.clients import POLL, ClientRegistry, Pending
from certifl.deploy.transport.messages import (
    Content,
    NoReply,
    encode,
    fingerprint_of,
    update_from,
)
from certifl.deploy.transport.schemas import MalformedMessage, Reply, checked
from certifl.errors import InputError
from certifl.federated.faults import ClientResult, Fault, mismatch
from certifl.federated.states import ClientData, ModelState, Parts, Update
from certifl.runs.checkpoints import StoredRound

_REFRESH_SECONDS = 5.0
_MOST_REQUESTS = 10  # to one client in one round
_KINDS = ("diverged", "raised", "wrong", "late", "ended")


class RemoteData:
    """As many clients as a study has, whose data is on their own machines."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int, /) -> ClientData:
        raise InputError(f"The data of client {index} is on its own machine.")


@dataclass(frozen=True)
class Timeouts:
    """How long the server waits, in seconds.

    Attributes:
        answer: for an answer to a request. start: for clients to join at the beginning.
        absent: for a participant that is absent when a round begins, or disconnects during it.
    """

    answer: float = 3600.0
    start: float = 300.0
    absent: float = 60.0


@dataclass
class RemoteRunner:
    """Runs the clients of a round over a transport; answers come in the order of participants.

    Where a node was restarted meanwhile, its request is sent again: a client gives the same answer
    to the same request.

    Attributes:
        registry: the connected clients. timeouts: how long to wait.
        needed: selects those of the server's parts that clients need.
        begins: called before each round.
        sends: names of the parts that clients send in a round.
        steps: maximum number of private steps of a client in a round.
        extra: a template of every part beside the model (it has an entry per trained weight).
    """

    registry: ClientRegistry
    timeouts: Timeouts
    needed: Callable[[Parts], Parts]
    begins: Callable[[], None]
    sends: Callable[[int], tuple[str, ...]]
    steps: Callable[[int, int], int]
    extra: ModelState
    _absent: set[int] = field(default_factory=set)

    def work(self, current: StoredRound, participants: Sequence[int]) -> Iterator[ClientResult]:
        """An answer from every participant, in the order given, one at a time."""
        self.begins()
        chosen = set(participants)
        missing = self.registry.wait_for(chosen - self._absent, self.timeouts.absent)
        self._absent = (missing | (self._absent & chosen)) - self.registry.connected.keys()
        round = _Round(self, current)
        pending = {client: round.ask(client) for client in participants}
        round.release()
        for client in participants:
            yield round.answer(client, pending.pop(client))


class _Round:
    """The requests and answers of one round."""

    def __init__(self, remote: RemoteRunner, current: StoredRound) -> None:
        self._remote, self._registry, self._current = remote, remote.registry, current
        self._encoded: Mapping[str, ArrayRecord] | None = None
        self._broadcast_fingerprint = ""
        self._began = time.perf_counter()

    def ask(self, client: int) -> Pending | None:
        """Send the round's request to a client; None where it is not connected."""
        if client not in self._registry.connected:
            return None
        if self._encoded is None:
            parts = self._remote.needed(self._current.server())
            self._broadcast_fingerprint = self._broadcast_fingerprint or fingerprint_of(parts)
            self._encoded = encode(parts)
        fields = request_fields("round", self._current, client, self._broadcast_fingerprint)
        return self._registry.ask(client, fields, self._encoded, self._remote.timeouts.answer)

    def release(self) -> None:
        """Free the broadcast: it is read again if needed."""
        self._encoded = None

    def answer(self, client: int, pending: Pending | None) -> ClientResult:
        """Wait for a client's answer; one that disconnects is asked again when it is back.

        One whose process crashed is asked once more, and nobody more than `_MOST_REQUESTS` times.
        """
        if pending is None:
            why = self._registry.refused.get(client)
            reason = "it is not connected" if why is None else f"it was refused, {why}"
            return ClientResult(client, 0.0, None, Fault("late", reason))
        until, refreshed, requests, crashed = pending.until, pending.since, 1, False
        while True:
            content = self._registry.transport.take_reply(pending.name)
            if isinstance(content, NoReply) and requests < _MOST_REQUESTS:
                lost = content.gone or (content.crashed and not crashed)
                if lost and not self._registry.wait_for({client}, self._remote.timeouts.absent):
                    requests, crashed = requests + 1, crashed or content.crashed
                    pending = self._again(client, pending)
                    until, refreshed = pending.until, pending.since
                    continue
            if content is not None:
                return self._read(client, pending.entry.joined.train_images, content)
            now = time.monotonic()
            if now > until:
                return self._fault(client, "late", "no answer came in time")
            if now - refreshed > _REFRESH_SECONDS:
                refreshed = now
                self._registry.refresh()
                if self._registry.restarted(pending):
                    pending = self._again(client, pending)
            time.sleep(POLL)

    def _again(self, client: int, before: Pending) -> Pending:
        asked = self.ask(client)
        self.release()
        return asked or before

    def _read(self, client: int, images: int, content: Content | NoReply) -> ClientResult:
        if isinstance(content, NoReply):
            return self._fault(client, "ended" if content.gone else "wrong", content.reason)
        try:
            reply = checked(Reply, content.fields, "not an answer to a round")
            # At most the time since the request, whatever the client's clock says.
            seconds = min(reply.seconds, time.perf_counter() - self._began)
            fault = fault_of(reply) or self._problem(client, reply)
            if fault is not None:
                return ClientResult(client, seconds, None, fault)
            update, state = update_from(content)
        except MalformedMessage as error:
            return self._fault(client, "wrong", f"its answer is malformed, {error}")
        fault = self._update_problem(client, images, update)
        return ClientResult(client, seconds, None if fault is not None else (update, state), fault)

    def _problem(self, client: int, reply: Reply) -> Fault | None:
        if reply.client != client:
            return Fault("wrong", f"it answered as client {reply.client}")
        if reply.round != self._current.number:
            return Fault("wrong", f"it answered round {reply.round}")
        if reply.started_from != self._broadcast_fingerprint:
            return Fault("wrong", "it trained from another model than it was sent (fingerprint)")
        return None

    def _update_problem(self, client: int, images: int, update: Update) -> Fault | None:
        """Why an update cannot be of this client and round; None where it can."""
        if update.weight != images:
            weight = f"its weight is {update.weight:g}"
            return Fault("wrong", f"{weight}, and it joined with {images} training images")
        number, steps = self._current.number, update.metrics.get("private_steps")
        most = self._remote.steps(client, number)
        if steps is not None and steps > most:
            return Fault(
                "wrong", f"it counts {steps} private steps, and at most {most} were asked"
            )
        sent = set(update.extra) | ({"model"} if update.model is not None else set())
        asked = set(self._remote.sends(number))
        if sent != asked:
            listed = [", ".join(sorted(names)) or "no parts" for names in (sent, asked)]
            return Fault("wrong", f"it sent {listed[0]}, and this round asks for {listed[1]}")
        for part, tensors in update.extra.items():
            differs = mismatch(self._remote.extra, tensors)
            if differs is not None:
                return Fault("wrong", f"its {part} does not fit, {differs}")
        return None

    def _fault(self, client: int, kind: str, reason: str) -> ClientResult:
        return ClientResult(client, time.perf_counter() - self._began, None, Fault(kind, reason))


def fault_of(reply: Reply) -> Fault | None:
    """The failure that a client reports."""
    fault = reply.fault
    if fault is None:
        return None
    return Fault(fault.kind if fault.kind in _KINDS else "raised", fault.reason)


def request_fields(
    order: str, current: StoredRound, client: int, broadcast: str
) -> dict[str, Any]:
    """Fields of a request that sends a client the parts of a stored round."""
    return {
        "order": order,
        "round": current.number,
        "counted": last_counted(current, client),
        "broadcast": broadcast,
    }


def last_counted(current: StoredRound, client: int) -> int:
    """The last round that a client was counted in, or `NEVER`."""
    for entry in reversed(current.history):
        if any(row["client"] == client for row in entry["clients"]):
            return int(entry["round"])
    return NEVER
