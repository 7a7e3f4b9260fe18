"""The commands of `certifl deploy`: federations over a network."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from certifl.cli.common import command_line, load_study, run_folder, say
from certifl.errors import RequestError, WorkError
from certifl.path_checks import check_party, check_party_settings

deploy = typer.Typer(
    help="Federations over a network: every client on its own machine, with Flower.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

ClientFolder = Annotated[
    Path, typer.Argument(metavar="[FOLDER]", help="The folder of this client or server.")
]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="No encryption, no keys: for a single machine only.")
]
Names = Annotated[
    list[str] | None,
    typer.Option("--name", help="Further name or address of the server; repeatable."),
]
SpecFile = Annotated[Path, typer.Argument(metavar="SPEC.toml", help="The study.")]
Kit = Annotated[Path, typer.Option("--kit", help="The server's folder.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the spec."),
]
OwnPerturbation = Annotated[
    bool, typer.Option("--own-perturbation", help="Clients may certify their own perturbation.")
]
MinClients = Annotated[
    int | None,
    typer.Option(min=1, help="Start with this many matching clients; default: all."),
]


@contextlib.contextmanager
def _flower() -> Iterator[None]:
    """Require Flower, quiet its log, and handle Ctrl-C."""
    if importlib.util.find_spec("flwr") is None:
        raise RequestError(
            'Federations over a network need Flower: pip install "certifl[flower]".'
        )
    logging.getLogger("flwr").setLevel(logging.WARNING)
    try:
        yield
    except KeyboardInterrupt:
        say("\nInterrupted. Finished work is kept; the same command resumes it.", err=True)
        raise typer.Exit(130) from None


def _echo(line: str) -> None:
    say(line, err=True)


@deploy.command("init")
def init_(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="New folder for all participants.")
    ],
    clients: Annotated[int, typer.Option(min=1, help="Number of clients.")] = 2,
    server: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Address at which clients reach the server.")
    ] = "127.0.0.1:9900",
    name: Names = None,
    insecure: Insecure = False,
) -> None:
    """Write a bundle for each participant: certificates, keys, settings, instructions."""
    with _flower():
        from certifl.deploy.processes import INSECURE
        from certifl.deploy.provision.kit import init

        parties = init(folder, clients, server, insecure, name or [])
    if insecure:
        say(INSECURE, err=True)
    say("\n".join(f"{place}/" for place in parties))
    say(f"\nInstructions, and what never leaves each machine: {folder / 'README.md'}")


@deploy.command()
def renew(
    folder: Annotated[
        Path, typer.Argument(help="The folder that `init` wrote, with the authority's key.")
    ],
    name: Names = None,
) -> None:
    """Write a new certificate for the server; clients need no change."""
    check_party(folder / "server")
    with _flower():
        from certifl.deploy.provision.kit import renew as renewed

        say(f"{renewed(folder, name or [])} (with its key beside it)")


@deploy.command()
def server(folder: ClientFolder = Path(".")) -> None:
    """Run the server until it is stopped."""
    check_party(folder)
    with _flower():
        from certifl.deploy.processes import serve

        serve(folder, _echo)


@deploy.command()
def client(
    folder: ClientFolder = Path("."),
    data: Annotated[
        str | None, typer.Option(help="The client's images; default: as in client.toml.")
    ] = None,
    dealt: Annotated[
        bool,
        typer.Option(
            "--dealt", help="DATA is a whole data set, of which the study assigns a share."
        ),
    ] = False,
    code: Annotated[
        Path | None,
        typer.Option(
            "--code", metavar="DIR", help="Folder with the networks that client.toml allows."
        ),
    ] = None,
) -> None:
    """Run a client with its own images until it is stopped."""
    check_party_settings(folder / "client.toml")
    with _flower():
        from certifl.deploy.client.settings import load_settings
        from certifl.deploy.processes import take_part, with_data

        settings = with_data(load_settings(folder / "client.toml"), data, dealt)
        _find_networks(settings.networks, code)
        take_part(folder, settings, _echo)


def _find_networks(names: list[str], code: Path | None) -> None:
    """Make the networks that the client allows importable from the folder with their code."""
    from certifl.models import require_code

    own = [name for name in names if ":" in name]
    if own and code is None:
        raise RequestError(
            f"networks of client.toml allows {own[0]!r}, which is code: name the folder that "
            "holds it with --code DIR."
        )
    for name in own:
        require_code(name, code or Path())


@deploy.command()
def log(folder: ClientFolder = Path(".")) -> None:
    """List what left a client's machine: time, purpose, keys, shapes, bytes."""
    with _flower():
        from certifl.deploy.client.sent_log import SENT, sent_lines

        if not any((folder / name).is_file() for name in ("client.toml", SENT)):
            raise RequestError(f"{folder} is not a client's folder: it has no client.toml.")
        for line in sent_lines(folder):
            typer.echo(line)


