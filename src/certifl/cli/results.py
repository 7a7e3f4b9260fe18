"""Commands about finished runs, and about one model or one image.

Heavy imports happen inside the commands, so that help and usage errors appear at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from certifl.cli.common import (
    Code,
    DataDir,
    Device,
    Family,
    OverwriteFile,
    RunDir,
    Sigma,
    inches,
    interruptible,
    positive,
    say,
    whole,
)
from certifl.errors import InputError
from certifl.path_checks import (
    IMAGE,
    SHARD,
    WEIGHTS,
    check_certificate_file,
    check_data_folder,
    check_file,
    check_model_folder,
    check_run,
    check_study,
)

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
        bool,
        typer.Option("--bands/--no-bands", help="Shade from worst to best client."),
    ] = True,
    by_class: Annotated[
        bool, typer.Option("--by-class", help="Also print a table of the classes.")
    ] = False,
) -> None:
    """Write a report on one run, compare several, or report the certificates of one model."""
    _check_reported(runs, name)
    measures = None if size is None else inches(size)
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
    say(f"\nReport: {page.resolve()}\nFigures: {(page.parent / 'figures').resolve()}")


def _check_reported(paths: list[Path], name: str | None) -> None:
    """Refuse what no report is made of: several files, or a name where there is no file."""
    files = [path for path in paths if path.is_file()]
    for path in paths:
        if path not in files:
            check_run(path)
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
        check_study(run)
    from certifl.cli import terminal
    from certifl.paper.claims import check_claims, claim_rows, explanation, write_claims

    found = check_claims(runs)
    if out is not None:
        write_claims(found, out)
    terminal.show_claims(claim_rows(found), explanation(found))
    if out is not None:
        say(f"\nClaims: {out.resolve()}")


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
    data_dir: DataDir = None,
    device: Device = "auto",
) -> None:
    """Recompute every certificate from its votes, and compare all that a run says of itself.

    Exit code 1: something does not agree. Exit code 2: the clients of a run kept their
    certificates, and only they can verify them; or a run was published without its models, and
    only what follows from spec and votes was compared.
    """
    for run in runs:
        if not run.is_file():
            check_run(run)
    from certifl.experiments.recast import Options

    options = None
    if recast is not None:
        options = Options(recast, recast_seed, code, data_dir, device)
    codes = [_verify(run, data_dir, options) for run in runs]
    worst = 1 if 1 in codes else max(codes)
    if worst:
        raise typer.Exit(worst)


def _verify(run: Path, data_dir: Path | None, recast: Options | None) -> int:
    """Verify one run and print the result; returns the exit status."""
    from certifl.experiments.verify import verify_run
    from certifl.experiments.verify_run import shortened

    result = verify_run(run, data_dir, recast)
    failed = bool(result.problems)
    for problem in shortened(result.problems, _FINDINGS):
        say(f"{run}: {problem}", err=True)
    if not failed and (result.checked or not result.kept):
        say(f"{run}: {result.checked} certificates follow from their votes.")
        for name, items in (("compared", result.compared), ("not checked", result.unchecked)):
            if items:
                say(f"  {name}: {'; '.join(items)}")
    if result.recast is not None:
        say(f"  recast: {result.recast}", err=failed)
    if result.kept:
        say(result.kept, err=True)
    return 1 if failed else 2 if result.kept else 0


def attack(
    run: RunDir,
    images: Annotated[int, typer.Option(min=1, help="Certified test images per client.")] = 10,
    client: Annotated[int | None, typer.Option(min=0, help="Attack only this client.")] = None,
    directions: Annotated[
        int, typer.Option(min=2, help="Initial search directions per image.")
    ] = 32,
    data_dir: DataDir = None,
    device: Device = "auto",
    code: Code = None,
) -> None:
    """Attack a run's certificates, and measure what they do not cover; fails if one breaks.

    Writes attack.json into the run; `certifl report` shows it beside the certificates.
    """
    check_run(run)
    check_data_folder(data_dir)
    from certifl.cli import terminal
    from certifl.experiments.attack import Options, attack_run
    from certifl.runs.folder import RunFolder

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
    """Write the run's report again, where it has one."""
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
    """Add a few test images of each run, deformed step by step, to its report."""
    for run in runs:
        check_run(run)
    check_data_folder(data_dir)
    from certifl.cli import terminal
    from certifl.experiments.explore import explore_run
    from certifl.runs.folder import RunFolder

    with interruptible(), terminal.Board() as board:
        for run in runs:
            board.stage(f"explore {run.name}")
            seen = explore_run(run, data_dir, device, board.report, code)
            _renew_page(RunFolder(run))
            say(
                f"{run}: {seen.images} images, {seen.votes:,} votes at each deformation. "
                "`certifl report` shows them."
            )


