"""Connected clients, and the rounds that they run: a runner of `federated.rounds`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ArrayRecord

from certifl.deploy.client.state import NEVER
from certifl.deploy.messages import (
    Content,
    GridTransport,
    Node,
    NoReply,
    encode,
    fingerprint_of,
    update_from,
)
from certifl.deploy.schemas import Joined, MalformedMessage, Reply, checked
from certifl.errors import InputError, one_line
from certifl.federated.faults import ClientResult, Fault, mismatch
from certifl.federated.states import ClientData, ModelState, Parts, Update
from certifl.runs.checkpoints import StoredRound

_log = logging.getLogger(__name__)

POLL = 0.3
"""Seconds between two checks for an answer."""
UNKNOWN = -1
"""Number of a node that cannot be identified as any client's."""
_RETRY_SECONDS = 10.0
FAILED, MISMATCHED, IMPOSTOR = "failed", "mismatched", "impostor"
"""Why a node is refused: it reports a fault, it does not match, it is not the client it claims."""


@dataclass(frozen=True)
class ConnectedClient:
    """A client that joined: its node, and its properties as reported."""

    client: int
    node: Node
    joined: Joined


@dataclass(frozen=True)
class Pending:
    """A request under way.

    Attributes:
        entry: its receiver, as it had joined. name: of the answer.
        since: when it was sent. until: when it times out.
    """

    entry: ConnectedClient
    name: str
    since: float
    until: float


