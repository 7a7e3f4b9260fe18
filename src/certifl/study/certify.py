"""One client's certificates of its own test images, resumable vote by vote."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from certifl.certification import Certificates, conditions, counts
from certifl.certification import adaptive as engine
from certifl.certification.certificates import Predictions, predict_plain
from certifl.certification.counts import Votes
from certifl.certification.network import Network, prepare
from certifl.certification.rng_check import check_random_source_once
from certifl.certification.sampling import VoteCounter
from certifl.certification.settings import Settings
from certifl.data import Dataset, Partition, choose, to_float
from certifl.errors import StoreError
from certifl.models import code_fingerprint, fingerprint
from certifl.perturbations import Perturbation
from certifl.progress import ProgressCallback, StageCallback
from certifl.runs.atomic import load_tensors, save_tensors, tensor_metadata
from certifl.runs.folder import RunFolder
from certifl.spec import Spec

_SECONDS_BETWEEN_SAVES = 15.0
# The reach decides nothing beyond the scan that it gives, which is part of the name.
_MAY_DIFFER = ("threads", "versions", "reach")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One client's test images to certify with the model it deploys.

    Attributes:
        client: number of the client.
        index: (m,) positions in the data set's test split.
        images: (m, c, h, w) uint8. labels: (m,).
        saved: where the votes cast so far are kept.
    """

    client: int
    index: np.ndarray
    images: torch.Tensor
    labels: np.ndarray
    saved: Path


class NetworkCache:
    """Networks made ready to vote; clients that deploy the same global model share one."""

    def __init__(self, device: str, precision: str) -> None:
        self._device, self._precision = device, precision
        self._ready: Network | None = None
        self.name = ""

    def network(self, model: nn.Module, job: Job) -> Network:
        """The model of a job, made ready; its fingerprint is then the bench's name."""
        name = fingerprint(model)
        if self._ready is None or name != self.name:
            probe = to_float(job.images[:1])
            self._ready = prepare(model, probe, self._device, self._precision)
            self.name = name
        return self._ready


def predicted(job: Job, network: Network, model: str, data: str) -> Predictions:
    """What a client that certifies nothing answers: one prediction for each of its images."""
    client = np.full(len(job.index), job.client, np.int64)
    facts = {
        "model_fingerprint": model,
        "data_fingerprint": data,
        "precision": network.precision,
        "device": network.device.type,
    }
    found = predict_plain(network, to_float(job.images))
    return Predictions(client, job.index, job.labels, found, facts)


@dataclass(frozen=True)
class Question:
    """What is certified, and what its votes depend on besides the images and the network.

    Attributes:
        perturbation, settings: as in `certifl.certify`.
        seed: of the study. data: fingerprint of the images' data set.
    """

    perturbation: Perturbation
    settings: Settings
    seed: int
    data: str


def certify_job(
    job: Job,
    model: nn.Module,
    network: Network,
    perturbation: Perturbation,
    settings: Settings,
    seed: int,
    data: str,
    progress: ProgressCallback | None,
) -> Certificates:
    """One client's certificates; votes already cast and saved are not cast again."""
    question = Question(perturbation, settings, seed, data)
    return _certified(job, model, network, question, progress, None)


def certify_piece(
    job: Job,
    model: nn.Module,
    network: Network,
    question: Question,
    progress: ProgressCallback | None,
    enough: Callable[[], bool],
) -> Certificates | None:
    """One client's certificates, or None where it was enough before all votes were cast.

    The votes cast until then are saved, and the next piece goes on from them.
    """
    try:
        return _certified(job, model, network, question, progress, enough)
    except _Enough:
        return None


class _Enough(Exception):
    """A piece ends here."""


def _certified(
    job: Job,
    model: nn.Module,
    network: Network,
    question: Question,
    progress: ProgressCallback | None,
    enough: Callable[[], bool] | None,
) -> Certificates:
    perturbation, settings = question.perturbation, question.settings
    facts = conditions(perturbation, settings, network, question.seed, model, question.data)
    estimator = settings.estimator_for(perturbation)
    saver = _Saver(job.saved, _votes_key(job, facts, code_fingerprint(model)))
    votes = saver.load() or counts.fresh(len(job.index), network.classes)

    def after_batch(votes: Votes) -> None:
        saver.maybe(votes)
        if enough is not None and enough() and not votes.done.all():
            saver.save(votes)
            raise _Enough

    if not votes.done.all():
        saver.save(votes)  # a place that cannot be written shows before the votes are cast
        images = to_float(job.images).to(network.device)
        counter = VoteCounter(network, perturbation, question.seed)
        engine.count_all(counter, images, job.labels, estimator, votes, after_batch, progress)
        saver.save(votes)
        facts["batch_size"] = counter.network.batch_size
    elif progress is not None:
        progress(engine.expected_votes(len(job.index), settings), 0)
    return engine.finalize(votes, estimator, job.labels, job.index, job.client, facts)


