"""Commands about finished runs: report, claims, verify, attack, explore.

Heavy imports happen inside the commands, so that help and usage errors appear at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from certifl import path_checks
from certifl.cli import common
from certifl.errors import InputError

if TYPE_CHECKING:
    from certifl.experiments.recast import Options
    from certifl.runs.folder import RunFolder


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Run folders, or a file of certificates."),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The page to write; default: in the run, or beside the first."),
    ] = None,
    images: Annotated[
        bool | None,
        typer.Option(
            "--images/--no-images",
            help="Show test images, or none (private data); default: as on the existing page.",
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(help="Name of the model of a file of certificates; default: the file's."),
    ] = None,
    labels: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=LABEL,...", help='New labels: "FedAvg=Global model".'),
    ] = None,
    order: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME,...", help='Which come first: "Local,FedAvg".'),
    ] = None,
    colors: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=COLOR,...", help='Colors: "FedAvg=#0072B2,Local=tab:orange".'),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(metavar="WxH", help="Inches of figures with one panel, for print: 3.3x2.2."),
    ] = None,
    formats: Annotated[
        list[str] | None,
        typer.Option("--format", help="png, pdf or svg; default: all; repeatable."),
    ] = None,
    unit: Annotated[
        str | None,
        typer.Option(help="Unit of radii in figures: degrees or radians; default: both."),
    ] = None,
    bands: Annotated[
        bool, typer.Option("--bands/--no-bands", help="Shade from worst to best client.")
    ] = True,
    by_class: Annotated[
        bool, typer.Option("--by-class", help="Also print a table of the classes.")
    ] = False,
) -> None:
    """Write a report on one run, compare several, or report the certificates of one model."""
    _check_reported(runs, name)
    if out is not None:
        path_checks.check_ending(out, "A report", *path_checks.REPORT_ENDINGS)
    measures = None if size is None else common.inches(size)
    from certifl.cli import terminal
    from certifl.paper.claims import verdicts_section
    from certifl.report import (
        FigureStyle,
        arranged,
        assignments,
        class_rows,
        known_names,
        listed_names,
        load_model,
        load_runs,
        page_beside,
        summary_rows,
        write_report,
    )
    from certifl.runs.folder import locked_for

    kinds = tuple(kind.strip() for text in formats or () for kind in text.split(","))
    style = FigureStyle(measures, unit, bands, kinds or FigureStyle.formats)
    path = out or page_beside(runs)
    results = load_runs([load_model(runs[0], name)] if runs[0].is_file() else runs)
    known = known_names(results)
    new = assignments(labels or (), known, "--labels")
    results = arranged(
        results,
        new,
        listed_names(order or (), [*new.values(), *known], "--order"),
        assignments(colors or (), [*new.values(), *known], "--colors"),
    )
    with locked_for(path):
        page = write_report(results, path, images=images, claims=verdicts_section, style=style)
    terminal.show_summary(summary_rows(results))
    if by_class:
        terminal.show_classes(class_rows(results))
    common.say(f"\nReport: {page.resolve()}\nFigures: {(page.parent / 'figures').resolve()}")


def _check_reported(paths: list[Path], name: str | None) -> None:
    """Refuse several files of certificates, and --name without one."""
    files = [path for path in paths if path.is_file()]
    for path in paths:
        if path not in files:
            path_checks.check_run(path)
    if files and len(paths) > 1:
        raise InputError(
            f"{files[0]} is a file of certificates, which has a page of its own: report it alone. "
            "Several run folders can be compared."
        )
    if name is not None and not files:
        raise InputError("--name names the model of a file of certificates; runs have --labels.")


def claims(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run folders, or folders of studies.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="Write the results as .json or .md.")
    ] = None,
) -> None:
    """Test the paper's claims: effect, 95 % interval and verdict of each."""
    for run in runs:
        path_checks.check_study(run)
    if out is not None:
        path_checks.check_ending(out, "A table of claims", *path_checks.CLAIMS_ENDINGS)
    from certifl.cli import terminal
    from certifl.paper.claims import check_claims, claim_rows, explanation, write_claims

    found = check_claims(runs)
    if out is not None:
        write_claims(found, out)
    terminal.show_claims(claim_rows(found), explanation(found))
    if out is not None:
        common.say(f"\nClaims: {out.resolve()}")


_FINDINGS = 20  # as many as a screen shows


