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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from certifl.certification.certificates import Certificates, Predictions
from certifl.errors import InputError, StoreError, StoreMismatch
from certifl.path_checks import check_run
from certifl.runs.atomic import read_json, write_json, write_text
from certifl.safe_io import MALFORMED, SPEC_BYTES, is_temporary, parse_json, parse_toml, read_text

RUNNING, FINISHED = "running", "finished"
_MARK, _LOCK = "run.json", ".lock"
_MOST = 100_000  # pixels of a side, channels, classes
_MOST_KEYS = 6


class _Entry:
    """The path of a file or folder of a run folder, as an attribute of the `RunFolder`."""

    def __init__(self, *parts: str) -> None:
        self._parts = parts

    def __get__(self, folder: RunFolder, _owner: object) -> Path:
        return folder.path.joinpath(*self._parts)


@dataclass(frozen=True)
class RunFolder:
    """Names of everything in a run folder, and how it is opened.

    Reading raises a StoreError where a file is missing or damaged, writing where the folder cannot
    be written or the disk is full.

    Attributes:
        path: the folder.
    """

    path: Path

    spec = _Entry("spec.toml")  # every default spelled out
    partition = _Entry("partition.json")  # which images each client holds
    initial = _Entry("initial.safetensors")  # the weights that training began with, if of a file
    training = _Entry("checkpoints", "training")  # checkpoints of the rounds
    history = _Entry("history.jsonl")  # a round on each line; written when training is finished
    certificates = _Entry("certificates.parquet")  # of all clients
    curves = _Entry("curves.json")  # only of clients that keep their certificates to themselves
    predictions = _Entry("predictions.parquet")  # plain ones, of clients that certify nothing
    attack = _Entry("attack.json")  # results of attacks on the certificates, if any were tried
    explorer = _Entry("explorer.json")  # a few test images deformed, with votes; may be absent
    figures = _Entry("figures")  # with the numbers behind them
    report = _Entry("report.html")

    def votes(self, client: int) -> Path:
        """Votes cast so far on one client's test images."""
        return self.path / "checkpoints" / "certification" / f"client-{client:05d}.safetensors"

    def shared(self, client: int) -> Path:
        """What a client of a federation shared of its certification; absent until it finished.

        The name of the file is that of older versions, whose folders stay readable.
        """
        return self.votes(client).with_name(f"told-{client:05d}.json")

    def exists(self) -> bool:
        """Whether a run was begun here."""
        return (self.path / _MARK).is_file()

    def manifest(self) -> dict[str, Any]:
        """The record of the run: status, hashes, data, machine, versions, times."""
        if not self.exists():
            raise StoreError(f"{self.path} is not a run folder: it has no {_MARK}.")
        try:
            stored = read_json(self.path / _MARK)
        except StoreError as error:
            raise damaged_manifest(self.path, str(error.__cause__)) from error
        if not isinstance(stored, dict):
            raise damaged_manifest(self.path, "it is not a JSON object")
        return stored

    def update(self, entries: Mapping[str, Any]) -> dict[str, Any]:
        """Add entries to the manifest, which is returned."""
        manifest = {**(self.manifest() if self.exists() else {}), **entries}
        write_json(self.path / _MARK, manifest)
        return manifest

    def finished(self) -> bool:
        """Whether everything was computed."""
        return self.exists() and self.manifest().get("status") == FINISHED

    def complete(self) -> bool:
        """Whether everything was computed and the certificates can still be read."""
        return StoredRun(self.path).complete()

    def check(self, spec_hash: str, overwrite: bool = False, spec_toml: str = "") -> None:
        """Refuse the folder if it is not free for one spec; nothing is written.

        Args:
            spec_hash: of the spec.
            overwrite: whether a run that is there may be replaced.
            spec_toml: the spec as text; with it a refusal names the keys that differ.

        Raises:
            StoreMismatch: the folder holds another study, or files that are not a run.
        """
        if self.exists() and not overwrite:
            stored = self.manifest().get("spec_hash")
            if stored != spec_hash:
                raise StoreMismatch(
                    f"{self.path} holds another study (spec {stored}, requested {spec_hash})"
                    f"{self._differing(spec_toml)}. "
                    "Choose another folder with --out, or give --overwrite to replace it."
                )
        if self.exists() or not self.path.is_dir():
            return
        entries = sorted(p.name for p in self.path.iterdir())
        own = (_LOCK, self.spec.name)
        foreign = [name for name in entries if name not in own and not is_temporary(name)]
        if foreign:
            raise StoreMismatch(
                f"{self.path} holds files that do not belong to a run ({foreign[0]}, ...). "
                "Choose an empty or new folder with --out."
            )

    def _differing(self, spec_toml: str) -> str:
        """Which keys of the stored spec have other values in this one, in words."""
        try:
            stored, asked = (
                flat(parse_toml(text)) for text in (read_text(self.spec, SPEC_BYTES), spec_toml)
            )
        except (OSError, InputError):
            return ""  # a damaged spec is reported where it is read

        def shown(values: Mapping[str, Any], key: str) -> str:
            return json.dumps(values[key], default=str) if key in values else "not set"

        keys = [key for key in {**stored, **asked} if stored.get(key) != asked.get(key)]
        words = [
            f"{key} is {shown(stored, key)} there and {shown(asked, key)} here"
            for key in keys
            if key != "name"  # which changes no result
        ]
        if len(words) > _MOST_KEYS:
            words[_MOST_KEYS:] = [f"and {len(words) - _MOST_KEYS} more"]
        return f": {'; '.join(words)}" if words and spec_toml else ""

    def begin(self, spec_toml: str, spec_hash: str, overwrite: bool = False) -> None:
        """Open the folder for one spec, new or to go on with; only while it is `locked`.

        Raises:
            StoreMismatch: the folder holds another study, or files that are not a run.
            StoreError: the folder cannot be written.
        """
        self.check(spec_hash, overwrite, spec_toml)
        if overwrite and self.exists():
            self._clear()
        self.clean()
        try:
            stored = read_text(self.spec, SPEC_BYTES)
        except (OSError, InputError):  # missing, or damaged: it is known what it must be
            stored = None
        if stored != spec_toml:
            write_text(self.spec, spec_toml)
        if not self.exists() or overwrite:
            write_json(self.path / _MARK, {"spec_hash": spec_hash, "status": RUNNING})

    def temporary_files(self) -> list[Path]:
        """Files that were being written when a process was killed."""
        folders = (self.path, self.figures, self.training.parent, self.votes(0).parent)
        existing = [folder for folder in folders if folder.is_dir() and not folder.is_symlink()]
        found = (path for folder in existing for path in folder.iterdir())
        temporary = (path for path in found if is_temporary(path.name))
        return [path for path in temporary if path.is_symlink() or not path.is_dir()]

    def clean(self) -> None:
        """Remove what a killed process left behind; only while it is `locked`."""
        for path in self.temporary_files():
            path.unlink(missing_ok=True)

    def _clear(self) -> None:
        """Remove all but lock and manifest; killed half-way, it leaves an unfinished run."""
        try:
            manifest = self.manifest()
        except StoreError:
            manifest = {}
        write_json(self.path / _MARK, {**manifest, "status": RUNNING})
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
            StoreMismatch: another process is using it, or this is a file.
            StoreError: the folder cannot be written.
        """
        for folder in (self.path, *self.path.parents):
            if folder.exists() and not folder.is_dir():
                raise StoreMismatch(f"{folder} is a file. Choose a folder with --out.")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # A link or a pipe in the place of the file is not followed.
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            handle = os.fdopen(os.open(self.path / _LOCK, flags, 0o666), "w")
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
                    f"Another process is using {self.path}. Wait for it, or choose "
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
                '(`share = "rows"`); `certifl report` shows what was shared.'
            )
        try:
            return Certificates.load(self.certificates)
        except (InputError, OSError) as error:
            raise StoreError(
                f"{error} Repeat the command that made the run: its votes are saved."
            ) from error

    def load_predictions(self) -> Predictions:
        """Plain predictions of the clients that certify nothing."""
        try:
            return Predictions.load(self.predictions)
        except InputError as error:
            raise StoreError(f"{error} Repeat the command that made the run.") from error

    def save(self, rows: Certificates | Predictions) -> None:
        """Write all clients' certificates, or the plain predictions."""
        path, advice = self.certificates, "All votes are saved: free"
        if isinstance(rows, Predictions):
            path, advice = self.predictions, "Free"
        try:
            rows.save(path)
        except OSError as error:
            raise StoreError(
                f"Cannot write {path}: {error}. {advice} some space, then repeat the command."
            ) from error


