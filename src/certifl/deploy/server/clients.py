"""Which clients are connected, and on which node each of them is."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ArrayRecord

from certifl.deploy.transport.messages import Content, GridTransport, Node, NoReply
from certifl.deploy.transport.schemas import Joined, MalformedMessage, Reply, checked
from certifl.errors import one_line

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
            client: its number. fields: of the request, without study and client.
            encoded: parts of the request. within: seconds after which it times out.
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
        """Wait for some clients; returns those that are still missing.

        Args:
            clients: their numbers. seconds: to wait at most.
            skip_refused: do not wait for clients that were refused.
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
