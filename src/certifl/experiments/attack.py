"""Attacks on the certificates of a finished run, and the record of them in attack.json.

```
format                1
spec_hash, family     of the run that was attacked
created, seconds      when, and how long it took
device, precision     the votes' arithmetic; the precision is that of the certificates
options               images per client, clients, directions, votes per deformed image
parameters            inside the certified sets, where no violation may be found:
    images            certified images that were attacked
    deltas, votes     tried and cast
    suspicious        deltas that needed all of `confirm` votes
    confirm, level    votes of a verdict (10 n), probability of calling any violation falsely
    smallest_lead     the image whose class was closest to changing: client, index, length,
                      radius, lead (share of votes), votes
    violations        the same of every image whose class changed, with rival, p_value, and delta
                      where it has at most eight numbers
deformed_first        images changed by a delta inside their certified set, then smoothed; where
                      certificates cover received images, clipped and rounded to 8 bits between:
    images            chosen, certified or not (the latter stay as they are)
    votes, deltas     votes of a prediction, deltas per image
    certified         share of the images that are certified correctly
    clean             share whose smoothed prediction is right, without an attack
    random            the same, mean over deltas drawn uniformly from the certified set
    worst             the same, where every one of the deltas must leave it right
    promised, changed certified images, and how many of them some delta gives another class
                      (by a sign test at 0.001 for all deltas of an image together)
clients               one entry of these counts and shares per client
perturbations         only where clients certify different perturbations, an entry for each:
    family, unit, clients, parameters, deformed_first
                      as above, of the clients that certify it
```
Shares of all clients together are means over images. With several perturbations, `family` and
`deformed_first` at the top are null, and violations and leads name their family and unit.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from certifl.certification import Certificates
from certifl.certification.attack import (
    AttackBudget,
    AttackResult,
    deformed_first,
    region_of,
    search,
)
from certifl.certification.counts import sign_test_against, vote_margins
from certifl.certification.network import Network
from certifl.certification.sampling import VoteCounter
from certifl.data import choose, to_float
from certifl.errors import InputError, StoreMismatch
from certifl.progress import StageCallback
from certifl.rng import generator, image_key
from certifl.runs.atomic import write_json
from certifl.study.environment import now
from certifl.study.opened_run import OpenRun

FORMAT = 1
VOTES = 1000  # of a prediction on a deformed image
_SHORT = 8  # deltas of up to so many numbers are written down
_CHANGED = 1e-3
_TIMES = 10


@dataclass(frozen=True)
class Options:
    """Which certificates are attacked, and how hard.

    Attributes:
        images: certified test images per client, a fixed random choice.
        client: only this one; None takes all.
        directions: deltas tried at first per image, and deltas an image is deformed by.
        data_dir, code: as `OpenRun`. device: "auto" or a torch device.
        report: called with progress.
    """

    images: int = 10
    client: int | None = None
    directions: int = 32
    data_dir: Path | None = None
    device: str = "auto"
    report: StageCallback | None = None
    code: Path | None = None


@dataclass(frozen=True, eq=False)
class Attack:
    """Results of attacking one client's images.

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

    @property
    def client(self) -> int:
        """Whose images they are."""
        return int(self.certificates.client[0])


def attack_run(path: Path, options: Options) -> dict[str, Any]:
    """Attack certificates of a finished run, and write the record beside them.

    Returns:
        The content of `attack.json`.

    Raises:
        StoreMismatch: not a finished run, or other data or models than were certified.
        InputError: a client the run does not have, or options out of range.
    """
    if options.images < 1 or options.directions < 2:
        raise InputError("An attack needs at least 1 image per client and 2 directions.")
    started, run = time.perf_counter(), OpenRun(path, options.data_dir, options.code)
    run.require_finished()
    clients = _clients(run.certificates, options.client)
    confirm = _TIMES * int(run.certificates.conditions["n"])
    budget = AttackBudget(directions=options.directions, confirm=confirm)
    with run.folder.locked():
        attacks = _attacks(run, clients, budget, options)
        record = {
            "format": FORMAT,
            "spec_hash": run.manifest.get("spec_hash"),
            "created": now(),
            "seconds": round(time.perf_counter() - started, 3),
            **_record(attacks, budget, options.images),
        }
        write_json(run.folder.attack, record)
    return record


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


