"""Attacks on the certificates of a finished run: which images, which network, which deltas."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from certifl.certification import Certificates
from certifl.certification.attack import Effort, deformed_first, search
from certifl.certification.contest import sign_test_against
from certifl.certification.network import Network, prepare
from certifl.certification.reach import reach_of
from certifl.certification.votes import VoteCounter
from certifl.data import Dataset, choose, to_float
from certifl.errors import InputError, StoreMismatch
from certifl.experiments.attack_record import FORMAT, VOTES, Attack, record_of
from certifl.models import fingerprint
from certifl.perturbations import Perturbation
from certifl.spec import Spec
from certifl.store.atomic import write_json
from certifl.store.runs import RunFolder
from certifl.streams import generator, image_key
from certifl.work.networks import deployed, last_round, run_model
from certifl.work.parts import data_folder, finished_run, load_data, run_spec

__all__ = ["Options", "attack_run"]

_CHANGED = 1e-3
_TIMES = 10
Report = Callable[[str, int, int, str], None]


@dataclass(frozen=True)
class Options:
    """What is attacked, and how hard.

    Attributes:
        images: certified test images per client, a fixed random choice.
        client: only this one; None takes all.
        directions: deltas tried at first per image, and deltas an image is deformed by.
        data_dir: folder of data sets. device: "auto" or a torch device.
        report: told about progress.
        code: the folder that holds a run's own network, which its user trusts.
    """

    images: int = 10
    client: int | None = None
    directions: int = 32
    data_dir: Path | None = None
    device: str = "auto"
    report: Report | None = None
    code: Path | None = None


def attack_run(place: Path, options: Options) -> dict[str, Any]:
    """Attack certificates of a finished run, and write what came of it beside them.

    Args:
        place: the run folder.
        options: what is attacked, and how hard.

    Returns:
        What was written to `attack.json`; `attack_record` says what it holds.

    Raises:
        StoreMismatch: no finished run, or other data or models than were certified.
        InputError: a client the run does not have, or options out of range.
    """
    if options.images < 1 or options.directions < 2:
        raise InputError("An attack needs at least 1 image per client and 2 directions.")
    started = time.perf_counter()
    folder = finished_run(place)
    spec, certificates = run_spec(folder), folder.load_certificates()
    clients = _clients(certificates, options.client)
    dataset = load_data(spec, data_folder(folder, options.data_dir))
    if dataset.fingerprint != certificates.conditions["data_fingerprint"]:
        raise StoreMismatch(
            f"The data set {spec.data.name!r} holds other images than were certified in {place}. "
            "Give --data-dir with the data it was made with."
        )
    chosen = [_chosen(certificates, client, options.images, spec.seed) for client in clients]
    confirm = _TIMES * int(certificates.conditions["n"])
    effort = Effort(directions=options.directions, confirm=confirm)
    with folder.locked():
        attacks = _attacks(folder, spec, dataset, chosen, effort, options)
        result = record_of(attacks, effort, options.images, clients)
        facts = {
            "format": FORMAT,
            "spec_hash": folder.manifest().get("spec_hash"),
            "created": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
            "seconds": round(time.perf_counter() - started, 3),
        }
        write_json(folder.attack, {**facts, **result})
    return {**facts, **result}


def _clients(certificates: Certificates, client: int | None) -> list[int]:
    known = sorted(set(certificates.client.tolist()))
    if client is None:
        return known
    if client not in known:
        some = "some of " if len(known) <= known[-1] - known[0] else ""
        raise InputError(
            f"--client {client}: the run has certificates of {some}the clients {known[0]} to "
            f"{known[-1]}."
        )
    return [client]


def _chosen(certificates: Certificates, client: int, images: int, seed: int) -> Certificates:
    own = certificates.of_client(client)
    return own.select(choose(np.arange(len(own)), images, seed, client))


def _attacks(
    folder: RunFolder,
    spec: Spec,
    dataset: Dataset,
    chosen: Sequence[Certificates],
    effort: Effort,
    options: Options,
) -> list[Attack]:
    model, last = run_model(folder, spec, options.code), last_round(folder, spec)
    perturbations = spec.perturbations()
    promised = [_promised(part) for part in chosen]
    everything, done, attacks = sum(map(len, chosen)), 0, []
    for part, held in zip(chosen, promised, strict=True):
        client = int(part.client[0])
        network = _network(deployed(last, spec, model, client), part, dataset, options.device)
        share = int(held.sum()) / max(1, sum(int(h.sum()) for h in promised))
        own = dataclasses.replace(effort, level=effort.level * share) if share else effort
        perturbation = perturbations[client]
        if perturbation is None:
            raise StoreMismatch(
                f"The run holds certificates of client {client}, to whom its spec gives nothing "
                "to certify; `certifl verify` says more."
            )
        counter = VoteCounter(network, perturbation, spec.seed)
        images = to_float(dataset.test.take(part.index).images).to(network.device)
        attacks.append(_attack(counter, images, part, held, own))
        done += len(part)
        if options.report is not None:
            options.report("attacking", done, everything, "images")
    return attacks


def _promised(certificates: Certificates) -> np.ndarray:
    """Where there is a set to attack: a radius above 0, or an interval to one side at least."""
    interval, reaches = certificates.interval, certificates.radius > 0
    if interval is not None:
        reaches = reaches | (interval[:, 1] > interval[:, 0])
    return ~certificates.abstained & reaches


def _network(
    model: torch.nn.Module, certificates: Certificates, dataset: Dataset, device: str
) -> Network:
    """The network as it was certified, in its precision.

    Raises:
        StoreMismatch: it is another one.
    """
    facts, client = certificates.conditions, int(certificates.client[0])
    if fingerprint(model) != facts["model_fingerprint"].get(str(client)):
        raise StoreMismatch(
            f"The stored model of client {client} is not the one that was certified; `certifl "
            "verify` says more. Compute the run again with --overwrite."
        )
    return prepare(model, to_float(dataset.test.images[:1]), device, facts["precision"])


def _attack(
    counter: VoteCounter,
    images: Tensor,
    certificates: Certificates,
    promised: np.ndarray,
    effort: Effort,
) -> Attack:
    held = certificates.select(promised)
    found = None
    if len(held):
        own = images[torch.as_tensor(promised, device=images.device)]
        found = search(counter, own, held.predicted, held.radius, held.interval, effort)
    deltas = _deltas(counter.perturbation, images, certificates, promised, effort, counter.seed)
    votes = deformed_first(counter, images, deltas, VOTES)
    right = votes.argmax(axis=2) == certificates.label[:, None]
    half = 1 + effort.directions // 2
    changed = np.zeros(len(images), np.bool_)
    for row in np.flatnonzero(promised):
        expected = np.full(effort.directions, certificates.predicted[row])
        p_values = sign_test_against(votes[row, 1:], expected)
        changed[row] = p_values.min() <= _CHANGED / effort.directions
    return Attack(
        certificates,
        promised,
        found,
        clean=right[:, 0],
        random=right[:, 1:half].mean(axis=1),
        worst=right[:, 1:].all(axis=1),
        changed=changed,
        network=counter.network,
    )


def _deltas(
    perturbation: Perturbation,
    images: Tensor,
    certificates: Certificates,
    promised: np.ndarray,
    effort: Effort,
    seed: int,
) -> Tensor:
    """No delta, deltas drawn from the certified set, and a grid or boundary of it, per image.

    Images without a certificate are left as they are: nothing is promised about any delta.
    """
    channels, height, width = images.shape[1:]
    radius = np.where(promised, certificates.radius, 0.0)
    interval = certificates.interval
    if interval is not None:
        interval = np.where(promised[:, None], interval, 0.0)
    reach = reach_of(perturbation, (channels, height, width), radius, interval, images.device)
    streams = [
        generator(seed, "deformed first", image_key(image), device=images.device)
        for image in images
    ]
    drawn = reach.random(effort.directions // 2, streams)
    aim = reach.directions(1, streams)[:, 0]
    edge = reach.first(effort.directions - drawn.shape[1], aim, streams)
    nothing = torch.zeros_like(drawn[:, :1])
    return torch.cat([nothing, drawn, edge], dim=1)