class StoredRun:
    """The results in a run folder, each file read once, when it is first asked for.

    Whatever is asked for raises a StoreError where its file is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        """Open a run folder; nothing is read yet."""
        self.path = path
        self.folder = RunFolder(path)

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """The record of the run, run.json."""
        return self.folder.manifest()

    def entry(self, name: str) -> Any:
        """One entry of the manifest."""
        if name not in self.manifest:
            raise damaged_manifest(self.path, f"it has no {name!r}")
        return self.manifest[name]

    @cached_property
    def data(self) -> dict[str, Any]:
        """Name, fingerprint, shape and classes of the images."""
        data = self.entry("data")
        try:
            size, names = data["image_size"], data["class_names"]
            numbers = [data["in_channels"], data["num_classes"], *size]
            valid = len(size) == 2 and len(names) == data["num_classes"]
            valid = valid and all(isinstance(n, int) and 0 < n <= _MOST for n in numbers)
            valid = valid and all(isinstance(data[n], str) for n in ("name", "fingerprint"))
        except MALFORMED:
            valid = False
        if not valid:
            raise damaged_manifest(self.path, "it does not say what the images are")
        return data

    @cached_property
    def certificates(self) -> Certificates:
        """All clients' certificates; see `RunFolder.load_certificates`."""
        return self.folder.load_certificates()

    @cached_property
    def predictions(self) -> Predictions | None:
        """Plain predictions of the clients that certify nothing; None where all certify."""
        return self.folder.load_predictions() if self.manifest.get("plain") else None

    @cached_property
    def history(self) -> list[dict[str, Any]]:
        """One entry per communication round; none where nothing was trained here."""
        path = self.folder.history
        if not path.is_file():
            return []
        try:
            lines = read_text(path).splitlines()
        except (OSError, InputError) as error:
            raise StoreError(f"{path} cannot be read: {error}.") from error
        entries = []
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                entry = parse_json(line)
                if not isinstance(entry, dict):
                    raise InputError("it is not a JSON object")
            except InputError as error:
                raise StoreError(f"{path}, line {number} is damaged: {error}.") from error
            entries.append(entry)
        return entries

    @cached_property
    def curves(self) -> dict[int, dict[str, Any]] | None:
        """By client the curve it shared, where clients kept their certificates; else None."""
        path = self.folder.curves
        if not path.is_file():
            return None
        try:
            clients = read_json(path)["clients"]
            return {int(client): dict(curve) for client, curve in clients.items()}
        except MALFORMED as error:
            raise StoreError(f"{path} is damaged: {error!r}.") from error

    @property
    def curves_only(self) -> bool:
        """Whether the clients shared no certificates, but curves at most."""
        return self.folder.curves.is_file() and not self.folder.certificates.is_file()

    def require_finished(self) -> None:
        """Refuse a run in which something is still to be computed.

        Raises:
            StoreMismatch: it is not a run, or not finished. StoreError: its manifest is damaged.
        """
        check_run(self.path)
        status = self.entry("status")
        if status != FINISHED:
            command = self.manifest.get("command") or "certifl run"
            raise StoreMismatch(
                f"The run in {self.path} is not finished (status: {status}). Repeat `{command}`, "
                "which resumes it."
            )

    def complete(self) -> bool:
        """Whether everything was computed and the certificates can still be read."""
        if not self.folder.exists() or self.manifest.get("status") != FINISHED:
            return False
        try:
            if "deployment" in self.manifest and self.folder.curves.is_file():
                return bool(read_json(self.folder.curves))
            return (self.predictions is None or len(self.predictions) > 0) and (
                len(self.certificates) > 0
            )
        except (StoreError, StoreMismatch):
            return False


