"""What left a client's machine: a line for every answer, written before it is sent.

```
client-N/
  sent.jsonl   time, kind, study, round, the keys of what is said, tensors by part, bytes
```

Values are not repeated: those of tensors are in the client's own states and models.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from certifl.deploy.client.rejected import plain
from certifl.deploy.transport.messages import Content
from certifl.errors import StoreError

SENT = "sent.jsonl"
_ERROR = "error"

Tensors = dict[str, list[Any]]
"""Type and shape by name."""


class Sent:
    """The log in a client's folder; lines are only ever added.

    Args:
        folder: of the client.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / SENT

    def note(self, order: Mapping[str, Any], answer: Content, size: int) -> None:
        """Write down an answer.

        Args:
            order: facts of the order that it answers. answer: what is sent. size: bytes of it.

        Raises:
            StoreError: it cannot be written, so the answer must not leave.
        """
        kind = "fault" if "fault" in answer.facts else str(order.get("order"))
        self._add(
            {
                "kind": kind,
                "study": _study(order),
                "round": order.get("round") if kind in ("round", "certify") else None,
                "says": sorted(_keys(answer.facts)),
                "parts": {part: _tensors(held) for part, held in answer.parts.items()},
                "bytes": size,
            }
        )

    def note_error(self, reason: str) -> None:
        """Write down that only a reason was sent.

        Raises:
            StoreError: it cannot be written.
        """
        facts = {"study": "", "round": None, "says": ["reason"], "parts": {}}
        self._add({"kind": _ERROR, **facts, "bytes": len(reason.encode())})

    def _add(self, entry: dict[str, Any]) -> None:
        line = json.dumps({"time": datetime.now(UTC).isoformat(timespec="seconds"), **entry})
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                os.write(handle, (line + "\n").encode())
                os.fsync(handle)
            finally:
                os.close(handle)
        except OSError as error:
            raise StoreError(
                f"Cannot write {self.path}: {error}. Nothing is sent that is not written down "
                "there: free some space."
            ) from error


def _study(order: Mapping[str, Any]) -> str:
    asked = order.get("study")
    return str(asked.get("id", ""))[:64] if isinstance(asked, dict) else ""


def _keys(facts: Mapping[str, Any], before: str = "") -> Iterator[str]:
    """Keys of tables in tables, joined by dots."""
    for key, value in facts.items():
        if isinstance(value, Mapping) and value:
            yield from _keys(value, f"{before}{key}.")
        else:
            yield f"{before}{key}"


def _tensors(held: Mapping[str, Any]) -> Tensors:
    return {
        name: [str(value.dtype).removeprefix("torch."), list(value.shape)]
        for name, value in held.items()
    }


def sent_lines(folder: Path) -> Iterator[str]:
    """The log for people: when, what, how many bytes, which keys, which tensors.

    Tensors are listed where they differ from those of the message of this kind before.

    Raises:
        StoreError: it cannot be read.
    """
    path, before, found = folder / SENT, dict[str, Any](), False
    for number, line in enumerate(_stored(path), 1):
        found = True
        try:
            entry = json.loads(line)
            yield from _entry_lines(entry, before)
        except (AttributeError, KeyError, TypeError, ValueError):
            yield f"line {number} of {path} is damaged"
    if not found:
        yield f"Nothing has left this machine yet: there is no {path}."


def _stored(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            yield from file
    except FileNotFoundError:
        return
    except OSError as error:
        raise StoreError(f"Cannot read {path}: {error}.") from error


def _entry_lines(entry: dict[str, Any], before: dict[str, Any]) -> Iterator[str]:
    kind, study, number = entry["kind"], entry["study"], entry["round"]
    which = "" if number is None else f" {number}"
    of = f"  study {plain(study[:8])}" if study else ""
    yield f"{entry['time']}  {kind}{which}{of}  {entry['bytes']:,} bytes"
    yield f"    says: {', '.join(entry['says'])}"
    for part, tensors in entry["parts"].items():
        known = (kind, part)
        if before.get(str(known)) == tensors:
            yield f"    {part}: the same {len(tensors)} tensors as before"
            continue
        before[str(known)] = tensors
        shown = (f"{name} {tuple(shape)} {dtype}" for name, (dtype, shape) in tensors.items())
        yield f"    {part}: {'; '.join(shown)}"
