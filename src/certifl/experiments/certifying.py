"""Every client's certificates of its own test images, resumable vote by vote."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from certifl.certification import Certificates, conditions, engine
from certifl.certification.engine import Votes
from certifl.certification.network import Network, prepare
from certifl.certification.votes import VoteCounter
from certifl.data import Dataset, Partition, choose, to_float
from certifl.models import fingerprint
from certifl.perturbations import Perturbation
from certifl.spec import Certification, Spec
from certifl.store.atomic import load_tensors, save_tensors, tensor_metadata
from certifl.store.runs import RunFolder

__all__ = ["Job", "certify_clients", "certify_job"]

Report = Callable[[str, int, int, str], None]
_SECONDS_BETWEEN_SAVES = 15.0
_SAME_VOTES = ("model_fingerprint", "precision", "batch_norm_folded", "batch_size", "device")


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
) -> None:
    """Certify all clients, one after the other, and put their certificates into one file."""
    perturbation, wanted = spec.perturbation(), spec.certification
    jobs = [_job(folder, spec, dataset, partition, c) for c in range(len(partition.clients))]
    everything = engine.expected_votes(sum(len(j.index) for j in jobs), wanted.settings())
    parts: list[Certificates] = []
    before, ready = 0, None
    for job in jobs:
        model = deployed(job.client)
        # Clients that deploy the same global model share one prepared network.
        name = fingerprint(model)
        if ready is None or ready[0] != name:
            probe = to_float(job.images[:1])
            ready = (name, prepare(model, probe, device, wanted.precision))
        progress = _progress(report, before, everything)
        part = certify_job(
            job, model, ready[1], perturbation, wanted, spec.seed, dataset.fingerprint, progress
        )
        parts.append(part)
        before += engine.expected_votes(len(job.index), wanted.settings())
    folder.update(_summary(parts))
    together = Certificates.concatenate(parts)
    models = {
        str(job.client): p.conditions["model_fingerprint"]
        for job, p in zip(jobs, parts, strict=True)
    }
    facts = {**together.conditions, "model_fingerprint": models}
    dataclasses.replace(together, conditions=facts).save(folder.certificates)


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
    wanted: Certification,
    seed: int,
    data: str,
    progress: engine.Progress | None,
) -> Certificates:
    """One client's certificates; votes already cast and saved are not cast again."""
    settings = wanted.settings()
    facts = conditions(perturbation, settings, network, seed, model, data)
    # Votes of another network, precision or device are votes of another classifier.
    key = json.dumps({name: facts[name] for name in _SAME_VOTES}, sort_keys=True)
    votes = _saved_votes(job, key) or engine.fresh(len(job.index), network.classes)
    saver = _Saver(job.saved, key)
    if not votes.done.all():
        images = to_float(job.images).to(network.device)
        counter = VoteCounter(network, perturbation, seed)
        engine.count_all(counter, images, job.labels, settings, votes, saver.maybe, progress)
        saver.save(votes)
    elif progress is not None:
        progress(engine.expected_votes(len(job.index), settings), 0)
    return engine.conclude(
        votes, settings, perturbation, job.labels, job.index, job.client, conditions=facts
    )


def _saved_votes(job: Job, key: str) -> Votes | None:
    """Votes of an earlier start, if the same network cast them."""
    if not job.saved.is_file() or tensor_metadata(job.saved).get("network") != key:
        return None
    votes = Votes.from_tensors(load_tensors(job.saved))
    return votes if len(votes.done) == len(job.index) else None


class _Saver:
    """Keeps the votes on disk, not more often than every few seconds."""

    def __init__(self, path: Path, key: str) -> None:
        self._path, self._key = path, key
        self._last = time.monotonic()

    def maybe(self, votes: Votes) -> None:
        if time.monotonic() - self._last > _SECONDS_BETWEEN_SAVES:
            self.save(votes)

    def save(self, votes: Votes) -> None:
        save_tensors(self._path, votes.tensors(), {"network": self._key})
        self._last = time.monotonic()


def _summary(parts: list[Certificates]) -> dict[str, object]:
    cast = sum(int(p.votes.sum()) + int(p.selection_counts.sum()) for p in parts)
    facts = parts[0].conditions
    return {
        "votes": cast,
        "certification_seconds": round(sum(float(p.seconds.sum()) for p in parts), 3),
        "precision": facts["precision"],
    }
