"""What commands share: options, Ctrl-C, how a command was called."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from certifl.path_checks import read_spec_file
from certifl.safe_io import visible

if TYPE_CHECKING:
    from certifl.spec import Spec

_SAFE_PATH = "PYTHONSAFEPATH"
_LONGEST_REASON = 200

Out = Annotated[
    Path | None,
    typer.Option("--out", help="Folder for the results; default: runs/<name>-<hash>."),
]
DataDir = Annotated[
    Path | None,
    typer.Option(
        help="Folder with data sets, <dir>/<name>/...; also the variable CERTIFL_DATA. A finished "
        "run remembers its own."
    ),
]
Device = Annotated[str, typer.Option(help='"auto", "cpu" or one GPU, "cuda:1".')]
Devices = Annotated[
    str, typer.Option("--device", help='"auto", "cpu", "cuda:1", or several: "cuda:0,cuda:1".')
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a run that is there.")]
OverwriteFile = Annotated[
    bool, typer.Option("--overwrite", help="Replace the file that is there.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one key of the spec; repeatable."),
]
Track = Annotated[
    list[str] | None,
    typer.Option(help="Follow with tensorboard, mlflow or wandb, offline; repeatable."),
]
Workers = Annotated[
    int, typer.Option(min=0, help="Processes that train clients beside this one, a thread each.")
]
AnswerWithin = Annotated[
    float | None,
    typer.Option(metavar="SECONDS", help="Leave out clients that take longer; needs --workers."),
]
RunDir = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
Family = Annotated[
    str | None,
    typer.Option(help="Perturbation family; a run's own by default, else pixel with sigma 0.25."),
]
Sigma = Annotated[str | None, typer.Option(help="In the family's unit: 0.3, 0.1pi, 18deg.")]
Code = Annotated[
    Path | None,
    typer.Option(
        "--code", metavar="DIR", help="Folder with the run's own network; only if you trust it."
    ),
]


def say(text: str, err: bool = False) -> None:
    """Print a line; control characters of names in it are shown, not obeyed."""
    typer.echo(visible(text), err=err)


def unforeseen(error: Exception) -> str:
    """One line about an error that is a fault of certifl itself; the rest goes into a file."""
    told = f"{type(error).__name__}: {error}".splitlines()[0][:_LONGEST_REASON]
    log = "".join(traceback.format_exception(error))
    try:
        handle, path = tempfile.mkstemp(prefix="certifl-", suffix=".log")
        with open(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{command_line()}\n\n{log}")
    except OSError as failed:
        return f"an error that was not foreseen ({told}); its log cannot be written: {failed}."
    return (
        f"an error that was not foreseen ({told}). Finished files are whole. {path} says more; "
        "please report it together with that file."
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
    from certifl.models import allow_code
    from certifl.spec import with_settings

    study = with_settings(values, settings or [])
    allow_code(study.model.name, spec.parent, Path.cwd())
    return study


def run_folder(spec: Path, study: Spec, out: Path | None) -> Path:
    """Where a study's results go: where the user says, or runs/<name>-<hash>."""
    return out or Path("runs") / f"{spec.stem}-{study.hash()[:8]}"


def whole(value: str | int) -> int:
    """A whole number as a person writes it: 10000, 10_000 or 1e4.

    Raises:
        typer.BadParameter: it is none.
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
    """A whole number of at least 1.

    Raises:
        typer.BadParameter: it is none.
    """
    number = whole(value)
    if number < 1:
        raise typer.BadParameter(f"{number} is not at least 1.")
    return number


@contextlib.contextmanager
def interruptible(overwrite: bool = False) -> Iterator[None]:
    """Let Ctrl-C say that nothing is lost, and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        same = "the same command without --overwrite" if overwrite else "the same command"
        told = f"\nInterrupted. What is finished is kept; {same} goes on from there."
        say(told, err=True)
        raise typer.Exit(130) from None


def command_line() -> str:
    """How this command was called, for a run's record."""
    return shlex.join(["certifl", *sys.argv[1:]])
