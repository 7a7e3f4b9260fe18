"""Log of what left a client's machine: a line for every answer, written before it is sent.

```
client-N/
  sent.jsonl   time, kind, study, round, keys of the fields, tensors by part, bytes
```

Values are not stored: those of tensors are in the client's own states and models.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from certifl.deploy.transport.messages import Content
from certifl.errors import StoreError, one_line

SENT = "sent.jsonl"
_ERROR = "error"

Tensors = dict[str, list[Any]]
"""Type and shape by name."""


class SentLog:
    """The log in a client's folder; lines are only added.

    Args:
        folder: of the client.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / SENT

    def note(self, request: Mapping[str, Any], answer: Content, size: int) -> None:
        """Log an answer.

        Args:
            request: fields of the request. answer: what is sent. size: bytes of it.

        Raises:
            StoreError: it cannot be written, so the answer must not leave.
        """
        kind = "fault" if "fault" in answer.fields else str(request.get("order"))
        self._add(
            {
                "kind": kind,
                "study": _study(request),
                "round": request.get("round") if kind in ("round", "certify") else None,
                "says": sorted(_keys(answer.fields)),
                "parts": {part: _tensors(tensors) for part, tensors in answer.parts.items()},
                "bytes": size,
            }
        )

    def note_error(self, reason: str) -> None:
        """Log that only a reason was sent.

        Raises:
            StoreError: it cannot be written.
        """
        fields = {"study": "", "round": None, "says": ["reason"], "parts": {}}
        self._add({"kind": _ERROR, **fields, "bytes": len(reason.encode())})

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
                f"Cannot write {self.path}: {error}. Nothing is sent that is not logged "
                "there: free some space."
            ) from error


def _study(request: Mapping[str, Any]) -> str:
    study = request.get("study")
    return str(study.get("id", ""))[:64] if isinstance(study, dict) else ""


def _keys(fields: Mapping[str, Any], before: str = "") -> Iterator[str]:
    """Keys of tables in tables, joined by dots."""
    for key, value in fields.items():
        if isinstance(value, Mapping) and value:
            yield from _keys(value, f"{before}{key}.")
        else:
            yield f"{before}{key}"


def _tensors(tensors: Mapping[str, Any]) -> Tensors:
    return {
        name: [str(value.dtype).removeprefix("torch."), list(value.shape)]
        for name, value in tensors.items()
    }


def sent_lines(folder: Path) -> Iterator[str]:
    """The log as text: when, what, how many bytes, which keys, which tensors.

    Tensors are listed where they differ from those of the previous message of this kind.

    Raises:
        StoreError: it cannot be read.
    """
    path, before, any_line = folder / SENT, dict[str, Any](), False
    for number, line in enumerate(_stored(path), 1):
        any_line = True
        try:
            entry = json.loads(line)
            yield from _entry_lines(entry, before)
        except (AttributeError, KeyError, TypeError, ValueError):
            yield f"line {number} of {path} is damaged"
    if not any_line:
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
    of = f"  study {one_line(study[:8])}" if study else ""
    yield f"{entry['time']}  {kind}{which}{of}  {entry['bytes']:,} bytes"
    yield f"    says: {', '.join(entry['says'])}"
    for part, tensors in entry["parts"].items():
        key = (kind, part)
        if before.get(str(key)) == tensors:
            yield f"    {part}: the same {len(tensors)} tensors as before"
            continue
        before[str(key)] = tensors
        shown = (f"{name} {tuple(shape)} {dtype}" for name, (dtype, shape) in tensors.items())
        yield f"    {part}: {'; '.join(shown)}"
