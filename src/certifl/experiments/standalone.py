"""Certificates outside a study: for an existing model, for one image, in shards."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from certifl.certification import Certificates
from certifl.certification.api import certify
from certifl.certification.arithmetic import Trial
from certifl.certification.network import Network
from certifl.certification.settings import PRECISIONS, Settings
from certifl.data import Dataset, changes_of, choose, load, read_image, shape_of_file
from certifl.data.preparation import AS_THEY_ARE, Preparation
from certifl.errors import InputError, StoreError, StoreMismatch
from certifl.experiments.hub import CARD, CERTIFICATES, check_card
from certifl.models import build
from certifl.module_copies import evaluating
from certifl.perturbations import DEFAULT, Perturbation, describe, from_description
from certifl.progress import StageCallback
from certifl.runs.atomic import read_json
from certifl.study.certify import (
    Job,
    VoteSource,
    calibration_images,
    certify_job,
    job_network,
    recorded_arithmetic,
    stored_arithmetic,
)
from certifl.study.opened_run import OpenRun, certified_by, open_deployed
from certifl.study.setup import begin_with
from certifl.torch_env import one_thread

_MOST_CLASSES = 100_000


@dataclass(frozen=True)
class Shard:
    """Shard `number` (from 1) of `count`."""

    number: int = 1
    count: int = 1

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def of(self, index: np.ndarray) -> np.ndarray:
        """The part of some images that belongs to this shard.

        Raises:
            InputError: there are fewer images than shards.
        """
        if len(index) < self.count:
            raise InputError(
                f"--shard {self}: {len(index)} images cannot be cut into {self.count} shards; "
                "take fewer shards or more --images."
            )
        return index[self.number - 1 :: self.count]


WHOLE = Shard()


@dataclass(frozen=True)
class Request:
    """What `certifl certify` was asked for.

    Attributes:
        model, weights: a network and its weights; or
        run, client: the model that a client of a run deploys.
        data, data_dir: the data set whose test images are certified; a run brings its own.
        family, sigma: the perturbation; without them the run's own, or pixel noise of 0.25.
        images: how many test images, a fixed random choice by `seed`.
        settings: how votes become certificates.
        precision, device, out: as on the command line.
        resize, crop, window: what is done to the images; a run brings its own.
        shard: which part of the images.
        code: the folder that holds a run's own network, which its user trusts.
    """

    model: str | None
    weights: Path | None
    run: Path | None
    client: int
    data: str | None
    family: str | None
    sigma: str | None
    images: int
    settings: Settings
    seed: int
    precision: str
    data_dir: Path | None
    device: str
    out: Path
    shard: Shard = WHOLE
    code: Path | None = None
    resize: int | None = None
    crop: str | None = None
    window: tuple[float, float] | None = None


def certify_standalone(request: Request, report: StageCallback | None = None) -> Certificates:
    """Certify test images; votes are saved beside `out` until it is written, so the call resumes.

    Raises:
        InputError: the options do not fit together.
        StoreError: `out` cannot be written; the votes are saved.
    """
    _check_options(request)
    if request.run is None:
        run, certified = None, None
        model, dataset, index = _from_model(request)
    else:
        run = OpenRun(request.run, request.data_dir, request.code)
        run.require_finished()
        certified = certified_by(run.spec, request.client)
        model, dataset, index = _from_run(request, run)
    perturbation = perturbation_named(request.family, request.sigma, certified)
    index = request.shard.of(index)
    part, training = dataset.test.take(index), None
    if request.precision == "int8":  # whose ranges the client's own images fix, or all
        own = np.arange(len(dataset.train))
        own = own if run is None else run.partition.clients[request.client].train
        training = calibration_images(dataset, own, request.seed, request.client)
    saved = request.out.with_name(f".{request.out.name}.votes.safetensors")
    job = Job(request.client, index, part.images, part.labels.numpy(), saved, training)
    trial = Trial.of(perturbation, request.settings, request.seed, len(job.index))
    network = _network(request, run, model, job, trial)
    source = VoteSource(perturbation, request.settings, request.seed, dataset.fingerprint)
    progress = None
    if report is not None:
        progress = lambda done, total: report("certifying", done, total, "votes")  # noqa: E731
    certificates = certify_job(job, model, network, source, progress)
    if request.shard != WHOLE:
        metadata = {**certificates.conditions, "shard": str(request.shard)}
        certificates = dataclasses.replace(certificates, conditions=metadata)
    advice = "All votes are saved: free some space, then repeat the command."
    _save(certificates, request.out, advice)
    saved.unlink(missing_ok=True)
    return certificates


def _save(certificates: Certificates, out: Path, advice: str) -> None:
    try:
        certificates.save(out)
    except OSError as error:
        raise StoreError(f"Cannot write {out}: {error}. {advice}") from error


def _network(
    request: Request, run: OpenRun | None, model: nn.Module, job: Job, trial: Trial
) -> Network:
    """The model prepared for voting; "auto" is what saved votes or the run chose, or measured."""
    choice = stored_arithmetic(job.saved)
    if choice is None and run is not None:
        choice = recorded_arithmetic(run, request.device)
    if choice is None and request.precision == "auto" and request.shard != WHOLE:
        raise InputError(
            "--shard needs --precision float32 or bfloat16 (or int8): what auto stands for is "
            "measured, and each shard could measure another. Only a run that was certified with "
            'precision = "auto" on such a device knows its choice.'
        )
    return job_network(job, model, trial, request.device, request.precision, choice)


def _check_options(request: Request) -> None:
    if request.shard != WHOLE and request.out.suffix != ".parquet":
        raise InputError("--shard needs an --out file .parquet: `certifl merge` reads no other.")
    if (request.run is None) == (request.model is None):
        raise InputError(
            "Give either --run RUN (and --client), or --model module:function with --weights "
            "and --data."
        )
    if request.run is not None and request.weights is not None:
        raise InputError("--run has its own weights; leave out --weights.")
    if request.run is None and request.code is not None:
        raise InputError(
            "--code says where a run's own network is; --model is found where you are."
        )
    if request.run is not None and (request.resize or request.crop or request.window):
        raise InputError("--run prepares its images as its spec says: leave out --resize, ...")
    if request.run is None and request.client:
        raise InputError("--client names a client of a run, so it needs --run.")


def perturbation_named(
    family: str | None, sigma: str | None, own: Perturbation | None = None
) -> Perturbation:
    """The one that a family and sigma name; without a family `own`, or pixel noise of 0.25.

    Raises:
        InputError: there is no such family, or sigma is not an amount in its unit.
    """
    given = {} if sigma is None else {"sigma": sigma}
    if family is not None:
        return from_description({"family": family, **given})
    usual = from_description(DEFAULT) if own is None else own
    return from_description({**describe(usual), **given}) if given else usual


def _from_run(request: Request, run: OpenRun) -> tuple[nn.Module, Dataset, np.ndarray]:
    model = run.deployed(request.client).model
    if request.data is not None and request.data != run.spec.data.name:
        raise InputError(f"--run has its own data ({run.spec.data.name}); leave out --data.")
    own = run.partition.clients[request.client].test
    return model, run.dataset, choose(own, request.images, request.seed, request.client)


def _from_model(request: Request) -> tuple[nn.Module, Dataset, np.ndarray]:
    assert request.model is not None
    on_hub = request.model.startswith("hf:")
    if request.data is None or (request.weights is None and not on_hub):
        raise InputError("--model needs --weights FILE and --data NAME.")
    dataset = load(
        request.data,
        request.data_dir,
        resize=request.resize,
        crop=request.crop,
        window=request.window,
    )
    model = _trained(request.model, request.weights, ImageKind.of(dataset), request.seed)
    everything = np.arange(len(dataset.test))
    return model, dataset, choose(everything, request.images, request.seed, 0)


@dataclass(frozen=True)
class ImageKind:
    """What a network takes: channels, height and width, and what its classes are called."""

    in_channels: int
    image_size: tuple[int, int]
    class_names: tuple[str, ...]

    @classmethod
    def of(cls, dataset: Dataset) -> ImageKind:
        """The images and classes of a data set."""
        return cls(dataset.in_channels, dataset.image_size, tuple(dataset.class_names))


def _trained(name: str, weights: Path | None, images: ImageKind, seed: int) -> nn.Module:
    """A network with its weights, in evaluation mode; one of the hub has its own."""
    classes, names = len(images.class_names), images.class_names
    if weights is None:
        from certifl.models.building import load as load_model  # imports an optional package

        channels, size = images.in_channels, images.image_size
        return load_model(name, channels, classes, size, class_names=names)
    model = build(name, images.in_channels, classes, seed, image_size=images.image_size)
    begin_with(model, weights, name)
    return evaluating(model)


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
        run: a finished run, or a client's own folder of a study, `CLIENT/studies/ID`.
        client: whose model predicts; None = client 0 of a run, or the one whose folder it is.
        n: votes; None = the run's own. resize: fit the image to the model. device: as elsewhere.
        code: folder with the network's own code.
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
        path: the image.
        model: name of a network, or module:function. weights: its file.
        perturbation: as `certifl certify` takes it. n: votes.
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
        images = ImageKind.of(load(data, data_dir))
    else:
        images = ImageKind(*shape_of_file(path), _class_names(str(classes)))
    network = _trained(model, weights, images, seed)
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


# A certification cut into shards, for a cluster's job arrays, and put together again.
#
# Shard i of n certifies every n-th image, from the i-th. Votes are a function of (seed, image), so
# however the work is cut, the certificates are the same.


# What may differ from node to node; everything else must agree.
_OF_THE_NODE = ("device", "threads", "versions", "batch_size", "shard")


def read_shard(text: str) -> Shard:
    """A shard written as i/n, from 1/n to n/n.

    Raises:
        InputError: it is not of this form.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    shard = Shard(int(found[1]), int(found[2])) if found else None
    if shard is None or not 1 <= shard.number <= shard.count:
        raise InputError(f"--shard must be i/n with i from 1 to n, such as 3/8; got {text!r}.")
    return shard


