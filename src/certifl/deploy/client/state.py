"""A client's state between rounds, on its own disk.

```
studies/<id>/
  state-00007.safetensors   the client's state after round 7
  state-00008.safetensors   after round 8, which the server may not have counted
  deployed.safetensors      the model for test time
  votes.safetensors  certificates.parquet
  answered.json             which rounds it answered, which model it certified
  study.json  spec.toml     how to use the deployed model: `certifl predict --run`
```

All of it is readable by its owner only.

The server says after which round it last counted the client, and the client resumes from there. So
a round that is requested twice (the server was killed before it committed the answer) gets the
same answer twice.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch

from certifl.deploy.transport.schemas import Rejected
from certifl.errors import StoreError
from certifl.federated.states import ClientState, ModelState, Parts
from certifl.models import fingerprint
from certifl.runs.atomic import (
    load_tensors,
    private_folder,
    read_json,
    save_tensors,
    tensor_metadata,
    write_json,
)

NEVER = -1
"""The round before a client's first."""

_STATE = "state-{:05d}.safetensors"


class ClientStateStore:
    """A client's folder of one study.

    Args:
        root: the folder of all studies.
        study: the study's id, as the server named it.

    Raises:
        StoreError: the id is not valid.
    """

    def __init__(self, root: Path, study: str) -> None:
        if not re.fullmatch(r"[0-9a-f]{8,64}", study):
            raise StoreError(f"{study!r} is not an id of a study.")
        self.folder = root / study

    def begin(self) -> None:
        """Create the private folder.

        Raises:
            StoreError: it cannot be made.
        """
        private_folder(self.folder.parent)
        private_folder(self.folder)

    @property
    def votes(self) -> Path:
        """Votes cast so far on the client's test images."""
        return self.folder / "votes.safetensors"

    @property
    def certificates(self) -> Path:
        """The client's certificates."""
        return self.folder / "certificates.parquet"

    @property
    def deployed(self) -> Path:
        """The model for test time."""
        return self.folder / "deployed.safetensors"

    def state(self, after: int) -> ClientState:
        """The client's state after a round.

        Raises:
            StoreError: it is missing or damaged.
        """
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
        tensors = _flat(state.parts)
        save_tensors(
            self.folder / _STATE.format(after), tensors, {"checksum": fingerprint(tensors)}
        )
        remain = {_STATE.format(after), _STATE.format(counted)}
        for path in self.folder.glob("state-*.safetensors"):
            if path.name not in remain:
                path.unlink(missing_ok=True)

    def deploy(self, model: ModelState) -> None:
        """Write the deployed model."""
        save_tensors(self.deployed, model)


def _flat(parts: Parts) -> dict[str, torch.Tensor]:
    """Tensors by part and name, without shared memory."""
    return {
        f"{part}/{name}": value.detach().to("cpu", copy=True)
        for part, tensors in parts.items()
        for name, value in tensors.items()
    }


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
        """Create the record, or compare it with the requested study.

        Raises:
            Rejected: the id belongs to another study, or the record is damaged.
        """
        if not self._path.exists() and not any(self._path.parent.glob("state-*.safetensors")):
            self._write({})
        self._read()

    def round(self, number: int, *inputs: str) -> None:
        """Record what the answer to a round depends on; refuse a round requested otherwise before.

        Args:
            number: of the round, counted from 0.
            inputs: fingerprints of all that the answer depends on.

        Raises:
            Rejected: it was requested with other inputs before.
            StoreError: the record cannot be written.
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
        """Record which model is certified; refuse another one.

        Raises:
            Rejected: it was another one before. StoreError: the record cannot be written.
        """
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
