"""A run folder: one spec, what was computed from it, and by what.

```
spec.toml  run.json  partition.json  history.jsonl  certificates.parquet  predictions.parquet
checkpoints/training/  checkpoints/certification/  attack.json  explorer.json  figures/
report.html
```
Every file is whole or absent, so a run can be interrupted at any moment and goes on with what is
there. One process at a time works on a folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from certifl.certification.certificates import Certificates, Predictions
from certifl.errors import InputError, StoreError, StoreMismatch
from certifl.runs.atomic import read_json, write_json, write_text
from certifl.safe_io import MALFORMED, SPEC_BYTES, read_text

RUNNING, FINISHED = "running", "finished"
_MARK, _LOCK = "run.json", ".lock"
_MOST = 100_000  # pixels of a side, channels, classes
_MOST_KEYS = 6


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
    def history(self) -> Path:
        """What every round came to, one line of JSON each; written when training is finished."""
        return self.path / "history.jsonl"

    @property
    def certificates(self) -> Path:
        """All clients' certificates."""
        return self.path / "certificates.parquet"

    @property
    def curves(self) -> Path:
        """Curves of clients that keep their certificates to themselves; else absent."""
        return self.path / "curves.json"

    @property
    def predictions(self) -> Path:
        """Plain predictions of the clients that certify nothing; absent where all certify."""
        return self.path / "predictions.parquet"

    @property
    def attack(self) -> Path:
        """What attacks on the certificates came to; absent where none were tried."""
        return self.path / "attack.json"

    @property
    def explorer(self) -> Path:
        """A few test images on the way through the deformations, with votes; may be absent."""
        return self.path / "explorer.json"

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
        try:
            held = read_json(self.path / _MARK)
        except StoreError as error:
            raise _damaged(self.path, str(error.__cause__)) from error
        if not isinstance(held, dict):
            raise _damaged(self.path, "it is no JSON object")
        return held

    def fact(self, name: str) -> Any:
        """One fact of the manifest.

        Raises:
            StoreError: the manifest is damaged or does not hold it.
        """
        held = self.manifest()
        if name not in held:
            raise _damaged(self.path, f"it does not say {name!r}")
        return held[name]

    def data(self) -> dict[str, Any]:
        """What the manifest says about the images: name, fingerprint, shape and classes.

        Raises:
            StoreError: the manifest is damaged or does not hold it.
        """
        held = self.fact("data")
        try:
            size, names = held["image_size"], held["class_names"]
            numbers = [held["in_channels"], held["num_classes"], *size]
            right = len(size) == 2 and len(names) == held["num_classes"]
            right = right and all(isinstance(n, int) and 0 < n <= _MOST for n in numbers)
            right = right and all(isinstance(held[n], str) for n in ("name", "fingerprint"))
        except MALFORMED:
            right = False
        if not right:
            raise _damaged(self.path, "it does not say what the images are")
        return held

    def update(self, facts: Mapping[str, Any]) -> None:
        """Add facts to the manifest."""
        known = self.manifest() if self.exists() else {}
        write_json(self.path / _MARK, {**known, **facts})

    def finished(self) -> bool:
        """Whether everything was computed."""
        return self.exists() and self.manifest().get("status") == FINISHED

    def told_nothing(self) -> bool:
        """Whether this was a federation whose clients told nothing of their certificates."""
        if not self.curves.is_file():
            return False
        return not read_json(self.curves)["clients"]

    def complete(self) -> bool:
        """Whether everything was computed and the certificates can still be read."""
        if not self.finished():
            return False
        try:
            if "deployment" in self.manifest() and self.curves.is_file():
                return bool(read_json(self.curves))
            if self.manifest().get("plain"):
                self.load_predictions()
            return len(self.load_certificates()) > 0
        except (StoreError, StoreMismatch):
            return False

    def check(self, spec_hash: str, overwrite: bool = False, spec_toml: str = "") -> None:
        """Refuse the folder if it is not free for one spec; nothing is written.

        Args:
            spec_hash: of the spec.
            overwrite: whether a run that is there may be replaced.
            spec_toml: the spec as text; with it a refusal names the keys that differ.

        Raises:
            StoreMismatch: the folder holds another study, or files that are no run.
        """
        if self.exists() and not overwrite:
            held = self.manifest().get("spec_hash")
            if held != spec_hash:
                raise StoreMismatch(
                    f"{self.path} holds another study (spec {held}, asked for {spec_hash})"
                    f"{self._differing(spec_toml)}. "
                    "Choose another folder with --out, or give --overwrite to replace it."
                )
        if self.exists() or not self.path.is_dir():
            return
        entries = sorted(p.name for p in self.path.iterdir())
        strangers = [n for n in entries if n not in (_LOCK, self.spec.name) and not _left_over(n)]
        if strangers:
            raise StoreMismatch(
                f"{self.path} holds files that are no run ({strangers[0]}, ...). "
                "Choose an empty or new folder with --out."
            )

    def _differing(self, spec_toml: str) -> str:
        """Which keys of the stored spec have other values in this one, in words."""
        if not spec_toml:
            return ""
        try:
            stored, asked = (
                _flat(tomllib.loads(text)) for text in (self.spec.read_text(), spec_toml)
            )
        except (OSError, ValueError):
            return ""  # a damaged spec is reported where it is read
        differing = [key for key in {**stored, **asked} if stored.get(key) != asked.get(key)]
        keys = [key for key in differing if key != "name"]  # a name changes no result
        if not keys:
            return ""
        shown = [
            f"{key} is {_value(stored, key)} there and {_value(asked, key)} here"
            for key in keys[:_MOST_KEYS]
        ]
        more = len(keys) - _MOST_KEYS
        return ": " + "; ".join([*shown, *([f"and {more} more"] if more > 0 else [])])

    def begin(self, spec_toml: str, spec_hash: str, overwrite: bool = False) -> None:
        """Open the folder for one spec, new or to go on with; only while it is `locked`.

        Raises:
            StoreMismatch: the folder holds another study, or files that are no run.
            StoreError: the folder cannot be written.
        """
        self.check(spec_hash, overwrite, spec_toml)
        if overwrite and self.exists():
            self._clear()
        self.clean()
        if self._stored_spec() != spec_toml:  # missing, or damaged: it is known what it must be
            write_text(self.spec, spec_toml)
        if not self.exists() or overwrite:
            write_json(self.path / _MARK, {"spec_hash": spec_hash, "status": RUNNING})

    def _stored_spec(self) -> str | None:
        try:
            return read_text(self.spec, SPEC_BYTES)
        except (OSError, InputError):
            return None

    def left_over(self) -> list[Path]:
        """Files that were being written when a process was killed."""
        places = (self.path, self.figures, self.training.parent, self.votes(0).parent)
        there = [place for place in places if place.is_dir() and not place.is_symlink()]
        found = (path for place in there for path in place.iterdir() if _left_over(path.name))
        return [path for path in found if path.is_symlink() or not path.is_dir()]

    def clean(self) -> None:
        """Remove what a killed process left behind; only while it is `locked`."""
        for path in self.left_over():
            path.unlink(missing_ok=True)

    def _clear(self) -> None:
        """Remove all but lock and manifest; killed half-way, it leaves an unfinished run."""
        try:
            held = self.manifest()
        except StoreError:
            held = {}
        write_json(self.path / _MARK, {**held, "status": RUNNING})
        try:
            for entry in self.path.iterdir():
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                elif entry.name not in (_MARK, _LOCK):
                    entry.unlink()
        except OSError as error:
            raise StoreError(f"Cannot replace the run in {self.path}: {error}.") from error

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for one process.

        Raises:
            StoreMismatch: another process is at work here, or this is a file.
            StoreError: the folder cannot be written.
        """
        for place in (self.path, *self.path.parents):
            if place.exists() and not place.is_dir():
                raise StoreMismatch(f"{place} is a file. Choose a folder with --out.")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = _opened_lock(self.path / _LOCK)
        except OSError as error:
            raise StoreError(
                f"Cannot write to {self.path}: {error}. Make it writable; commands that compute a "
                "run also take another folder with --out."
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
        write_text(self.history, "".join(line + "\n" for line in lines))

    def load_certificates(self) -> Certificates:
        """All clients' certificates.

        Raises:
            StoreMismatch: the clients kept theirs. StoreError: there are none, or the file is
                damaged.
        """
        if self.curves.is_file() and not self.certificates.is_file():
            raise StoreMismatch(
                f"{self.path} holds no certificates: its clients certified on their own machines "
                "and kept them. This can be done where they are, or with clients that share rows "
                '(`share = "rows"`); `certifl report` shows what was told.'
            )
        try:
            return Certificates.load(self.certificates)
        except (InputError, OSError) as error:
            raise StoreError(
                f"{error} Repeat the command that made the run: its votes are kept."
            ) from error

    def load_predictions(self) -> Predictions:
        """Plain predictions of the clients that certify nothing.

        Raises:
            StoreError: there are none, or the file is damaged.
        """
        try:
            return Predictions.load(self.predictions)
        except InputError as error:
            raise StoreError(f"{error} Repeat the command that made the run.") from error

    def save_predictions(self, predictions: Predictions) -> None:
        """Write the plain predictions.

        Raises:
            StoreError: the folder cannot be written, or the disk is full.
        """
        try:
            predictions.save(self.predictions)
        except OSError as error:
            raise StoreError(
                f"Cannot write {self.predictions}: {error}. Free some space, then repeat the "
                "command."
            ) from error

    def save_certificates(self, certificates: Certificates) -> None:
        """Write all clients' certificates.

        Raises:
            StoreError: the folder cannot be written, or the disk is full.
        """
        try:
            certificates.save(self.certificates)
        except OSError as error:
            raise StoreError(
                f"Cannot write {self.certificates}: {error}. All votes are kept: free some "
                "space, then repeat the command."
            ) from error


def _opened_lock(path: Path) -> TextIO:
    """The file that is locked, made if need be; a link or a pipe in its place is not followed."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    return os.fdopen(os.open(path, flags, 0o666), "w")