def _votes_key(job: Job, facts: Mapping[str, Any], code: str) -> str:
    """A name of the votes asked for: another image, noise, network or look makes another.

    Votes of two functions must never be counted together, and a network of somebody's own may
    change with its code while its weights stay: so its code is part of the name.
    """
    same = {name: value for name, value in facts.items() if name not in _MAY_DIFFER}
    same["torch"] = facts["versions"]["torch"]  # another version may round the network otherwise
    if code:
        same["code"] = code
    images = [job.index.tolist(), job.labels.tolist()]
    text = json.dumps([same, images], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class _Saver:
    """Keeps the votes on disk, not more often than every few seconds."""

    def __init__(self, path: Path, key: str) -> None:
        self._path, self._key = path, key
        self._last = time.monotonic()

    def load(self) -> Votes | None:
        """Votes of an earlier start, if they were cast for the same question."""
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
        about = {"key": self._key, "checksum": fingerprint(tensors)}
        save_tensors(self._path, tensors, about)
        self._last = time.monotonic()


# Every client's certificates of its own test images, resumable vote by vote.


def certify_clients(
    folder: RunFolder,
    spec: Spec,
    dataset: Dataset,
    partition: Partition,
    deployed: Callable[[int], nn.Module],
    device: str,
    report: StageCallback | None,
    share: tuple[int, int] = (0, 1),
) -> None:
    """Certify clients one after the other; a whole set of them is put into one file.

    Every client certifies its own perturbation where it has one. Those that certify nothing leave
    plain predictions in a file of their own.

    Args:
        deployed: the model a client uses at test time.
        share: (k, n): only clients k, k + n, k + 2 n, ...; with n > 1 votes are saved for whoever
            concludes, and no certificates are written.
    """
    perturbations, settings = spec.perturbations(), spec.certification.settings
    mine = range(share[0], len(partition.clients), share[1])
    jobs = [_job(folder, spec, dataset, partition, client) for client in mine]
    at_most = [
        0
        if perturbations[job.client] is None
        else engine.expected_votes(len(job.index), settings(job.client))
        for job in jobs
    ]
    parts: list[Certificates] = []
    plain: list[Predictions] = []
    bench = NetworkCache(device, spec.certification.precision)
    for place, job in enumerate(jobs):
        model, perturbation = deployed(job.client), perturbations[job.client]
        network = bench.network(model, job)
        if perturbation is None:
            plain.append(predicted(job, network, bench.name, dataset.fingerprint))
            continue
        check_random_source_once(perturbation, tuple(job.images.shape[1:]), network.device)
        told = _progress(report, sum(at_most[:place]), sum(at_most))
        asked = (perturbation, settings(job.client), spec.seed, dataset.fingerprint)
        parts.append(certify_job(job, model, network, *asked, told))
    if share[1] == 1:
        _store(folder, parts, plain)


def _store(folder: RunFolder, parts: Sequence[Certificates], plain: Sequence[Predictions]) -> None:
    """Everybody's predictions and certificates as one file each."""
    if plain:
        models = {str(p.clients[0]): p.conditions["model_fingerprint"] for p in plain}
        facts = {**plain[0].conditions, "model_fingerprint": models}
        predictions = Predictions.concatenate(plain)
        folder.save_predictions(dataclasses.replace(predictions, conditions=facts))
    folder.update({**_summary(parts), **({"plain": _accuracies(plain)} if plain else {})})
    together = Certificates.concatenate(parts)
    models = {str(int(p.client[0])): p.conditions["model_fingerprint"] for p in parts}
    facts = {**together.conditions, "model_fingerprint": models}
    folder.save_certificates(dataclasses.replace(together, conditions=facts))


def _accuracies(plain: Sequence[Predictions]) -> dict[str, dict[str, int]]:
    """By client that certifies nothing: its test images, and how many its model gets right."""
    return {
        str(part.clients[0]): {"images": len(part), "correct": int(part.correct.sum())}
        for part in plain
    }


def _progress(
    report: StageCallback | None, before: int, everything: int
) -> ProgressCallback | None:
    if report is None:
        return None
    return lambda done, _all: report("certifying", before + done, everything, "votes at most")


def _job(
    folder: RunFolder, spec: Spec, dataset: Dataset, partition: Partition, client: int
) -> Job:
    held = partition.clients[client].test
    index = choose(held, spec.certification.images, spec.seed, client)
    part = dataset.test.take(index)
    return Job(client, index, part.images, part.labels.numpy(), folder.votes(client))


def _summary(parts: Sequence[Certificates]) -> dict[str, object]:
    cast = sum(int(p.votes.sum()) + int(p.selection_counts.sum()) for p in parts)
    facts = parts[0].conditions
    return {
        "votes": cast,
        "certification_seconds": round(sum(float(p.seconds.sum()) for p in parts), 3),
        "precision": facts["precision"],
    }
