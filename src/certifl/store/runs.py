"""A run folder: one spec, what was computed from it, and by what.

```
spec.toml  run.json  partition.json  history.jsonl  certificates.parquet
checkpoints/training/  checkpoints/certification/  figures/  report.html
```
Every file is whole or absent, so a run can be interrupted at any moment and goes on with what is
there. One process at a time works on a folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from certifl.certification.certificates import Certificates
from certifl.errors import StoreError, StoreMismatch
from certifl.store.atomic import read_json, write_json, write_text

__all__ = ["FINISHED", "RUNNING", "RunFolder"]

RUNNING, FINISHED = "running", "finished"
_MARK = "run.json"


@dataclass(frozen=True)
class RunFolder:
    """Names of everything in a run folder, and how it is opened.

    Attributes:
        path: the folder.
    """

    path: Path

    @property
    def spec(self) -> Path:
        """The spec, every default spelled out."""
        return self.path / "spec.toml"

    @property
    def partition(self) -> Path:
        """Which images each client holds."""
        return self.path / "partition.json"

    @property
    def training(self) -> Path:
        """Checkpoints of the rounds."""
        return self.path / "checkpoints" / "training"

    @property
    def certificates(self) -> Path:
        """All clients' certificates."""
        return self.path / "certificates.parquet"

    @property
    def figures(self) -> Path:
        """Figures and the numbers behind them."""
        return self.path / "figures"

    @property
    def report(self) -> Path:
        """The report page."""
        return self.path / "report.html"

    def votes(self, client: int) -> Path:
        """Votes cast so far on one client's test images."""
        return self.path / "checkpoints" / "certification" / f"client-{client:05d}.safetensors"

    def exists(self) -> bool:
        """Whether a run was begun here."""
        return (self.path / _MARK).is_file()

    def manifest(self) -> dict[str, Any]:
        """What is known of the run: status, hashes, data, machine, versions, times.

        Raises:
            StoreError: this is no run folder, or its manifest is damaged.
        """
        if not self.exists():
            raise StoreError(f"{self.path} is no run folder: it has no {_MARK}.")
        return read_json(self.path / _MARK)

    def update(self, facts: Mapping[str, Any]) -> None:
        """Add facts to the manifest."""
        known = self.manifest() if self.exists() else {}
        write_json(self.path / _MARK, {**known, **facts})

    def finished(self) -> bool:
        """Whether everything was computed."""
        return self.exists() and self.manifest().get("status") == FINISHED

    def begin(self, spec_toml: str, spec_hash: str, overwrite: bool = False) -> None:
        """Open the folder for one spec: new, or to go on with.

        Raises:
            StoreMismatch: the folder holds another study, or files that are no run.
        """
        if overwrite and self.exists():
            shutil.rmtree(self.path)
        if self.exists():
            held = self.manifest().get("spec_hash")
            if held != spec_hash:
                raise StoreMismatch(
                    f"{self.path} holds another study (spec {held}, asked for {spec_hash}). "
                    "Choose another folder with --out, or give --overwrite to replace it."
                )
            return
        strangers = [p.name for p in self.path.iterdir()] if self.path.is_dir() else []
        if any(name not in (".lock", self.spec.name) for name in strangers):
            raise StoreMismatch(
                f"{self.path} holds files that are no run ({strangers[0]}, ...). "
                "Choose an empty or new folder with --out."
            )
        write_text(self.spec, spec_toml)
        self.update({"spec_hash": spec_hash, "status": RUNNING})

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for one process.

        Raises:
            StoreMismatch: another process is at work here.
            StoreError: the folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = (self.path / ".lock").open("w")
        except OSError as error:
            raise StoreError(
                f"Cannot write to {self.path}: {error}. Choose another folder with --out."
            ) from error
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise StoreMismatch(
                    f"Another process is at work in {self.path}. Wait for it, or choose "
                    "another folder with --out."
                ) from None
            yield

    def write_history(self, rounds: Sequence[Mapping[str, Any]]) -> None:
        """One line of JSON per round."""
        lines = [json.dumps(dict(entry), sort_keys=True) for entry in rounds]
        write_text(self.path / "history.jsonl", "".join(line + "\n" for line in lines))

    def load_certificates(self) -> Certificates:
        """All clients' certificates."""
        return Certificates.load(self.certificates)
