"""What a client stores on its own disk: its state between rounds, what it answered and sent.

```
client-N/
  sent.jsonl                a line for every answer, written before it is sent
studies/<id>/
  state-00007.safetensors   the client's state after round 7
  state-00008.safetensors   after round 8, which the server may not have counted
  deployed.safetensors      the model for test time
  votes.safetensors  certificates.parquet
  answered.json             which rounds it answered, which model it certified
  study.json  spec.toml     how to use the deployed model: `certifl predict --run`
  epsilon.json              privacy of its images that the deployed model spent
```

All of it is readable by its owner only.

The server says after which round it last counted the client, and the client resumes from there. So
a round that is requested twice (the server was killed before it committed the answer) gets the
same answer twice.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from certifl.deploy.messages import Content
from certifl.deploy.schemas import Rejected
from certifl.errors import InputError, StoreError, one_line
from certifl.federated.states import ClientState, Parts
from certifl.models import fingerprint
from certifl.runs.atomic import (
    load_tensors,
    private_folder,
    read_json,
    save_tensors,
    tensor_metadata,
    write_json,
)
from certifl.safe_io import MALFORMED, open_regular, parse_json

NEVER = -1
"""The round before a client's first."""

_STATE = "state-{:05d}.safetensors"


class ClientStateStore:
    """A client's folder of one study.

    Attributes:
        folder: of the study, named by its id (StoreError if that is not valid).
        votes: file of the votes cast so far on its test images.
        certificates, deployed: files of its certificates, and of the model for test time.
    """

    def __init__(self, root: Path, study: str) -> None:
        if not re.fullmatch(r"[0-9a-f]{8,64}", study):
            raise StoreError(f"{study!r} is not an id of a study.")
        self.folder = root / study
        self.votes = self.folder / "votes.safetensors"
        self.certificates = self.folder / "certificates.parquet"
        self.deployed = self.folder / "deployed.safetensors"

    def begin(self) -> None:
        """Create the private folder; StoreError where it cannot be made."""
        private_folder(self.folder.parent)
        private_folder(self.folder)

    def state(self, after: int) -> ClientState:
        """The client's state after a round; StoreError where it is missing or damaged."""
        if after == NEVER:
            return ClientState()
        path = self.folder / _STATE.format(after)
        tensors = load_tensors(path)
        if tensor_metadata(path).get("checksum") != fingerprint(tensors):
            raise StoreError(f"{path} is damaged.")
        parts: Parts = {}
        for key, value in tensors.items():
            part, _, name = key.partition("/")
            parts.setdefault(part, {})[name] = value
        return ClientState(parts)

    def save(self, state: ClientState, after: int, counted: int) -> None:
        """Write the client's state after a round; only this and the last counted one remain."""
        tensors = {  # without shared memory
            f"{part}/{name}": value.detach().to("cpu", copy=True)
            for part, tensors in state.parts.items()
            for name, value in tensors.items()
        }
        path = self.folder / _STATE.format(after)
        save_tensors(path, tensors, {"checksum": fingerprint(tensors)})
        remain = {_STATE.format(after), _STATE.format(counted)}
        for path in self.folder.glob("state-*.safetensors"):
            if path.name not in remain:
                path.unlink(missing_ok=True)


_FILE, _FORMAT = "answered.json", 1
_LOST = "its record of what it answered in this study is lost or damaged: start a new run"


class AnsweredRounds:
    """The record of a study: the request of each round it answered, and the model it certified.

    Otherwise a server could request the same round from many models of its choice, and learn
    something more about the same images from each answer. A request is written down before it is
    worked on, so neither a restart of the client nor a failure resets it. Every access reads the
    file.

    Args:
        folder: the client's folder of the study.
        spec: hash of the study's spec, which belongs to its id from the first request on.
    """

    def __init__(self, folder: Path, spec: str) -> None:
        self._path, self._spec = folder / _FILE, spec

    def begin(self) -> None:
        """Create the record; Rejected if the id is of another study, or the record damaged."""
        if not self._path.exists() and not any(self._path.parent.glob("state-*.safetensors")):
            self._write({})
        self._read()

    def round(self, number: int, *inputs: str) -> None:
        """Record what an answer depends on (fingerprints); refuse a round asked otherwise before.

        Raises:
            Rejected: it was requested with other inputs. StoreError: it cannot be recorded.
        """
        record = self._read()
        digest = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()
        before = record["rounds"].setdefault(str(number), digest)
        if before != digest:
            raise Rejected(
                f"it has answered round {number} of this study before, from another model or with "
                "other states or images: a round is answered once; start a new run"
            )
        self._write(record)

    def deployed(self, model: str) -> None:
        """Record which model is certified; refuse another one (Rejected)."""
        record = self._read()
        if record["deployed"] not in ("", model):
            raise Rejected(
                "it has certified another model of this study before: one deployed model is "
                "certified per study; start a new run"
            )
        self._write({**record, "deployed": model})

    def _read(self) -> dict[str, Any]:
        try:
            record = read_json(self._path)
            rounds, deployed, spec = record["rounds"], record["deployed"], record["spec"]
            whole = record["format"] == _FORMAT and isinstance(rounds, dict)
        except (KeyError, StoreError, TypeError) as error:
            raise Rejected(_LOST) from error
        if not whole or not isinstance(deployed, str):
            raise Rejected(_LOST)
        if spec != self._spec:
            raise Rejected("this study has another spec than when it began: start a new run")
        return record

    def _write(self, record: dict[str, Any]) -> None:
        empty = {"format": _FORMAT, "spec": self._spec, "rounds": {}, "deployed": ""}
        write_json(self._path, {**empty, **record})


