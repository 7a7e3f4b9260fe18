"""Commands about one model or one image: certify, merge, predict.

Heavy imports happen inside the commands, so that help and errors of usage answer at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from certifl.cli.common import (
    Code,
    DataDir,
    Device,
    Family,
    OverwriteFile,
    Sigma,
    interruptible,
    positive,
    say,
    whole,
)
from certifl.requests import (
    IMAGE,
    SHARD,
    WEIGHTS,
    check_certificate_file,
    check_data_folder,
    check_file,
    check_run,
)

__all__ = ["certify", "merge", "predict"]


def certify(
    model: Annotated[
        str | None,
        typer.Option(
            help="Your own network as module:function, or a model's name; needs --weights, --data."
        ),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help=".safetensors, or .pt with weights.")
    ] = None,
    run: Annotated[Path | None, typer.Option(help="Take the model of a run instead.")] = None,
    client: Annotated[int, typer.Option(min=0, help="Which client of the run.")] = 0,
    data: Annotated[str | None, typer.Option(help="Data set whose test images are used.")] = None,
    family: Family = None,
    sigma: Sigma = None,
    images: Annotated[
        int,
        typer.Option(
            parser=positive, metavar="NUMBER", help="Test images, a fixed random choice."
        ),
    ] = 100,
    estimator: Annotated[str, typer.Option(help="`certifl list` names them.")] = "sequential",
    n0: Annotated[
        int,
        typer.Option("--n0", parser=whole, metavar="VOTES", help="Votes that choose the class."),
    ] = 100,
    n: Annotated[
        int, typer.Option("--n", parser=whole, metavar="VOTES", help="Fresh votes that bound it.")
    ] = 100_000,
    alpha: Annotated[float, typer.Option(help="Probability of a wrong certificate.")] = 1e-3,
    keep: Annotated[
        str, typer.Option(help="What stopping early keeps: certificates, or (cheaper) the curve.")
    ] = "certificates",
    seed: Annotated[int, typer.Option(min=0, help="Of the noise and the choice of images.")] = 0,
    precision: Annotated[
        str, typer.Option(help="auto, float32, bfloat16, or either with -compiled.")
    ] = "auto",
    data_dir: DataDir = None,
    device: Device = "auto",
    out: Annotated[Path, typer.Option("--out", help=".parquet or .tsv")] = Path(
        "certificates.parquet"
    ),
    overwrite: OverwriteFile = False,
    shard: Annotated[
        str, typer.Option(help="i/n: every n-th image from the i-th; `certifl merge` joins them.")
    ] = "1/1",
    code: Code = None,
) -> None:
    """Certify a model you already have, or the model a client of a run deploys."""
    check_certificate_file(out, overwrite)
    check_data_folder(data_dir)
    if weights is not None:
        check_file(weights, WEIGHTS)
    if run is not None:
        check_run(run)
    from certifl import terminal
    from certifl.certification.settings import Settings
    from certifl.experiments.shards import read_shard
    from certifl.experiments.standalone import Request, certify_standalone
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
        list[Path], typer.Argument(metavar="SHARD...", help="All files of `certify --shard i/n`.")
    ],
    out: Annotated[Path, typer.Option("--out", help=".parquet or .tsv")] = Path(
        "certificates.parquet"
    ),
    overwrite: OverwriteFile = False,
) -> None:
    """Put the shards of one certification together: the same file, however the work was cut."""
    check_certificate_file(out, overwrite)
    for shard in shards:
        check_file(shard, SHARD)
    from certifl import terminal
    from certifl.experiments.shards import merge_shards, save_merged

    certificates = save_merged(merge_shards(shards), out, overwrite)
    terminal.show_certificates(certificates)
    say(f"\nCertificates: {out.resolve()}")


def predict(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="A PNG or JPEG file.")],
    run: Annotated[
        Path,
        typer.Option(
            help="The run whose model answers, or a client's own folder CLIENT/studies/ID."
        ),
    ],
    client: Annotated[
        int | None, typer.Option(min=0, help="Which client asks; 0 where a run has several.")
    ] = None,
    n: Annotated[
        int | None,
        typer.Option(
            "--n", parser=positive, metavar="VOTES", help="Votes; the run's own by default."
        ),
    ] = None,
    resize: Annotated[bool, typer.Option("--resize", help="Fit the image to the model.")] = False,
    device: Device = "auto",
    code: Code = None,
) -> None:
    """Label of one image with its certified radius, or abstained, and what that means."""
    check_run(run)
    check_file(image, IMAGE)
    from certifl import terminal
    from certifl.experiments.standalone import certify_image

    terminal.show_prediction(certify_image(image, run, client, n, resize, device, code))
