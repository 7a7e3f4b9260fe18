"""Commands about finished runs: report, claims, verify, attack, explore.

Heavy imports happen inside the commands, so that help and errors of usage answer at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from certifl.cli.common import (
    Code,
    DataDir,
    Device,
    RunDir,
    interruptible,
    say,
)
from certifl.requests import check_data_folder, check_run, check_study

if TYPE_CHECKING:
    from certifl.experiments.recasting import Options
    from certifl.store.runs import RunFolder

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
    from certifl.store.runs import locked_for

    place = out or page_beside(runs)
    with locked_for(place):
        page = write_report(runs, place, images=images)
    terminal.show_summary(summary_rows(runs))
    say(f"\nReport: {page.resolve()}\nFigures: {(page.parent / 'figures').resolve()}")


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
        say(f"\nClaims: {out.resolve()}")


_FINDINGS = 20  # as many as a screen shows


def verify(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...")],
    recast: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="K", help="Cast the votes of K random images per client again."
        ),
    ] = None,
    recast_seed: Annotated[
        int | None, typer.Option(min=0, help="Choose these images by a seed; else by chance.")
    ] = None,
    code: Annotated[
        Path | None,
        typer.Option("--code", help="Folder with the network's own code, which --recast runs."),
    ] = None,
    data_dir: DataDir = None,
    device: Device = "auto",
) -> None:
    """Recompute every certificate from its votes, and compare all that a run says of itself.

    Ends with 1 where something does not agree, and with 2 where a run's clients kept their
    certificates: only they can verify them.
    """
    for run in runs:
        if not run.is_file():
            check_run(run)
    from certifl.experiments.recasting import Options

    options = None
    if recast is not None:
        options = Options(recast, recast_seed, code, data_dir, device)
    codes = [_verified(place, data_dir, options) for place in runs]
    worst = 1 if 1 in codes else max(codes)
    if worst:
        raise typer.Exit(worst)


def _verified(place: Path, data_dir: Path | None, options: Options | None) -> int:
    """Verify one run, and say what came of it; gives the exit status."""
    from certifl.experiments.checking import verify_run
    from certifl.experiments.checking_run import shortened
    from certifl.experiments.recasting import recast_run

    result = verify_run(place, data_dir)
    problems, again = result.problems, None
    if options is not None and not problems:
        again = recast_run(place, options)
        problems = again.problems
    for problem in shortened(problems, _FINDINGS):
        say(f"{place}: {problem}", err=True)
    if not problems and (result.checked or not result.kept):
        say(f"{place}: {result.checked} certificates follow from their votes.")
        for name, told in (("compared", result.compared), ("not checked", result.unchecked)):
            if told:
                say(f"  {name}: {'; '.join(told)}")
    if again is not None:
        say(f"  recast: {again}", err=bool(problems))
    if result.kept:
        say(result.kept, err=True)
    return 1 if problems else 2 if result.kept else 0


def attack(
    run: RunDir,
    images: Annotated[int, typer.Option(min=1, help="Certified test images per client.")] = 10,
    client: Annotated[int | None, typer.Option(min=0, help="Only this client.")] = None,
    directions: Annotated[
        int, typer.Option(min=2, help="Parameters tried at first, per image.")
    ] = 32,
    data_dir: DataDir = None,
    device: Device = "auto",
    code: Code = None,
) -> None:
    """Try to break a run's certificates, and measure what they do not cover; fails if one breaks.

    Writes attack.json into the run; `certifl report` shows it beside the certificates.
    """
    check_run(run)
    check_data_folder(data_dir)
    from certifl import terminal
    from certifl.experiments.attacking import Options, attack_run
    from certifl.store.runs import RunFolder

    with interruptible(), terminal.Board() as board:
        board.stage("attack")
        options = Options(images, client, directions, data_dir, device, board.report, code)
        result = attack_run(run, options)
    terminal.show_attack(result)
    folder = RunFolder(run)
    _renew_page(folder)
    say(f"\nAttack: {folder.attack.resolve()}")
    if result["parameters"]["violations"]:
        raise typer.Exit(1)


def _renew_page(folder: RunFolder) -> None:
    """Show what is new on the run's page, where it has one."""
    from certifl.report import write_report

    if folder.report.is_file():
        with folder.locked():
            write_report(
                [folder.path], folder.report, folder.manifest().get("name"), figures=False
            )


def explore(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Finished run folders.")],
    data_dir: DataDir = None,
    device: Device = "auto",
    code: Code = None,
) -> None:
    """Take a few test images of each run through the deformations, for readers of its report."""
    for run in runs:
        check_run(run)
    check_data_folder(data_dir)
    from certifl import terminal
    from certifl.experiments.exploring import explore_run
    from certifl.store.runs import RunFolder

    with interruptible(), terminal.Board() as board:
        for run in runs:
            board.stage(f"explore {run.name}")
            seen = explore_run(run, data_dir, device, board.report, code)
            _renew_page(RunFolder(run))
            told = f"{run}: {seen.images} images, {seen.votes:,} votes at each deformation."
            say(f"{told} `certifl report` shows them.")
