"""Every client's certificates of its own test images, resumable vote by vote."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from certifl.certification import Certificates, conditions, engine
from certifl.certification.engine import Votes
from certifl.certification.network import Network, prepare
from certifl.certification.selftest import check_random_source_once
from certifl.certification.settings import Settings
from certifl.certification.votes import VoteCounter
from certifl.data import Dataset, Partition, choose, to_float
from certifl.errors import StoreError
from certifl.models import fingerprint
from certifl.perturbations import Perturbation
from certifl.spec import Spec
from certifl.store.atomic import load_tensors, save_tensors, tensor_metadata
from certifl.store.runs import RunFolder

__all__ = ["Job", "certify_clients", "certify_job"]

Report = Callable[[str, int, int, str], None]
_SECONDS_BETWEEN_SAVES = 15.0
_MAY_DIFFER = ("threads", "versions")
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

    Args:
        deployed: the model a client uses at test time.
        share: (k, n): only clients k, k + n, k + 2 n, ...; with n > 1 votes are saved for whoever
            concludes, and no certificates are written.
    """
    perturbation, settings = spec.perturbation(), spec.certification.settings()
    mine = range(share[0], len(partition.clients), share[1])
    jobs = [_job(folder, spec, dataset, partition, client) for client in mine]
    everything = engine.expected_votes(sum(len(j.index) for j in jobs), settings)
    parts: list[Certificates] = []
    before, ready = 0, None
    for job in jobs:
        model = deployed(job.client)
        # Clients that deploy the same global model share one prepared network.
        name = fingerprint(model)
        if ready is None or ready[0] != name:
            probe = to_float(job.images[:1])
            ready = (name, prepare(model, probe, device, spec.certification.precision))
            check_random_source_once(perturbation, tuple(probe.shape[1:]), ready[1].device)
        progress = _progress(report, before, everything)
        part = certify_job(
            job, model, ready[1], perturbation, settings, spec.seed, dataset.fingerprint, progress
        )
        parts.append(part)
        before += engine.expected_votes(len(job.index), settings)
    if share[1] > 1:
        return
    folder.update(_summary(parts))
    together = Certificates.concatenate(parts)
    models = {
        str(job.client): p.conditions["model_fingerprint"]
        for job, p in zip(jobs, parts, strict=True)
    }
    facts = {**together.conditions, "model_fingerprint": models}
    folder.save_certificates(dataclasses.replace(together, conditions=facts))


def _progress(report: Report | None, before: int, everything: int) -> engine.Progress | None:
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
    facts = conditions(perturbation, settings, network, seed, model, data)
    saver = _Saver(job.saved, _votes_key(job, facts))
    votes = saver.load() or engine.fresh(len(job.index), network.classes)
    if not votes.done.all():
        saver.save(votes)  # a place that cannot be written shows before the votes are cast
        images = to_float(job.images).to(network.device)
        counter = VoteCounter(network, perturbation, seed)
        engine.count_all(counter, images, job.labels, settings, votes, saver.maybe, progress)
        saver.save(votes)
        facts["batch_size"] = counter.network.batch_size
    elif progress is not None:
        progress(engine.expected_votes(len(job.index), settings), 0)
    return engine.conclude(
        votes, settings, perturbation, job.labels, job.index, job.client, conditions=facts
    )


def _votes_key(job: Job, facts: Mapping[str, Any]) -> str:
    """A name of the votes asked for: another image, noise, network or look makes another."""
    same = {name: value for name, value in facts.items() if name not in _MAY_DIFFER}
    same["torch"] = facts["versions"]["torch"]  # another version may round the network otherwise
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
        return Votes.from_tensors(tensors)

    def maybe(self, votes: Votes) -> None:
        if time.monotonic() - self._last > _SECONDS_BETWEEN_SAVES:
            self.save(votes)

    def save(self, votes: Votes) -> None:
        tensors = votes.tensors()
        about = {"key": self._key, "checksum": fingerprint(tensors)}
        save_tensors(self._path, tensors, about)
        self._last = time.monotonic()


def _summary(parts: list[Certificates]) -> dict[str, object]:
    cast = sum(int(p.votes.sum()) + int(p.selection_counts.sum()) for p in parts)
    facts = parts[0].conditions
    return {
        "votes": cast,
        "certification_seconds": round(sum(float(p.seconds.sum()) for p in parts), 3),
        "precision": facts["precision"],
    }
