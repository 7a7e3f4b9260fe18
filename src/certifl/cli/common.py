"""What commands share: options, Ctrl-C, how a command was called."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "AnswerWithin",
    "DataDir",
    "Device",
    "Devices",
    "Family",
    "Out",
    "Overwrite",
    "OverwriteFile",
    "RunDir",
    "Settings",
    "Sigma",
    "Track",
    "Workers",
    "command_line",
    "find_code_in",
    "interruptible",
    "positive",
    "whole",
]

Out = Annotated[
    Path | None,
    typer.Option("--out", help="Folder for the results; else one in runs/ that is told."),
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


def find_code_in(folder: Path) -> None:
    """Let `module:function` name code in a folder; last in line, so that it replaces nothing."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


@contextlib.contextmanager
def interruptible(overwrite: bool = False) -> Iterator[None]:
    """Let Ctrl-C say that nothing is lost, and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        same = "the same command without --overwrite" if overwrite else "the same command"
        told = f"\nInterrupted. What is finished is kept; {same} goes on from there."
        typer.echo(told, err=True)
        raise typer.Exit(130) from None


def command_line() -> str:
    """How this command was called, for a run's record."""
    return shlex.join(["certifl", *sys.argv[1:]])
