"""Commands about finished runs: report, claims, verify, attack, explore.

Heavy imports happen inside the commands, so that help and errors of usage answer at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from certifl.cli.common import (
    DataDir,
    Device,
    RunDir,
    interruptible,
)
from certifl.requests import check_data_folder, check_run, check_study

__all__ = ["attack", "claims", "explore", "report", "verify"]


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Finished run folders.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The page to write; else in the run, or beside the first."),
    ] = None,
    images: Annotated[
        bool | None,
        typer.Option(
            "--images/--no-images",
            help="Show test images, or leave every pixel out (private data); else as before.",
        ),
    ] = None,
) -> None:
    """Write one page about one run, or about several side by side."""
    for run in runs:
        check_run(run)
    from certifl import terminal
    from certifl.report import page_beside, summary_rows, write_report

    page = write_report(runs, out or page_beside(runs), images=images)
    terminal.show_summary(summary_rows(runs))
    typer.echo(f"\nReport: {page.resolve()}\nFigures: {(page.parent / 'figures').resolve()}")


def claims(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run folders, or folders of studies.")
    ],
    out: Annotated[Path | None, typer.Option("--out", help="Write them as .json or .md.")] = None,
) -> None:
    """Put the paper's claims to the test: effect, 95 % interval and verdict of each."""
    for run in runs:
        check_study(run)
    from certifl import terminal
    from certifl.report import check_claims, claim_rows, explanation, write_claims

    found = check_claims(runs)
    if out is not None:
        write_claims(found, out)
    terminal.show_claims(claim_rows(found), explanation(found))
    if out is not None:
        typer.echo(f"\nClaims: {out.resolve()}")


def verify(runs: Annotated[list[Path], typer.Argument(metavar="RUN...")]) -> None:
    """Recompute every radius from its votes; fails if a stored one claims more.

    Ends with 2 where a run's clients kept their certificates: only they can verify them.
    """
    for run in runs:
        if not run.is_file():
            check_run(run)
    from certifl.experiments.checking import verify_run

    code = 0
    for place in runs:
        result = verify_run(place)
        for problem in result.problems:
            typer.echo(f"{place}: {problem}", err=True)
        if result.problems:
            code = 1
        elif result.checked or not result.kept:
            typer.echo(f"{place}: {result.checked} certificates follow from their votes.")
        if result.kept:
            typer.echo(result.kept, err=True)
            code = code or 2
    if code:
        raise typer.Exit(code)


def attack(
    run: RunDir,
    images: Annotated[int, typer.Option(min=1, help="Certified test images per client.")] = 10,
    client: Annotated[int | None, typer.Option(min=0, help="Only this client.")] = None,
    directions: Annotated[
        int, typer.Option(min=2, help="Parameters tried at first, per image.")
    ] = 32,
    data_dir: DataDir = None,
    device: Device = "auto",
) -> None:
    """Try to break a run's certificates, and measure what they do not cover; fails if one breaks.

    Writes attack.json into the run; `certifl report` shows it beside the certificates.
    """
    check_run(run)
    check_data_folder(data_dir)
    from certifl import terminal
    from certifl.experiments.attacking import Options, attack_run
    from certifl.report import write_report
    from certifl.store.runs import RunFolder

    with interruptible(), terminal.Board() as board:
        board.stage("attack")
        options = Options(images, client, directions, data_dir, device, board.report)
        result = attack_run(run, options)
    terminal.show_attack(result)
    folder = RunFolder(run)
    if folder.report.is_file():
        write_report([run], folder.report, folder.manifest().get("name"), figures=False)
    typer.echo(f"\nAttack: {folder.attack.resolve()}")
    if result["parameters"]["violations"]:
        raise typer.Exit(1)


def explore(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Finished run folders.")],
    data_dir: DataDir = None,
    device: Device = "auto",
) -> None:
    """Take a few test images of each run through the deformations, for readers of its report."""
    for run in runs:
        check_run(run)
    check_data_folder(data_dir)
    from certifl import terminal
    from certifl.experiments.exploring import explore_run
    from certifl.report import write_report
    from certifl.store.runs import RunFolder

    with interruptible(), terminal.Board() as board:
        for run in runs:
            board.stage(f"explore {run.name}")
            seen = explore_run(run, data_dir, device, board.report)
            folder = RunFolder(run)
            if folder.report.is_file():
                write_report([run], folder.report, folder.manifest().get("name"), figures=False)
            told = f"{run}: {seen.images} images, {seen.votes:,} votes at each deformation."
            typer.echo(f"{told} `certifl report` shows them.")
