"""One tracker that follows one run: what was logged is recorded, and only the rest is logged.

```
<run>/tracking/<tracker>/certifl.json    the tracker's name of the run, rounds logged, certified
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

_RECORD = "certifl.json"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Logged:
    """What was logged to a tracker so far.

    Attributes:
        run: the tracker's name of the run; None before its first start.
        rounds: number of rounds logged.
        certified: whether the certificates were logged.
    """

    run: str | None = None
    rounds: int = 0
    certified: bool = False


class Follower:
    """Log one run to one tracker; never raises because of the tracker.

    A round is recorded as logged right after the tracker accepted it. A kill between the two
    repeats that one round at the next start, with the same step and the same values. After a
    failure the tracker is not used until the next start, which logs what is missing.
    """

    def __init__(self, name: str, make: TrackerFactory, folder: Path) -> None:
        self._name = name
        self._make = make
        self._folder = folder
        self._logged = _Logged()
        self._tracker: Tracker | None = None
        self._failed = False

    @property
    def complete(self) -> bool:
        """Whether everything was logged: all rounds and the certificates."""
        return self._logged.certified

    def begin(self, spec: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
        """Open the tracker, or resume its run; nothing if everything was logged."""

        def opened() -> None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._logged = self._stored()
            if self.complete:
                return
            tracker = self._make(self._folder)
            run = tracker.begin(spec, metadata, self._logged.run, self._logged.rounds)
            self._tracker = tracker
            self._store(replace(self._logged, run=run))

        self._safely(opened)

    def rounds(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Log the rounds that were not logged yet, in order."""
        for entry in history:
            if entry["round"] >= self._logged.rounds:
                self._safely(lambda entry=entry: self._log_round(entry))

    def certified(self, summary: Mapping[str, Any]) -> None:
        """Log a summary of the certificates, once."""
        if not self.complete:
            self._safely(lambda: self._log_certified(summary))

    def finish(self) -> None:
        """Close the tracker; what is missing is logged at the next start."""
        tracker = self._tracker
        if tracker is not None:
            self._safely(lambda: tracker.finish(self.complete))
            self._tracker = None

    def _log_round(self, entry: Mapping[str, Any]) -> None:
        if self._tracker is not None:
            self._tracker.round(entry)
            self._store(replace(self._logged, rounds=entry["round"] + 1))

    def _log_certified(self, summary: Mapping[str, Any]) -> None:
        if self._tracker is not None:
            self._tracker.certified(summary)
            self._store(replace(self._logged, certified=True))

    def _stored(self) -> _Logged:
        path = self._folder / _RECORD
        if not path.is_file():
            return _Logged()
        stored = read_json(path)
        try:
            return _Logged(**stored)
        except TypeError as error:
            raise StoreError(
                f"{path} is damaged ({error}). Delete {self._folder} to track the run from its "
                "beginning."
            ) from error

    def _store(self, logged: _Logged) -> None:
        write_json(self._folder / _RECORD, asdict(logged))
        self._logged = logged

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
                "same command later logs what is missing.",
                self._name,
                type(error).__name__,
                error,
            )
