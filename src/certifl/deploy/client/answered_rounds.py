"""What a client has answered in a study: each round once, and one deployed model.

```
studies/<id>/answered.json   which question each round was, and which model was certified
```

A server could otherwise ask for the same round from many models of its choice, and learn from each
answer something more of the same images. A question is written down before it is worked on, so
neither a restart of the client nor a failure opens it again.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from certifl.deploy.client.rejected import Rejected
from certifl.errors import StoreError
from certifl.runs.atomic import read_json, write_json

_FILE, _FORMAT = "answered.json", 1
_LOST = "its record of what it answered in this study is lost or damaged: begin with a new run"


class Answered:
    """The record of one study; every look reads the file.

    Args:
        folder: the client's folder of the study.
        spec: hash of the study's spec, which its id stands for from the first order on.
    """

    def __init__(self, folder: Path, spec: str) -> None:
        self._path, self._spec = folder / _FILE, spec

    def begin(self) -> None:
        """Open the record, or compare it with the study that is asked for.

        Raises:
            Rejected: the id stands for another study, or the record cannot be trusted.
        """
        if not self._path.exists() and not any(self._path.parent.glob("state-*.safetensors")):
            self._write({})
        self._read()

    def round(self, number: int, *question: str) -> None:
        """Write down what a round is asked with, unless it is what it was asked with before.

        Args:
            number: of the round, counted from 0.
            question: names of all that the answer follows from.

        Raises:
            Rejected: it was asked with something else before.
            StoreError: it cannot be written down.
        """
        held = self._read()
        asked = hashlib.sha256(json.dumps(question).encode()).hexdigest()
        before = held["rounds"].setdefault(str(number), asked)
        if before != asked:
            raise Rejected(
                f"it has answered round {number} of this study before, from another model or with "
                "other states or images: a round is answered once; begin with a new run"
            )
        self._write(held)

    def deployed(self, model: str) -> None:
        """Write down which model is certified.

        Raises:
            Rejected: it was another one before. StoreError: it cannot be written down.
        """
        held = self._read()
        if held["deployed"] not in ("", model):
            raise Rejected(
                "it has certified another model of this study before: one deployed model is "
                "certified per study; begin with a new run"
            )
        self._write({**held, "deployed": model})

    def _read(self) -> dict[str, Any]:
        try:
            held = read_json(self._path)
            rounds, deployed, spec = held["rounds"], held["deployed"], held["spec"]
            whole = held["format"] == _FORMAT and isinstance(rounds, dict)
        except (KeyError, StoreError, TypeError) as error:
            raise Rejected(_LOST) from error
        if not whole or not isinstance(deployed, str):
            raise Rejected(_LOST)
        if spec != self._spec:
            raise Rejected("this study has another spec than when it began: begin with a new run")
        return held

    def _write(self, held: dict[str, Any]) -> None:
        empty = {"format": _FORMAT, "spec": self._spec, "rounds": {}, "deployed": ""}
        write_json(self._path, {**empty, **held})