def merge_shards(files: Sequence[Path], out: Path) -> Certificates:
    """Put all shards of one certification together, rows in the order of the uncut one.

    Args:
        files: of all shards. out: where the certificates are written.

    Raises:
        InputError: a file is not a shard. StoreMismatch: shards are missing, given twice, or of
            different certifications. StoreError: `out` cannot be written.
    """
    by_number: dict[int, tuple[Path, Certificates]] = {}
    for path in dict.fromkeys(files):
        part = _loaded(path)
        number = read_shard(part.conditions["shard"]).number
        if number in by_number:
            raise StoreMismatch(f"{path} and {by_number[number][0]} are both shard {number}.")
        by_number[number] = (path, part)
    if not by_number:
        raise InputError("Give the files of all shards of one certification.")
    first_path, first = next(iter(by_number.values()))
    for path, part in by_number.values():
        _check_alike(first_path, first.conditions, path, part.conditions)
    count = read_shard(first.conditions["shard"]).count
    if missing := sorted(set(range(1, count + 1)) - by_number.keys()):
        named = ", ".join(f"{number}/{count}" for number in missing)
        raise StoreMismatch(f"These shards are missing: {named}. Certify them, then merge all.")
    merged = _interleaved([by_number[number][1] for number in range(1, count + 1)])
    _save(merged, out, "The shards are as they were.")
    return merged