@dataclass
class ClientRegistry:
    """The clients that joined.

    A node is identified by its key, where keys are known; the number that it claims is believed
    only where there are none.

    Attributes:
        transport: to the nodes. study: the study's entry in every request.
        mismatch: why a client's properties do not match, or None.
        keys: public keys by client, where they are known.
        within: seconds in which a node must answer a request to join.
        connected: clients that joined, by number.
        refused: why other clients are not among them.
        kinds: of these refusals: `FAILED`, `MISMATCHED`, `IMPOSTOR`.
    """

    transport: GridTransport
    study: Mapping[str, Any]
    mismatch: Callable[[Joined], str | None]
    keys: Mapping[int, bytes] = field(default_factory=dict)
    within: float = 120.0
    connected: dict[int, ConnectedClient] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)
    kinds: dict[int, str] = field(default_factory=dict)
    _join_requests: dict[int, tuple[Node, str, float]] = field(default_factory=dict)
    _nodes: dict[int, Node] = field(default_factory=dict)
    _retry_at: dict[int, float] = field(default_factory=dict)

    def refresh(self) -> None:
        """Update for nodes that have connected, gone, or restarted; does not wait."""
        nodes = self.transport.nodes()
        for client, entry in list(self.connected.items()):
            if nodes.get(entry.node.id) != entry.node:
                del self.connected[client]
        for id, node in nodes.items():
            if self._nodes.get(id) != node or time.monotonic() > self._retry_at.get(
                id, float("inf")
            ):
                request = Content({"order": "join", "study": dict(self.study)})
                name = self.transport.send(id, request, self.within)
                self._retry_at.pop(id, None)
                self._nodes[id] = node
                self._join_requests[id] = (node, name, time.monotonic() + self.within)
        for id in self._nodes.keys() - nodes.keys():
            del self._nodes[id]
            self._join_requests.pop(id, None)
            self._retry_at.pop(id, None)
        for id, (node, name, until) in list(self._join_requests.items()):
            answer = self.transport.take_reply(name)
            if answer is not None:
                del self._join_requests[id]
                self._handle_join(node, answer)
            elif time.monotonic() > until:
                del self._join_requests[id]
                del self._nodes[id]  # asked again at the next refresh

    def ask(
        self,
        client: int,
        fields: Mapping[str, Any],
        encoded: Mapping[str, ArrayRecord],
        within: float,
    ) -> Pending | None:
        """Send a request to a client; None where it is not connected.

        Args:
            fields: of the request, without study and client. encoded: parts of the request.
            within: seconds after which it times out.
        """
        entry = self.connected.get(client)
        if entry is None:
            return None
        request = {**fields, "study": dict(self.study), "client": client}
        name = self.transport.send(entry.node.id, Content(request, encoded=encoded), within)
        now = time.monotonic()
        return Pending(entry, name, now, now + within)

    def restarted(self, pending: Pending) -> bool:
        """Whether the receiver of a request was started again: it does not know of the request."""
        entry = self.connected.get(pending.entry.client)
        return entry is not None and entry.node != pending.entry.node

    def wait_for(self, clients: set[int], seconds: float, skip_refused: bool = False) -> set[int]:
        """Wait some seconds at most; returns the clients that are still missing.

        With `skip_refused`, clients that were refused are not awaited.
        """
        ends = time.monotonic() + seconds
        while True:
            self.refresh()
            missing = clients - self.connected.keys()
            awaited = missing - self.refused.keys() if skip_refused else missing
            if not awaited or time.monotonic() > ends:
                return missing
            time.sleep(POLL)

    def drop_mismatched(self) -> None:
        """Check all clients again: what a study needs may have been determined only now."""
        for client, entry in list(self.connected.items()):
            problem = self.mismatch(entry.joined)
            if problem is not None:
                del self.connected[client]
                self._refuse(client, problem, MISMATCHED)

    def _handle_join(self, node: Node, answer: Content | NoReply) -> None:
        if isinstance(answer, NoReply):
            if answer.malformed:
                self._refuse(self._identify(node, None), answer.reason, MISMATCHED)
            else:
                _log.warning("Node %d does not join: %s.", node.id, answer.reason)
                self._retry_at[node.id] = time.monotonic() + _RETRY_SECONDS
            return
        who = self._identify(node, answer.fields.get("client"))
        try:
            reply = checked(Reply, answer.fields, "not an answer to a request")
            if reply.fault is not None:
                self._refuse(who, reply.fault.reason, FAILED)
                return
            joined = checked(Joined, answer.fields.get("joined"), "not an answer to join")
            if joined.client != reply.client:
                raise MalformedMessage(
                    f"it claims to be client {joined.client}, and client {reply.client}"
                )
        except MalformedMessage as error:
            self._refuse(who, f"its answer is malformed, {error}", MISMATCHED)
            return
        impostor = self._identity_problem(joined.client, node)
        problem = impostor or self.mismatch(joined)
        if problem is not None:
            self._refuse(who, problem, MISMATCHED if impostor is None else IMPOSTOR)
            return
        self.refused.pop(who, None)
        self.kinds.pop(who, None)
        self.connected[joined.client] = ConnectedClient(joined.client, node, joined)
        _log.info("Client %d joined.", joined.client)

    def _identify(self, node: Node, claimed: object) -> int:
        """Whose node this is: by its key, or else as it claims if no other node is that client."""
        if self.keys:
            owners = [client for client, key in self.keys.items() if key == node.key]
            return next((c for c in owners if c == claimed), next(iter(owners), UNKNOWN))
        if isinstance(claimed, bool) or not isinstance(claimed, int) or not 0 <= claimed < 10**6:
            return UNKNOWN
        other = self.connected.get(claimed)
        return claimed if other is None or other.node.id == node.id else UNKNOWN

    def _identity_problem(self, client: int, node: Node) -> str | None:
        if self.keys and self.keys.get(client) != node.key:
            return f"it claims to be client {client}, but has another key than that client"
        other = self.connected.get(client)
        if other is not None and other.node.id != node.id:
            return f"client {client} is connected on another node: every client has its own number"
        return None

    def _refuse(self, client: int, why: str, kind: str) -> None:
        shown = one_line(why, 700)
        who = f"Client {client}" if client != UNKNOWN else "A node"
        _log.warning("%s is refused: %s.", who, shown)
        if client in self.connected:  # another node claimed to be this client
            return
        self.refused[client], self.kinds[client] = shown, kind


# Rounds of a training.

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
