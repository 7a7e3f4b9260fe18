"""When a client that is not connected tries again, and what it says meanwhile.

Flower answers alike to a key it does not know and to a client that it counts as connected already;
and a client that was killed is counted as connected for up to a minute. So a refusal is never
final: the client waits and tries again, says what may be the reason, and says it again only where
something has changed or a while has passed.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path

from certifl.runs.atomic import write_text

_FIRST, _LONGEST = 2.0, 30.0
_STILL_COUNTED = 90.0
"""Seconds after which Flower counts nobody as connected that is not (60, with some to spare)."""
_SAY_AGAIN = 600.0
_LASTING = 20.0

_KEY = (
    "node.key must be the private half of clients/client-{client}.pub in the server's folder; "
    "whoever runs the server can put it there at any time"
)


class Accepted:
    """Whether the server has accepted this folder's key before; kept in a small file.

    Args:
        folder: of the client.
    """

    def __init__(self, folder: Path) -> None:
        self._file, self._key = folder / "flower" / "accepted", folder / "node.key"

    def before(self) -> bool:
        """Whether the key that is there now was accepted once."""
        return self._file.is_file() and self._file.read_text() == self._name()

    def note(self) -> None:
        """The key that is there now is accepted."""
        if not self.before():
            write_text(self._file, self._name())

    def _name(self) -> str:
        content = self._key.read_bytes() if self._key.is_file() else b""
        return hashlib.sha256(content).hexdigest()


class Retry:
    """Waits between attempts: longer from one to the next, as long as none lasts.

    Args:
        server: its address. client: number of the client.
        told: called with lines for people.
        clock: seconds; only differences count.
    """

    def __init__(
        self,
        server: str,
        client: int,
        told: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._server, self._client, self._told, self._clock = server, client, told, clock
        self._wait = _FIRST
        self._refused_since: float | None = None
        self._said: dict[str, float] = {}

    def unreachable(self, problem: str) -> float:
        """The server does not answer; how many seconds to wait."""
        self._say("Waits for the server", f": {problem}.")
        return self._longer()

    def refused(self, accepted_before: bool) -> float:
        """The server does not accept the client; how many seconds to wait."""
        now = self._clock()
        if self._refused_since is None:
            self._refused_since = now
        self._say(self._why(accepted_before, now - self._refused_since), " Tries again.")
        return self._longer()

    def ended(self, lasted: float) -> float:
        """A connection ended by itself after so many seconds; how many to wait."""
        if lasted >= _LASTING:
            self._wait = _FIRST
            self._said.clear()
        self._say("The connection ended; connects again.", "")
        return self._longer()

    def connected(self) -> None:
        """The server has accepted the client."""
        self._refused_since = None
        self._say("The server has accepted this client.", "")

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

    def _say(self, what: str, more: str) -> None:
        """Say something that was not said in the last minutes."""
        now, before = self._clock(), self._said.get(what)
        if before is None or now - before >= _SAY_AGAIN:
            self._said[what] = now
            self._told(what + more)

    def _longer(self) -> float:
        wait = self._wait
        self._wait = min(2 * wait, _LONGEST)
        return wait
