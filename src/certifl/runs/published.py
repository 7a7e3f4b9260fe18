"""Finished runs as data to publish: spec, record, history and certificates, without models.

A published run is a run folder without checkpoints and partition, whose run.json says so under
"published". Reports, claims and `verify` read it like any other. Kept are all votes of every image
after the last look taken, so that other bounds can be computed; removed are paths of the machine.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from certifl.certification.certificates import Certificates
from certifl.errors import InputError, StoreMismatch
from certifl.runs.atomic import replacing, write_json, write_text
from certifl.runs.folder import RunFolder, StoredRun
from certifl.safe_io import SPEC_BYTES, read_text

PUBLISHED = "published"
_FORMAT = 1
_PLACEHOLDERS = {"--data-dir": "DATA", "--out": "OUT"}
_LEFT_OUT = ("data_dir", "code")
_PATH = re.compile(r"(?<![\w.:/~-])~?(?:/[\w.+-]+)+/?")
_DIGITS = 3  # of the seconds of an image


def is_published(manifest: Mapping[str, Any]) -> bool:
    """Whether a run.json is that of a published run."""
    return PUBLISHED in manifest


def publish(
    run: StoredRun, into: Path, check: Callable[[Path], None] = lambda _folder: None
) -> bool:
    """Write what of a finished run is published; what is already there is not written again.

    The record is written last: without it the folder is not a run, and the next call completes it.

    Args:
        run: a finished run, or one that was published before.
        into: the folder of the published run; its name should be the hash of the spec.
        check: called with the run's folder before anything is written; raises what it finds.

    Returns:
        Whether anything was written.

    Raises:
        StoreMismatch: the run is not finished, keeps its certificates with its clients, or spent
            privacy, whose ledger is not published; or `into` is another run.
        InputError: a path of the machine would be published.
        StoreError: a file of the run is damaged, or `into` cannot be written.
    """
    run.require_finished()
    if "deployment" in run.manifest or "privacy" in run.manifest or run.manifest.get("plain"):
        raise StoreMismatch(
            f"{run.path} cannot be published: only runs of one machine are, in which every client "
            "has certificates and no privacy was accounted for."
        )
    # Further digits of seconds are noise, and most of the file.
    seconds = np.round(run.certificates.seconds, _DIGITS)
    certificates = dataclasses.replace(run.certificates, seconds=seconds)
    manifest = published_manifest(run.manifest, certificates)
    texts = {
        "spec.toml": read_text(run.folder.spec, SPEC_BYTES),
        "history.jsonl": "".join(json.dumps(e, sort_keys=True) + "\n" for e in run.history),
    }
    _refuse_paths(run.path, {**texts, "run.json": json.dumps(manifest)}, certificates)
    target = RunFolder(into)
    if target.exists():
        target.check(str(run.entry("spec_hash")), False, texts["spec.toml"])
    if _is_there(into, texts, manifest, certificates):
        return False
    check(run.path)
    for name, text in texts.items():
        write_text(into / name, text)
    _save(certificates, target.certificates)
    write_json(into / "run.json", manifest)
    return True


def published_manifest(manifest: Mapping[str, Any], certificates: Certificates) -> dict[str, Any]:
    """The record of a run as it is published: without paths, marked as published."""
    seconds = round(float(certificates.seconds.sum()), 3)
    return {
        **{key: value for key, value in manifest.items() if key not in _LEFT_OUT},
        "command": without_folders(str(manifest.get("command", ""))),
        "certification_seconds": seconds,
        PUBLISHED: {"format": _FORMAT, "left_out": ["models", "partition"]},
    }


def without_folders(command: str) -> str:
    """A command as a reader would give it, without the folders of the machine."""
    words = shlex.split(command)
    for index, word in enumerate(words[:-1]):
        if word in _PLACEHOLDERS:
            words[index + 1] = _PLACEHOLDERS[word]
    return shlex.join(_PATH.sub(lambda found: Path(found.group()).name, word) for word in words)


def _refuse_paths(run: Path, texts: Mapping[str, str], certificates: Certificates) -> None:
    conditions = json.dumps(dict(certificates.conditions), default=str)
    for name, text in {**texts, "certificates.parquet": conditions}.items():
        if found := _PATH.search(text):
            raise InputError(
                f"{run / name} names a folder of this machine ({found.group()}...), which is not "
                "published. Give data sets and networks by name and repeat the run."
            )


def _is_there(
    into: Path, texts: Mapping[str, str], manifest: Mapping[str, Any], certificates: Certificates
) -> bool:
    folder = RunFolder(into)
    if not folder.exists() or folder.manifest() != manifest:
        return False
    files = [into / name for name in texts]
    if not all(file.is_file() for file in (*files, folder.certificates)):
        return False
    if any(read_text(into / name) != text for name, text in texts.items()):
        return False
    stored = folder.load_certificates()
    same = stored.same_results(certificates) and stored.conditions == certificates.conditions
    return same and np.array_equal(stored.seconds, certificates.seconds)


def _save(certificates: Certificates, path: Path) -> None:
    """As `Certificates.save`, packed more tightly."""
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / path.name
        certificates.save(plain)
        table = pq.ParquetFile(plain).read()
    with replacing(path) as part:
        pq.write_table(table, part, compression="zstd", compression_level=19)
