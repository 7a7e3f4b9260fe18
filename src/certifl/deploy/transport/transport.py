"""How requests reach clients and answers come back: Flower's grid, as the server needs it."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from flwr.app import Message
from flwr.serverapp import Grid

from certifl.deploy.transport.messages import Content, MalformedMessage, from_records, to_records
from certifl.errors import one_line

_log = logging.getLogger(__name__)
_GONE = 5  # Flower's NODE_UNAVAILABLE

TYPES = {"join": "query.join", "round": "train", "certify": "query.certify"}
"""Flower's message type of each request."""


@dataclass(frozen=True)
class Node:
    """A client's machine as the server sees it.

    Attributes:
        id: Flower's number of the node.
        since: changes whenever the node is started again.
        key: its public key, as it was registered; empty where nodes show none.
    """

    id: int
    since: str
    key: bytes = b""


@dataclass(frozen=True)
class NoReply:
    """Why there is no answer.

    Attributes:
        reason: in words. gone: whether the client's machine has disconnected.
        malformed: whether something arrived that is not an answer.
    """

    reason: str
    gone: bool = False
    malformed: bool = False


class GridTransport:
    """Sends requests to clients and takes their answers, over Flower's grid."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def nodes(self) -> dict[int, Node]:
        """The nodes that are connected now."""
        return {
            info.node_id: Node(info.node_id, info.last_activated_at, info.public_key)
            for info in self._grid.get_nodes()
        }

    def send(self, node: int, content: Content, within: float) -> str:
        """Send a request that expires after some seconds; returns the name of its answer."""
        kind = TYPES[str(content.fields["order"])]
        group = str(content.fields.get("round", ""))
        message = Message(to_records(content), node, kind, ttl=within, group_id=group)
        return str(next(iter(self._grid.push_messages([message]))))

    def take_reply(self, name: str) -> Content | NoReply | None:
        """An answer, once; None while there is none."""
        for message in self._grid.pull_messages([name]):
            if message.has_error():
                gone = message.error.code == _GONE
                why = one_line(message.error.reason)
                return NoReply("its machine is gone" if gone else f"no answer came ({why})", gone)
            return _read(message)
        return None


def _read(message: Message) -> Content | NoReply:
    """What a client sent, or why it cannot be read; no message raises an error here."""
    try:
        return from_records(message.content)
    except MalformedMessage as error:
        return NoReply(f"its answer is malformed, {error}", malformed=True)
    except Exception as error:  # unforeseen, of the libraries that read it
        _log.debug("An answer that cannot be read.", exc_info=True)
        why = f"its answer is malformed, it cannot be read ({type(error).__name__})"
        return NoReply(why, malformed=True)
