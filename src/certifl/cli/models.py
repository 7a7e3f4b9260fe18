"""Commands about one model or one image: certify, merge, finetune, predict, push.

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
    from certifl.study.opened_run import OpenRun

_PREDICT_VOTES = 10_000

Weights = Annotated[Path | None, typer.Option(help="Weights: .safetensors or .pt.")]
Family = Annotated[
    str | None,
    typer.Option(help="Perturbation family; default: that of the run, or pixel with sigma 0.25."),
]
CertificateFile = Annotated[Path, typer.Option("--out", help="File to write, .parquet or .tsv.")]


def certify(
    model: Annotated[
        str | None,
        typer.Option(
            help="Your network as module:function or a model's name, with --weights; or "
            "hf:OWNER/NAME, hf:./folder. Needs --data."
        ),
    ] = None,
    weights: Weights = None,
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
        typer.Option(
            metavar="LOW HIGH",
            help="Intensities of black and white: 16-bit gray images, DICOM.",
        ),
    ] = None,
    family: Family = None,
    sigma: common.Sigma = None,
    images: Annotated[
        int,
        typer.Option(
            parser=common.positive,
            metavar="NUMBER",
            help="Number of test images, a fixed random choice.",
        ),
    ] = 100,
    estimator: Annotated[str, typer.Option(help="See `certifl list`.")] = "sequential",
    n0: Annotated[
        int,
        typer.Option(
            "--n0", parser=common.whole, metavar="VOTES", help="Votes that select the class."
        ),
    ] = 100,
    n: Annotated[
        int,
        typer.Option(
            "--n", parser=common.whole, metavar="VOTES", help="Votes that bound its probability."
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
    data_dir: common.DataDir = None,
    device: common.Device = "auto",
    out: CertificateFile = Path("certificates.parquet"),
    overwrite: common.OverwriteFile = False,
    shard: Annotated[
        str, typer.Option(help="i/n: every n-th image from the i-th, for `certifl merge`.")
    ] = "1/1",
    code: common.Code = None,
) -> None:
    """Certify an existing model, or the model that a client of a run deploys."""
    path_checks.check_certificate_file(out, overwrite)
    path_checks.check_data_folder(data_dir)
    if weights is not None:
        path_checks.check_file(weights, path_checks.WEIGHTS)
    if run is not None:
        path_checks.check_run(run)
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
        shard=read_shard(shard),
        code=code,
        resize=resize,
        crop=crop,
        window=window,
    )
    if model is not None:
        allow_code(model, Path.cwd())
    with common.interruptible(), terminal.Board() as board:
        board.stage("certify")
        certificates = certify_standalone(request, board.report)
    terminal.show_certificates(certificates)
    common.say(f"\nCertificates: {out.resolve()}")


def merge(
    shards: Annotated[
        list[Path],
        typer.Argument(metavar="SHARD...", help="All files of `certifl certify --shard i/n`."),
    ],
    out: CertificateFile = Path("certificates.parquet"),
    overwrite: common.OverwriteFile = False,
) -> None:
    """Merge the shards of one certification; the result does not depend on their number."""
    path_checks.check_certificate_file(out, overwrite)
    for shard in shards:
        path_checks.check_file(shard, path_checks.SHARD)
    from certifl.cli import terminal
    from certifl.experiments.standalone import merge_shards

    certificates = merge_shards(shards, out)
    terminal.show_certificates(certificates)
    common.say(f"\nCertificates: {out.resolve()}")


def finetune(
    model: Annotated[
        str, typer.Option(help="Your network as module:function, or a model's name.")
    ],
    weights: Annotated[Path, typer.Option(help="Weights to begin with: .safetensors or .pt.")],
    data: Annotated[
        str, typer.Option(help="Data set: training images tune, test images are certified.")
    ],
    perturbation: Annotated[
        str, typer.Option(help="Family, with --sigma, or FAMILY:SIGMA, such as rotation:18deg.")
    ],
    sigma: common.Sigma = None,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs over the training images.")] = 10,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 0.01,
    batch_size: Annotated[int, typer.Option(min=1, help="Images in a step.")] = 64,
    images: Annotated[
        int | None, typer.Option(min=1, help="Test images to certify; default: 500.")
    ] = None,
    n: Annotated[
        int,
        typer.Option("--n", parser=common.positive, metavar="VOTES", help="Votes for each image."),
    ] = 10_000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of steps and noise.")] = 0,
    set_: common.Settings = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder for the results; default: runs/<weights>-<hash>."),
    ] = None,
    data_dir: common.DataDir = None,
    device: common.Devices = "auto",
    overwrite: common.Overwrite = False,
) -> None:
    """Fine-tune your own weights with noise, and certify them before and after.

    A short form of a study with one client; the same command resumes an interrupted one.
    """
    path_checks.check_data_folder(data_dir)
    path_checks.check_file(weights, path_checks.WEIGHTS)
    from certifl.cli import terminal
    from certifl.experiments.run import Options, compute
    from certifl.experiments.standalone import finetune_specs, read_perturbation
    from certifl.models import allow_code
    from certifl.report import summary_rows, write_report
    from certifl.runs.atomic import save_tensors
    from certifl.runs.folder import require_own_folder

    specs = finetune_specs(
        model,
        weights,
        data,
        read_perturbation(perturbation, sigma),
        epochs=epochs,
        lr=lr,
        batch_size=batch_size,
        images=images,
        n=n,
        seed=seed,
        settings=set_ or [],
    )
    allow_code(model, Path.cwd())
    folder = out or Path("runs") / f"{weights.stem}-{specs['after'].hash()[:8]}"
    page, tuned = folder / "report.html", folder / "finetuned.safetensors"
    require_own_folder(folder, list(specs), (page.name, "figures", tuned.name))
    runs: list[OpenRun] = []
    with common.interruptible(overwrite), terminal.Board() as board:
        for name, spec in specs.items():
            board.stage(name)
            where = (folder / name, data_dir, device, overwrite)
            options = Options(*where, report=board.report, command=common.command_line())
            runs.append(compute(spec, options))
        labels = ("Before fine-tuning", "After fine-tuning")
        results = [common.labeled(run, text) for run, text in zip(runs, labels, strict=True)]
        save_tensors(tuned, runs[-1].state(0))
        write_report(results, page, title=specs["after"].name)
    terminal.show_summary(summary_rows(results))
    common.say(f"\nReport: {page.resolve()}\nWeights: {tuned.resolve()}")


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
            parser=common.positive,
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
    weights: Weights = None,
    classes: Annotated[
        str | None, typer.Option(metavar="NUMBER|NAME,...", help="Its classes: 10, or cat,dog.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Data set of the model, for its image size and classes."),
    ] = None,
    family: Annotated[
        str | None, typer.Option(help="Perturbation family with --model; default: pixel.")
    ] = None,
    sigma: common.Sigma = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise with --model.")] = 0,
    precision: Annotated[
        str, typer.Option(help="With --model: auto, float32 or bfloat16.")
    ] = "auto",
    data_dir: common.DataDir = None,
    device: common.Device = "auto",
    code: common.Code = None,
) -> None:
    """Predict one image: its label and certified radius, or abstention."""
    own = {"--weights": weights, "--classes": classes, "--data": data, "--family": family}
    own |= {"--sigma": sigma}
    _check_predictor(run, client, code, model, own)
    path_checks.check_file(image, path_checks.IMAGE)
    from certifl.cli import terminal
    from certifl.experiments.hub import local_folder
    from certifl.experiments.predict import certify_image, certify_image_with
    from certifl.experiments.standalone import perturbation_named

    if run is not None:
        run = local_folder(run) if str(run).startswith("hf:") else run
        answer = certify_image(image, run, client, n, resize, device, code)
        terminal.show_prediction(answer)
        return
    assert model is not None
    from certifl.models import allow_code

    allow_code(model, Path.cwd())
    answer = certify_image_with(
        image,
        model,
        weights,
        perturbation_named(family, sigma),
        n=n or _PREDICT_VOTES,
        data=data,
        data_dir=data_dir,
        classes=classes,
        seed=seed,
        precision=precision,
        resize=resize,
        device=device,
    )
    terminal.show_prediction(answer)


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
            path_checks.check_model_folder(run)
        return
    if client is not None or code is not None:
        raise InputError("--client and --code are about a run; leave them out with --model.")
    weights = own["--weights"]
    if isinstance(weights, Path):
        path_checks.check_file(weights, path_checks.WEIGHTS)
    elif not str(model).startswith("hf:"):
        raise InputError("--model needs --weights FILE: a network without training says nothing.")


def push(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run, or a client's folder CLIENT/studies/ID.")
    ],
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="hf:OWNER/NAME, or a new folder.")
    ],
    client: Annotated[
        int | None, typer.Option(min=0, help="Client whose model is published; default: 0.")
    ] = None,
    share: Annotated[
        str,
        typer.Option(help="curve, or rows: also every test image's certificate with its votes."),
    ] = "curve",
    public: Annotated[
        bool, typer.Option("--public", help="Make the repository on the hub public.")
    ] = False,
    code: common.Code = None,
) -> None:
    """Publish a client's deployed model, with a card, on the Hugging Face hub or in a folder."""
    path_checks.check_model_folder(run)
    from certifl.experiments.hub import push as push_model

    common.say(f"Model and card: {push_model(run, target, client, share, public, code)}")
