"""Certificates of the clients' own test images, resumable vote by vote."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from certifl.certification import Certificates, conditions, counts
from certifl.certification import counts as engine
from certifl.certification.arithmetic import (
    Arithmetic,
    Trial,
    choose_arithmetic,
    device_name,
    in_arithmetic,
    loses,
    ready,
)
from certifl.certification.certificates import Predictions
from certifl.certification.counts import Votes
from certifl.certification.network import Network, choose_device, prepare
from certifl.certification.quantization import CALIBRATION_IMAGES, Calibration
from certifl.certification.sampling import VoteCounter, check_random_source_once, predict_plain
from certifl.certification.settings import Settings
from certifl.data import Dataset, choose, to_float
from certifl.errors import InputError, StoreError
from certifl.models import code_fingerprint, fingerprint
from certifl.perturbations import Perturbation
from certifl.progress import ProgressCallback, StageCallback
from certifl.runs.atomic import load_tensors, save_tensors, tensor_metadata
from certifl.study.opened_run import NetworkCache, OpenRun

_SECONDS_BETWEEN_SAVES = 15.0
# The reach decides nothing beyond the scan that it gives, which is part of the name.
_MAY_DIFFER = ("threads", "versions", "reach", "agreement_with_float32")
_OF_A_QUANTIZED_NETWORK = ("quantization", "agreement_with_float32")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One client's test images to certify with the model it deploys.

    Attributes:
        client: its number. index: (m,) positions in the data set's test split.
        images: (m, c, h, w) uint8. labels: (m,).
        saved: the file of the votes cast so far.
        training: (k, c, h, w) uint8, training images that fix the ranges of int8.
    """

    client: int
    index: np.ndarray
    images: torch.Tensor
    labels: np.ndarray
    saved: Path
    training: torch.Tensor | None = None


def job_network(
    job: Job,
    model: nn.Module,
    trial: Trial | None,
    device: str,
    precision: str,
    choice: Arithmetic | None = None,
) -> Network:
    """The model of a job, prepared for voting.

    Args:
        job: the images. model: the client's, in evaluation mode.
        trial: the votes of the job; None where there are none.
        device, precision: as `certifl.certify` takes them.
        choice: what "auto" stands for; None = as for the votes saved so far, or else measured.
    """
    stored = choice or stored_arithmetic(job.saved)
    if trial is not None:
        images = to_float(job.images[: max(1, trial.images)])
        scales = calibration(job, trial)
        return ready(model, images, trial, device, precision, stored=stored, calibration=scales)
    probe = to_float(job.images[:1])
    if stored is not None and precision == "auto":
        return in_arithmetic(model, probe, stored, device)
    # No perturbation, so no ranges under it.
    return prepare(model, probe, device, "float32" if precision == "int8" else precision)


def calibration(job: Job, trial: Trial) -> Calibration | None:
    """What the scales of a job are read from; None where it has no training images."""
    if job.training is None:
        return None
    return Calibration.of(to_float(job.training), trial.perturbation, trial.seed)


def stored_arithmetic(saved: Path) -> Arithmetic | None:
    """The arithmetic of votes cast so far, which a call that resumes from them takes."""
    try:
        return Arithmetic.read(json.loads(tensor_metadata(saved).get("arithmetic", "null")))
    except (StoreError, ValueError):
        return None


@dataclass(frozen=True)
class VoteSource:
    """What votes depend on besides the images and the network.

    Attributes:
        perturbation, settings: as in `certifl.certify`.
        seed: of the study. data: fingerprint of the images' data set.
    """

    perturbation: Perturbation
    settings: Settings
    seed: int
    data: str


class Paused(Exception):
    """A certification ended before all votes were cast; those cast so far are saved."""


def predicted(job: Job, network: Network, model: str, data: str) -> Predictions:
    """Plain predictions of a client that certifies nothing, one for each of its images."""
    metadata = {
        "model_fingerprint": model,
        "data_fingerprint": data,
        "precision": network.precision,
        "device": network.device.type,
    }
    client = np.full(len(job.index), job.client, np.int64)
    classes = predict_plain(network, to_float(job.images))
    return Predictions(client, job.index, job.labels, classes, metadata)


