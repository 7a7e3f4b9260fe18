"""The commands of `certifl deploy`: real federations over a network."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from certifl.cli.common import Overwrite, command_line, load_study, run_folder, say
from certifl.errors import RequestError, WorkError
from certifl.path_checks import check_client_settings, check_deploy_folder, is_run

deploy = typer.Typer(
    help="Real federations: every client on its own machine, over Flower.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

ClientFolder = Annotated[
    Path, typer.Argument(metavar="[FOLDER]", help="Folder of this machine, from `deploy init`.")
]
Insecure = Annotated[
    bool,
    typer.Option("--insecure", help="No encryption, no keys: only to try out on one machine."),
]
Names = Annotated[
    list[str] | None,
    typer.Option("--name", help="Additional name or address of the server; repeatable."),
]
SpecFile = Annotated[Path, typer.Argument(metavar="SPEC.toml", help="The study.")]
ServerFolder = Annotated[
    Path, typer.Option("--kit", help="The server's folder, from `deploy init`.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the spec; repeatable."),
]
OwnPerturbation = Annotated[
    bool, typer.Option("--own-perturbation", help="Allow clients their own perturbation.")
]
MinClients = Annotated[
    int | None,
    typer.Option(min=1, help="Minimum number of matching clients to start; default: all."),
]


@contextlib.contextmanager
def _flower() -> Iterator[None]:
    """Report a missing Flower, and an interruption."""
    if importlib.util.find_spec("flwr") is None:
        raise RequestError(
            'Federations over a network need Flower: pip install "certifl[flower]".'
        )
    logging.getLogger("flwr").setLevel(logging.WARNING)
    try:
        yield
    except KeyboardInterrupt:
        message = "\nInterrupted. Finished work is stored; the same command resumes."
        say(message, err=True)
        raise typer.Exit(130) from None


def _report(line: str) -> None:
    say(line, err=True)


@deploy.command("init")
def init_(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="New folder for all bundles.")],
    clients: Annotated[int, typer.Option(min=1, help="Number of clients.")] = 2,
    server: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Address of the server for clients.")
    ] = "127.0.0.1:9900",
    name: Names = None,
    insecure: Insecure = False,
) -> None:
    """Write a provisioning bundle for each machine: certificates, keys, settings, scripts."""
    with _flower():
        from certifl.deploy.bundle import INSECURE, init

        folders = init(folder, clients, server, insecure, name or [])
    if insecure:
        say(INSECURE, err=True)
    say("\n".join(f"{each}/" for each in folders))
    say(f"\nWho runs what, and what never leaves each machine: {folder / 'README.md'}")


@deploy.command()
def renew(
    folder: Annotated[Path, typer.Argument(help="Folder of `init`, with the authority's key.")],
    name: Names = None,
) -> None:
    """Write a new certificate for the server; clients need no change."""
    check_deploy_folder(folder / "server")
    with _flower():
        from certifl.deploy.bundle import renew as renewed

        say(f"{renewed(folder, name or [])} (with its key beside it)")


@deploy.command()
def server(folder: ClientFolder = Path(".")) -> None:
    """Run the server until it is stopped."""
    check_deploy_folder(folder)
    with _flower():
        from certifl.deploy.server.process import run_server

        run_server(folder, _report)


@deploy.command()
def client(
    folder: ClientFolder = Path("."),
    data: Annotated[
        str | None, typer.Option(help="The client's images; default: data in client.toml.")
    ] = None,
    dealt: Annotated[
        bool,
        typer.Option(
            "--dealt",
            help="All clients have the data set DATA; the study allocates its images.",
        ),
    ] = False,
    code: Annotated[
        Path | None,
        typer.Option(
            "--code", metavar="DIR", help="Folder of the networks that client.toml allows."
        ),
    ] = None,
) -> None:
    """Run a client until it is stopped."""
    check_client_settings(folder / "client.toml")
    with _flower():
        from certifl.deploy.client.process import run_client, with_data
        from certifl.deploy.client.settings import load_settings

        settings = with_data(load_settings(folder / "client.toml"), data, dealt)
        _find_networks(settings.networks, code)
        run_client(folder, settings, _report)


def _find_networks(names: list[str], code: Path | None) -> None:
    from certifl.models import require_code

    own = [name for name in names if ":" in name]
    if own and code is None:
        raise RequestError(
            f"networks of client.toml allows {own[0]!r}, which is code: name its folder "
            "with --code DIR."
        )
    for name in own:
        require_code(name, code or Path())


@deploy.command()
def log(folder: ClientFolder = Path(".")) -> None:
    """List what left a client's machine: time, kind, keys, shapes, bytes."""
    with _flower():
        from certifl.deploy.client.state import SENT, sent_lines

        if not any((folder / name).is_file() for name in ("client.toml", SENT)):
            raise RequestError(f"{folder} is not a client's folder: it has no client.toml.")
        for line in sent_lines(folder):
            say(line)


