"""Which clients are there, and on which node each of them is."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from certifl.deploy.transport.messages import Content
from certifl.deploy.transport.schemas import Joined, MalformedMessage, Reply, checked
from certifl.deploy.transport.transport import Node, NoReply, Transport
from certifl.errors import one_line

_log = logging.getLogger(__name__)

POLL = 0.3
"""Seconds between two looks for an answer."""
UNKNOWN = -1
"""Stands for the number of a node that cannot be told to be any client's."""
_AGAIN = 10.0
_FAILED, _MISMATCHED, _STRANGER = "failed", "mismatched", "stranger"
"""Why a node is refused: it says it cannot, what it says does not fit, it is somebody else."""


@dataclass(frozen=True)
class ConnectedClient:
    """A client that joined: its node, and its properties as it said them."""

    client: int
    node: Node
    joined: Joined


@dataclass
class ClientRegistry:
    """The clients that joined.

    Who a node is follows from its key, where keys are known; what a node says of itself is
    believed only where there are none.

    Attributes:
        line: the way to them. study: what every order says of the study.
        accepts: why a client's properties do not fit, or None.
        keys: public keys by client, where they are known: then a node is whose key it has.
        within: seconds in which a node must answer that it joins.
        members: by client.
        refused: why a client is not among them; some said themselves that they cannot take part.
        unfit: those whose answer cannot be. mismatched: of these, those whose properties or answer
            do not fit the study, whoever they are.
    """

    line: Transport
    study: Mapping[str, Any]
    accepts: Callable[[Joined], str | None]
    keys: Mapping[int, bytes] = field(default_factory=dict)
    within: float = 120.0
    members: dict[int, ConnectedClient] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)
    unfit: set[int] = field(default_factory=set)
    mismatched: set[int] = field(default_factory=set)
    _asked: dict[int, tuple[Node, str, float]] = field(default_factory=dict)
    _known: dict[int, Node] = field(default_factory=dict)
    _again: dict[int, float] = field(default_factory=dict)

    def look(self) -> None:
        """See who has come, gone, or been started again; does not wait for anybody."""
        here = self.line.nodes()
        for client, member in list(self.members.items()):
            if here.get(member.node.id) != member.node:
                del self.members[client]
        for id, node in here.items():
            if self._known.get(id) != node or time.monotonic() > self._again.get(id, float("inf")):
                order = Content({"order": "join", "study": dict(self.study)})
                name = self.line.send(id, order, self.within)
                self._again.pop(id, None)
                self._known[id] = node
                self._asked[id] = (node, name, time.monotonic() + self.within)
        for id in self._known.keys() - here.keys():
            del self._known[id]
            self._asked.pop(id, None)
            self._again.pop(id, None)
        for id, (node, name, until) in list(self._asked.items()):
            answer = self.line.take(name)
            if answer is not None:
                del self._asked[id]
                self._joins(node, answer)
            elif time.monotonic() > until:
                del self._asked[id]
                del self._known[id]  # asked again at the next look

    def wait_for(self, clients: set[int], seconds: float, heard: bool = False) -> set[int]:
        """Wait for some clients; those that are still missing.

        Args:
            clients: their numbers. seconds: to wait at most.
            heard: a client that was refused is not waited for.
        """
        ends = time.monotonic() + seconds
        while True:
            self.look()
            missing = clients - self.members.keys()
            awaited = missing - self.refused.keys() if heard else missing
            if not awaited or time.monotonic() > ends:
                return missing
            time.sleep(POLL)

    def sift(self) -> None:
        """Look at everybody once more: what a study needs may be known only now."""
        for client, member in list(self.members.items()):
            problem = self.accepts(member.joined)
            if problem is not None:
                del self.members[client]
                self._refuse(client, problem, _MISMATCHED)

    def _joins(self, node: Node, answer: Content | NoReply) -> None:
        if isinstance(answer, NoReply):
            if answer.garbled:
                self._refuse(self._who(node, None), answer.reason, _MISMATCHED)
            else:
                _log.warning("Node %d does not join: %s.", node.id, answer.reason)
                self._again[node.id] = time.monotonic() + _AGAIN
            return
        who = self._who(node, answer.facts.get("client"))
        try:
            reply = checked(Reply, answer.facts, "no answer to an order")
            if reply.fault is not None:
                self._refuse(who, reply.fault.reason, _FAILED)
                return
            joined = checked(Joined, answer.facts.get("joined"), "no answer to join")
            if joined.client != reply.client:
                raise MalformedMessage(
                    f"it says it is client {joined.client}, and client {reply.client}"
                )
        except MalformedMessage as error:
            self._refuse(who, f"its answer is garbled, {error}", _MISMATCHED)
            return
        stranger = self._problem(joined.client, node)
        problem = stranger or self.accepts(joined)
        if problem is not None:
            self._refuse(who, problem, _MISMATCHED if stranger is None else _STRANGER)
            return
        self.refused.pop(who, None)
        self.unfit.discard(who)
        self.mismatched.discard(who)
        self.members[joined.client] = ConnectedClient(joined.client, node, joined)
        _log.info("Client %d is here.", joined.client)

    def _who(self, node: Node, said: object) -> int:
        """Whose node this is: by its key, or else what it says if nobody else is that client."""
        if self.keys:
            owners = [client for client, key in self.keys.items() if key == node.key]
            return next((c for c in owners if c == said), next(iter(owners), UNKNOWN))
        if isinstance(said, bool) or not isinstance(said, int) or not 0 <= said < 10**6:
            return UNKNOWN
        other = self.members.get(said)
        return said if other is None or other.node.id == node.id else UNKNOWN

    def _problem(self, client: int, node: Node) -> str | None:
        if self.keys and self.keys.get(client) != node.key:
            return f"it says it is client {client}, but has another key than that client"
        other = self.members.get(client)
        if other is not None and other.node.id != node.id:
            return f"client {client} is here already, on another node: every client has one number"
        return None

    def _refuse(self, client: int, why: str, kind: str) -> None:
        shown = one_line(why, 700)
        who = f"Client {client}" if client != UNKNOWN else "A node"
        _log.warning("%s is not taken: %s.", who, shown)
        if client in self.members:  # it was somebody else who said that he is this client
            return
        self.refused[client] = shown
        for group, kinds in (
            (self.unfit, (_MISMATCHED, _STRANGER)),
            (self.mismatched, (_MISMATCHED,)),
        ):
            group.discard(client)
            if kind in kinds:
                group.add(client)
