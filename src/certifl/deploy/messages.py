"""Messages between the server and the clients: as Flower's records, and over Flower's grid.

A message has a few fields (`ConfigRecord`, one JSON text) and named parts of tensors
(`ArrayRecord`s). The tensors of a part travel in arrays of some megabytes, each in the safetensors
format: Flower moves every array with several requests in each direction, and a network has
hundreds of tensors; but it assembles an array from copies, so they are not too large.
That format checks what arrives against its own size; nothing is ever unpickled. The receiver
checks the fields by `schemas`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pydantic_core
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from safetensors import SafetensorError
from safetensors.torch import load, save

from certifl.deploy.schemas import (
    CertifyRequest,
    Envelope,
    JoinRequest,
    MalformedMessage,
    RoundRequest,
    Trained,
    checked,
)
from certifl.errors import one_line
from certifl.federated.states import ClientState, ModelState, Parts, Update
from certifl.models import fingerprint

_log = logging.getLogger(__name__)

FORMAT = 2
"""Incremented when a message changes its meaning; both sides must have the same."""

_FACTS, _PART = "certifl", "part:"
_PACKED, _KIND = "tensors-{}", "certifl.safetensors"
_PIECE = 1 << 22
_LONGEST = 1 << 21  # characters of a message's fields
_DEEPEST = 12
_GONE, _CRASHED = 5, 8  # Flower's NODE_UNAVAILABLE and CLIENT_APP_CRASHED


@dataclass(frozen=True)
class Content:
    """A message's fields (plain JSON) and parts; parts may be encoded already."""

    fields: dict[str, Any] = field(default_factory=dict)
    parts: Parts = field(default_factory=dict)
    encoded: Mapping[str, ArrayRecord] = field(default_factory=dict)


def encode(parts: Parts) -> dict[str, ArrayRecord]:
    """Parts as they travel, once for many messages (`Content.encoded`)."""
    return {part: _packed(tensors) for part, tensors in parts.items()}


def to_records(content: Content) -> RecordDict:
    """A message as Flower carries it."""
    arrays = {**content.encoded, **encode(content.parts)}
    fields = {"format": FORMAT, "parts": list(arrays), "facts": content.fields}
    records = RecordDict({_FACTS: ConfigRecord({"json": json.dumps(fields)})})
    for part, record in arrays.items():
        records[_PART + part] = record
    return records


def from_records(records: RecordDict) -> Content:
    """A message as it was sent; its tensors leave the records. Else MalformedMessage."""
    names, fields = _fields_of(records)
    arrays = records.array_records
    parts: Parts = {}
    for part in names:
        record = arrays.get(_PART + part)
        if record is None:
            raise MalformedMessage(f"its part {part!r} is missing")
        parts[part] = _unpacked(part, record)
    return Content(fields, parts)


def _fields_of(records: RecordDict) -> tuple[list[str], dict[str, Any]]:
    """Names of the parts, and the fields, neither larger nor deeper than a message needs."""
    try:
        text = records.config_records[_FACTS]["json"]
        if not isinstance(text, str) or len(text) > _LONGEST:
            raise MalformedMessage(f"its fields are not a text of at most {_LONGEST} characters")
        stored = pydantic_core.from_json(text)  # bounds depth and the length of numbers
        version = stored["format"]
    except (KeyError, TypeError, ValueError) as error:
        raise MalformedMessage(f"it has no fields ({type(error).__name__})") from error
    if version != FORMAT:
        raise MalformedMessage(
            f"it is of format {version!r}, this is format {FORMAT}: install the same version of "
            "certifl on both sides"
        )
    message = checked(Envelope, stored, "not one of certifl's messages")
    if _deeper(message.facts, _DEEPEST):
        raise MalformedMessage(f"its fields are nested deeper than {_DEEPEST} levels")
    return message.parts, message.facts


def _deeper(value: object, levels: int) -> bool:
    """Whether tables and lists lie in each other beyond so many levels."""
    if not isinstance(value, (dict, list)):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_deeper(value, levels - 1) for value in inner)


Request = JoinRequest | RoundRequest | CertifyRequest
_ORDERS: dict[str, tuple[type[Request], str]] = {
    "join": (JoinRequest, "query.join"),
    "round": (RoundRequest, "train"),
    "certify": (CertifyRequest, "query.certify"),
}
"""Schema and Flower's message type of each request."""


