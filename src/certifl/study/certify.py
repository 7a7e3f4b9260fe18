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
from certifl.certification.arithmetic import (
    Arithmetic,
    Trial,
    choose_arithmetic,
    device_name,
    in_arithmetic,
    loses,
    ready,
)
from certifl.certification.certificates import Predictions, predict_plain
from certifl.certification.counts import Votes
from certifl.certification.network import Network, choose_device, prepare
from certifl.certification.quantization import CALIBRATION_IMAGES, Calibration
from certifl.certification.rng_check import check_random_source_once
from certifl.certification.sampling import VoteCounter
from certifl.certification.settings import Settings
from certifl.data import Dataset, Partition, choose, to_float
from certifl.errors import InputError, StoreError
from certifl.models import code_fingerprint, fingerprint
from certifl.perturbations import Perturbation
from certifl.runs.atomic import load_tensors, save_tensors, tensor_metadata
from certifl.runs.folder import RunFolder
from certifl.spec import Spec

_SECONDS_BETWEEN_SAVES = 15.0
# The reach decides nothing beyond the scan that it gives, which is part of the name.
_MAY_DIFFER = ("threads", "versions", "reach", "agreement_with_float32")
_OF_A_QUANTIZED_NETWORK = ("quantization", "agreement_with_float32")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One client's test images to certify with the model it deploys.

    Attributes:
        client: number of the client.
        index: (m,) positions in the data set's test split.
        images: (m, c, h, w) uint8. labels: (m,).
        saved: where the votes cast so far are kept.
        training: (k, c, h, w) uint8, training images that fix the ranges of int8.
    """

    client: int
    index: np.ndarray
    images: torch.Tensor
    labels: np.ndarray
    saved: Path
    training: torch.Tensor | None = None


class NetworkCache:
    """Networks made ready to vote; clients that deploy the same global model share one.

    Args:
        device, precision: as `certifl.certify` takes them.
        choice: what "auto" stands for in this run; None where each client chooses.
    """

    def __init__(self, device: str, precision: str, choice: Arithmetic | None = None) -> None:
        self._device, self._precision, self._choice = device, precision, choice
        self._ready: Network | None = None
        self._of: tuple[str, int | None] | None = None
        self.name = ""

    def network(self, model: nn.Module, job: Job, trial: Trial | None = None) -> Network:
        """The model of a job, made ready; its fingerprint is then the bench's name.

        Args:
            trial: the votes of the job, for "auto"; None where there are none.
        """
        self.name = fingerprint(model)
        # In int8 a client's own training images fix the ranges.
        of = (self.name, job.client if self._precision == "int8" else None)
        if self._ready is None or of != self._of:
            self._ready, self._of = self._prepared(model, job, trial), of
        return self._ready

    def _prepared(self, model: nn.Module, job: Job, trial: Trial | None) -> Network:
        stored = self._choice or stored_arithmetic(job.saved)
        if trial is not None:
            images = to_float(job.images[: max(1, trial.images)])
            where, scales = (self._device, self._precision), calibration(job, trial)
            return ready(model, images, trial, *where, stored=stored, calibration=scales)
        probe = to_float(job.images[:1])
        if stored is not None and self._precision == "auto":
            return in_arithmetic(model, probe, stored, self._device)
        # No perturbation, so no ranges under it.
        precision = "float32" if self._precision == "int8" else self._precision
        return prepare(model, probe, self._device, precision)


def calibration(job: Job, trial: Trial) -> Calibration | None:
    """What the scales of a job are read from; None where it has no training images."""
    if job.training is None:
        return None
    return Calibration.of(to_float(job.training), trial.perturbation, trial.seed)


def stored_arithmetic(saved: Path) -> Arithmetic | None:
    """The arithmetic of votes cast so far, which a call that goes on from them takes."""
    try:
        return Arithmetic.read(json.loads(tensor_metadata(saved).get("arithmetic", "null")))
    except (StoreError, ValueError):
        return None


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
    progress: engine.Progress | None,
) -> Certificates:
    """One client's certificates; votes already cast and saved are not cast again."""
    question = Question(perturbation, settings, seed, data)
    return _certified(job, model, network, question, progress, None)


