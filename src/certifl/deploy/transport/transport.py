"""How orders reach clients and answers come back: Flower's grid, as the server needs it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from flwr.app import Message
from flwr.serverapp import Grid

from certifl.deploy.transport.messages import Content, MalformedMessage, from_records, to_records
from certifl.errors import one_line

_log = logging.getLogger(__name__)
_GONE = 5  # Flower's NODE_UNAVAILABLE

TYPES = {"join": "query.join", "round": "train", "certify": "query.certify"}
"""Flower's message type of each order."""


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
    """There will be no answer, and why.

    Attributes:
        reason: in words. gone: whether the client's machine is not there any more.
        garbled: whether something came that is no answer.
    """

    reason: str
    gone: bool = False
    garbled: bool = False


class Transport(Protocol):
    """The way to the clients."""

    def nodes(self) -> dict[int, Node]:
        """The nodes that are connected now."""
        ...

    def send(self, node: int, content: Content, within: float) -> str:
        """Send an order that is worth answering for some seconds; the name of its answer."""
        ...

    def take(self, name: str) -> Content | NoReply | None:
        """An answer, once; None while there is none."""
        ...


class GridTransport:
    """Flower's grid as a line."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def nodes(self) -> dict[int, Node]:
        """The nodes that are connected now."""
        told: Mapping[int, Node] = {
            info.node_id: Node(info.node_id, info.last_activated_at, info.public_key)
            for info in self._grid.get_nodes()
        }
        return dict(told)

    def send(self, node: int, content: Content, within: float) -> str:
        """Send an order that is worth answering for some seconds; the name of its answer."""
        kind = TYPES[str(content.facts["order"])]
        group = str(content.facts.get("round", ""))
        message = Message(to_records(content), node, kind, ttl=within, group_id=group)
        return str(next(iter(self._grid.push_messages([message]))))

    def take(self, name: str) -> Content | NoReply | None:
        """An answer, once; None while there is none."""
        for message in self._grid.pull_messages([name]):
            if message.has_error():
                gone = message.error.code == _GONE
                said = one_line(message.error.reason)
                return NoReply("its machine is gone" if gone else f"no answer came ({said})", gone)
            return _read(message)
        return None


def _read(message: Message) -> Content | NoReply:
    """What a client sent, or why it cannot be read; whatever it is, it ends nothing here."""
    try:
        return from_records(message.content)
    except MalformedMessage as error:
        return NoReply(f"its answer is garbled, {error}", garbled=True)
    except Exception as error:  # of the libraries that read it, which nobody foresaw
        _log.debug("An answer that cannot be read.", exc_info=True)
        why = f"its answer is garbled, it cannot be read ({type(error).__name__})"
        return NoReply(why, garbled=True)