def parse_request(content: Content) -> Request:
    """What the server asks for, as a client may take it; else MalformedMessage."""
    kind = content.fields.get("order")
    if not isinstance(kind, str) or kind not in _ORDERS:
        raise MalformedMessage(f"the request {kind!r} is unknown")
    request = checked(_ORDERS[kind][0], content.fields, f"not a request to {kind}")
    if not isinstance(request, JoinRequest) and request.counted >= request.round:
        raise MalformedMessage(
            f"it says that round {request.counted} came before round {request.round}"
        )
    return request


def _packed(tensors: ModelState) -> ArrayRecord:
    """A part in arrays of whole tensors; at least one, so that an empty part is one too."""
    pieces: list[list[str]] = [[]]
    size = 0
    for name, value in tensors.items():
        size += value.numel() * value.element_size()
        if pieces[-1] and size > _PIECE:
            pieces.append([])
            size = value.numel() * value.element_size()
        pieces[-1].append(name)
    arrays: dict[str, Array] = {}
    for number, names in enumerate(pieces):
        content = save({name: tensors[name].detach().to("cpu").contiguous() for name in names})
        arrays[_PACKED.format(number)] = Array("uint8", (len(content),), _KIND, content)
    return ArrayRecord(arrays)


def _unpacked(part: str, record: ArrayRecord) -> ModelState:
    """The tensors of a part; its arrays are dropped one by one, so one copy is enough."""
    count = len(record)
    tensors: ModelState = {}
    for number in range(count):
        packed = record.pop(_PACKED.format(number), None)
        if packed is None:
            raise MalformedMessage(f"its part {part!r} is not one of certifl's")
        if packed.stype != _KIND:
            raise MalformedMessage(
                f"its part {part!r} is written as {packed.stype!r}, which is unknown here"
            )
        try:
            loaded = load(packed.data)
        except (KeyError, SafetensorError, TypeError, ValueError) as error:
            raise MalformedMessage(f"its part {part!r} is not whole ({error})") from error
        if tensors.keys() & loaded.keys():
            raise MalformedMessage(f"its part {part!r} holds a tensor twice")
        tensors |= loaded
    if not count:
        raise MalformedMessage(f"its part {part!r} is not one of certifl's")
    return tensors


def update_to(update: Update) -> Content:
    """What a client sends after a round."""
    fields = {
        "client": update.client,
        "weight": update.weight,
        "metrics": dict(update.metrics),
        "model": update.model is not None,
    }
    parts: Parts = {f"extra:{part}": tensors for part, tensors in update.extra.items()}
    if update.model is not None:
        parts["model"] = update.model
    return Content({"update": fields}, parts)


def update_from(content: Content) -> tuple[Update, ClientState]:
    """The update that a client sent, without its own state; else MalformedMessage."""
    sent = checked(Trained, content.fields, "not an update").update
    if sent.model != ("model" in content.parts):
        raise MalformedMessage("it claims to have a model and has none, or the other way round")
    model = content.parts.get("model")
    metrics = sent.metrics.model_dump(exclude_none=True)
    extra = {
        part.removeprefix("extra:"): tensors
        for part, tensors in content.parts.items()
        if part.startswith("extra:")
    }
    return Update(sent.client, sent.weight, model, metrics, extra), ClientState()


def fingerprint_of(parts: Parts) -> str:
    """One name for the content of all parts."""
    together = {
        f"{part}/{name}": v for part, tensors in parts.items() for name, v in tensors.items()
    }
    return fingerprint(together)


# How requests reach clients and answers come back: Flower's grid, as the server needs it.


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
        crashed: whether its process ended, or was not heard of in time, while it worked.
        malformed: whether something arrived that is not an answer.
    """

    reason: str
    gone: bool = False
    crashed: bool = False
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
        kind = _ORDERS[content.fields["order"]][1]
        group = str(content.fields.get("round", ""))
        message = Message(to_records(content), node, kind, ttl=within, group_id=group)
        return str(next(iter(self._grid.push_messages([message]))))

    def take_reply(self, name: str) -> Content | NoReply | None:
        """An answer, once; None while there is none."""
        for message in self._grid.pull_messages([name]):
            if message.has_error():
                gone, crashed = (message.error.code == code for code in (_GONE, _CRASHED))
                why = "its machine is gone"
                if not gone:
                    why = f"no answer came ({one_line(message.error.reason)})"
                return NoReply(why, gone, crashed)
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
