"""Commands that compute studies, and those about the installation.

Heavy imports happen inside the commands, so that help and usage errors appear at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from certifl.cli import common
from certifl.errors import WorkError
from certifl.path_checks import check_data_folder, read_spec_file

if TYPE_CHECKING:
    from certifl.experiments.parallel import Job
    from certifl.experiments.sweep import Sweep
    from certifl.report import RunResults


def quickstart(
    out: Annotated[Path, typer.Option("--out", help="Folder for the results.")] = Path(
        "runs/quickstart"
    ),
    seed: Annotated[int, typer.Option(min=0, help="Seed of images, weights and noise.")] = 0,
    device: common.Device = "auto",
    overwrite: common.Overwrite = False,
) -> None:
    """Run an example study: embedded digits, ten clients, rotation, four algorithms, a report."""
    from certifl.cli import terminal
    from certifl.experiments.run import Options, compute
    from certifl.paper import scales as presets
    from certifl.report import load_run, load_runs, summary_rows, write_report
    from certifl.runs.folder import RunFolder, require_own_folder

    folder, specs = out, presets.quickstart(seed)
    page, complete = folder / "report.html", not overwrite
    results: list[RunResults] = []
    require_own_folder(folder, list(specs), (page.name, "figures"))
    with common.interruptible(overwrite), terminal.Board() as board:
        for regime, spec in specs.items():
            board.stage(regime)
            options = Options(
                out=folder / regime,
                device=device,
                overwrite=overwrite,
                siblings=tuple(run.folder for run in results),
                report=board.report,
                command=common.command_line(),
            )
            complete = complete and RunFolder(options.out).finished()
            results.append(load_run(compute(spec, options)))
        results = load_runs(results)
        if not (complete and page.is_file()):
            write_report(results, page, title="Quickstart: handwritten digits")
    terminal.show_summary(summary_rows(results))
    common.say(f"\nReport: {page.resolve()}\nFigures: {(page.parent / 'figures').resolve()}")


def run(
    spec: Annotated[Path, typer.Argument(metavar="SPEC.toml", help="The study.")],
    set_: common.Settings = None,
    out: common.Out = None,
    data_dir: common.DataDir = None,
    device: common.Devices = "auto",
    overwrite: common.Overwrite = False,
    track: common.Track = None,
    workers: common.Workers = 0,
    answer_within: common.AnswerWithin = None,
) -> None:
    """Train, certify and report one study; the same command resumes an interrupted run."""
    check_data_folder(data_dir)
    study = common.load_study(spec, set_)
    from certifl.cli import terminal
    from certifl.experiments.run import Options
    from certifl.notebook import run_and_report, siblings_of
    from certifl.report import summary_rows

    folder = common.run_folder(spec, study, out)
    with common.interruptible(overwrite), terminal.Board() as board:
        board.stage(study.name)
        options = Options(
            out=folder,
            data_dir=data_dir,
            device=device,
            overwrite=overwrite,
            siblings=siblings_of(folder),
            report=board.report,
            command=common.command_line(),
            track=tuple(track or ()),
            workers=workers,
            answer_within=answer_within,
        )
        result = run_and_report(study, options)
    terminal.show_summary(summary_rows([result]))
    common.say(f"\nRun: {folder.resolve()}\nReport: {(folder / 'report.html').resolve()}")


def plan(
    spec: Annotated[Path, typer.Argument(metavar="SPEC.toml", help="The study.")],
    set_: common.Settings = None,
    data_dir: common.DataDir = None,
    device: common.Device = "auto",
) -> None:
    """Estimate votes, time, memory and disk of a study from a few seconds of measurements."""
    check_data_folder(data_dir)
    study = common.load_study(spec, set_)
    from certifl.cli import terminal
    from certifl.experiments.plan import plan as plan_study

    terminal.show_plan(study.name, plan_study(study, data_dir, device))


def sweep(
    spec: Annotated[Path, typer.Argument(metavar="SPEC.toml", help="The study.")],
    seeds: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="Seeds; default: that of the spec.")
    ] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[ALGORITHM:]KEY=V,V,...",
            help="A key of the spec and its values; repeatable: all combinations are run.",
        ),
    ] = None,
    set_: common.Settings = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder for the results; default: runs/<spec>-sweep-<hash>."),
    ] = None,
    data_dir: common.DataDir = None,
    device: common.Devices = "auto",
    plan: common.PlanOnly = False,
    overwrite: common.Overwrite = False,
    workers: common.Workers = 0,
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Runs in parallel, one process each; default: on a CPU one per core, up to 16; "
            "otherwise 1.",
        ),
    ] = None,
) -> None:
    """Run a study with several algorithms, settings and seeds, and compare them in one table.

    Keys that an algorithm lacks are left out for it, and equal specs run once. The same command
    resumes an interrupted sweep.
    """
    check_data_folder(data_dir)
    values = read_spec_file(spec)
    from certifl.cli import terminal
    from certifl.experiments import sweep as sweeps
    from certifl.experiments.parallel import compute, helper_processes, processes_here
    from certifl.experiments.run import Options
    from certifl.models import allow_code

    sweep_plan = sweeps.make_sweep(
        values,
        set_ or [],
        [sweeps.read_axis(text) for text in grid or []],
        sweeps.read_seeds(seeds),
        out or sweeps.default_folder(spec, values, set_ or []),
    )
    for name in {job.spec.model.name for job in sweep_plan.jobs}:
        allow_code(name, spec.parent, Path.cwd())
    if plan:
        at_once = processes_here(jobs, sweeps.MOST_PROCESSES, device, overwrite=False)
        terminal.show_sweep(sweep_plan.name, sweeps.costs(sweep_plan, data_dir, device), at_once)
        return
    options = Options(
        sweep_plan.out, data_dir, device, overwrite, command=common.command_line(), workers=workers
    )
    sweeps.check_sweep(sweep_plan, options)
    pending = [job for job in sweep_plan.jobs if overwrite or not job.done()]
    at_once = processes_here(jobs, sweeps.MOST_PROCESSES, device, overwrite)
    at_once = max(1, min(at_once, len(pending)))
    failures: dict[Path, str] = {}

    def failed(job: Job, error: WorkError) -> None:
        failures[job.path] = str(error)

    with common.interruptible(overwrite), terminal.Board() as board:
        options = replace(options, report=board.report)
        with helper_processes(pending, options, at_once, tolerant=True):
            compute(pending, options, [], board.stage, failed)
    _show_sweep(sweep_plan, failures)


def _show_sweep(sweep_plan: Sweep, failures: Mapping[Path, str]) -> None:
    """Write table, figure and page of what a sweep has finished, and name what failed."""
    from certifl.report.seed_table import write_comparison

    results = [
        common.labeled(folder, variant.label)
        for variant in sweep_plan.variants
        for folder in sweep_plan.folders(variant)
        if folder not in failures
    ]
    if results:
        common.say(write_comparison(results, sweep_plan.out, sweep_plan.name).text())
        for what, name in (("Table", "table.txt, .csv, .md, .tex"), ("Report", "report.html")):
            common.say(f"{what}: {sweep_plan.out.resolve() / name}")
        common.say(f"Figure: {sweep_plan.out.resolve() / 'figure.png'}, .pdf, .svg, .csv")
    if failures:
        first, why = next(iter(failures.items()))
        raise WorkError(
            f"{len(failures)} of {len(sweep_plan.jobs)} runs failed and are not in the table; the "
            f"first was {first}: {why}"
        )


def reproduce(
    figure: Annotated[
        str,
        typer.Argument(metavar="FIGURE|all", help="figure1 to figure10, figure5-matched, or all."),
    ],
    scale: Annotated[str, typer.Option(help="smoke, laptop, overnight or paper.")] = "laptop",
    set_: common.Settings = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder for the results; default: runs/reproduce-<scale>."),
    ] = None,
    data_dir: common.DataDir = None,
    device: common.Devices = "auto",
    plan: common.PlanOnly = False,
    overwrite: common.Overwrite = False,
    workers: common.Workers = 0,
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Runs in parallel, one process each; default: at laptop and overnight scale on a "
            "CPU one per core, up to 4 and 2; otherwise 1.",
        ),
    ] = None,
) -> None:
    """Reproduce figures of the paper; runs that they share are trained and certified once.

    The same command resumes an interrupted one; several processes may work in one folder.
    """
    check_data_folder(data_dir)
    from certifl.cli import terminal
    from certifl.experiments.parallel import helper_processes, processes_here
    from certifl.experiments.run import Options
    from certifl.paper.figures import chosen_figures
    from certifl.paper.pages import complete, write_paper_figure
    from certifl.paper.reproduce import costs, make_plan
    from certifl.paper.reproduce import reproduce as compute
    from certifl.paper.scales import scale_named

    size, figures = scale_named(scale, set_ or []), chosen_figures(figure)
    study = make_plan(figures, size, out or Path("runs") / f"reproduce-{scale}")
    if plan:
        terminal.show_study(costs(study, device), size.name, size.words)
        return
    at_once = processes_here(jobs, size.jobs, device, overwrite)
    with common.interruptible(overwrite), terminal.Board() as board:
        where, command = (study.out, data_dir, device, overwrite), common.command_line()
        options = Options(*where, report=board.report, command=command, workers=workers)
        with helper_processes(study.jobs, options, at_once):
            for folder, changed in compute(study, options, board.stage):
                page = folder / "report.html"
                if changed or not complete(folder):
                    page = write_paper_figure(folder)
                common.say(f"{folder.name}: {page.resolve()}")


# Commands about the installation: doctor, list.


def doctor(data_dir: common.DataDir = None) -> None:
    """Check devices, memory, data and extras, and list what is missing."""
    from certifl.cli import terminal
    from certifl.study.environment import examine

    terminal.show_checks(examine(data_dir))


def list_() -> None:
    """List registered components: data, splits, models, algorithms, perturbations, estimators."""
    from certifl.certification import ESTIMATORS
    from certifl.cli import terminal
    from certifl.data import EMBEDDED, SPLITS
    from certifl.federated.aggregation import RULES
    from certifl.federated.algorithms import ALGORITHMS
    from certifl.federated.objectives import OBJECTIVES
    from certifl.models import MODELS
    from certifl.perturbations import PERTURBATIONS, covers_received

    terminal.show_names(
        {
            "data sets": [
                *EMBEDDED,
                "mnist",
                "cifar10",
                "fashion_mnist",
                "owner/name",
                "a folder",
            ],
            "splits": list(SPLITS),
            "models": [*MODELS, "module:function"],
            "algorithms": list(ALGORITHMS),
            "objectives": list(OBJECTIVES),
            "rules": list(RULES),
            "perturbations": list(PERTURBATIONS),
            "  received": [
                *filter(covers_received, PERTURBATIONS),
                "whose certificates also hold for images that arrive changed",
            ],
            "estimators": list(ESTIMATORS),
        }
    )