def certify_job(
    job: Job,
    model: nn.Module,
    network: Network,
    source: VoteSource,
    progress: ProgressCallback | None = None,
    enough: Callable[[], bool] | None = None,
) -> Certificates:
    """One client's certificates; votes that are saved already are not cast again.

    Args:
        job: the images. model: the client's. network: the model, prepared for voting.
        source: what else the votes depend on.
        progress: called with (votes cast, votes at most).
        enough: asked after every batch of votes whether to pause.

    Raises:
        Paused: it was enough before all votes were cast.
        StoreError: the votes cannot be saved.
    """
    perturbation, settings = source.perturbation, source.settings
    metadata = conditions(perturbation, settings, network, source.seed, model, source.data)
    estimator = settings.estimator_for(perturbation)
    key = _votes_key(job, metadata, code_fingerprint(model))
    saver = _Saver(job.saved, key, Arithmetic.of(network))
    votes = saver.load() or counts.fresh(len(job.index), network.classes)

    def after_batch(votes: Votes) -> None:
        saver.maybe(votes)
        if enough is not None and enough() and not votes.done.all():
            saver.save(votes)
            raise Paused

    if not votes.done.all():
        saver.save(votes)  # a path that cannot be written shows before the votes are cast
        images = to_float(job.images).to(network.device)
        counter = VoteCounter(network, perturbation, source.seed)
        engine.count_all(counter, images, job.labels, estimator, votes, after_batch, progress)
        saver.save(votes)
        metadata["batch_size"] = counter.network.batch_size
    elif progress is not None:
        progress(engine.expected_votes(len(job.index), settings), 0)
    return engine.finalize(votes, estimator, job.labels, job.index, job.client, metadata)


