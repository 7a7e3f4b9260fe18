"""What travels between the server and the clients, as Flower's records.

A message is a few facts (`ConfigRecord`, one JSON text) and named parts of tensors
(`ArrayRecord`s). The tensors of a part travel in arrays of some megabytes, each in the safetensors
format: Flower moves every array with requests of its own, several times on each way, and a network
has hundreds of tensors; but it puts an array together from copies, so they are not too large.
What comes in is checked against its own size by that format; nothing is ever unpickled. What the
facts say is checked by `schemas`, by whoever receives them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pydantic_core
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from safetensors import SafetensorError
from safetensors.torch import load, save

from certifl.deploy.transport.schemas import (
    CertifyOrder,
    JoinOrder,
    MalformedMessage,
    RoundOrder,
    Trained,
    checked,
)
from certifl.federated.states import ClientState, ModelState, Parts, Update
from certifl.models import fingerprint

FORMAT = 2
"""Raised when a message changes its meaning; both sides must have the same."""

_FACTS, _PART = "certifl", "part:"
_PACKED, _KIND = "tensors-{}", "certifl.safetensors"
_PIECE = 1 << 22
_LONGEST = 1 << 21  # characters of a message's facts
_DEEPEST = 12
_MOST_PARTS, _LONGEST_NAME = 32, 200


@dataclass(frozen=True)
class Content:
    """A message's facts (plain JSON) and parts, some of them perhaps encoded already."""

    facts: dict[str, Any] = field(default_factory=dict)
    parts: Parts = field(default_factory=dict)
    encoded: Mapping[str, ArrayRecord] = field(default_factory=dict)


def encode(parts: Parts) -> dict[str, ArrayRecord]:
    """Parts as they travel, once for many messages (`Content.encoded`)."""
    return {part: _packed(held) for part, held in parts.items()}


def to_records(content: Content) -> RecordDict:
    """A message as Flower carries it."""
    arrays = {**content.encoded, **encode(content.parts)}
    facts = {"format": FORMAT, "parts": list(arrays), "facts": content.facts}
    records = RecordDict({_FACTS: ConfigRecord({"json": json.dumps(facts)})})
    for part, record in arrays.items():
        records[_PART + part] = record
    return records


def from_records(records: RecordDict) -> Content:
    """A message as it was sent; its tensors are taken out of the records.

    Raises:
        MalformedMessage: it is none of ours, or not whole.
    """
    names, facts = _facts_of(records)
    arrays = records.array_records
    parts: Parts = {}
    for part in names:
        record = arrays.get(_PART + part)
        if record is None:
            raise MalformedMessage(f"its part {part!r} is missing")
        parts[part] = _unpacked(part, record)
    return Content(facts, parts)


def _facts_of(records: RecordDict) -> tuple[list[str], dict[str, Any]]:
    """Names of the parts, and the facts, neither larger nor deeper than a message needs."""
    try:
        text = records.config_records[_FACTS]["json"]
        if not isinstance(text, str) or len(text) > _LONGEST:
            raise MalformedMessage(f"its facts are no text of at most {_LONGEST} characters")
        held = pydantic_core.from_json(text)  # bounds depth and the length of numbers
        version, names, facts = held["format"], held["parts"], held["facts"]
    except (KeyError, TypeError, ValueError) as error:
        raise MalformedMessage(f"it holds no facts ({type(error).__name__})") from error
    if version != FORMAT:
        raise MalformedMessage(
            f"it is of format {version!r}, this is format {FORMAT}: install the same version of "
            "certifl on both sides"
        )
    if not (isinstance(facts, dict) and isinstance(names, list)):
        raise MalformedMessage("its facts are no table")
    if len(names) > _MOST_PARTS or len(set(map(str, names))) < len(names):
        raise MalformedMessage(f"it names more than {_MOST_PARTS} parts, or one of them twice")
    if not all(isinstance(name, str) and len(name) <= _LONGEST_NAME for name in names):
        raise MalformedMessage("it names a part by something else than a short text")
    if _deeper(facts, _DEEPEST):
        raise MalformedMessage(f"its facts are nested deeper than {_DEEPEST} levels")
    return names, facts