# Commands about one model or one image: certify, merge, predict.


def certify(
    model: Annotated[
        str | None,
        typer.Option(
            help="Your network as module:function or a model's name, with --weights; or "
            "hf:OWNER/NAME, hf:./folder. Needs --data."
        ),
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="Weights: .safetensors or .pt.")] = None,
    run: Annotated[Path | None, typer.Option(help="Certify the model of a run instead.")] = None,
    client: Annotated[int, typer.Option(min=0, help="Client of the run.")] = 0,
    data: Annotated[
        str | None, typer.Option(help="Data set whose test images are certified.")
    ] = None,
    resize: Annotated[
        int | None, typer.Option(metavar="PIXELS", help="Resize the images to a square.")
    ] = None,
    crop: Annotated[
        str | None, typer.Option(help="center or pad: make them square before --resize.")
    ] = None,
    window: Annotated[
        tuple[float, float] | None,
        typer.Option(metavar="LOW HIGH", help="Black and white of 16-bit gray images and DICOM."),
    ] = None,
    family: Family = None,
    sigma: Sigma = None,
    images: Annotated[
        int,
        typer.Option(
            parser=positive, metavar="NUMBER", help="Number of test images, a fixed random choice."
        ),
    ] = 100,
    estimator: Annotated[str, typer.Option(help="See `certifl list`.")] = "sequential",
    n0: Annotated[
        int,
        typer.Option("--n0", parser=whole, metavar="VOTES", help="Votes that select the class."),
    ] = 100,
    n: Annotated[
        int,
        typer.Option(
            "--n", parser=whole, metavar="VOTES", help="Votes that bound its probability."
        ),
    ] = 100_000,
    alpha: Annotated[float, typer.Option(help="Probability of a wrong certificate.")] = 1e-3,
    keep: Annotated[
        str,
        typer.Option(help="What early stopping preserves: certificates, or (cheaper) the curve."),
    ] = "certificates",
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of the noise and the choice of images.")
    ] = 0,
    precision: Annotated[str, typer.Option(help="auto, float32, bfloat16 or int8.")] = "auto",
    data_dir: DataDir = None,
    device: Device = "auto",
    out: Annotated[Path, typer.Option("--out", help="File to write, .parquet or .tsv.")] = Path(
        "certificates.parquet"
    ),
    overwrite: OverwriteFile = False,
    shard: Annotated[
        str, typer.Option(help="i/n: every n-th image from the i-th, for `certifl merge`.")
    ] = "1/1",
    code: Code = None,
) -> None:
    """Certify an existing model, or the model that a client of a run deploys."""
    check_certificate_file(out, overwrite)
    check_data_folder(data_dir)
    if weights is not None:
        check_file(weights, WEIGHTS)
    if run is not None:
        check_run(run)
    from certifl.certification.settings import Settings
    from certifl.cli import terminal
    from certifl.experiments.standalone import Request, certify_standalone, read_shard
    from certifl.models import allow_code

    request = Request(
        model=model,
        weights=weights,
        run=run,
        client=client,
        data=data,
        family=family,
        sigma=sigma,
        images=images,
        settings=Settings(estimator, n0, n, alpha, keep=keep),
        seed=seed,
        precision=precision,
        data_dir=data_dir,
        device=device,
        out=out,
        overwrite=overwrite,
        shard=read_shard(shard),
        code=code,
        resize=resize,
        crop=crop,
        window=window,
    )
    if model is not None:
        allow_code(model, Path.cwd())
    with interruptible(), terminal.Board() as board:
        board.stage("certify")
        certificates = certify_standalone(request, board.report)
    terminal.show_certificates(certificates)
    say(f"\nCertificates: {out.resolve()}")


def merge(
    shards: Annotated[
        list[Path],
        typer.Argument(metavar="SHARD...", help="All files of `certifl certify --shard i/n`."),
    ],
    out: Annotated[Path, typer.Option("--out", help="File to write, .parquet or .tsv.")] = Path(
        "certificates.parquet"
    ),
    overwrite: OverwriteFile = False,
) -> None:
    """Merge the shards of one certification; the result does not depend on their number."""
    check_certificate_file(out, overwrite)
    for shard in shards:
        check_file(shard, SHARD)
    from certifl.cli import terminal
    from certifl.experiments.standalone import merge_shards, save_merged

    certificates = save_merged(merge_shards(shards), out, overwrite)
    terminal.show_certificates(certificates)
    say(f"\nCertificates: {out.resolve()}")