@contextlib.contextmanager
def locked_for(page: Path) -> Iterator[None]:
    """Lock the run folder that a page is written into; nothing where that is no run folder.

    Raises:
        StoreMismatch: another process is at work in the run folder.
    """
    folder = RunFolder(page.parent)
    with folder.locked() if folder.exists() else contextlib.nullcontext():
        yield


def require_own_folder(place: Path, runs: Sequence[str], others: Sequence[str]) -> None:
    """Refuse a folder that holds something else than some runs and what is made of them.

    Args:
        place: where runs and their page are written.
        runs: names of the run folders in it.
        others: what is written beside them, once there are runs.

    Raises:
        StoreMismatch: it is a file, or holds something else.
    """
    if not place.exists():
        return
    if not place.is_dir():
        raise StoreMismatch(f"{place} is a file. Choose a folder with --out.")
    begun = any(RunFolder(place / name).exists() for name in runs)
    known = {*runs, *(others if begun else ())}
    names = sorted(path.name for path in place.iterdir() if not _left_over(path.name))
    strangers = [name for name in names if name not in known]
    if strangers:
        raise StoreMismatch(
            f"{place} holds something else ({strangers[0]}, ...). Choose an empty or new folder "
            "with --out."
        )


def _left_over(name: str) -> bool:
    """Whether a file was being written when the process was killed."""
    return name.startswith(".") and name.endswith(".tmp")


def _damaged(path: Path, why: str) -> StoreError:
    return StoreError(
        f"{path / _MARK} is damaged ({why}). The command that computed the run makes "
        "it again with --overwrite, or elsewhere with --out."
    )


def _flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Tables in tables as keys such as training.lr."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        inner = value if isinstance(value, Mapping) else None
        found.update({before + key: value} if inner is None else _flat(inner, f"{before}{key}."))
    return found


def _value(values: Mapping[str, Any], key: str) -> str:
    return json.dumps(values[key], default=str) if key in values else "not set"
