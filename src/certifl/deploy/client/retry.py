"""When a client that is not connected tries again, and what it reports meanwhile.

Flower gives the same answer to an unknown key and to a client that it counts as connected, as it
does for up to a minute after a client was killed. So a refusal is never final: the client waits,
tries again and reports the possible reason, again only after a change or ten minutes.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path

from certifl.runs.atomic import write_text

_FIRST, _LONGEST = 2.0, 30.0
_STILL_COUNTED = 90.0
"""Seconds after which Flower no longer counts a killed client as connected (60, with a margin)."""
_SAY_AGAIN = 600.0
_LASTING = 20.0

_KEY = (
    "node.key must be the private half of clients/client-{client}.pub in the server's folder; "
    "the server's operator can put it there at any time"
)


class Accepted:
    """Whether the server has accepted this folder's key before; stored in a small file.

    Args:
        folder: of the client.
    """

    def __init__(self, folder: Path) -> None:
        self._file, self._key = folder / "flower" / "accepted", folder / "node.key"

    def before(self) -> bool:
        """Whether the current key was accepted before."""
        return self._file.is_file() and self._file.read_text() == self._name()

    def note(self) -> None:
        """Store that the current key was accepted."""
        if not self.before():
            write_text(self._file, self._name())

    def _name(self) -> str:
        content = self._key.read_bytes() if self._key.is_file() else b""
        return hashlib.sha256(content).hexdigest()


class Retry:
    """Waits between attempts: longer from one to the next, as long as none lasts.

    Args:
        server: its address. client: number of the client.
        report: called with a line when something changes.
        clock: seconds; only differences count.
    """

    def __init__(
        self,
        server: str,
        client: int,
        report: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._server, self._client, self._report, self._clock = server, client, report, clock
        self._wait = _FIRST
        self._refused_since: float | None = None
        self._reported_at: dict[str, float] = {}

    def unreachable(self, problem: str) -> float:
        """The server does not answer; how many seconds to wait."""
        self._report_once("Waits for the server", f": {problem}.")
        return self._next_wait()

    def refused(self, accepted_before: bool) -> float:
        """The server does not accept the client; how many seconds to wait."""
        now = self._clock()
        if self._refused_since is None:
            self._refused_since = now
        self._report_once(self._why(accepted_before, now - self._refused_since), " Tries again.")
        return self._next_wait()

    def ended(self, lasted: float) -> float:
        """A connection ended after so many seconds; how many to wait."""
        if lasted >= _LASTING:
            self._wait = _FIRST
            self._reported_at.clear()
        self._report_once("The connection ended; connects again.", "")
        return self._next_wait()

    def connected(self) -> None:
        """The server has accepted the client."""
        self._refused_since = None
        self._report_once("The server has accepted this client.", "")

    def _why(self, accepted_before: bool, refused_for: float) -> str:
        whose = f"The server {self._server}"
        key = _KEY.format(client=self._client)
        if refused_for >= _STILL_COUNTED:
            return (
                f"{whose} has not accepted this client for more than {_STILL_COUNTED:g} seconds: "
                f"it does not know its key, or another client with this key is connected. {key}."
            )
        if accepted_before:
            return (
                f"{whose} does not accept this client yet, as it did before: for about a minute "
                "it counts a client that was killed as connected."
            )
        return (
            f"{whose} does not accept this client: it does not know this client's key, or counts "
            f"it as connected still, as for about a minute after it was killed. {key}."
        )

    def _report_once(self, what: str, more: str) -> None:
        """Report something that was not reported in the last minutes."""
        now, before = self._clock(), self._reported_at.get(what)
        if before is None or now - before >= _SAY_AGAIN:
            self._reported_at[what] = now
            self._report(what + more)

    def _next_wait(self) -> float:
        wait = self._wait
        self._wait = min(2 * wait, _LONGEST)
        return wait
