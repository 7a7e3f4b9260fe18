"""The command line: parses a request, calls the package that does the work, prints the result."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from typing import Annotated, Any

import typer
import typer.core
import typer.main

from certifl.cli import models, results, studies
from certifl.cli.common import safe_path, say, unexpected
from certifl.cli.deploy import deploy
from certifl.errors import CertiflError, RequestError, UnusualValue

__all__ = ["app", "main"]

# Typer up to 0.20, which Flower holds to, escapes the brackets of "[default: ...]" for rich even
# where help is plain text, and shows the escapes.
if hasattr(typer.core, "HAS_RICH"):
    setattr(typer.core, "HAS_RICH", False)  # noqa: B010 - newer ones have no such name


class _Panels(typer.core.TyperGroup):
    """Commands in the help under the titles of their panels, as rich would show them."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write a section for each panel, in the order of `_PANELS`."""
        panels: dict[str, list[tuple[str, str]]] = {title: [] for title in _PANELS}
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            if command is not None and not command.hidden:
                panel = getattr(command, "rich_help_panel", None)
                panels[str(panel)].append((name, command.get_short_help_str(80)))
        width = max(len(name) for rows in panels.values() for name, _ in rows)
        for title, rows in panels.items():
            with formatter.section(title):
                formatter.write_dl([(name.ljust(width), text) for name, text in rows])


app = typer.Typer(
    name="certifl",
    cls=_Panels,
    help="Certified robustness in federated learning: train together, then prove how stable every "
    "client's predictions are.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

# Short helps, whole in `certifl --help`: longer texts would be cut there.
_PANELS: dict[str, dict[str, tuple[Callable[..., None], str]]] = {
    "Studies": {
        "quickstart": (studies.quickstart, "Example study on embedded data, with a report."),
        "run": (studies.run, "Train, certify and report one study."),
        "sweep": (studies.sweep, "Compare algorithms and settings over seeds."),
        "plan": (studies.plan, "Estimate votes, time and memory of a study."),
        "reproduce": (studies.reproduce, "Reproduce figures of the paper."),
    },
    "Models": {
        "certify": (models.certify, "Certify an existing model."),
        "merge": (models.merge, "Merge the shards of a certification."),
        "finetune": (models.finetune, "Fine-tune your weights; certify before and after."),
        "predict": (models.predict, "Predict one image, with its certified radius."),
        "push": (models.push, "Publish a client's model, with a card, on the hub."),
    },
    "Federation": {},
    "Results": {
        "report": (results.report, "Write a report on one run, or compare several."),
        "claims": (results.claims, "Test the paper's claims."),
        "verify": (results.verify, "Recompute every certificate from its votes."),
        "attack": (results.attack, "Attack a run's certificates."),
        "explore": (results.explore, "Add deformed test images to a report."),
    },
    "Installation": {
        "doctor": (studies.doctor, "Check the installation and the hardware."),
        "list": (studies.list_, "List registered components."),
    },
}
for _panel, _commands_of in _PANELS.items():
    for _name, (_command, _short) in _commands_of.items():
        app.command(_name, short_help=_short, rich_help_panel=_panel)(_command)
app.add_typer(
    deploy,
    name="deploy",
    short_help="Federations over a network, with Flower.",
    rich_help_panel="Federation",
)


def main() -> None:
    """Run a command; exit with 0, 1 (the work failed) or 2 (the request was wrong)."""
    try:
        with safe_path(), warnings.catch_warnings():
            warnings.simplefilter("default", UnusualValue)
            warnings.showwarning = _shown_plainly
            _commands()(prog_name="certifl")
    except RequestError as error:
        say(f"certifl: {error}", err=True)
        sys.exit(2)
    except (CertiflError, OSError) as error:
        say(f"certifl: {error}", err=True)
        sys.exit(1)
    except MemoryError:
        say(
            "certifl: memory ran out. Reduce the images, clients or processes, or use a machine "
            "with more memory; finished work is saved.",
            err=True,
        )
        sys.exit(1)
    except Exception as error:  # unexpected errors end in one line, too
        say(f"certifl: {unexpected(error)}", err=True)
        sys.exit(1)


@functools.cache
def _commands() -> Callable[..., object]:
    """All commands, made once for however many are called in one process."""
    return typer.main.get_command(app)


def _shown_plainly(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object
) -> None:
    """A warning in one line."""
    where = "" if issubclass(category, UnusualValue) else f"{filename}:{lineno}: "
    typer.echo(f"certifl: {where}{message}", err=True)


def _version(value: bool) -> None:
    if value:
        from certifl._version import __version__

        typer.echo(f"certifl {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    _version_flag: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show and exit.")
    ] = False,
) -> None:
    """Options before any command."""
