"""Every error certifl raises on purpose.

```
CertiflError
├── RequestError            the request was wrong; the command line exits with 2
│   ├── InputError          images, labels or numbers given to a library call (also a ValueError)
│   │   └── SpecError       a key, type, range or combination in a study's spec
│   ├── ModelError          a model that cannot be certified or trained as it is
│   ├── DataUnavailable     a data set that is neither here nor reachable
│   └── StoreMismatch       a run folder that holds something else than what was asked for
└── WorkError               the work failed; the command line exits with 1
    ├── TrainingDiverged    a loss, a client's weights or the server's stopped being finite
    ├── TooFewClients       so many clients of a round failed that it cannot continue
    ├── RandomSourceBroken  draws that do not repeat, do not differ or do not follow their law
    └── StoreError          a folder that cannot be read or written
```

A message says what is wrong, why, and what to do. Abstaining is a result, never an error.
`UnusualValue` is a warning: the value is allowed, and most likely not what was meant.
"""

from __future__ import annotations

from collections.abc import Mapping

_SHOWN = 5


def one_line(text: object, most: int = 300) -> str:
    """Text of somebody else, safe to print and to log: one line, no control characters, short.

    Escape sequences could rewrite what a terminal shows, line breaks could forge lines of a log.

    Args:
        text: from a client, a file or a network.
        most: characters after which it is cut.
    """
    shown = str(text)[: 8 * most]  # enough to fill a line, however many of them are dropped
    kept = "".join(c if c.isprintable() else " " for c in shown)
    line = " ".join(kept.split())
    return line if len(line) <= most else f"{line[: most - 3]}..."


class UnusualValue(UserWarning):
    """A value that is allowed but hardly meant, such as an angle in degrees read as radians."""


class CertiflError(Exception):
    """Root of all errors certifl raises on purpose."""


class RequestError(CertiflError):
    """The request was wrong; nothing was written."""


class InputError(RequestError, ValueError):
    """Images, labels or numbers given to a library call are not usable.

    As a ValueError, it is what pydantic expects of a validator.
    """


class SpecError(InputError):
    """A spec has a wrong key, type, range or combination."""


class ModelError(RequestError):
    """A model cannot be certified or trained as it is."""


class DataUnavailable(RequestError):
    """A data set is neither on this machine nor reachable."""


class StoreMismatch(RequestError):
    """A run folder holds something else than what was asked for."""


class WorkError(CertiflError):
    """The work failed although the request was sound."""


class TrainingDiverged(WorkError):
    """A loss, a client's weights or the server's stopped being finite.

    Attributes:
        client: the client whose training diverged; None = the server's combination did.
        round: the communication round, counted from 0.
        reason: what is not finite.
    """

    def __init__(self, client: int | None, round: int, reason: str) -> None:
        self.client = client
        self.round = round
        self.reason = reason
        where = "the server" if client is None else f"client {client}"
        super().__init__(
            f"Training diverged at {where} in round {round}: {reason}. "
            "Lower training.lr or training.momentum; rounds finished so far are saved."
        )


class TooFewClients(WorkError):
    """So many clients of a round failed that it cannot continue.

    Attributes:
        round: the communication round, counted from 0.
        left_out: why each client that failed was left out.
    """

    def __init__(
        self, round: int, left_out: Mapping[int, str], participants: int, needed: int, advice: str
    ) -> None:
        self.round = round
        self.left_out = dict(left_out)
        shown = [f"client {client} ({why})" for client, why in list(left_out.items())[:_SHOWN]]
        more = len(left_out) - len(shown)
        failed = "; ".join([*shown, f"and {more} more"] if more else shown)
        super().__init__(
            f"Round {round} cannot be finished: {len(left_out)} of its {participants} clients "
            f"failed and at least {needed} must remain. Left out: {failed}. {advice} Rounds "
            "finished so far are saved; the same command resumes from the last one."
        )


class RandomSourceBroken(WorkError):
    """The self-test of the random source failed: certificates from its votes would not hold."""


class StoreError(WorkError):
    """A folder cannot be read or written."""


def first_line(error: BaseException) -> str:
    """The first line of what an error says, to stand inside a sentence."""
    return str(error).strip().partition("\n")[0].rstrip(".") or "no further message"