@deploy.command()
def run(
    spec: SpecFile,
    server_folder: ServerFolder = Path("server"),
    set_: Overrides = None,
    out: Annotated[Path | None, typer.Option("--out", help="Default: runs/<spec>-<hash>.")] = None,
    share: Annotated[
        str, typer.Option(help="Disclosure level of certificates: curve, rows, none.")
    ] = "curve",
    own_perturbation: OwnPerturbation = False,
    answer_within: Annotated[
        float, typer.Option(min=1.0, help="Timeout for a client's answer, in seconds.")
    ] = 3600.0,
    wait: Annotated[
        float, typer.Option(min=0.0, help="Timeout for clients to join at the start, in seconds.")
    ] = 300.0,
    min_clients: MinClients = None,
    absent: Annotated[
        float, typer.Option(min=0.0, help="Timeout for absent clients, in seconds.")
    ] = 60.0,
    piece: Annotated[
        float, typer.Option(min=0.1, help="Seconds of certification per message.")
    ] = 60.0,
    overwrite: Overwrite = False,
) -> None:
    """Train and certify with the connected clients; the same command resumes.

    Run it on the server's machine. It exits with code 0 only if everything was done.
    """
    study = load_study(spec, set_)
    with _flower():
        from certifl.cli import terminal
        from certifl.deploy.server.coordinator import Options, run_study
        from certifl.deploy.server.remote_runner import Timeouts
        from certifl.runs.atomic import private_files

        with terminal.Board() as board:
            board.stage(study.name)
            options = Options(
                out=run_folder(spec, study, out),
                overwrite=overwrite,
                share=share,
                own_perturbation=own_perturbation,
                timeouts=Timeouts(answer_within, wait, absent),
                piece=piece,
                report=board.report,
                command=command_line(),
                min_clients=min_clients,
                log=_report,
            )
            folder = run_study(study, server_folder, options)
        with private_files():
            _show_results(folder.path, study.name)


@deploy.command()
def check(
    spec: SpecFile,
    server_folder: ServerFolder = Path("server"),
    set_: Overrides = None,
    own_perturbation: OwnPerturbation = False,
    wait: Annotated[
        float, typer.Option(min=0.0, help="Timeout for absent clients, in seconds.")
    ] = 30.0,
    min_clients: MinClients = None,
) -> None:
    """List the connected clients and whether a study would start; train nothing.

    It exits with code 0 if `certifl deploy run` would start the study with these clients.
    """
    study = load_study(spec, set_)
    check_deploy_folder(server_folder)
    with _flower():
        from certifl.deploy.server.coordinator import Options, check_study
        from certifl.deploy.server.remote_runner import Timeouts

        options = Options(
            out=Path(),
            own_perturbation=own_perturbation,
            timeouts=Timeouts(start=wait),
            min_clients=min_clients,
            log=typer.echo,
        )
        problem = check_study(study, server_folder, options)
        if problem is not None:
            raise RequestError(problem)
        typer.echo("The study would start.")


def _show_results(path: Path, title: str) -> None:
    from certifl.cli import terminal
    from certifl.report import load_runs, summary_rows, write_report
    from certifl.runs.folder import StoredRun

    run = StoredRun(path)
    for client, why in run.manifest["deployment"].get("left_out", {}).items():
        typer.echo(f"Warning: client {client} is left out of the certificates: {why}.", err=True)
    if run.curves == {}:
        say(f"\nRun: {path.resolve()}\nNo client shared its certificates.")
        return
    results = load_runs([run])
    with run.folder.locked():
        write_report(results, run.folder.report, title=title)
    terminal.show_summary(summary_rows(results))
    say(f"\nRun: {path.resolve()}\nReport: {run.folder.report.resolve()}")


@deploy.command()
def status(
    folder: Annotated[
        Path,
        typer.Argument(metavar="[FOLDER]", help="This machine's folder, or that of a run."),
    ] = Path("."),
) -> None:
    """Show connected clients, whether the server answers, or the progress of a run.

    On the server's machine: connected clients. On a client's: whether the server answers, and the
    privacy spent. For the folder of a run: its rounds, who answered, the loss and the time left.
    """
    if is_run(folder):
        from certifl.deploy.status import study_lines

        say("\n".join(study_lines(folder)))
        return
    check_deploy_folder(folder)
    with _flower():
        from certifl.deploy.status import status_lines

        lines, fine = status_lines(folder)
    say("\n".join(lines))
    if not fine:
        raise WorkError("There is a problem; see above.")
