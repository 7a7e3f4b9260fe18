"""Certificates outside a study: for an existing model, in shards, and after fine-tuning it."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from certifl.certification import Certificates
from certifl.certification.arithmetic import Trial
from certifl.certification.network import Network
from certifl.certification.settings import Settings
from certifl.data import Dataset, choose, load
from certifl.errors import InputError, SpecError, StoreError, StoreMismatch
from certifl.models import build
from certifl.module_copies import evaluating
from certifl.perturbations import DEFAULT, Perturbation, describe, from_description
from certifl.progress import StageCallback
from certifl.safe_io import parse_toml
from certifl.spec import Spec, with_settings
from certifl.study.certify import (
    Job,
    VoteSource,
    calibration_images,
    certify_job,
    job_network,
    recorded_arithmetic,
    stored_arithmetic,
)
from certifl.study.opened_run import OpenRun, certified_by
from certifl.study.setup import begin_with


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
        precision, device, out: as on the command line. shard: which part of the images.
        resize, crop, window: what is done to the images; a run brings its own.
        code: as `OpenRun`.
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
        if request.precision == "int8" and run.spec.privacy.kind != "none":
            raise InputError(
                f"The training of {request.run} was private, and int8 votes with ranges of "
                "activations on its training images, which have no noise and stand in the "
                "certificates. Give --precision float32 or bfloat16."
            )
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
            "--code is the folder of a run's own network; --model is imported from the "
            "working directory or PYTHONPATH."
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
    model = trained(request.model, request.weights, ImageKind.of(dataset), request.seed)
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


def trained(name: str, weights: Path | None, images: ImageKind, seed: int) -> nn.Module:
    """A network with its weights, in evaluation mode; one of the hub has its own."""
    classes, names = len(images.class_names), images.class_names
    if weights is None:
        from certifl.models.building import load as load_model  # imports an optional package

        channels, size = images.in_channels, images.image_size
        return load_model(name, channels, classes, size, class_names=names)
    model = build(name, images.in_channels, classes, seed, image_size=images.image_size)
    begin_with(model, weights, name)
    return evaluating(model)


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
        if path.suffix != ".parquet":
            raise InputError(
                f"{path} is not a shard: shards are .parquet files of `certifl certify`."
            )
        part = Certificates.load(path)
        if "shard" not in part.conditions:
            raise InputError(f"{path} is not a shard: it was certified without --shard.")
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
    _save(merged, out, "The shards are unchanged.")
    return merged


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


# Noise-augmented fine-tuning of a user's own weights: a spec with one client, run twice.
#
# <out>/before/, <out>/after/  the given weights, and the fine-tuned ones, certified
# <out>/finetuned.safetensors, <out>/report.html    written by the command line


def finetune_specs(
    model: str,
    weights: Path,
    data: str,
    perturbation: Mapping[str, Any],
    *,
    epochs: int,
    lr: float,
    batch_size: int,
    images: int | None,
    n: int,
    seed: int,
    settings: Sequence[str] = (),
) -> dict[str, Spec]:
    """The two studies by the names of their folders, "before" and "after".

    Args:
        model: a network's name, or the user's own as module:function. weights: its file.
        data: the data set: training images tune, test images are certified.
        perturbation: as in a spec; see `read_perturbation`.
        epochs, lr, batch_size: of fine-tuning. seed: of all random streams.
        images: test images certified; None = all. n: votes of each.
        settings: `key=value` for any other key of the spec.

    Raises:
        SpecError: something that was asked for is not possible; the message names the key.
    """
    values: dict[str, Any] = {
        "name": f"{weights.stem}, fine-tuned",
        "seed": seed,
        "data": {"name": data},
        "clients": {"count": 1},
        "model": {"name": model, "weights": str(weights)},
        "algorithm": {"name": "local"},
        "training": {
            "rounds": epochs,
            "local_epochs": 1,
            "batch_size": batch_size,
            "lr": lr,
            "decay_every": 0,
            "momentum_between_rounds": "keep",
        },
        "augmentation": {"federated": perturbation},
        "certification": {"perturbation": perturbation, "n": n},
    }
    if images is not None:
        values["certification"]["images"] = images
    after = with_settings(values, settings)
    before = with_settings(values, [*settings, "training.rounds=0"])
    return {"before": before, "after": after}


def read_perturbation(text: str, sigma: str | None) -> dict[str, Any]:
    """A perturbation as a spec takes it.

    Args:
        text: FAMILY, FAMILY:SIGMA such as rotation:18deg, or a table as in a spec.
        sigma: of a family that is named alone.

    Raises:
        SpecError: it is none of these, or sigma is missing or given twice.
    """
    if text.lstrip().startswith("{"):
        try:
            table = parse_toml(f"value = {text}")["value"]
        except InputError as error:
            raise SpecError(
                f"--perturbation {text}: this is not a TOML table: {error}."
            ) from error
        return table if sigma is None else {**table, "sigma": sigma}
    family, colon, amount = text.partition(":")
    if bool(colon) == (sigma is not None):
        raise SpecError(
            f"--perturbation {text}: give sigma once, as --perturbation {family.strip()}:SIGMA, "
            f"or --perturbation {family.strip()} --sigma SIGMA."
        )
    given: float | str = amount.strip() if colon else str(sigma)
    with contextlib.suppress(ValueError):  # an angle stays text
        given = float(given)
    return {"family": family.strip(), "sigma": given}