def _deeper(held: object, levels: int) -> bool:
    """Whether tables and lists lie in each other beyond so many levels."""
    if not isinstance(held, (dict, list)):
        return False
    inner = held.values() if isinstance(held, dict) else held
    return levels == 0 or any(_deeper(value, levels - 1) for value in inner)


Order = JoinOrder | RoundOrder | CertifyOrder
_ORDERS: dict[str, type[Order]] = {
    "join": JoinOrder,
    "round": RoundOrder,
    "certify": CertifyOrder,
}


def order_from(content: Content) -> Order:
    """What the server asks for, as a client may take it.

    Raises:
        MalformedMessage: it is no order, or one that cannot be meant.
    """
    kind = content.facts.get("order")
    schema = _ORDERS.get(kind) if isinstance(kind, str) else None
    if schema is None:
        raise MalformedMessage(f"the order {kind!r} is unknown")
    order = checked(schema, content.facts, f"no order to {kind}")
    if not isinstance(order, JoinOrder) and order.counted >= order.round:
        raise MalformedMessage(
            f"it says that round {order.counted} came before round {order.round}"
        )
    return order


def _packed(held: ModelState) -> ArrayRecord:
    """A part in arrays of whole tensors; at least one, so that an empty part is one too."""
    pieces: list[list[str]] = [[]]
    size = 0
    for name, value in held.items():
        size += value.numel() * value.element_size()
        if pieces[-1] and size > _PIECE:
            pieces.append([])
            size = value.numel() * value.element_size()
        pieces[-1].append(name)
    return ArrayRecord({_PACKED.format(i): _array(held, names) for i, names in enumerate(pieces)})


def _array(held: ModelState, names: list[str]) -> Array:
    content = save({name: held[name].detach().to("cpu").contiguous() for name in names})
    return Array("uint8", (len(content),), _KIND, content)


def _unpacked(part: str, record: ArrayRecord) -> ModelState:
    """The tensors of a part; its arrays are dropped one by one, so one copy is enough."""
    count = len(record)
    tensors: ModelState = {}
    for number in range(count):
        packed = record.pop(_PACKED.format(number), None)
        if packed is None:
            raise MalformedMessage(f"its part {part!r} is none of ours")
        if packed.stype != _KIND:
            raise MalformedMessage(
                f"its part {part!r} is written as {packed.stype!r}, which is unknown here"
            )
        try:
            found = load(packed.data)
        except (KeyError, SafetensorError, TypeError, ValueError) as error:
            raise MalformedMessage(f"its part {part!r} is not whole ({error})") from error
        if tensors.keys() & found.keys():
            raise MalformedMessage(f"its part {part!r} holds a tensor twice")
        tensors |= found
    if not count:
        raise MalformedMessage(f"its part {part!r} is none of ours")
    return tensors


def update_to(update: Update) -> Content:
    """What a client sends after a round."""
    facts = {
        "client": update.client,
        "weight": update.weight,
        "metrics": dict(update.metrics),
        "model": update.model is not None,
    }
    parts: Parts = {f"extra:{part}": held for part, held in update.extra.items()}
    if update.model is not None:
        parts["model"] = update.model
    return Content({"update": facts}, parts)


def update_from(content: Content) -> tuple[Update, ClientState]:
    """What came back from a client; what it keeps stays with it.

    Raises:
        MalformedMessage: it is no update.
    """
    told = checked(Trained, content.facts, "no update").update
    if told.model != ("model" in content.parts):
        raise MalformedMessage(
            "it says that it carries a model and carries none, or the other way round"
        )
    model = content.parts.get("model")
    metrics = told.metrics.model_dump(exclude_none=True)
    extra = {
        part.removeprefix("extra:"): held
        for part, held in content.parts.items()
        if part.startswith("extra:")
    }
    return Update(told.client, told.weight, model, metrics, extra), ClientState()


def fingerprint_of(parts: Parts) -> str:
    """One name for the content of all parts."""
    together = {f"{part}/{name}": v for part, held in parts.items() for name, v in held.items()}
    return fingerprint(together)
