"""Options and helpers that commands share."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from certifl.errors import InputError, first_line
from certifl.path_checks import read_spec_file
from certifl.safe_io import visible

if TYPE_CHECKING:
    from certifl.report import RunResults
    from certifl.runs.folder import StoredRun
    from certifl.spec import Spec

_SAFE_PATH = "PYTHONSAFEPATH"
_LONGEST_REASON = 200

Out = Annotated[
    Path | None, typer.Option("--out", help="Folder for the results; default: runs/<spec>-<hash>.")
]
DataDir = Annotated[
    Path | None,
    typer.Option(
        help="Folder with data sets, <dir>/<name>/...; default: $CERTIFL_DATA, or the folder that "
        "a finished run recorded."
    ),
]
Device = Annotated[str, typer.Option(help='"auto", "cpu" or one GPU, "cuda:1".')]
Devices = Annotated[
    str, typer.Option("--device", help='"auto", "cpu", "cuda:1", or several: "cuda:0,cuda:1".')
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing run.")]
OverwriteFile = Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the spec; repeatable."),
]
PlanOnly = Annotated[
    bool, typer.Option("--plan", help="Only list the runs and estimate their time.")
]
Track = Annotated[
    list[str] | None,
    typer.Option(help="Log to tensorboard, mlflow or wandb, offline; repeatable."),
]
Workers = Annotated[
    int, typer.Option(min=0, help="Worker processes that train clients, one thread each.")
]
AnswerWithin = Annotated[
    float | None,
    typer.Option(
        metavar="SECONDS",
        help="Timeout after which a client is left out of a round; needs --workers.",
    ),
]
RunDir = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
Sigma = Annotated[
    str | None, typer.Option(help="Noise level in the unit of the family: 0.3, 0.1pi, 18deg.")
]
Code = Annotated[
    Path | None,
    typer.Option(
        "--code",
        metavar="DIR",
        help="Folder with the code of the run's own network, which you must trust.",
    ),
]


def say(text: str, err: bool = False) -> None:
    """Print a line; control characters of names in it are escaped."""
    typer.echo(visible(text), err=err)


def unexpected(error: Exception) -> str:
    """One line about a bug in certifl; the traceback goes into a file."""
    reason = f"{type(error).__name__}: {first_line(error)}"[:_LONGEST_REASON]
    log = "".join(traceback.format_exception(error))
    try:
        handle, path = tempfile.mkstemp(prefix="certifl-", suffix=".log")
        with open(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{command_line()}\n\n{log}")
    except OSError as failed:
        return f"an unexpected error ({reason}); its log cannot be written: {failed}."
    return (
        f"an unexpected error ({reason}). Finished files are whole. Please report it "
        f"with the log {path}."
    )


@contextlib.contextmanager
def safe_path() -> Iterator[None]:
    """Keep the working directory off the import path of every Python process started meanwhile.

    It may be a folder that somebody sent, with a `multiprocessing.py` of its own.
    """
    before = os.environ.get(_SAFE_PATH)
    os.environ[_SAFE_PATH] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(_SAFE_PATH, None)
        else:
            os.environ[_SAFE_PATH] = before


def load_study(spec: Path, settings: list[str] | None) -> Spec:
    """The study in a spec file, whose own network is then importable.

    A wrong path is refused before anything heavy is imported.
    """
    values = read_spec_file(spec)
    from certifl.spec import with_settings

    study = with_settings(values, settings or [])
    from certifl.models import allow_code  # imports torch, which a wrong spec need not wait for

    allow_code(study.model.name, spec.parent, Path.cwd())
    return study


def run_folder(spec: Path, study: Spec, out: Path | None) -> Path:
    """Where a study's results go: where the user says, or runs/<spec>-<hash>."""
    return out or Path("runs") / f"{spec.stem}-{study.hash()[:8]}"


def whole(value: str | int) -> int:
    """An integer, also written as 10_000 or 1e4.

    Raises:
        typer.BadParameter: it is not one.
    """
    try:
        return int(value)
    except ValueError:
        pass
    with contextlib.suppress(ValueError):
        number = float(value)
        if number.is_integer():
            return int(number)
    raise typer.BadParameter(f"{value!r} is not a valid integer.")


def positive(value: str | int) -> int:
    """An integer of at least 1.

    Raises:
        typer.BadParameter: it is not one.
    """
    number = whole(value)
    if number < 1:
        raise typer.BadParameter(f"{number} is not at least 1.")
    return number


def inches(value: str) -> tuple[float, float]:
    """Width and height, written as 3.3x2.2.

    Raises:
        InputError: it is not of this form.
    """
    with contextlib.suppress(ValueError):
        width, height = map(float, value.lower().replace("×", "x").split("x"))
        return width, height
    raise InputError(f"--size is a width and a height in inches, such as 3.3x2.2; got {value!r}.")


@contextlib.contextmanager
def interruptible(overwrite: bool = False) -> Iterator[None]:
    """On Ctrl-C, say that nothing is lost and how to resume."""
    try:
        yield
    except KeyboardInterrupt:
        same = "the same command without --overwrite" if overwrite else "the same command"
        say(f"\nInterrupted. Finished work is saved; {same} resumes it.", err=True)
        raise typer.Exit(130) from None


def labeled(run: Path | StoredRun, label: str) -> RunResults:
    """A finished run under another name."""
    from certifl.report import load_run

    found = load_run(run)
    return replace(found, label=label, manifest={**found.manifest, "label": label})


def command_line() -> str:
    """This command as it was called, for a run's record."""
    return shlex.join(["certifl", *sys.argv[1:]])