@contextlib.contextmanager
def locked_for(page: Path) -> Iterator[None]:
    """Lock the run folder that a page is written into; nothing where that is no run folder.

    Raises:
        StoreMismatch: another process is using the run folder.
    """
    folder = RunFolder(page.parent)
    with folder.locked() if folder.exists() else contextlib.nullcontext():
        yield


def require_own_folder(path: Path, runs: Sequence[str], others: Sequence[str]) -> None:
    """Refuse a folder that holds anything but some runs and what is made of them.

    Args:
        runs: names of the run folders in it.
        others: what is written beside them, once there are runs.

    Raises:
        StoreMismatch: it is a file, or holds something else.
    """
    if not path.exists():
        return
    if not path.is_dir():
        raise StoreMismatch(f"{path} is a file. Choose a folder with --out.")
    begun = any(RunFolder(path / name).exists() for name in runs)
    known = {*runs, *(others if begun else ())}
    names = sorted(entry.name for entry in path.iterdir() if not is_temporary(entry.name))
    foreign = [name for name in names if name not in known]
    if foreign:
        raise StoreMismatch(
            f"{path} holds something else ({foreign[0]}, ...). Choose an empty or new folder "
            "with --out."
        )


def damaged_manifest(path: Path, why: str) -> StoreError:
    """The error for a run.json that cannot be used."""
    return StoreError(
        f"{path / _MARK} is damaged ({why}). The command that computed the run makes "
        "it again with --overwrite, or elsewhere with --out."
    )


def flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Nested tables as dotted keys: {"data": {"name": "digits"}} is {"data.name": "digits"}."""
    keys: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{before}{key}"
        keys |= flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return keys
