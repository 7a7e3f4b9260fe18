"""What attacks on the certificates of a run came to, as its `attack.json` holds it.

```
format                1
spec_hash, family     of the run that was attacked
created, seconds      when, and how long it took
device, precision     the votes' arithmetic; the precision is that of the certificates
options               images per client, clients, directions, votes per deformed image
parameters            inside the certified sets, where nothing may be found:
    images            certified images that were attacked
    deltas, votes     tried and spent
    suspicious        deltas that needed all of `confirm` votes
    confirm, level    votes of a verdict (10 n), probability of calling any violation falsely
    smallest_lead     the image whose class was closest to changing: client, index, length, radius,
                      lead (share of votes), votes
    violations        the same of every image whose class changed, with rival, p_value, and delta
                      where it has at most eight numbers
deformed_first        images deformed by a delta inside their certified set, then smoothed:
    images            chosen, certified or not (these stay as they are)
    votes, deltas     votes of a prediction, deltas per image
    certified         share of the images that are certified correctly
    clean             share whose smoothed prediction is right, without an attack
    random            the same, mean over deltas drawn uniformly from the certified set
    worst             the same, where every one of the deltas must leave it right
    promised, changed certified images, and how many of them some delta gives another class
                      (by a sign test at 0.001 for all deltas of an image together)
clients               one entry of these counts and shares per client
```
Shares of all clients together are means over images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from certifl.certification import Certificates
from certifl.certification.attack import Effort, Found
from certifl.certification.contest import lead_of
from certifl.certification.network import Network

__all__ = ["FORMAT", "VOTES", "Attack", "record_of"]

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
    found: Found | None
    clean: np.ndarray
    random: np.ndarray
    worst: np.ndarray
    changed: np.ndarray
    network: Network


def record_of(
    attacks: Sequence[Attack], effort: Effort, images: int, clients: list[int]
) -> dict[str, Any]:
    """The record of the attacks on some clients' images; see the module."""
    network = attacks[0].network
    found = [attack.found for attack in attacks if attack.found is not None]
    cases = [case for attack in attacks for case in _cases(attack)]
    return {
        "device": str(network.device),
        "precision": network.precision,
        "options": {
            "images": images,
            "clients": clients,
            "directions": effort.directions,
            "votes": VOTES,
        },
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
        "clients": [
            {
                "client": int(attack.certificates.client[0]),
                "violations": 0 if attack.found is None else int(attack.found.violated.sum()),
                **_shares([attack]),
            }
            for attack in attacks
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
