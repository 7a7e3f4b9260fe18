"""Metadata of certificates where perturbations differ between clients.

What all rows share is at the top, as always. What differs is in `PERTURBATIONS`, one entry for
each perturbation:

```
"perturbations": [{"clients": [0, 3], "family": "rotation", "sigma": 0.31, "unit": "radians", ...},
                  {"clients": [1], "family": "pixel", "sigma": 0.12, "unit": "intensity", ...}]
```
Code that expects one family, sigma or unit then finds none, instead of a wrong one. Where all
clients certify the same perturbation there is no such entry.

Two perturbations are of one KIND if their radii can be averaged: equal in all but sigma. Sigma may
differ between clients: it says how the classifier is smoothed, the radius what is promised.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from certifl.certification.settings import ESTIMATORS, Settings
from certifl.errors import InputError
from certifl.perturbations import describe

if TYPE_CHECKING:
    from certifl.certification.estimators import Estimator
    from certifl.perturbations import Perturbation

PERTURBATIONS = "perturbations"
CURVES_ONLY = "curves_only"
"""Marks rows that stand for a curve: nothing is known of single images."""

Conditions = Mapping[str, Any]
AMOUNTS = (
    "radii",
    *(name for row in ESTIMATORS.rows.values() for name in row.metadata),
    "look_votes",
    "look_levels",
)
"""What depends on a perturbation and its unit."""
NOISE = ("family", "sigma", "law", "norm", "unit", "threat")
"""What follows from the description of a perturbation."""


def requested_conditions(
    perturbation: Perturbation, settings: Settings, seed: int, estimator: Estimator | None = None
) -> dict[str, Any]:
    """The metadata that follow from the request, before any network is known.

    `verify` compares a record with these, so they must depend on the arguments alone. `estimator`
    is that of a record, where an earlier version took another for these settings.
    """
    estimator = estimator or settings.estimator_for(perturbation)
    return {
        "family": perturbation.family,
        "sigma": perturbation.sigma,
        "description": describe(perturbation),
        "law": perturbation.law.name,
        "norm": perturbation.norm,
        "unit": perturbation.unit,
        "threat": perturbation.threat,
        "estimator": settings.estimator,
        "bounds": estimator.bounds,
        "alpha": settings.alpha,
        "n0": settings.n0,
        "n": settings.n,
        "look_votes": list(estimator.looks),
        "look_levels": list(estimator.levels),
        **estimator.metadata,
        "radii": None if settings.radii is None else list(settings.radii),
        "label_aware": settings.label_aware,
        "keep": settings.keep,
        "seed": seed,
    }


def differs(first: Any, second: Any) -> bool:
    """Whether two stored values are not the same; true is not 1."""
    return json.dumps(first, sort_keys=True) != json.dumps(second, sort_keys=True)


def below_sigma(metadata: Conditions) -> bool:
    """Whether radii must stay below sigma: Corollary 1 for a uniform distribution."""
    row = ESTIMATORS.rows.get(str(metadata.get("estimator")))
    return metadata.get("law") == "uniform" and not (row is not None and row.beyond_sigma)


def require_groups(conditions: Conditions) -> None:
    """Refuse stored metadata that cannot be assigned to clients (InputError)."""
    groups = conditions.get(PERTURBATIONS)
    if groups is None:
        return
    if not isinstance(groups, list) or not groups or not all(map(_names_clients, groups)):
        raise InputError("its conditions do not say which client certifies which perturbation")


def _names_clients(group: object) -> bool:
    clients = group.get("clients") if isinstance(group, dict) else None
    return isinstance(clients, list) and all(type(client) is int for client in clients)


def joined(parts: Sequence[tuple[int, Conditions]]) -> dict[str, Any]:
    """The metadata of several clients' certificates together.

    Args:
        parts: (client, metadata of its certificates); all but the perturbation is the first's.
    """
    metadata = dict(parts[0][1])
    result: dict[str, dict[str, Any]] = {}
    for client, conditions in parts:
        own = {
            name: conditions[name]
            for name in (*NOISE, "description", *AMOUNTS)
            if name in conditions
        }
        entry = result.setdefault(json.dumps(own, sort_keys=True), {"clients": [], **own})
        entry["clients"].append(client)
    groups = list(result.values())
    if len(groups) == 1:
        return metadata
    named = [client for group in groups for client in group["clients"]]
    if len(set(named)) < len(named):
        raise InputError(
            "These certificates give one client several perturbations, so its rows could not be "
            "distinguished. Keep them in separate files, or renumber the clients."
        )
    names = {name for group in groups for name in group} - {"clients"}
    differing = {n for n in names if any(g.get(n) != groups[0].get(n) for g in groups)}
    shared = {name: value for name, value in metadata.items() if name not in differing}
    reduced = [{k: v for k, v in g.items() if k == "clients" or k in differing} for g in groups]
    return {**shared, PERTURBATIONS: reduced}


def entries(conditions: Conditions) -> list[tuple[list[int] | None, dict[str, Any]]]:
    """Every perturbation's clients and full metadata; clients are None where there is one."""
    groups = conditions.get(PERTURBATIONS)
    if groups is None:
        return [(None, dict(conditions))]
    shared = {name: value for name, value in conditions.items() if name != PERTURBATIONS}
    result = []
    for group in groups:
        own = {name: value for name, value in group.items() if name != "clients"}
        result.append(([int(client) for client in group["clients"]], {**shared, **own}))
    return result


def of_client(conditions: Conditions, client: int) -> dict[str, Any]:
    """The metadata of one client's certificates; InputError if it certified nothing."""
    for clients, metadata in entries(conditions):
        if clients is None or client in clients:
            return metadata
    raise InputError(f"There are no certificates of client {client}: it certified nothing.")


def narrowed(conditions: Conditions, present: Iterable[int]) -> Conditions:
    """The metadata of some clients' rows: plain if they certify one perturbation."""
    if PERTURBATIONS not in conditions:
        return conditions
    here = set(present)
    parts = [
        (client, metadata)
        for clients, metadata in entries(conditions)
        for client in clients or ()
        if client in here
    ]
    return joined(parts) if parts else conditions


def kind_of(conditions: Conditions) -> str:
    """A key of what a radius means: the perturbation without its sigma, its norm and its unit."""
    described = conditions.get("description")
    options = dict(described) if isinstance(described, Mapping) else {}
    options.pop("sigma", None)
    names = ("family", "norm", "unit")
    return json.dumps([options, [conditions.get(n) for n in names]], sort_keys=True)


def kinds(conditions: Conditions) -> dict[str, list[int] | None]:
    """Kinds of radii and their clients; None where all clients certify the same."""
    result: dict[str, list[int] | None] = {}
    for clients, metadata in entries(conditions):
        owners = result.setdefault(kind_of(metadata), None if clients is None else [])
        if owners is not None:
            owners.extend(clients or ())
    return result


def masks(conditions: Conditions, client: np.ndarray) -> list[np.ndarray]:
    """For every perturbation, the rows of the clients that certify it."""
    return [
        np.ones(len(client), np.bool_) if clients is None else np.isin(client, clients)
        for clients, _ in entries(conditions)
    ]