def predict(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="A PNG or JPEG file.")],
    run: Annotated[
        Path | None,
        typer.Option(
            help="The run whose model is used, a client's own folder CLIENT/studies/ID, or a "
            "pushed model: a folder or hf:OWNER/NAME."
        ),
    ] = None,
    client: Annotated[
        int | None, typer.Option(min=0, help="Client whose model is used; default: 0.")
    ] = None,
    n: Annotated[
        int | None,
        typer.Option(
            "--n",
            parser=positive,
            metavar="VOTES",
            help="Votes; default: as in the run, 10,000 with --model.",
        ),
    ] = None,
    resize: Annotated[
        bool, typer.Option("--resize", help="Resize the image to fit the model.")
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(
            help="Your network as module:function, or a model's name, instead of --run; needs "
            "--weights, and --classes or --data."
        ),
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="Weights: .safetensors or .pt.")] = None,
    classes: Annotated[
        str | None,
        typer.Option(metavar="NUMBER|NAME,...", help="Its classes: 10, or cat,dog."),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Data set whose images and classes are those of the model.")
    ] = None,
    family: Annotated[
        str | None, typer.Option(help="Perturbation family with --model; default: pixel.")
    ] = None,
    sigma: Sigma = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise with --model.")] = 0,
    precision: Annotated[
        str, typer.Option(help="With --model: auto, float32 or bfloat16.")
    ] = "auto",
    data_dir: DataDir = None,
    device: Device = "auto",
    code: Code = None,
) -> None:
    """Predict one image: its label and certified radius, or abstention."""
    own = {"--weights": weights, "--classes": classes, "--data": data, "--family": family}
    own |= {"--sigma": sigma}
    _check_predictor(run, client, code, model, own)
    check_file(image, IMAGE)
    from certifl.cli import terminal
    from certifl.experiments import standalone

    if run is not None:
        from certifl.experiments.hub import local_folder

        run = local_folder(run) if str(run).startswith("hf:") else run
        answer = standalone.certify_image(image, run, client, n, resize, device, code)
        terminal.show_prediction(answer)
        return
    assert model is not None
    from certifl.models import allow_code

    allow_code(model, Path.cwd())
    noise = standalone.perturbation_named(family, sigma)
    network = standalone.OwnModel(
        model, weights, data, data_dir, classes, noise, n or _PREDICT_VOTES, seed, precision
    )
    terminal.show_prediction(standalone.certify_image_with(image, network, resize, device))


_PREDICT_VOTES = 10_000


def _check_predictor(
    run: Path | None,
    client: int | None,
    code: Path | None,
    model: str | None,
    own: dict[str, object],
) -> None:
    """Refuse options that do not go together; a wrong path is refused before torch is imported."""
    if (run is None) == (model is None):
        raise InputError("Give either --run RUN, or --model module:function with --weights.")
    if run is not None:
        if given := [name for name, value in own.items() if value is not None]:
            raise InputError(f"--run names a model already; leave out {', '.join(given)}.")
        if not str(run).startswith("hf:"):
            check_model_folder(run)
        return
    if client is not None or code is not None:
        raise InputError("--client and --code are about a run; leave them out with --model.")
    weights = own["--weights"]
    if isinstance(weights, Path):
        check_file(weights, WEIGHTS)
    elif not str(model).startswith("hf:"):
        raise InputError("--model needs --weights FILE: a network without training says nothing.")


def push(
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="A run, or a client's folder CLIENT/studies/ID."),
    ],
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="hf:OWNER/NAME, or a new folder.")
    ],
    client: Annotated[
        int | None, typer.Option(min=0, help="Client whose model is pushed; default: 0.")
    ] = None,
    share: Annotated[
        str,
        typer.Option(help="curve, or rows: also every test image's certificate with its votes."),
    ] = "curve",
    public: Annotated[
        bool, typer.Option("--public", help="A new repository of the hub is public.")
    ] = False,
    code: Code = None,
) -> None:
    """Push the model that a client deploys, with a card, to the Hugging Face hub or a folder."""
    check_model_folder(run)
    from certifl.experiments.hub import push as push_model

    say(f"Model and card: {push_model(run, target, client, share, public, code)}")
