"""Committed rounds of a training: either whole on disk, or not there.

```
checkpoints/
  round-00006/            the state after six rounds
    server.safetensors    the server's parts
    clients/00003.safetensors   what client 3 keeps (absent: nothing)
    round.json            number, identity, history, size and checksum of every file
  round-00007/
```

A round is written into a temporary folder beside these, flushed, and committed by ONE rename.
(Nothing is flushed before the commit: a round counts when it is whole, or not at all.)
History travels inside the commit, so the two cannot disagree. States that did not change are
carried over as hard links. The last two rounds are kept: if the newest is damaged, training goes
on from the one before. One process writes a folder at a time.

Contents are parts: `{"model": {"conv.weight": tensor}}`, stored under the key `model/conv.weight`.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors.torch import save

from certifl.errors import InputError, StoreError
from certifl.runs.atomic import load_tensors
from certifl.safe_io import TEXT_BYTES, flush, open_regular, parse_json, read_bytes

_FORMAT = 1
_KEPT = 2
_PIECE = 1 << 20
_FLUSHED_TOGETHER = 8
_FILE_NAME = re.compile(r"server\.safetensors|clients/\d{5,9}\.safetensors", re.ASCII)
_log = logging.getLogger(__name__)

ReadableParts = Mapping[str, Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class StoredRound:
    """One committed round, read from disk when asked.

    Attributes:
        path: its folder.
        number: how many rounds are finished; 0 is the state before the first.
        files: size and CRC-32 of every file, by its path within the round.
        identity: the training as it was described when it was stored.
        history: one entry per finished round, in order.
    """

    path: Path
    number: int
    files: dict[str, list[int]]
    identity: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def clients(self) -> list[int]:
        """The clients that keep something."""
        return sorted(int(Path(name).stem) for name in self.files if name.startswith("clients/"))

    def only(self, client: int) -> StoredRound:
        """The same round as far as one client needs it: short enough to be sent to a process."""
        names = ("server.safetensors", _client_file(client))
        files = {name: self.files[name] for name in names if name in self.files}
        return StoredRound(self.path, self.number, files)

    def server(self) -> dict[str, dict[str, torch.Tensor]]:
        """The server's parts."""
        return _unflatten(load_tensors(self.path / "server.safetensors"))

    def client(self, client: int) -> dict[str, dict[str, torch.Tensor]]:
        """The parts client `client` keeps; none if it keeps nothing."""
        name = _client_file(client)
        return _unflatten(load_tensors(self.path / name)) if name in self.files else {}

    def damage(self) -> str | None:
        """What is wrong with the files; None when every size and checksum is right."""
        for name, (size, checksum) in self.files.items():
            try:
                found = [0, 0]
                # A larger file need not be read to be another.
                with open_regular(self.path / name, size) as file:
                    while piece := file.read(_PIECE):
                        found = [found[0] + len(piece), zlib.crc32(piece, found[1])]
            except (OSError, InputError) as error:
                return f"{name} cannot be read ({error})"
            if found != [size, checksum]:
                return f"{name} is not what was written (size or checksum differ)"
        return None


class PendingRound:
    """A round being written; nothing of it is seen by readers before `commit`.

    Use as a context: leaving it without a commit removes what was written.
    """

    def __init__(self, folder: Path, number: int) -> None:
        self._folder = folder
        self._number = number
        self._path = folder / f".round-{number:05d}.tmp"
        self._files: dict[str, list[int]] = {}
        self._unflushed: list[Path] = []

    def __enter__(self) -> PendingRound:
        try:
            if self._path.exists():
                shutil.rmtree(self._path)
            (self._path / "clients").mkdir(parents=True)
        except OSError as error:
            raise _cannot_write(self._path, error) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        shutil.rmtree(self._path, ignore_errors=True)

    def put_client(self, client: int, parts: ReadableParts) -> None:
        """Write what a client keeps; a client that keeps nothing has no file."""
        if any(parts.values()):
            self._write(_client_file(client), save(_flatten(parts)))

    def carry_client(self, client: int, previous: StoredRound) -> None:
        """Take over a client's file of an earlier round: a hard link, or else a copy."""
        self._carry(_client_file(client), previous)

    def carry_all(self, previous: StoredRound) -> None:
        """Take over every file of a round."""
        for name in previous.files:
            self._carry(name, previous)

    def put_server(self, parts: ReadableParts) -> None:
        """Write the server's parts."""
        self._write("server.safetensors", save(_flatten(parts)))

    def commit(self, *, identity: Mapping[str, Any], history: list[dict[str, Any]]) -> StoredRound:
        """Make the round visible, whole, with one rename; then drop all but the last two.

        Raises:
            StoreError: it could not be written; the rounds committed before are unchanged.
        """
        record = {
            "format": _FORMAT,
            "number": self._number,
            "identity": dict(identity),
            "history": history,
            "files": self._files,
        }
        self._write("round.json", _sealed(record))
        del self._files["round.json"]
        final = self._folder / f"round-{self._number:05d}"
        try:
            _flush_all(self._unflushed)
            for folder in (self._path / "clients", self._path):
                flush(folder)
            if final.exists():  # a damaged round that was trained again
                shutil.rmtree(final)
            os.rename(self._path, final)
            flush(self._folder)
        except OSError as error:
            raise _cannot_write(final, error) from error
        _prune(self._folder, self._number)
        return _stored(final, record)

    def _write(self, name: str, content: bytes) -> None:
        try:
            with open(self._path / name, "wb") as file:
                file.write(content)
        except OSError as error:
            raise _cannot_write(self._path / name, error) from error
        self._unflushed.append(self._path / name)
        self._files[name] = [len(content), zlib.crc32(content)]

    def _carry(self, name: str, previous: StoredRound) -> None:
        if name not in previous.files:
            return
        source, target = previous.path / name, self._path / name
        try:
            try:
                os.link(source, target)
            except OSError:  # another file system, or one without hard links
                shutil.copyfile(source, target)
                self._unflushed.append(target)
        except OSError as error:
            raise _cannot_write(target, error) from error
        self._files[name] = previous.files[name]


