"""Attacks on the certificates of a finished run: which images, which network, which deltas."""

from __future__ import annotations

import dataclasses
import json
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
from certifl.certification.attack import AttackBudget, AttackResult, deformed_first, search
from certifl.certification.certified_sets import reach_of
from certifl.certification.counts import lead_of, sign_test_against
from certifl.certification.network import Network, prepare
from certifl.certification.quantization import recorded
from certifl.certification.sampling import VoteCounter
from certifl.data import Dataset, choose, to_float
from certifl.errors import InputError, StoreMismatch
from certifl.models import fingerprint
from certifl.perturbations import Perturbation
from certifl.rng import generator, image_key
from certifl.runs.atomic import write_json
from certifl.runs.folder import RunFolder
from certifl.spec import Spec
from certifl.study.opened_run import (
    data_folder,
    deployed,
    finished_run,
    last_round,
    load_data,
    run_model,
    run_spec,
)

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
    effort = AttackBudget(directions=options.directions, confirm=confirm)
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
    effort: AttackBudget,
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
    probe, scales = to_float(dataset.test.images[:1]), recorded(facts, client)
    return prepare(model, probe, device, facts["precision"], calibration=scales)


def _attack(
    counter: VoteCounter,
    images: Tensor,
    certificates: Certificates,
    promised: np.ndarray,
    effort: AttackBudget,
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
    effort: AttackBudget,
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


# What attacks on the certificates of a run came to, as its `attack.json` holds it.
#
# ```
# format                1
# spec_hash, family     of the run that was attacked
# created, seconds      when, and how long it took
# device, precision     the votes' arithmetic; the precision is that of the certificates
# options               images per client, clients, directions, votes per deformed image
# parameters            inside the certified sets, where nothing may be found:
#     images            certified images that were attacked
#     deltas, votes     tried and spent
#     suspicious        deltas that needed all of `confirm` votes
#     confirm, level    votes of a verdict (10 n), probability of calling any violation falsely
#     smallest_lead     the image whose class was closest to changing: client, index, length,
# radius,
#                       lead (share of votes), votes
#     violations        the same of every image whose class changed, with rival, p_value, and delta
#                       where it has at most eight numbers
# deformed_first        images deformed by a delta inside their certified set, then smoothed:
#     images            chosen, certified or not (these stay as they are)
#     votes, deltas     votes of a prediction, deltas per image
#     certified         share of the images that are certified correctly
#     clean             share whose smoothed prediction is right, without an attack
#     random            the same, mean over deltas drawn uniformly from the certified set
#     worst             the same, where every one of the deltas must leave it right
#     promised, changed certified images, and how many of them some delta gives another class
#                       (by a sign test at 0.001 for all deltas of an image together)
# clients               one entry of these counts and shares per client
# perturbations         only where clients certify perturbations of their own, an entry for each:
#     family, unit, clients, parameters, deformed_first
#                       as above, of the clients that certify it
# ```
# Shares of all clients together are means over images. With perturbations of their own,
# `family` and
# `deformed_first` at the top are null, and violations and leads name their family and unit.


FORMAT = 1
VOTES = 1000
"""Of a prediction on a deformed image."""
# Deltas of up to so many numbers are written down.
_SHORT = 8


@dataclass(frozen=True, eq=False)
class Attack:
    """What came of attacking one client's images.

    Attributes:
        certificates: of the images, one row each.
        promised: (m,) where there is a certificate to attack.
        found: of the images in `promised`, in their order; None where there are none.
        clean: (m,) whether the smoothed classifier is right without an attack.
        random: (m,) share of deltas drawn from the certified set that leave it right.
        worst: (m,) whether all deltas leave it right.
        changed: (m,) whether some delta gives a certified image another class beyond doubt.
        network: that voted.
    """

    certificates: Certificates
    promised: np.ndarray
    found: AttackResult | None
    clean: np.ndarray
    random: np.ndarray
    worst: np.ndarray
    changed: np.ndarray
    network: Network


def record_of(
    attacks: Sequence[Attack], effort: AttackBudget, images: int, clients: list[int]
) -> dict[str, Any]:
    """The record of the attacks on some clients' images; see the module."""
    network = attacks[0].network
    groups: dict[str, list[Attack]] = {}
    for attack in attacks:
        noise = attack.certificates.conditions.get("description")
        groups.setdefault(json.dumps(noise, sort_keys=True), []).append(attack)
    parts = [_of_perturbation(group, effort) for group in groups.values()]
    alone = len(parts) == 1
    return {
        "family": parts[0]["family"] if alone else None,
        "device": str(network.device),
        "precision": network.precision,
        "options": {
            "images": images,
            "clients": clients,
            "directions": effort.directions,
            "votes": VOTES,
        },
        "parameters": parts[0]["parameters"] if alone else _altogether(parts),
        "deformed_first": parts[0]["deformed_first"] if alone else None,
        **({} if alone else {"perturbations": parts}),
        "clients": [
            {
                "client": int(attack.certificates.client[0]),
                "violations": 0 if attack.found is None else int(attack.found.violated.sum()),
                **_shares([attack]),
            }
            for attack in attacks
        ],
    }


def _of_perturbation(attacks: Sequence[Attack], effort: AttackBudget) -> dict[str, Any]:
    """What came of the clients that certify one perturbation."""
    facts = attacks[0].certificates.conditions
    found = [attack.found for attack in attacks if attack.found is not None]
    cases = [case for attack in attacks for case in _cases(attack)]
    return {
        "family": facts["family"],
        "unit": facts["unit"],
        "clients": [int(attack.certificates.client[0]) for attack in attacks],
        "parameters": {
            "images": len(cases),
            "deltas": sum(part.tried for part in found),
            "votes": sum(part.votes for part in found),
            "suspicious": sum(part.suspicious for part in found),
            "confirm": effort.confirm,
            "level": effort.level,
            "smallest_lead": _closest(cases),
            "violations": [_without(case, "violated") for case in cases if case["violated"]],
        },
        "deformed_first": {
            "votes": VOTES,
            "deltas": effort.directions,
            **_shares(attacks),
        },
    }


def _altogether(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What was found inside certificates of any perturbation; lengths keep their own unit."""
    inside = [part["parameters"] for part in parts]
    units = [{"family": part["family"], "unit": part["unit"]} for part in parts]
    sums = ("images", "deltas", "votes", "suspicious")
    leads = [
        {**one["smallest_lead"], **unit}
        for one, unit in zip(inside, units, strict=True)
        if one["smallest_lead"] is not None
    ]
    return {
        **inside[0],
        **{name: sum(one[name] for one in inside) for name in sums},
        "smallest_lead": min(leads, key=lambda case: case["lead"], default=None),
        "violations": [
            {**case, **unit}
            for one, unit in zip(inside, units, strict=True)
            for case in one["violations"]
        ],
    }


def _cases(attack: Attack) -> list[dict[str, Any]]:
    """The worst delta of every attacked image, in plain numbers."""
    if attack.found is None:
        return []
    held, found = attack.certificates.select(attack.promised), attack.found
    lead = lead_of(found.counts, held.predicted)
    cases = []
    for row in range(len(held)):
        others = found.counts[row].copy()
        others[held.predicted[row]] = -1
        case = {
            "client": int(held.client[row]),
            "index": int(held.index[row]),
            "predicted": int(held.predicted[row]),
            "rival": int(others.argmax()),
            "radius": float(held.radius[row]),
            "length": float(found.length[row]),
            "lead": float(lead[row]),
            "votes": int(found.counts[row].sum()),
            "p_value": float(found.p_value[row]),
            "violated": bool(found.violated[row]),
        }
        delta = found.delta[row].flatten()
        cases.append({**case, "delta": delta.tolist()} if len(delta) <= _SHORT else case)
    return cases


def _closest(cases: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    if not cases:
        return None
    return _without(min(cases, key=lambda case: case["lead"]), "violated", "p_value", "rival")


def _without(case: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in case.items() if name not in names}


def _shares(attacks: Sequence[Attack]) -> dict[str, Any]:
    def share(of: Callable[[Attack], np.ndarray]) -> float:
        return float(np.concatenate([of(attack) for attack in attacks]).mean())

    return {
        "images": sum(len(attack.certificates) for attack in attacks),
        "certified": share(lambda a: a.certificates.correct & a.promised),
        "clean": share(lambda a: a.clean),
        "random": share(lambda a: a.random),
        "worst": share(lambda a: a.worst),
        "promised": sum(int(attack.promised.sum()) for attack in attacks),
        "changed": sum(int(attack.changed.sum()) for attack in attacks),
    }
