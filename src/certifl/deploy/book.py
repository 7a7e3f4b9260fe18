"""A party's own ledger of privacy: a file beside its studies, one line for every private answer.

```
client-N/
  privacy-ledger.jsonl   a checksum, then an answer per line
```

It is written whole, flushed and renamed before an answer leaves, so a kill can leave an answer
counted that nobody has got, and never one uncounted. It holds for all studies together: the images
are the same.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from certifl.errors import InputError, StoreError
from certifl.federated.privacy import Pass, Release
from certifl.outside import parse_json, read_text
from certifl.store.atomic import write_text

__all__ = ["LEDGER", "Book", "Entry"]

LEDGER = "privacy-ledger.jsonl"
_LOCK = ".privacy-ledger.lock"
_FORMAT = 1


@dataclass(frozen=True)
class Entry:
    """One answer.

    Attributes:
        study: its id. name: of the study, for people. round: counted from 0.
        delta: of the study. time: when it was first given, UTC.
        release: what it let go of.
    """

    study: str
    name: str
    round: int
    delta: float
    time: str
    release: Release


class Book:
    """The ledger in a party's folder.

    Every look reads the file: nothing else is believed. One process writes at a time.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LEDGER

    def entries(self) -> list[Entry]:
        """All answers so far; none where there is no file.

        Raises:
            StoreError: it cannot be read, or is not what was written.
        """
        try:
            content = read_text(self.path)
        except FileNotFoundError:
            return []
        except (OSError, InputError) as error:
            raise self._damaged(str(error)) from error
        seal, _, lines = content.partition("\n")
        if seal != _seal(lines):
            raise self._damaged("its checksum is another")
        try:
            return [_entry(parse_json(line)) for line in lines.splitlines()]
        except (KeyError, TypeError, ValueError) as error:
            raise self._damaged(f"a line is none of ours ({type(error).__name__})") from error

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Within this context no other process writes.

        Raises:
            StoreError: the folder cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle = self.path.with_name(_LOCK).open("a")
        except OSError as error:
            raise StoreError(f"{self.path} cannot be written: {error}.") from error
        with handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def write(self, entries: list[Entry]) -> None:
        """Put these in place of what is there, durably.

        Raises:
            StoreError: it cannot be written; what was there is as it was.
        """
        lines = "".join(json.dumps(asdict(entry), sort_keys=True) + "\n" for entry in entries)
        write_text(self.path, f"{_seal(lines)}\n{lines}")

    def _damaged(self, why: str) -> StoreError:
        return StoreError(
            f"{self.path} cannot be trusted: {why}. It says how much of its images' privacy this "
            "party has spent; put back the newest copy of it, and let no study train before that."
        )


def _seal(lines: str) -> str:
    digest = hashlib.sha256(lines.encode()).hexdigest()
    return json.dumps({"format": _FORMAT, "sha256": digest})


def _entry(held: dict[str, Any]) -> Entry:
    told = held.pop("release")
    passes = tuple(Pass(**one) for one in told.pop("passes"))
    return Entry(**held, release=Release(**told, passes=passes))