def _attacks(
    run: OpenRun, clients: Sequence[int], budget: AttackBudget, options: Options
) -> list[Attack]:
    certificates, seed = run.certificates, run.spec.seed
    chosen, promised = [], []
    for client in clients:
        own = certificates.of_client(client)
        part = own.select(choose(np.arange(len(own)), options.images, seed, client))
        interval, reaches = part.interval, part.radius > 0
        if interval is not None:  # to one side at least
            reaches = reaches | (interval[:, 1] > interval[:, 0])
        chosen.append(part)
        promised.append(~part.abstained & reaches)
    total, done, attacks = sum(map(len, chosen)), 0, []
    for client, part, own in zip(clients, chosen, promised, strict=True):
        perturbation = run.perturbations[client]
        if perturbation is None:
            raise StoreMismatch(
                f"The run holds certificates of client {client}, but its spec gives that client "
                "no perturbation; `certifl verify` says more."
            )
        network = run.network(client, options.device)
        counter = VoteCounter(network, perturbation, run.spec.seed)
        images = to_float(run.dataset.test.take(part.index).images).to(network.device)
        share = int(own.sum()) / max(1, sum(int(each.sum()) for each in promised))
        level = budget.level * (share or 1.0)
        attacks.append(
            _attack(counter, images, part, own, dataclasses.replace(budget, level=level))
        )
        done += len(part)
        if options.report is not None:
            options.report("attacking", done, total, "images")
    return attacks


