"""One image, predicted with a deployed model, or with a network that no study trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from certifl.certification import Certificates
from certifl.certification.api import certify
from certifl.certification.settings import PRECISIONS
from certifl.data import changes_of, read_image, shape_of_file
from certifl.data import load as load_data
from certifl.data.preparation import AS_THEY_ARE, Preparation
from certifl.errors import InputError
from certifl.experiments.hub import CARD, CERTIFICATES, check_card
from certifl.experiments.standalone import ImageKind, trained
from certifl.perturbations import Perturbation
from certifl.runs.atomic import read_json
from certifl.study.certify import recorded_arithmetic
from certifl.study.opened_run import OpenRun, open_deployed
from certifl.torch_env import one_thread

_MOST_CLASSES = 100_000


@dataclass(frozen=True)
class Prediction:
    """The smoothed classifier's prediction for one image.

    Attributes:
        certificates: one row. class_name: of the predicted class, "" where it abstained.
        client: whose model predicted; None = that of no study. deploys: which model, in words.
        changed: how the file's pixels were converted, in words; "" = not at all.
    """

    certificates: Certificates
    class_name: str
    client: int | None
    deploys: str
    changed: str = ""


def certify_image(
    path: Path,
    run: Path,
    client: int | None,
    n: int | None,
    resize: bool,
    device: str,
    code: Path | None = None,
) -> Prediction:
    """Certify one image with the model that a client of a run deploys.

    Args:
        path: the image.
        run, client, code: as `open_deployed`, or the folder of a pushed model.
        n: votes; None = the run's own. resize: fit the image to the model. device: as elsewhere.
    """
    used, opened = open_deployed(run, client, code)
    if opened is None and (run / CARD).is_file():
        check_card(run, used.model)
    prepare, study = used.spec.data.preparation(), used.spec.certification
    image = read_image(path, used.in_channels, used.image_size, resize, prepare)
    settings, precision = study.settings(used.client), study.precision
    choice, scales = None, None
    if precision == "auto":
        if opened is None:
            precision = _recorded_precision(run)
        else:
            choice = recorded_arithmetic(opened, device)
    if study.precision == "int8":
        certified = opened or OpenRun(run)  # a client's own folder has its certificates, too
        scales = certified.certificates.conditions["quantization"][str(used.client)]
    with one_thread(choice is not None and choice.threads == 1):
        certificates = certify(
            used.model,
            image,
            used.perturbation,
            n0=study.n0,
            n=study.n if n is None else n,
            alpha=study.alpha,
            estimator=study.estimator,
            radii=settings.radii,
            seed=used.spec.seed,
            precision=precision if choice is None else choice.precision,
            device=device,
            batch_size="auto" if choice is None else choice.batch_size,
            reach=settings.reach,
            keep=study.keep,
            calibration=scales,
        )
    images = ImageKind(used.in_channels, used.image_size, used.class_names)
    return _prediction(path, certificates, images, used.client, used.deploys, prepare)


def _prediction(
    path: Path,
    certificates: Certificates,
    images: ImageKind,
    client: int | None,
    deploys: str,
    prepare: Preparation = AS_THEY_ARE,
) -> Prediction:
    label = int(certificates.predicted[0])
    name = images.class_names[label] if label >= 0 else ""
    changed = changes_of(path, images.in_channels, images.image_size, prepare)
    return Prediction(certificates, name, client, deploys, changed)


def certify_image_with(
    path: Path,
    model: str,
    weights: Path | None,
    perturbation: Perturbation,
    *,
    n: int,
    data: str | None = None,
    data_dir: Path | None = None,
    classes: str | None = None,
    seed: int = 0,
    precision: str = "auto",
    resize: bool = False,
    device: str = "auto",
) -> Prediction:
    """Certify one image with a network that no study trained.

    Args:
        path: the image. n: votes.
        model: name of a network, or module:function. weights: its file.
        data, data_dir: a data set whose channels, image size and classes are the network's; or
        classes: their number, or their names with commas between; the image gives the rest.
        resize: fit the image to the network. seed, precision, device: as elsewhere.

    Raises:
        InputError: neither a data set nor classes are named, or both.
        InputError, ModelError: the image, the network or its weights do not fit.
    """
    if (data is None) == (classes is None):
        raise InputError(
            "--model needs to know its classes: give --classes with their number or names, "
            "such as 10 or cat,dog, or --data with the data set it was trained on."
        )
    if data is not None:
        images = ImageKind.of(load_data(data, data_dir))
    else:
        images = ImageKind(*shape_of_file(path), _class_names(str(classes)))
    network = trained(model, weights, images, seed)
    image = read_image(path, images.in_channels, images.image_size, resize=resize)
    certificates = certify(
        network, image, perturbation, n=n, seed=seed, precision=precision, device=device
    )
    deploys = model if weights is None else f"{model} with {weights}"
    return _prediction(path, certificates, images, None, deploys)


def _class_names(text: str) -> tuple[str, ...]:
    """Names from a number, 0 to n - 1, or from a list."""
    names = tuple(name.strip() for name in text.split(","))
    if text.strip().isdigit() and int(text) <= _MOST_CLASSES:
        names = tuple(map(str, range(int(text))))
    if len(names) < 2 or not all(names):
        raise InputError(
            f"--classes is a number from 2 to {_MOST_CLASSES:,}, or at least two names; got "
            f"{text!r}."
        )
    return names


def _recorded_precision(path: Path) -> str:
    """The precision in which a client's own or pushed model was certified, else "auto".

    Another one is another network, which the certificates say nothing of.
    """
    rows, card = path / CERTIFICATES, path / CARD
    stored = Certificates.load(rows).conditions if rows.is_file() else {}
    if not stored and card.is_file():
        stored = read_json(card)
    recorded = stored.get("precision") if isinstance(stored, Mapping) else None
    return recorded if isinstance(recorded, str) and recorded in PRECISIONS else "auto"