def verify(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run folders or .parquet files.")
    ],
    recast: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="K", help="Also cast the votes of K random images per client again."
        ),
    ] = None,
    recast_seed: Annotated[
        int | None,
        typer.Option(min=0, help="Seed of the choice of these images; default: random."),
    ] = None,
    code: Annotated[
        Path | None,
        typer.Option(
            "--code", help="Folder with the code of the run's own network, which --recast runs."
        ),
    ] = None,
    data_dir: common.DataDir = None,
    device: common.Device = "auto",
) -> None:
    """Recompute every certificate from its votes, and compare all that a run says of itself.

    Exit code 1: something does not agree. Exit code 2: the clients of a run kept their
    certificates, and only they can verify them; or a run was published without its models, and
    only what follows from spec and votes was compared.
    """
    for run in runs:
        if not run.is_file():
            path_checks.check_run(run)
    from certifl.experiments.recast import Options

    options = None
    if recast is not None:
        options = Options(recast, recast_seed, code, device)
    codes = [_verify(run, data_dir, options) for run in runs]
    worst = 1 if 1 in codes else max(codes)
    if worst:
        raise typer.Exit(worst)


def _verify(run: Path, data_dir: Path | None, recast: Options | None) -> int:
    from certifl.experiments.verify import verify_run

    result = verify_run(run, data_dir, recast)
    failed, more = bool(result.problems), len(result.problems) - _FINDINGS
    for problem in result.problems[:_FINDINGS]:
        common.say(f"{run}: {problem}", err=True)
    if more > 0:
        common.say(f"{run}: and {more} more findings", err=True)
    if not failed and (result.checked or not result.elsewhere):
        common.say(f"{run}: {result.checked} certificates follow from their votes.")
        for name, items in (("compared", result.compared), ("not checked", result.unchecked)):
            if items:
                common.say(f"  {name}: {'; '.join(items)}")
    if result.recast is not None:
        common.say(f"  recast: {result.recast}", err=failed)
    if result.elsewhere:
        common.say(result.elsewhere, err=True)
    return 1 if failed else 2 if result.elsewhere else 0


def attack(
    run: common.RunDir,
    images: Annotated[int, typer.Option(min=1, help="Certified test images per client.")] = 10,
    client: Annotated[int | None, typer.Option(min=0, help="Attack only this client.")] = None,
    directions: Annotated[
        int, typer.Option(min=2, help="Initial search directions per image.")
    ] = 32,
    data_dir: common.DataDir = None,
    device: common.Device = "auto",
    code: common.Code = None,
) -> None:
    """Attack a run's certificates, and measure what they do not cover; fails if one breaks.

    Writes attack.json into the run; `certifl report` shows it beside the certificates.
    """
    path_checks.check_run(run)
    path_checks.check_data_folder(data_dir)
    from certifl.cli import terminal
    from certifl.experiments.attack import Options, attack_run
    from certifl.runs.folder import RunFolder

    with common.interruptible(), terminal.Board() as board:
        board.stage("attack")
        options = Options(images, client, directions, data_dir, device, board.report, code)
        result = attack_run(run, options)
    terminal.show_attack(result)
    folder = RunFolder(run)
    _renew_page(folder)
    common.say(f"\nAttack: {folder.attack.resolve()}")
    if result["parameters"]["violations"]:
        raise typer.Exit(1)


def _renew_page(folder: RunFolder) -> None:
    """Write the run's report again, where it has one."""
    from certifl.report import write_report

    if folder.report.is_file():
        with folder.locked():
            write_report(
                [folder.path], folder.report, folder.manifest().get("name"), figures=False
            )


def explore(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Finished run folders.")],
    data_dir: common.DataDir = None,
    device: common.Device = "auto",
    code: common.Code = None,
) -> None:
    """Add a few test images of each run, deformed step by step, to its report."""
    for run in runs:
        path_checks.check_run(run)
    path_checks.check_data_folder(data_dir)
    from certifl.cli import terminal
    from certifl.experiments.explore import explore_run
    from certifl.runs.folder import RunFolder

    with common.interruptible(), terminal.Board() as board:
        for run in runs:
            board.stage(f"explore {run.name}")
            images, votes = explore_run(run, data_dir, device, board.report, code)
            _renew_page(RunFolder(run))
            common.say(
                f"{run}: {images} images, {votes:,} votes at each deformation. "
                "`certifl report` shows them."
            )