def certify_piece(
    job: Job,
    model: nn.Module,
    network: Network,
    question: Question,
    progress: engine.Progress | None,
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
    progress: engine.Progress | None,
    enough: Callable[[], bool] | None,
) -> Certificates:
    perturbation, settings = question.perturbation, question.settings
    facts = conditions(perturbation, settings, network, question.seed, model, question.data)
    key = _votes_key(job, facts, code_fingerprint(model))
    saver = _Saver(job.saved, key, Arithmetic.of(network))
    votes = saver.load() or counts.fresh(len(job.index), network.classes)

    def after_wave(votes: Votes) -> None:
        saver.maybe(votes)
        if enough is not None and enough() and not votes.done.all():
            saver.save(votes)
            raise _Enough

    if not votes.done.all():
        saver.save(votes)  # a place that cannot be written shows before the votes are cast
        images = to_float(job.images).to(network.device)
        counter = VoteCounter(network, perturbation, question.seed)
        engine.count_all(counter, images, job.labels, settings, votes, after_wave, progress)
        saver.save(votes)
        facts["batch_size"] = counter.network.batch_size
    elif progress is not None:
        progress(engine.expected_votes(len(job.index), settings), 0)
    return engine.conclude(
        votes, settings, perturbation, job.labels, job.index, job.client, conditions=facts
    )


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

    def __init__(self, path: Path, key: str, arithmetic: Arithmetic) -> None:
        self._path, self._key = path, key
        self._arithmetic = json.dumps(arithmetic.stored())
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
        return Votes.from_tensors(tensors)

    def maybe(self, votes: Votes) -> None:
        if time.monotonic() - self._last > _SECONDS_BETWEEN_SAVES:
            self.save(votes)

    def save(self, votes: Votes) -> None:
        tensors = votes.tensors()
        about = {
            "key": self._key,
            "checksum": fingerprint(tensors),
            "arithmetic": self._arithmetic,
        }
        save_tensors(self._path, tensors, about)
        self._last = time.monotonic()


# Every client's certificates of its own test images, resumable vote by vote.


Report = Callable[[str, int, int, str], None]


