"""Every error certifl raises on purpose.

```
CertiflError
├── RequestError            the request was wrong; the command line exits with 2
│   ├── SpecError           a key, type, range or combination in a study's spec
│   ├── InputError          images, labels or numbers given to a library call (also a ValueError)
│   ├── ModelError          a model that cannot be certified or trained as it is
│   ├── DataUnavailable     a data set that is neither here nor reachable
│   └── StoreMismatch       a run folder that holds something else than what was asked for
└── WorkError               the work failed; the command line exits with 1
    ├── TrainingDiverged    a client's loss or weights stopped being finite
    ├── VerificationFailed  a stored certificate does not follow from its votes
    ├── RandomSourceBroken  draws that do not repeat, do not differ or do not follow their law
    └── StoreError          a folder that cannot be read or written
```

A message says what is wrong, why, and what to do. Abstaining is a result, never an error.
"""

from __future__ import annotations

__all__ = [
    "CertiflError",
    "DataUnavailable",
    "InputError",
    "ModelError",
    "RandomSourceBroken",
    "RequestError",
    "SpecError",
    "StoreError",
    "StoreMismatch",
    "TrainingDiverged",
    "VerificationFailed",
    "WorkError",
]


class CertiflError(Exception):
    """Root of all errors certifl raises on purpose."""


class RequestError(CertiflError):
    """The request was wrong; nothing was written."""


class SpecError(RequestError):
    """A spec has a wrong key, type, range or combination."""


class InputError(RequestError, ValueError):
    """Images, labels or numbers given to a library call are not usable."""


class ModelError(RequestError):
    """A model cannot be certified or trained as it is."""


class DataUnavailable(RequestError):
    """A data set is neither on this machine nor reachable."""


class StoreMismatch(RequestError):
    """A run folder holds something else than what was asked for."""


class WorkError(CertiflError):
    """The work failed although the request was sound."""


class TrainingDiverged(WorkError):
    """A client's loss or weights stopped being finite.

    Attributes:
        client: the client whose training diverged.
        round: the communication round, counted from 0.
    """

    def __init__(self, client: int, round: int, reason: str) -> None:
        self.client = client
        self.round = round
        super().__init__(
            f"Training diverged at client {client} in round {round}: {reason}. "
            "Lower training.lr or training.momentum; rounds finished so far are kept."
        )


class VerificationFailed(WorkError):
    """A stored certificate does not follow from its votes."""


class RandomSourceBroken(WorkError):
    """The self-test of the random source failed: certificates from its votes would not hold."""


class StoreError(WorkError):
    """A folder cannot be read or written."""
