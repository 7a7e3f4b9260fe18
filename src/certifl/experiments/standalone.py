"""Certificates outside a study: for a model somebody already has, or for one image."""

from __future__ import annotations

import dataclasses
import logging
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from certifl.certification import Certificates, certify
from certifl.certification.arithmetic import Arithmetic, Trial, device_name, ready
from certifl.certification.network import Network, choose_device
from certifl.certification.settings import Settings
from certifl.data import Dataset, changes_of, choose, load, read_image, to_float
from certifl.errors import InputError, StoreError, StoreMismatch
from certifl.models import build
from certifl.models.weights import load_weights, read_checkpoint, weights_in
from certifl.module_copies import evaluating
from certifl.path_checks import WEIGHTS, check_certificate_file, check_file
from certifl.perturbations import Perturbation, PixelNoise, describe, from_description
from certifl.runs.atomic import load_tensors
from certifl.runs.folder import RunFolder
from certifl.spec import Spec
from certifl.study.certify import (
    Job,
    calibration,
    calibration_images,
    certify_job,
    stored_arithmetic,
)
from certifl.study.client_study import KeptStudy
from certifl.study.opened_run import data_folder, finished_run, open_data, run_spec, trained_model

_log = logging.getLogger(__name__)

Report = Callable[[str, int, int, str], None]
_DEFAULT_SIGMA = 0.25


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
        precision, device, out, overwrite: as on the command line.
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
    overwrite: bool
    shard: Shard = WHOLE
    code: Path | None = None


def certify_standalone(request: Request, report: Report | None = None) -> Certificates:
    """Certify test images; votes are kept beside `out` until it is written, so the call resumes.

    Raises:
        InputError: the options do not fit together. StoreMismatch: `out` exists already.
        StoreError: `out` cannot be written; the votes are kept.
    """
    _check_options(request)
    perturbation = _perturbation(request)
    model, dataset, index = _from_run(request) if request.run else _from_model(request)
    index = request.shard.of(index)
    part = dataset.test.take(index)
    saved = request.out.with_name(f".{request.out.name}.votes.safetensors")
    training = _training(request, dataset)
    job = Job(request.client, index, part.images, part.labels.numpy(), saved, training)
    network = _network(request, model, job, perturbation)
    told = None if report is None else lambda done, all_: report("certifying", done, all_, "votes")
    made = certify_job(
        job,
        model,
        network,
        perturbation,
        request.settings,
        request.seed,
        dataset.fingerprint,
        told,
    )
    if request.shard != WHOLE:
        facts = {**made.conditions, "shard": str(request.shard)}
        made = dataclasses.replace(made, conditions=facts)
    try:
        made.save(request.out)
    except OSError as error:
        raise StoreError(
            f"Cannot write {request.out}: {error}. All votes are kept: free some space, then "
            "repeat the command."
        ) from error
    saved.unlink(missing_ok=True)
    return made


def _network(request: Request, model: nn.Module, job: Job, perturbation: Perturbation) -> Network:
    """The model ready to vote; "auto" is what the votes at hand or the run chose, or measured.

    Raises:
        InputError: a shard would have to choose alone.
    """
    trial = Trial.of(perturbation, request.settings, request.seed, len(job.index))
    choice = stored_arithmetic(job.saved)
    if choice is None and request.run is not None:
        known = finished_run(request.run).manifest().get("arithmetic", {})
        choice = Arithmetic.read(known.get(device_name(choose_device(request.device))))
    if choice is None and request.precision == "auto" and request.shard != WHOLE:
        raise InputError(
            "--shard needs --precision float32 or bfloat16 (or int8): what auto stands for is "
            "measured, and each shard could measure another. Only a run that was certified with "
            'precision = "auto" on such a device knows its choice.'
        )
    images, scales = to_float(job.images[: max(1, trial.images)]), calibration(job, trial)
    where = (request.device, request.precision)
    return ready(model, images, trial, *where, stored=choice, calibration=scales)


def _training(request: Request, dataset: Dataset) -> Tensor | None:
    """Training images that fix the ranges of int8: the client's own, or of the whole data set."""
    if request.precision != "int8":
        return None
    held = np.arange(len(dataset.train))
    if request.run is not None:
        folder = finished_run(request.run)
        _, partition = open_data(run_spec(folder), data_folder(folder, request.data_dir))
        held = partition.clients[request.client].train
    return calibration_images(dataset, held, request.seed, request.client)