def _attack(
    counter: VoteCounter,
    images: Tensor,
    certificates: Certificates,
    promised: np.ndarray,
    budget: AttackBudget,
) -> Attack:
    found = None
    if promised.any():
        own = certificates.select(promised)
        inside = images[torch.as_tensor(promised, device=images.device)]
        found = search(counter, inside, own.predicted, own.radius, own.interval, budget)
    deltas = _deltas(counter, images, certificates, promised, budget.directions)
    votes = deformed_first(counter, images, deltas, VOTES)
    right = votes.argmax(axis=2) == certificates.label[:, None]
    half = 1 + budget.directions // 2
    changed = np.zeros(len(images), np.bool_)
    for row in np.flatnonzero(promised):
        expected = np.full(budget.directions, certificates.predicted[row])
        p_values = sign_test_against(votes[row, 1:], expected)
        changed[row] = p_values.min() <= _CHANGED / budget.directions
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
    counter: VoteCounter,
    images: Tensor,
    certificates: Certificates,
    promised: np.ndarray,
    count: int,
) -> Tensor:
    """No delta, deltas drawn from the certified set, and a grid or boundary of it, per image.

    Images without a certificate stay as they are: nothing is promised about any delta.
    """
    channels, height, width = images.shape[1:]
    radius = np.where(promised, certificates.radius, 0.0)
    interval = certificates.interval
    if interval is not None:
        interval = np.where(promised[:, None], interval, 0.0)
    shape, device = (channels, height, width), images.device
    region = region_of(counter.perturbation, shape, radius, interval, device)
    streams = [
        generator(counter.seed, "deformed first", image_key(image), device=device)
        for image in images
    ]
    drawn = region.random(count // 2, streams)
    direction = region.directions(1, streams)[:, 0]
    edge = region.first(count - drawn.shape[1], direction, streams)
    return torch.cat([torch.zeros_like(drawn[:, :1]), drawn, edge], dim=1)


# The record of the attacks.


def _record(attacks: Sequence[Attack], budget: AttackBudget, images: int) -> dict[str, Any]:
    groups: dict[str, list[Attack]] = {}
    for attack in attacks:
        perturbation = attack.certificates.conditions.get("description")
        groups.setdefault(json.dumps(perturbation, sort_keys=True), []).append(attack)
    parts = [_of_perturbation(group, budget) for group in groups.values()]
    mixed = len(parts) > 1
    return {
        "family": None if mixed else parts[0]["family"],
        "device": str(attacks[0].network.device),
        "precision": attacks[0].network.precision,
        "options": {
            "images": images,
            "clients": [attack.client for attack in attacks],
            "directions": budget.directions,
            "votes": VOTES,
        },
        "parameters": _together(parts) if mixed else parts[0]["parameters"],
        "deformed_first": None if mixed else parts[0]["deformed_first"],
        **({"perturbations": parts} if mixed else {}),
        "clients": [
            {
                "client": attack.client,
                "violations": 0 if attack.found is None else int(attack.found.violated.sum()),
                **_shares([attack]),
            }
            for attack in attacks
        ],
    }


def _of_perturbation(attacks: Sequence[Attack], budget: AttackBudget) -> dict[str, Any]:
    metadata = attacks[0].certificates.conditions
    found = [attack.found for attack in attacks if attack.found is not None]
    cases = [case for attack in attacks for case in _cases(attack)]
    closest = min(cases, key=itemgetter("lead"), default=None)
    return {
        "family": metadata["family"],
        "unit": metadata["unit"],
        "clients": [attack.client for attack in attacks],
        "parameters": {
            "images": len(cases),
            "deltas": sum(part.tried for part in found),
            "votes": sum(part.votes for part in found),
            "suspicious": sum(part.suspicious for part in found),
            "confirm": budget.confirm,
            "level": budget.level,
            "smallest_lead": closest and _without(closest, "violated", "p_value", "rival"),
            "violations": [_without(case, "violated") for case in cases if case["violated"]],
        },
        "deformed_first": {"votes": VOTES, "deltas": budget.directions, **_shares(attacks)},
    }


def _together(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The search inside certificates of all perturbations; lengths keep their own unit."""
    inside = [part["parameters"] for part in parts]
    units = [{"family": part["family"], "unit": part["unit"]} for part in parts]
    pairs = list(zip(inside, units, strict=True))
    closest = [
        {**one["smallest_lead"], **unit} for one, unit in pairs if one["smallest_lead"] is not None
    ]
    sums = ("images", "deltas", "votes", "suspicious")
    return {
        **inside[0],
        **{name: sum(one[name] for one in inside) for name in sums},
        "smallest_lead": min(closest, key=itemgetter("lead"), default=None),
        "violations": [{**case, **unit} for one, unit in pairs for case in one["violations"]],
    }


def _cases(attack: Attack) -> list[dict[str, Any]]:
    """The worst delta of every attacked image, in plain numbers."""
    if attack.found is None:
        return []
    own, found = attack.certificates.select(attack.promised), attack.found
    rows = np.arange(len(own))
    others = found.counts.copy()
    others[rows, own.predicted] = -1
    columns: dict[str, list[Any]] = {
        "client": own.client.tolist(),
        "index": own.index.tolist(),
        "predicted": own.predicted.tolist(),
        "rival": others.argmax(axis=1).tolist(),
        "radius": own.radius.tolist(),
        "length": found.length.astype(np.float64).tolist(),
        "lead": vote_margins(found.counts, own.predicted).tolist(),
        "votes": found.counts.sum(axis=1).tolist(),
        "p_value": found.p_value.tolist(),
        "violated": found.violated.tolist(),
    }
    deltas = found.delta.flatten(1)
    if deltas.shape[1] <= _SHORT:
        columns["delta"] = deltas.tolist()
    return [{name: values[row] for name, values in columns.items()} for row in rows]


def _without(case: Mapping[str, Any], *names: str) -> dict[str, Any]:
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