@deploy.command()
def run(
    spec: SpecFile,
    kit: Kit = Path("server"),
    set_: Overrides = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the results.")] = None,
    share: Annotated[
        str, typer.Option(help="Disclosure level of certificates: curve, rows or none.")
    ] = "curve",
    own_perturbation: OwnPerturbation = False,
    answer_within: Annotated[
        float,
        typer.Option(
            min=1.0, help="Timeout in seconds after which a client is left out of a round."
        ),
    ] = 3600.0,
    wait: Annotated[
        float, typer.Option(min=0.0, help="Seconds to wait for clients at the start.")
    ] = 300.0,
    min_clients: MinClients = None,
    absent: Annotated[
        float, typer.Option(min=0.0, help="Timeout for absent clients, in seconds.")
    ] = 60.0,
    piece: Annotated[
        float, typer.Option(min=0.1, help="Seconds of certification per request.")
    ] = 60.0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing run.")
    ] = False,
) -> None:
    """Train and certify with the connected clients; the same command resumes the study.

    Run it on the server's machine. The exit code is 0 only if everything was done.
    """
    study = load_study(spec, set_)
    with _flower():
        from certifl.cli import terminal
        from certifl.deploy.server.coordinator import Options
        from certifl.deploy.server.remote_runner import Timeouts
        from certifl.deploy.server.run import run_study
        from certifl.deploy.transport.flower_processes import private_files

        with terminal.Board() as board:
            board.stage(study.name)
            options = Options(
                out=run_folder(spec, study, out),
                overwrite=overwrite,
                share=share,
                own_perturbation=own_perturbation,
                patience=Timeouts(answer_within, wait, absent),
                piece=piece,
                report=board.report,
                command=command_line(),
                min_clients=min_clients,
                told=_echo,
            )
            folder = run_study(study, kit, options)
        with private_files():
            _write_report(folder.path, study.name)


@deploy.command()
def check(
    spec: SpecFile,
    kit: Kit = Path("server"),
    set_: Overrides = None,
    own_perturbation: OwnPerturbation = False,
    wait: Annotated[
        float, typer.Option(min=0.0, help="Timeout for absent clients, in seconds.")
    ] = 30.0,
    min_clients: MinClients = None,
) -> None:
    """List the connected clients and whether a study would start with them; train nothing.

    The exit code is 0 if `certifl deploy run` would start the study with these clients.
    """
    check_party(kit)
    with _flower():
        from certifl.deploy.server.coordinator import Options
        from certifl.deploy.server.remote_runner import Timeouts
        from certifl.deploy.server.run import check_study

        options = Options(
            out=Path(),
            own_perturbation=own_perturbation,
            patience=Timeouts(start=wait),
            min_clients=min_clients,
            told=typer.echo,
        )
        problem = check_study(load_study(spec, set_), kit, options)
        if problem is not None:
            raise RequestError(problem)
        typer.echo("The study would start.")


def _write_report(path: Path, title: str) -> None:
    from certifl.cli import terminal
    from certifl.report import load_runs, summary_rows, write_report
    from certifl.runs.folder import StoredRun

    run = StoredRun(path)
    for client, why in run.manifest["deployment"].get("left_out", {}).items():
        _echo(f"Warning: client {client} is left out of the certificates: {why}.")
    if run.curves == {}:
        say(f"\nRun: {path.resolve()}\nEvery client keeps its certificates to itself.")
        return
    results = load_runs([run])
    with run.folder.locked():
        write_report(results, run.folder.report, title=title)
    terminal.show_summary(summary_rows(results))
    say(f"\nRun: {path.resolve()}\nReport: {run.folder.report.resolve()}")


@deploy.command()
def status(folder: ClientFolder = Path(".")) -> None:
    """List connected clients (on the server), or test the connection (on a client)."""
    check_party(folder)
    with _flower():
        from certifl.deploy.server.run import status_lines

        lines, fine = status_lines(folder)
    say("\n".join(lines))
    if not fine:
        raise WorkError("Some checks failed; see above.")