def _check_options(request: Request) -> None:
    check_certificate_file(request.out, request.overwrite)
    if request.shard != WHOLE and request.out.suffix != ".parquet":
        raise InputError("--shard needs an --out file .parquet: `certifl merge` reads no other.")
    if (request.run is None) == (request.model is None):
        raise InputError(
            "Give either --run RUN (and --client), or --model module:function with --weights "
            "and --data."
        )
    if request.run is not None and request.weights is not None:
        raise InputError("--run brings its own weights; leave out --weights.")
    if request.run is None and request.code is not None:
        raise InputError(
            "--code says where a run's own network is; --model is found where you are."
        )
    if request.run is None and request.client:
        raise InputError("--client names a client of a run, so it needs --run.")


def _perturbation(request: Request) -> Perturbation:
    """The one asked for; what is not said is taken from the run, or is pixel noise of 0.25."""
    if request.family is not None:
        return from_description(
            {
                "family": request.family,
                **({} if request.sigma is None else {"sigma": request.sigma}),
            }
        )
    own: Perturbation = PixelNoise(_DEFAULT_SIGMA)
    if request.run is not None:
        own = _certified_by(run_spec(finished_run(request.run)), request.client)
    if request.sigma is None:
        return own
    return from_description({**describe(own), "sigma": request.sigma})


def _certified_by(spec: Spec, client: int) -> Perturbation:
    """What a client of a run certifies."""
    own = spec.perturbations()[client] if client < spec.clients.count else spec.perturbation()
    if own is None:
        raise InputError(
            f"Client {client} of this run certifies nothing, so there is no perturbation to take "
            "from it. Ask another client, or `certifl certify` with --family and --sigma."
        )
    return own


def _from_run(request: Request) -> tuple[nn.Module, Dataset, np.ndarray]:
    assert request.run is not None
    folder = finished_run(request.run)
    model, spec = _model_of(folder, request.client, request.code)
    if request.data is not None and request.data != spec.data.name:
        raise InputError(f"--run brings its own data ({spec.data.name}); leave out --data.")
    dataset, partition = open_data(spec, data_folder(folder, request.data_dir))
    if dataset.fingerprint != folder.data()["fingerprint"]:
        raise StoreMismatch(
            f"The data set {spec.data.name!r} holds other images than the run in {folder.path} "
            "was made with. Give --data-dir with the data it was made with."
        )
    held = partition.clients[request.client].test
    return model, dataset, choose(held, request.images, request.seed, request.client)


def _from_model(request: Request) -> tuple[nn.Module, Dataset, np.ndarray]:
    assert request.model is not None
    if request.data is None or request.weights is None:
        raise InputError("--model needs --weights FILE and --data NAME.")
    dataset = load(request.data, request.data_dir)
    model = build(
        request.model,
        dataset.in_channels,
        dataset.num_classes,
        request.seed,
        image_size=dataset.image_size,
    )
    misfit = f"{request.weights} does not fit {request.model}"
    if change := load_weights(model, _weights(request.weights), misfit):
        _log.warning("%s: %s", request.weights, change)
    everything = np.arange(len(dataset.test))
    return evaluating(model), dataset, choose(everything, request.images, request.seed, 0)


def _weights(path: Path) -> Mapping[str, Tensor]:
    check_file(path, WEIGHTS)
    if path.suffix == ".safetensors":
        try:
            return load_tensors(path)
        except StoreError as error:
            raise InputError(
                f"{error} It is no whole file of weights: save model.state_dict() anew with "
                "safetensors.torch.save_file."
            ) from error
    _require_plain(path)
    return weights_in(read_checkpoint(path), str(path))


def _require_plain(path: Path) -> None:
    """Refuse a file of weights that expands: torch writes them without compression."""
    try:
        with zipfile.ZipFile(path) as packed:
            inside = sum(entry.file_size for entry in packed.infolist())
    except (OSError, ValueError, zipfile.BadZipFile):
        return  # older files of torch are no archive; what is damaged is refused when it is read
    if inside > path.stat().st_size:
        raise InputError(
            f"{path} would expand to {inside:,} bytes. Save model.state_dict() with torch.save."
        )


def _model_of(folder: RunFolder, client: int, code: Path | None) -> tuple[nn.Module, Spec]:
    spec = run_spec(folder)
    if client >= spec.clients.count:
        raise InputError(
            f"--client {client}: the run has the clients 0 to {spec.clients.count - 1}."
        )
    return trained_model(folder, spec, client, code), spec