class Checkpoints:
    """The committed rounds of one training, in one folder."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)

    def latest(self) -> StoredRound | None:
        """The newest undamaged round, None where there is none; damaged ones are warned about."""
        for path in reversed(_rounds(self.folder)):
            stored, damage = _open(path)
            if stored is not None:
                return stored
            _log.warning("Checkpoint %s is damaged and is ignored: %s.", path, damage)
        return None

    def history(self) -> list[dict[str, Any]]:
        """One entry per finished round, as committed with the newest undamaged one."""
        latest = self.latest()
        return [] if latest is None else latest.history

    def begin(self, number: int) -> PendingRound:
        """A round to be written and committed."""
        return PendingRound(self.folder, number)

    def clean(self, newest: int | None = None) -> None:
        """Remove what an interruption left behind; for the one process that writes.

        Args:
            newest: number of the newest undamaged round, so that too old ones go too.
        """
        for path in self.folder.glob(".round-*.tmp"):
            shutil.rmtree(path, ignore_errors=True)
        if newest is not None:
            _prune(self.folder, newest)


def _open(path: Path) -> tuple[StoredRound | None, str | None]:
    try:
        record = _unsealed(read_bytes(path / "round.json", TEXT_BYTES))
        _require_record(record)
    except (OSError, ValueError) as error:
        return None, f"round.json cannot be read ({error})"
    stored = _stored(path, record)
    damage = stored.damage()
    return (stored, None) if damage is None else (None, damage)


def _stored(path: Path, record: Mapping[str, Any]) -> StoredRound:
    return StoredRound(path, *(record[key] for key in ("number", "files", "identity", "history")))


def _sealed(record: Mapping[str, Any]) -> bytes:
    """The record as JSON, with the checksum of its text as the first line."""
    text = json.dumps(record, indent=1, sort_keys=True, allow_nan=False)
    return f'{{"checksum": {zlib.crc32(text.encode())},\n"record": {text}}}\n'.encode()


def _unsealed(content: bytes) -> dict[str, Any]:
    first, _, rest = content.partition(b',\n"record": ')
    text = rest[:-2]
    if first != b'{"checksum": %d' % zlib.crc32(text):
        raise ValueError("it is not what was written")
    record = parse_json(text)
    if not isinstance(record, dict) or record.get("format") != _FORMAT:
        raise ValueError("it was written by another version of certifl")
    return record


def _require_record(record: Mapping[str, Any]) -> None:
    """Refuse a record that certifl cannot have written; its names of files decide what is read."""
    kinds = {"number": int, "identity": dict, "history": list, "files": dict}
    for name, kind in kinds.items():
        if not isinstance(record.get(name), kind):
            raise ValueError(f"{name} is missing or of another type")
    if not all(isinstance(entry, dict) for entry in record["history"]):
        raise ValueError("history holds something else than rounds")
    for name, sealed in record["files"].items():
        if not _FILE_NAME.fullmatch(name):
            raise ValueError(f"{name!r} is not a file of a round")
        if not (isinstance(sealed, list) and len(sealed) == 2 and isinstance(sealed[0], int)):
            raise ValueError(f"{name} has no size and checksum")


def _rounds(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("round-*") if path.name[6:].isdigit())


def _prune(folder: Path, newest: int) -> None:
    for path in _rounds(folder):
        if int(path.name[6:]) <= newest - _KEPT:
            # Renamed first: an interrupted removal must not leave a round that looks damaged.
            doomed = path.with_name(f".{path.name}.tmp")
            try:
                os.rename(path, doomed)
                shutil.rmtree(doomed)
            except OSError as error:
                _log.warning("Cannot remove the old checkpoint %s: %s.", path, error)


def _client_file(client: int) -> str:
    return f"clients/{client:05d}.safetensors"


def _flatten(parts: ReadableParts) -> dict[str, torch.Tensor]:
    """Named tensors that share no memory, which the format demands; copied where they do."""
    flat: dict[str, torch.Tensor] = {}
    taken: set[int] = set()
    for part, tensors in parts.items():
        for name, value in tensors.items():
            plain = value.detach().to("cpu").contiguous()
            address = plain.untyped_storage().data_ptr()
            flat[f"{part}/{name}"] = plain.clone() if address in taken else plain
            taken.add(address)
    return flat


def _unflatten(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        part, _, name = key.partition("/")
        parts.setdefault(part, {})[name] = value
    return parts


def _flush_all(paths: list[Path]) -> None:
    """Flush files together: a disk that is asked for a hundred at once writes them in a few goes.

    One after the other, each waits for the journal; that cost more than the training of a round
    with a hundred participants.
    """
    with ThreadPoolExecutor(_FLUSHED_TOGETHER) as threads:
        for _ in threads.map(flush, paths):  # raises what a thread raised
            pass


def _cannot_write(path: Path, error: OSError) -> StoreError:
    return StoreError(
        f"Cannot write {path}: {error}. Rounds committed before are unchanged; free some space or "
        "choose another folder, then repeat the command to resume from the last one."
    )
