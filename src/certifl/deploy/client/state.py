"""What a client keeps between rounds, on its own disk.

```
studies/<id>/
  state-00007.safetensors   what the client keeps after round 7
  state-00008.safetensors   after round 8, of which it does not know whether the server counted it
  deployed.safetensors      the model that it uses at test time
  votes.safetensors  certificates.parquet
  answered.json             which rounds it answered, and which model it certified
  study.json  spec.toml     what the deployed model is used with: `certifl predict --run`
```

All of it is readable by its owner alone.

The server says after which round it counted the client last, and the client goes on from there. So
a round that the server asks for twice (it was killed before it committed the answer) gives the
same answer twice.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from certifl.errors import StoreError
from certifl.federated.states import ClientState, ModelState, Parts
from certifl.models import fingerprint
from certifl.runs.atomic import load_tensors, save_tensors, tensor_metadata

NEVER = -1
"""Stands for the round before a client's first."""

_STATE = "state-{:05d}.safetensors"


@contextlib.contextmanager
def owner_only() -> Iterator[None]:
    """What this process creates meanwhile is readable and writable by its owner alone.

    That holds from the moment a file appears, also for files that libraries and processes started
    meanwhile write, and for those that are written beside their place first.
    """
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def private_folder(folder: Path) -> None:
    """Make a folder for its owner alone, also one that others could read until now.

    Raises:
        StoreError: it cannot be made, or belongs to somebody else.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if folder.stat().st_mode & 0o077:
            folder.chmod(0o700)
    except OSError as error:
        raise StoreError(
            f"{folder} cannot be made readable by its owner alone: {error}. It must belong to the "
            "user that starts the client."
        ) from error


class ClientStateStore:
    """A client's folder of one study.

    Args:
        root: the folder of all studies.
        study: the study's id, as the server named it.

    Raises:
        StoreError: the id is no plain name.
    """

    def __init__(self, root: Path, study: str) -> None:
        if not re.fullmatch(r"[0-9a-f]{8,64}", study):
            raise StoreError(f"{study!r} is no id of a study.")
        self.folder = root / study

    def begin(self) -> None:
        """Make the folder, for its owner alone.

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
        """The model that the client uses at test time."""
        return self.folder / "deployed.safetensors"

    def state(self, after: int) -> ClientState:
        """What the client kept after a round.

        Raises:
            StoreError: it is no longer there, or damaged.
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

    def keep(self, state: ClientState, after: int, counted: int) -> None:
        """Write what the client keeps after a round; only this and what was counted remain."""
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
    """Tensors by part and name, none sharing memory with another."""
    return {
        f"{part}/{name}": value.detach().to("cpu", copy=True)
        for part, held in parts.items()
        for name, value in held.items()
    }