@dataclass(frozen=True)
class Answer:
    """What the smoothed classifier says of one image, and how sure.

    Attributes:
        certificates: one row. class_name: of the predicted class, "" where it abstained.
        client: whose model answered. deploys: which model that is, in words.
        changed: what was done to the file's pixels before, in words; "" = nothing.
    """

    certificates: Certificates
    class_name: str
    client: int
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
) -> Answer:
    """Certify one image with the model that a client of a run deploys.

    Args:
        path: the image.
        run: a finished run, or a client's own folder of a study, `CLIENT/studies/ID`.
        client: whose model answers; None = client 0 of a run, or the one whose folder it is.
        n: votes; None = the run's own. resize: fit the image to the model. device: as elsewhere.
        code: folder with the network's own code.
    """
    model, spec, about = _deployed_by(run, client, code)
    own, channels, size = int(about["client"]), about["in_channels"], about["image_size"]
    image = read_image(path, channels, size, resize=resize)
    wanted = spec.certification
    perturbation, settings = _certified_by(spec, own), wanted.settings(own)
    made = certify(
        model,
        image,
        perturbation,
        n0=wanted.n0,
        n=wanted.n if n is None else n,
        alpha=wanted.alpha,
        estimator=wanted.estimator,
        radii=settings.radii,
        seed=spec.seed,
        precision=wanted.precision,
        device=device,
        reach=settings.reach,
        keep=wanted.keep,
        calibration=_scales(run, own) if wanted.precision == "int8" else None,
    )
    label = int(made.predicted[0])
    name = about["class_names"][label] if label >= 0 else ""
    changed = changes_of(path, channels, size)
    return Answer(made, name, own, about["deploys"], changed)


def _scales(run: Path, client: int) -> Mapping[str, Any]:
    """The scales that a client of a run certified with, as its record holds them."""
    return finished_run(run).load_certificates().conditions["quantization"][str(client)]


def _deployed_by(
    run: Path, asked: int | None, code: Path | None
) -> tuple[nn.Module, Spec, dict[str, Any]]:
    """A client's model, its study, and what it is used with."""
    kept = KeptStudy(run)
    if kept.exists():
        spec, about = kept.spec(), kept.about(asked)
        return kept.model(spec, about, code), spec, about
    folder, client = finished_run(run), asked or 0
    model, spec = _model_of(folder, client, code)
    data = folder.fact("data")
    about = {name: data[name] for name in ("in_channels", "class_names")}
    about |= {"client": client, "deploys": folder.fact("deploys")}
    return model, spec, {**about, "image_size": tuple(data["image_size"])}


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


def merge_shards(files: Sequence[Path]) -> Certificates:
    """Put all shards of one certification together, rows in the order of the uncut one.

    Raises:
        InputError: a file is no shard. StoreMismatch: shards are missing, given twice, or of
            different certifications.
    """
    held = {path: _loaded(path) for path in files}
    by_number: dict[int, tuple[Path, Certificates]] = {}
    for path, part in held.items():
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
    return _interleaved([by_number[number][1] for number in range(1, count + 1)])


def save_merged(certificates: Certificates, out: Path, overwrite: bool) -> Certificates:
    """Write merged certificates; gives them back.

    Raises:
        InputError: `out` is of another kind. StoreMismatch: it exists already.
        StoreError: it cannot be written.
    """
    if out.suffix not in (".parquet", ".tsv"):
        raise InputError(f"--out must be a file .parquet or .tsv; got {str(out)!r}.")
    if out.exists() and not overwrite:
        raise StoreMismatch(f"{out} exists already; give --overwrite to replace it.")
    try:
        certificates.save(out)
    except OSError as error:
        raise StoreError(f"Cannot write {out}: {error}. The shards are as they were.") from error
    return certificates


def _loaded(path: Path) -> Certificates:
    if path.suffix != ".parquet":
        raise InputError(f"{path} is no shard: shards are .parquet files of `certifl certify`.")
    made = Certificates.load(path)
    if "shard" not in made.conditions:
        raise InputError(f"{path} is no shard: it was certified without --shard.")
    return made


def _check_alike(
    first: Path, facts: Mapping[str, Any], path: Path, others: Mapping[str, Any]
) -> None:
    """Both are of one certification, cut into as many shards."""
    cuts = [read_shard(held["shard"]).count for held in (facts, others)]
    differing = sorted(
        key
        for key in facts.keys() | others.keys()
        if key not in _OF_THE_NODE and facts.get(key) != others.get(key)
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
    facts = {key: value for key, value in joined.conditions.items() if key != "shard"}
    for key in _OF_THE_NODE:
        seen = [part.conditions.get(key) for part in parts]
        if key != "shard" and any(value != seen[0] for value in seen):
            facts[key] = [value for i, value in enumerate(seen) if value not in seen[:i]]
    return dataclasses.replace(joined.select(np.argsort(rows)), conditions=facts)
