"""Paths that a request names, checked before anything heavy is imported.

A wrong path is the most frequent mistake of all, and nobody should wait seconds for its message:
this module and `safe_io` need the standard library alone.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from certifl.errors import DataUnavailable, InputError, SpecError, StoreMismatch
from certifl.safe_io import SPEC_BYTES, parse_toml, read_text

IMAGE, WEIGHTS = "is no image file at", "are no weights at"
SHARD = "is no file of certificates at"
CONNECTION = "connection.toml"
CLIENT_STUDY = "study.json"
"""Marks the folder of a study on a client's own machine."""
_MARK = "run.json"
REPORT_ENDINGS, CLAIMS_ENDINGS = (".html", ".htm"), (".json", ".md")
_UNQUOTED = re.compile(
    r"[=,\[]\s*(?P<amount>[+-]?[\d.][\d.eE+-]*[ \t]*(?:\*?[ \t]*(?:pi|π)|deg|°))"
)


def is_run(path: Path) -> bool:
    """Whether a path is a run folder, finished or not."""
    return (path / _MARK).is_file()


def check_run(path: Path) -> None:
    """Refuse a path that is not a run folder (StoreMismatch)."""
    if not is_run(path):
        raise StoreMismatch(
            f"{path} is not a run folder: it has no {_MARK}. Give the folder that `certifl run` "
            "wrote."
        )


def check_model_folder(path: Path) -> None:
    """Refuse what is neither a run folder nor a client's folder of a study (StoreMismatch)."""
    if not (path / CLIENT_STUDY).is_file():
        check_run(path)


def check_study(path: Path) -> None:
    """Refuse a path with no run in it, nor in the folders of a study (StoreMismatch)."""
    patterns = (_MARK, f"runs/*/{_MARK}", f"*/{_MARK}")
    if not any(True for pattern in patterns for _ in path.glob(pattern)):
        raise StoreMismatch(
            f"{path} holds no run: there is no {_MARK} in it, and no run in its folders. "
            "Give run folders, or the folder of a study that was computed."
        )


def check_file(path: Path, what: str) -> None:
    """Refuse a path without a file (InputError); `what` says what should lie there."""
    if not path.is_file():
        raise InputError(f"There {what} {path}. Check the path.")


def check_certificate_file(out: Path, overwrite: bool) -> None:
    """Refuse a file that certificates cannot be written to (InputError, StoreMismatch)."""
    check_ending(out, "A table of certificates", ".parquet", ".tsv")
    if out.exists() and not overwrite:
        raise StoreMismatch(f"{out} exists already; give --overwrite to replace it.")


def check_ending(path: Path, what: str, *endings: str) -> None:
    """Refuse a file to write that has none of these endings (InputError); `what` it would be."""
    if path.suffix.lower() not in endings or path.is_dir():
        known = " or ".join(endings)
        raise InputError(f"{what} must be a {known} file; got {str(path)!r}.")


def check_data_folder(folder: Path | None, variable: str = "CERTIFL_DATA") -> None:
    """Refuse a folder of data sets that does not exist (DataUnavailable)."""
    if folder is not None and not folder.expanduser().is_dir():
        raise DataUnavailable(
            f"The data folder {folder} does not exist. Correct --data-dir or {variable}."
        )


def check_deploy_folder(folder: Path) -> None:
    """Refuse a folder that is not of a federation (SpecError)."""
    if not (folder / CONNECTION).is_file():
        raise SpecError(
            f"{folder} is not a folder of a federation: it has no {CONNECTION}. Give a folder "
            "that `certifl deploy init` wrote."
        )


def check_client_settings(path: Path) -> None:
    """Refuse a client's folder without its settings (SpecError)."""
    if not path.exists():
        raise SpecError(
            f"There is no {path}. It is written by `certifl deploy init`; give the folder of "
            "this client, as in `certifl deploy client FOLDER`."
        )


def read_spec_file(path: Path) -> dict[str, Any]:
    """The plain values of a spec file (SpecError)."""
    text = ""
    try:
        text = read_text(path, SPEC_BYTES)
        return parse_toml(text)
    except FileNotFoundError:
        raise SpecError(
            f"There is no spec at {path}. Correct the path, or write one: README.md and the "
            "folder examples show how."
        ) from None
    except (OSError, InputError) as error:
        if path.is_dir():
            raise SpecError(f"{path} is a folder. Name the .toml file of the study.") from None
        advice = quotes_missing(text)
        raise SpecError(f"{path} cannot be read as a spec (TOML): {error}.{advice}") from error


def quotes_missing(toml: str) -> str:
    """What to do about an amount without quotes in a text that is not TOML; "" if there is none.

    >>> quotes_missing("sigma = 18deg")
    ' Write 18deg in quotes: "18deg".'
    """
    found = _UNQUOTED.search(toml)
    return "" if found is None else f' Write {found["amount"]} in quotes: "{found["amount"]}".'