def _votes_key(job: Job, metadata: Mapping[str, Any], code: str) -> str:
    """A name of the votes: another image, noise, network or look has another.

    Votes of two functions must never be counted together, and a user's network may change with
    its code while its weights stay: so its code is part of the name.
    """
    same = {name: value for name, value in metadata.items() if name not in _MAY_DIFFER}
    same["torch"] = metadata["versions"]["torch"]  # another version may round differently
    if code:
        same["code"] = code
    images = [job.index.tolist(), job.labels.tolist()]
    text = json.dumps([same, images], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class _Saver:
    """Saves the votes, not more often than every few seconds."""

    def __init__(self, path: Path, key: str, arithmetic: Arithmetic) -> None:
        self._path, self._key = path, key
        self._arithmetic = json.dumps(arithmetic.stored())
        self._last = time.monotonic()

    def load(self) -> Votes | None:
        """Votes of an earlier start, if they were cast under the same conditions."""
        if not self._path.is_file():
            return None
        try:
            about, tensors = tensor_metadata(self._path), load_tensors(self._path)
        except StoreError as error:
            _log.warning("Votes are cast again: %s", error)
            return None
        if about.get("key") != self._key:
            return None
        if about.get("checksum") != fingerprint(tensors):
            _log.warning("%s is damaged; its votes are cast again.", self._path)
            return None
        return Votes(**{name: value.numpy() for name, value in tensors.items()})

    def maybe(self, votes: Votes) -> None:
        if time.monotonic() - self._last > _SECONDS_BETWEEN_SAVES:
            self.save(votes)

    def save(self, votes: Votes) -> None:
        arrays = votes.arrays().items()
        tensors = {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in arrays}
        about = {
            "key": self._key,
            "checksum": fingerprint(tensors),
            "arithmetic": self._arithmetic,
        }
        save_tensors(self._path, tensors, about)
        self._last = time.monotonic()


def certify_clients(
    run: OpenRun, device: str, report: StageCallback | None = None, share: tuple[int, int] = (0, 1)
) -> None:
    """Certify the clients one after the other and store the results of all in the run.

    Each client certifies its own perturbation. Those that certify nothing leave plain predictions
    in a file of their own.

    Args:
        run: trained.
        share: (k, n): only clients k, k + n, k + 2 n, ...; with n > 1 votes are saved, and no
            certificates are written.
    """
    spec = run.spec
    settings = spec.certification.settings
    jobs = [_job(run, client) for client in range(share[0], spec.clients.count, share[1])]
    at_most = [
        0
        if run.perturbations[job.client] is None
        else engine.expected_votes(len(job.index), settings(job.client))
        for job in jobs
    ]
    parts: list[Certificates] = []
    plain: list[Predictions] = []
    cache, choice = NetworkCache(), run_arithmetic(run, device, share)
    precision = spec.certification.precision
    for number, job in enumerate(jobs):
        model, perturbation = run.model(job.client), run.perturbations[job.client]
        prepared = partial(job_network, job, model, _trial(run, job), device, precision, choice)
        network = cache.network(model, prepared, job.client if precision == "int8" else None)
        if perturbation is None:
            plain.append(predicted(job, network, cache.fingerprint, run.dataset.fingerprint))
            continue
        check_random_source_once(perturbation, tuple(job.images.shape[1:]), network.device)
        source = VoteSource(perturbation, settings(job.client), spec.seed, run.dataset.fingerprint)
        progress = _progress(report, sum(at_most[:number]), sum(at_most))
        parts.append(certify_job(job, model, network, source, progress))
    if share[1] == 1:
        _store(run, parts, plain)


def run_arithmetic(
    run: OpenRun, device: str, share: tuple[int, int] = (0, 1)
) -> Arithmetic | None:
    """What "auto" stands for in a run, read from its manifest or measured and written there.

    It is measured with the first client that certifies; bfloat16 must lose nothing for any.

    Raises:
        InputError: a share of the clients, which must not choose alone.
    """
    if run.spec.certification.precision != "auto":
        return None
    if (choice := recorded_arithmetic(run, device)) is not None:
        return choice
    if share[1] > 1:
        raise InputError(
            f'The run in {run.path} does not record what precision = "auto" stands for on this '
            "device, and a share of its clients must not choose alone. Set "
            'certification.precision = "float32" or "bfloat16", or certify on one device first.'
        )
    jobs = [_job(run, client) for client, own in enumerate(run.perturbations) if own is not None]
    choice = _chosen_for_all([(job, _trial(run, job)) for job in jobs], run.model, device)
    known = run.folder.manifest().get("arithmetic", {})
    stored = {**known, device_name(choose_device(device)): choice.stored()}
    run.manifest = run.folder.update({"arithmetic": stored})
    return choice


def recorded_arithmetic(run: OpenRun, device: str) -> Arithmetic | None:
    """What a run recorded for "auto" on such a device; None where it recorded nothing."""
    stored = run.folder.manifest().get("arithmetic")
    if not isinstance(stored, Mapping):
        return None
    return Arithmetic.read(stored.get(device_name(choose_device(device))))


def _trial(run: OpenRun, job: Job) -> Trial | None:
    """The votes of a job; None where its client certifies nothing."""
    perturbation = run.perturbations[job.client]
    if perturbation is None:
        return None
    settings = run.spec.certification.settings(job.client)
    return Trial.of(perturbation, settings, run.spec.seed, len(job.index))


def _chosen_for_all(
    trials: Sequence[tuple[Job, Trial | None]], deployed: Callable[[int], nn.Module], device: str
) -> Arithmetic:
    job, trial = trials[0]
    assert trial is not None, "only clients that certify something"
    model = deployed(job.client)
    images = to_float(job.images[: max(1, trial.images)])
    choice, seen = choose_arithmetic(model, images, trial, device), {fingerprint(model)}
    plain = Arithmetic.of(prepare(model, images, device, "float32"))
    for other, its_trial in trials[1:]:
        if choice.precision == "float32":
            return choice
        assert its_trial is not None, "only clients that certify something"
        model = deployed(other.client)
        if (name := fingerprint(model)) not in seen:
            seen.add(name)
            images = to_float(other.images[: max(1, its_trial.images)])
            first, rounded = (in_arithmetic(model, images, how, device) for how in (plain, choice))
            if loses(first, rounded, images, its_trial):
                choice = plain
    return choice


def _store(run: OpenRun, parts: Sequence[Certificates], plain: Sequence[Predictions]) -> None:
    summary: dict[str, object] = {
        "votes": sum(int(p.votes.sum()) + int(p.selection_counts.sum()) for p in parts),
        "certification_seconds": round(sum(float(p.seconds.sum()) for p in parts), 3),
        "precision": parts[0].conditions["precision"],
    }
    if plain:
        models = {str(p.clients[0]): p.conditions["model_fingerprint"] for p in plain}
        metadata = {**plain[0].conditions, "model_fingerprint": models}
        joined = Predictions.concatenate(plain)
        run.predictions = dataclasses.replace(joined, conditions=metadata)
        run.folder.save(run.predictions)
        summary["plain"] = {
            str(p.clients[0]): {"images": len(p), "correct": int(p.correct.sum())} for p in plain
        }
    run.folder.update(summary)
    together = Certificates.concatenate(parts)
    metadata = dict(together.conditions)
    for name in {"model_fingerprint", *_OF_A_QUANTIZED_NETWORK} & set(metadata):
        metadata[name] = {str(int(p.client[0])): p.conditions[name] for p in parts}
    run.certificates = dataclasses.replace(together, conditions=metadata)
    run.folder.save(run.certificates)


def _progress(report: StageCallback | None, before: int, total: int) -> ProgressCallback | None:
    if report is None:
        return None
    return lambda done, _all: report("certifying", before + done, total, "votes at most")


def _job(run: OpenRun, client: int) -> Job:
    own, spec, training = run.partition.clients[client], run.spec, None
    index = choose(own.test, spec.certification.images, spec.seed, client)
    part = run.dataset.test.take(index)
    if spec.certification.precision == "int8":
        training = calibration_images(run.dataset, own.train, spec.seed, client)
    saved = run.folder.votes(client)
    return Job(client, index, part.images, part.labels.numpy(), saved, training)


def calibration_images(dataset: Dataset, own: np.ndarray, seed: int, client: int) -> torch.Tensor:
    """Some of the training images that a client has, (k, c, h, w) uint8."""
    return dataset.train.take(choose(own, CALIBRATION_IMAGES, seed, client)).images