def _loaded(path: Path) -> Certificates:
    if path.suffix != ".parquet":
        raise InputError(f"{path} is not a shard: shards are .parquet files of `certifl certify`.")
    loaded = Certificates.load(path)
    if "shard" not in loaded.conditions:
        raise InputError(f"{path} is not a shard: it was certified without --shard.")
    return loaded


def _check_alike(
    first: Path, metadata: Mapping[str, Any], path: Path, others: Mapping[str, Any]
) -> None:
    """Both are of one certification, cut into as many shards."""
    cuts = [read_shard(each["shard"]).count for each in (metadata, others)]
    differing = sorted(
        key
        for key in metadata.keys() | others.keys()
        if key not in _OF_THE_NODE and metadata.get(key) != others.get(key)
    )
    if cuts[0] != cuts[1]:
        differing.insert(0, "the number of shards")
    if differing:
        raise StoreMismatch(
            f"{path} and {first} are of different certifications: they differ in "
            f"{', '.join(differing)}. Merge only shards of one command."
        )


def _interleaved(parts: Sequence[Certificates]) -> Certificates:
    joined = Certificates.concatenate(parts)
    rows = np.concatenate([i + len(parts) * np.arange(len(p.index)) for i, p in enumerate(parts)])
    if not np.array_equal(np.sort(rows), np.arange(len(rows))):
        raise StoreMismatch("The shards are of different lengths: they had different --images.")
    metadata = {key: value for key, value in joined.conditions.items() if key != "shard"}
    for key in _OF_THE_NODE:
        seen = [part.conditions.get(key) for part in parts]
        if key != "shard" and any(value != seen[0] for value in seen):
            metadata[key] = [value for i, value in enumerate(seen) if value not in seen[:i]]
    return dataclasses.replace(joined.select(np.argsort(rows)), conditions=metadata)
