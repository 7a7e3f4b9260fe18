"""What travels between the server and the clients, as Flower's records.

A message is a few facts (`ConfigRecord`, one JSON text) and named parts of tensors
(`ArrayRecord`s). The tensors of a part travel in arrays of some megabytes, each in the safetensors
format: Flower moves every array with requests of its own, several times on each way, and a network
has hundreds of tensors; but it puts an array together from copies, so they are not too large.
What comes in is checked against its own size by that format; nothing is ever unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from safetensors import SafetensorError
from safetensors.torch import load, save

from certifl.errors import WorkError
from certifl.federated.states import ClientState, ModelState, Parts, Update
from certifl.models import fingerprint

__all__ = [
    "FORMAT",
    "Content",
    "Garbled",
    "encode",
    "fingerprint_of",
    "from_records",
    "to_records",
    "update_from",
    "update_to",
]

FORMAT = 2
"""Raised when a message changes its meaning; both sides must have the same."""

_FACTS, _PART = "certifl", "part:"
_PACKED, _KIND = "tensors-{}", "certifl.safetensors"
_PIECE = 1 << 22


class Garbled(WorkError):
    """A message that is none of ours, or damaged."""


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
        Garbled: it is none of ours, or not whole.
    """
    try:
        held = json.loads(str(records.config_records[_FACTS]["json"]))
        version, names, facts = held["format"], held["parts"], held["facts"]
    except (KeyError, TypeError, ValueError) as error:
        raise Garbled(f"it holds no facts ({type(error).__name__})") from error
    if version != FORMAT:
        raise Garbled(
            f"it is of format {version!r}, this is format {FORMAT}: install the same version of "
            "certifl on both sides"
        )
    if not (isinstance(facts, dict) and isinstance(names, list)):
        raise Garbled("its facts are no table")
    arrays = records.array_records
    parts: Parts = {}
    for part in names:
        record = arrays.get(_PART + str(part))
        if record is None:
            raise Garbled(f"its part {part!r} is missing")
        parts[str(part)] = _unpacked(str(part), record)
    return Content(facts, parts)


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
            raise Garbled(f"its part {part!r} is none of ours")
        if packed.stype != _KIND:
            raise Garbled(
                f"its part {part!r} is written as {packed.stype!r}, which is unknown here"
            )
        try:
            found = load(packed.data)
        except (KeyError, SafetensorError, TypeError, ValueError) as error:
            raise Garbled(f"its part {part!r} is not whole ({error})") from error
        if tensors.keys() & found.keys():
            raise Garbled(f"its part {part!r} holds a tensor twice")
        tensors |= found
    if not count:
        raise Garbled(f"its part {part!r} is none of ours")
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
        Garbled: it is no update.
    """
    try:
        facts: Mapping[str, Any] = content.facts["update"]
        model: ModelState | None = content.parts["model"] if facts["model"] else None
        metrics = {str(name): value for name, value in facts["metrics"].items()}
        client, weight = facts["client"], facts["weight"]
    except (AttributeError, KeyError, TypeError) as error:
        raise Garbled(f"it is no update ({type(error).__name__})") from error
    extra = {
        part.removeprefix("extra:"): held
        for part, held in content.parts.items()
        if part.startswith("extra:")
    }
    return Update(client, weight, model, metrics, extra), ClientState()


def fingerprint_of(parts: Parts) -> str:
    """One name for the content of all parts."""
    together = {f"{part}/{name}": v for part, held in parts.items() for name, v in held.items()}
    return fingerprint(together)