# The log of what left the machine: time, kind, study, round, keys of the fields, tensors, bytes.
#
# Values are not stored: those of tensors are in the client's own states and models.


SENT = "sent.jsonl"
_LONGEST_LINE = 1 << 24


class SentLog:
    """The log in a client's folder; lines are only added.

    Args:
        folder: of the client.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / SENT

    def note(self, request: Mapping[str, Any], answer: Content, size: int) -> None:
        """Log an answer of `size` bytes to a request; StoreError where it must not leave."""
        kind = "fault" if "fault" in answer.fields else str(request.get("order"))
        study = request.get("study")
        self._add(
            {
                "kind": kind,
                "study": str(study.get("id", ""))[:64] if isinstance(study, dict) else "",
                "round": request.get("round") if kind in ("round", "certify") else None,
                "says": sorted(_keys(answer.fields)),
                "parts": {
                    part: {
                        name: [str(value.dtype).removeprefix("torch."), list(value.shape)]
                        for name, value in tensors.items()
                    }
                    for part, tensors in answer.parts.items()
                },
                "bytes": size,
            }
        )

    def note_error(self, reason: str) -> None:
        """Log that only a reason was sent; StoreError where it cannot be written."""
        fields = {"study": "", "round": None, "says": ["reason"], "parts": {}}
        self._add({"kind": "error", **fields, "bytes": len(reason.encode())})

    def _add(self, entry: dict[str, Any]) -> None:
        line = json.dumps({"time": datetime.now(UTC).isoformat(timespec="seconds"), **entry})
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with open(self.path, "a+b", opener=_private) as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
                cut_short = file.read(1) not in (b"", b"\n")  # by a full disk
                file.write(f"{chr(10) * cut_short}{line}\n".encode())
                file.flush()  # an error where a part alone is written, unlike os.write
                os.fsync(file.fileno())
        except OSError as error:
            raise StoreError(
                f"Cannot write {self.path}: {error}. Nothing is sent that is not logged "
                "there: free some space."
            ) from error


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _keys(fields: Mapping[str, Any], before: str = "") -> Iterator[str]:
    """Keys of tables in tables, joined by dots."""
    for key, value in fields.items():
        if isinstance(value, Mapping) and value:
            yield from _keys(value, f"{before}{key}.")
        else:
            yield f"{before}{key}"


def sent_lines(folder: Path) -> Iterator[str]:
    """The log as text: when, what, how many bytes, which keys, which tensors where they differ."""
    path, before = folder / SENT, dict[str, Any]()
    if not path.exists():
        yield f"Nothing has left this machine yet: there is no {path}."
        return
    try:
        with open_regular(path) as file:
            for number, line in enumerate(iter(lambda: file.readline(_LONGEST_LINE), b""), 1):
                try:
                    yield from _entry_lines(parse_json(line), before)
                except MALFORMED:
                    yield f"line {number} of {path} is damaged"
    except (InputError, OSError) as error:
        raise StoreError(f"Cannot read {path}: {error}.") from error


def _entry_lines(entry: dict[str, Any], before: dict[str, Any]) -> Iterator[str]:
    kind, study, number = entry["kind"], entry["study"], entry["round"]
    which = "" if number is None else f" {number}"
    of = f"  study {one_line(study[:8])}" if study else ""
    yield f"{entry['time']}  {kind}{which}{of}  {entry['bytes']:,} bytes"
    yield f"    says: {', '.join(entry['says'])}"
    for part, tensors in entry["parts"].items():
        if before.get(f"{kind} {part}") == tensors:
            yield f"    {part}: the same {len(tensors)} tensors as before"
            continue
        before[f"{kind} {part}"] = tensors
        shown = (f"{name} {tuple(shape)} {dtype}" for name, (dtype, shape) in tensors.items())
        yield f"    {part}: {'; '.join(shown)}"
