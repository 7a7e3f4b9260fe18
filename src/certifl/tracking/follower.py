"""One tracker kept level with a run: what it was told is noted, what is missing is told.

```
<run>/tracking/<tracker>/certifl.json    the tracker's own name of the run, rounds told, certified
<run>/tracking/<tracker>/...             the tracker's files, unless the user named a server
```
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from certifl.errors import StoreError
from certifl.runs.atomic import read_json, write_json
from certifl.tracking.base import Tracker, TrackerFactory

_NOTE = "certifl.json"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Told:
    """What a tracker was told before.

    Attributes:
        run: the tracker's own name of the run; None before its first start.
        rounds: how many rounds. certified: whether it knows the certificates.
    """

    run: str | None = None
    rounds: int = 0
    certified: bool = False


class Follower:
    """Keeps one tracker level with one run; never raises because of the tracker.

    A round is noted as told right after the tracker took it. A kill between the two repeats that
    one round at the next start, with the same step and the same values. After a failure the
    tracker is left alone until the next start, which tells it what it missed.
    """

    def __init__(self, name: str, make: TrackerFactory, folder: Path) -> None:
        self._name = name
        self._make = make
        self._folder = folder
        self._told = _Told()
        self._tracker: Tracker | None = None
        self._failed = False

    @property
    def complete(self) -> bool:
        """Whether the tracker knows everything: all rounds and the certificates."""
        return self._told.certified

    def begin(self, spec: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """Open the tracker, or go on with what it holds; nothing if it knows everything."""

        def opened() -> None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._told = self._noted()
            if self.complete:
                return
            tracker = self._make(self._folder)
            run = tracker.begin(spec, facts, self._told.run, self._told.rounds)
            self._tracker = tracker
            self._note(replace(self._told, run=run))

        self._safely(opened)

    def rounds(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Tell the rounds that the tracker does not know yet, in order."""
        for entry in history:
            if entry["round"] >= self._told.rounds:
                self._safely(lambda entry=entry: self._tell_round(entry))

    def certified(self, summary: Mapping[str, Any]) -> None:
        """Tell what the certificates came to, once."""
        if not self.complete:
            self._safely(lambda: self._tell_certified(summary))

    def finish(self) -> None:
        """Close the tracker; what it does not know yet is told at the next start."""
        tracker = self._tracker
        if tracker is not None:
            self._safely(lambda: tracker.finish(self.complete))
            self._tracker = None

    def _tell_round(self, entry: Mapping[str, Any]) -> None:
        if self._tracker is not None:
            self._tracker.round(entry)
            self._note(replace(self._told, rounds=entry["round"] + 1))

    def _tell_certified(self, summary: Mapping[str, Any]) -> None:
        if self._tracker is not None:
            self._tracker.certified(summary)
            self._note(replace(self._told, certified=True))

    def _noted(self) -> _Told:
        path = self._folder / _NOTE
        if not path.is_file():
            return _Told()
        held = read_json(path)
        try:
            return _Told(**held)
        except TypeError as error:
            raise StoreError(
                f"{path} is damaged ({error}). Delete {self._folder} to track the run from its "
                "beginning."
            ) from error

    def _note(self, told: _Told) -> None:
        write_json(self._folder / _NOTE, asdict(told))
        self._told = told

    def _safely(self, action: Callable[[], None]) -> None:
        """Whatever a tracker's library raises: the run matters more than its tracker."""
        if self._failed:
            return
        try:
            action()
        except Exception as error:
            self._failed = True
            _log.warning(
                "Tracking with %s stopped: %s: %s. The run goes on and keeps everything; the "
                "same command tells the tracker later what it missed.",
                self._name,
                type(error).__name__,
                error,
            )
