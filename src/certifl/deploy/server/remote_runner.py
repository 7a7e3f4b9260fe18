"""The rounds of a training whose clients are elsewhere: a runner of `federated.rounds`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from flwr.app import ArrayRecord

from certifl.deploy.client.state import NEVER
from certifl.deploy.server.clients import POLL, ClientRegistry
from certifl.deploy.transport.messages import (
    Content,
    Node,
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
class _Pending:
    """A pending request; `images` is how many the client trains on, as reported on joining."""

    node: Node
    images: int
    name: str
    until: float
    refreshed: float


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
        wanted = set(participants)
        missing = self.registry.wait_for(wanted - self._absent, self.timeouts.absent)
        self._absent = (missing | (self._absent & wanted)) - self.registry.connected.keys()
        round = _Round(self, current)
        for client in participants:
            round.ask(client)
        round.release()
        for client in participants:
            yield round.answer(client)


class _Round:
    """The requests and answers of one round."""

    def __init__(self, remote: RemoteRunner, current: StoredRound) -> None:
        self._registry, self._timeouts = remote.registry, remote.timeouts
        self._needed, self._extra = remote.needed, remote.extra
        self._steps = remote.steps
        self._sends = set(remote.sends(current.number))
        self._current = current
        self._encoded: Mapping[str, ArrayRecord] | None = None
        self._broadcast_fingerprint = ""
        self._pending: dict[int, _Pending] = {}
        self._began = time.perf_counter()

    def ask(self, client: int) -> None:
        """Send the round's request to a client, if it is connected."""
        entry = self._registry.connected.get(client)
        if entry is None:
            return
        fields = {
            "order": "round",
            "study": dict(self._registry.study),
            "client": client,
            "round": self._current.number,
            "counted": last_counted(self._current, client),
        }
        encoded = self._broadcast()
        request = Content({**fields, "broadcast": self._broadcast_fingerprint}, encoded=encoded)
        name = self._registry.transport.send(entry.node.id, request, self._timeouts.answer)
        now, images = time.monotonic(), entry.joined.train_images
        until = now + self._timeouts.answer
        self._pending[client] = _Pending(entry.node, images, name, until, now)

    def release(self) -> None:
        """Free the broadcast: it is read again if needed."""
        self._encoded = None

    def _broadcast(self) -> Mapping[str, ArrayRecord]:
        if self._encoded is None:
            parts = self._needed(self._current.server())
            self._broadcast_fingerprint = self._broadcast_fingerprint or fingerprint_of(parts)
            self._encoded = encode(parts)
        return self._encoded

    def answer(self, client: int) -> ClientResult:
        """Wait for a client's answer."""
        pending = self._pending.pop(client, None)
        if pending is None:
            why = self._registry.refused.get(client)
            reason = "it is not connected" if why is None else f"it was refused, {why}"
            return ClientResult(client, 0.0, None, Fault("late", reason))
        while True:
            content = self._registry.transport.take_reply(pending.name)
            if isinstance(content, NoReply) and content.gone:
                again = self._reconnected(client)
                if again is not None:
                    pending = again
                    continue
            if content is not None:
                return self._read(client, pending.images, content)
            now = time.monotonic()
            if now > pending.until:
                return self._fault(client, "late", "no answer came in time")
            if now - pending.refreshed > _REFRESH_SECONDS:
                pending = self._refreshed(client, pending)
            time.sleep(POLL)

    def _reconnected(self, client: int) -> _Pending | None:
        """A client that disconnected, asked again if it returns; None if it does not."""
        if self._registry.wait_for({client}, self._timeouts.absent):
            return None
        self.ask(client)
        self.release()
        return self._pending.pop(client)

    def _refreshed(self, client: int, pending: _Pending) -> _Pending:
        """Ask again if the client's node was restarted."""
        self._registry.refresh()
        entry = self._registry.connected.get(client)
        if entry is not None and entry.node != pending.node:
            self.ask(client)
            self.release()
            again = self._pending.pop(client)
            return replace(again, until=pending.until)
        return replace(pending, refreshed=time.monotonic())

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
        most, steps = (
            self._steps(client, self._current.number),
            update.metrics.get("private_steps"),
        )
        if steps is not None and steps > most:
            return Fault(
                "wrong", f"it counts {steps} private steps, and at most {most} were asked"
            )
        sent = set(update.extra) | ({"model"} if update.model is not None else set())
        if sent != self._sends:
            listed = [", ".join(sorted(names)) or "no parts" for names in (sent, self._sends)]
            return Fault("wrong", f"it sent {listed[0]}, and this round asks for {listed[1]}")
        for part, tensors in update.extra.items():
            differs = mismatch(self._extra, tensors)
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


def last_counted(current: StoredRound, client: int) -> int:
    """The last round that a client was counted in, or `NEVER`."""
    for entry in reversed(current.history):
        if any(row["client"] == client for row in entry["clients"]):
            return int(entry["round"])
    return NEVER