def certify_clients(
    folder: RunFolder,
    spec: Spec,
    dataset: Dataset,
    partition: Partition,
    deployed: Callable[[int], nn.Module],
    device: str,
    report: Report | None,
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
    choice = run_arithmetic(folder, spec, dataset, partition, deployed, device, share)
    bench = NetworkCache(device, spec.certification.precision, choice)
    for place, job in enumerate(jobs):
        model, perturbation = deployed(job.client), perturbations[job.client]
        trial = None
        if perturbation is not None:
            trial = Trial.of(perturbation, settings(job.client), spec.seed, len(job.index))
        network = bench.network(model, job, trial)
        if perturbation is None:
            plain.append(predicted(job, network, bench.name, dataset.fingerprint))
            continue
        check_random_source_once(perturbation, tuple(job.images.shape[1:]), network.device)
        told = _progress(report, sum(at_most[:place]), sum(at_most))
        asked = (perturbation, settings(job.client), spec.seed, dataset.fingerprint)
        parts.append(certify_job(job, model, network, *asked, told))
    if share[1] == 1:
        _store(folder, parts, plain)


def run_arithmetic(
    folder: RunFolder,
    spec: Spec,
    dataset: Dataset,
    partition: Partition,
    deployed: Callable[[int], nn.Module],
    device: str,
    share: tuple[int, int] = (0, 1),
) -> Arithmetic | None:
    """What "auto" stands for in a run, read from its manifest or measured and written there.

    It is measured with the first client that certifies; bfloat16 must lose nothing for any.

    Raises:
        InputError: a share of the clients, which must not choose alone.
    """
    if spec.certification.precision != "auto":
        return None
    name = device_name(choose_device(device))
    known = folder.manifest().get("arithmetic", {})
    if (choice := Arithmetic.read(known.get(name))) is not None:
        return choice
    if share[1] > 1:
        raise InputError(
            f'The run in {folder.path} does not say what precision = "auto" stands for on this '
            'device, and shares must not choose alone. Set certification.precision = "float32" '
            'or "bfloat16", or certify on one device first.'
        )
    trials = []
    for client, perturbation in enumerate(spec.perturbations()):
        if perturbation is not None:
            job = _job(folder, spec, dataset, partition, client)
            settings = spec.certification.settings(client)
            trials.append((job, Trial.of(perturbation, settings, spec.seed, len(job.index))))
    choice = _chosen_for_all(trials, deployed, device)
    folder.update({"arithmetic": {**known, name: choice.stored()}})
    return choice


def _chosen_for_all(
    trials: Sequence[tuple[Job, Trial]], deployed: Callable[[int], nn.Module], device: str
) -> Arithmetic:
    job, trial = trials[0]
    model = deployed(job.client)
    images = to_float(job.images[: max(1, trial.images)])
    choice, seen = choose_arithmetic(model, images, trial, device), {fingerprint(model)}
    plain = Arithmetic.of(prepare(model, images, device, "float32"))
    for other, its_trial in trials[1:]:
        if choice.precision == "float32":
            return choice
        model = deployed(other.client)
        if (name := fingerprint(model)) not in seen:
            seen.add(name)
            images = to_float(other.images[: max(1, its_trial.images)])
            first, rounded = (in_arithmetic(model, images, how, device) for how in (plain, choice))
            if loses(first, rounded, images, its_trial):
                choice = plain
    return choice


def _store(folder: RunFolder, parts: Sequence[Certificates], plain: Sequence[Predictions]) -> None:
    """Everybody's predictions and certificates as one file each."""
    if plain:
        models = {str(p.clients[0]): p.conditions["model_fingerprint"] for p in plain}
        facts = {**plain[0].conditions, "model_fingerprint": models}
        predictions = Predictions.concatenate(plain)
        folder.save_predictions(dataclasses.replace(predictions, conditions=facts))
    folder.update({**_summary(parts), **({"plain": _accuracies(plain)} if plain else {})})
    together = Certificates.concatenate(parts)
    facts = dict(together.conditions)
    for name in {"model_fingerprint", *_OF_A_QUANTIZED_NETWORK} & set(facts):
        facts[name] = {str(int(p.client[0])): p.conditions[name] for p in parts}
    folder.save_certificates(dataclasses.replace(together, conditions=facts))


def _accuracies(plain: Sequence[Predictions]) -> dict[str, dict[str, int]]:
    """By client that certifies nothing: its test images, and how many its model gets right."""
    return {
        str(part.clients[0]): {"images": len(part), "correct": int(part.correct.sum())}
        for part in plain
    }


def _progress(report: Report | None, before: int, everything: int) -> engine.Progress | None:
    if report is None:
        return None
    return lambda done, _all: report("certifying", before + done, everything, "votes at most")


def _job(
    folder: RunFolder, spec: Spec, dataset: Dataset, partition: Partition, client: int
) -> Job:
    held = partition.clients[client].test
    index = choose(held, spec.certification.images, spec.seed, client)
    part, training = dataset.test.take(index), None
    if spec.certification.precision == "int8":
        training = calibration_images(dataset, partition.clients[client].train, spec.seed, client)
    saved = folder.votes(client)
    return Job(client, index, part.images, part.labels.numpy(), saved, training)


def calibration_images(dataset: Dataset, held: np.ndarray, seed: int, client: int) -> torch.Tensor:
    """Some of the training images that a client has, (k, c, h, w) uint8."""
    return dataset.train.take(choose(held, CALIBRATION_IMAGES, seed, client)).images


def _summary(parts: Sequence[Certificates]) -> dict[str, object]:
    cast = sum(int(p.votes.sum()) + int(p.selection_counts.sum()) for p in parts)
    facts = parts[0].conditions
    return {
        "votes": cast,
        "certification_seconds": round(sum(float(p.seconds.sum()) for p in parts), 3),
        "precision": facts["precision"],
    }
