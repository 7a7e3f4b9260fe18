"""Everything about a finished run that can be checked again from its own files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from certifl.certification import Certificates, verify
from certifl.certification.groups import entries
from certifl.certification.predictions import Predictions
from certifl.errors import InputError, StoreError
from certifl.experiments.checking_curves import (
    curves_of,
    impossible,
    kept_words,
    shared_rows,
)
from certifl.federated.engine import deployed_model
from certifl.models import fingerprint
from certifl.perturbations import Perturbation, from_record
from certifl.spec import Spec
from certifl.store.runs import RunFolder
from certifl.work.networks import last_round
from certifl.work.parts import finished_run, run_spec

__all__ = ["Verification", "verify_run"]


@dataclass(frozen=True)
class Verification:
    """What came of checking a run or a file of certificates.

    Attributes:
        checked: number of certificates. problems: one sentence each; empty when all is well.
        kept: why certificates of the run could not be verified here, and who can; empty where
            all of them were.
    """

    checked: int
    problems: tuple[str, ...]
    kept: str = ""


def verify_run(place: Path) -> Verification:
    """Recompute every radius from its votes, and hold the certificates against run and models.

    Args:
        place: a run folder, or one certificate file (.parquet).

    Raises:
        StoreMismatch: the folder is no run, or is not finished.
        StoreError: a file of the run is missing or damaged.
        InputError: the file holds no certificates, or none with votes.
    """
    if place.is_file():
        certificates = Certificates.load(place)
        return Verification(len(certificates), tuple(_from_votes(certificates)))
    folder = finished_run(place)
    manifest, spec = folder.manifest(), run_spec(folder)
    if folder.curves.is_file() and not folder.certificates.is_file():
        return _of_curves(folder, spec)
    certificates = folder.load_certificates()
    problems = [*_from_votes(certificates), *_as_asked(certificates, spec)]
    predictions = folder.load_predictions() if None in spec.perturbations() else None
    problems += [] if predictions is None else _plain_as_asked(predictions, spec)
    if spec.hash() != manifest.get("spec_hash"):
        problems.append("spec.toml was changed after the run was begun")
    problems += _of_the_models(folder, spec, certificates, predictions)
    return Verification(len(certificates), tuple(problems))


def _of_curves(folder: RunFolder, spec: Spec) -> Verification:
    """A federation whose clients kept their certificates: what they told, as far as it goes."""
    problems: list[str] = []
    if spec.hash() != folder.manifest().get("spec_hash"):
        problems.append("spec.toml was changed after the run was begun")
    curves, checked = curves_of(folder), 0
    for client, curve in curves.items():
        problems += impossible(client, curve, spec)
        problems += _told_as_asked(client, curve.get("conditions"), spec)
    for path in shared_rows(folder):
        rows = Certificates.load(path)
        problems += _from_votes(rows)
        checked += len(rows)
    return Verification(checked, tuple(problems), kept_words(folder.path, len(curves)))


def _told_as_asked(client: int, facts: Any, spec: Spec) -> list[str]:
    """A client may certify a perturbation of its own; everything else is the study's."""
    try:
        perturbation = from_record(facts["description"])
        return _other_facts(facts, spec, perturbation, f"of client {client} ")
    except (InputError, KeyError, TypeError, AttributeError) as error:
        return [f"client {client}: what it certified is damaged ({error!r})"]


def _from_votes(certificates: Certificates) -> list[str]:
    found = verify(certificates)
    return [f"client {f.client}, image {f.index}: {f.problem}" for f in found]


def _as_asked(certificates: Certificates, spec: Spec) -> list[str]:
    """The conditions in the file must be those of the spec, and no image may appear twice."""
    problems: dict[str, None] = {}  # clients that share a perturbation say it once
    perturbations = spec.perturbations()
    certified = [c for c, perturbation in enumerate(perturbations) if perturbation is not None]
    for clients, facts in entries(certificates.conditions):
        for client in certified if clients is None else clients:
            perturbation = perturbations[client] if client < len(perturbations) else None
            if perturbation is not None:
                who = "" if clients is None else f"of client {client} "
                problems |= dict.fromkeys(_other_facts(facts, spec, perturbation, who))
    rows = np.stack([certificates.client, certificates.index], axis=1)
    if len(np.unique(rows, axis=0)) != len(rows):
        problems["an image is certified twice for one client"] = None
    there = sorted(set(certificates.client.tolist()))
    if set(certified) - set(there):
        problems["some clients have no certificates"] = None
    if strangers := sorted(set(there) - set(certified)):
        problems[f"client {strangers[0]} has certificates, but the spec asks for none"] = None
    return list(problems)


def _other_facts(
    facts: Mapping[str, Any], spec: Spec, perturbation: Perturbation, who: str
) -> list[str]:
    """Where the conditions of certificates differ from what the spec asks for."""
    settings = spec.certification
    wanted = {
        "family": perturbation.family,
        "sigma": perturbation.sigma,
        "law": perturbation.law.name,
        "estimator": settings.estimator,
        "alpha": settings.alpha,
        "n0": settings.n0,
        "n": settings.n,
        "seed": spec.seed,
    }
    problems = [
        f"the certificates {who}say {key} = {facts.get(key)!r}, the spec {value!r}"
        for key, value in wanted.items()
        if facts.get(key) != value
    ]
    described = facts.get("description")
    if not problems and described is not None and not _same(described, perturbation):
        problems.append(f"the certificates {who}are of {described}, the spec's of {perturbation}")
    return problems


def _same(described: Any, perturbation: Perturbation) -> bool:
    try:
        return from_record(described) == perturbation
    except (InputError, TypeError, AttributeError):
        return False


def _plain_as_asked(predictions: Predictions, spec: Spec) -> list[str]:
    """Plain predictions are those of the clients that certify nothing, once for each image."""
    plain = [c for c, perturbation in enumerate(spec.perturbations()) if perturbation is None]
    problems = []
    if predictions.clients != plain:
        problems.append("plain predictions are not those of the clients that certify nothing")
    rows = np.stack([predictions.client, predictions.index], axis=1)
    if len(np.unique(rows, axis=0)) != len(rows):
        problems.append("an image is predicted twice for one client")
    return problems


def _of_the_models(
    folder: RunFolder, spec: Spec, certificates: Certificates, predictions: Predictions | None
) -> list[str]:
    # States alone, without the network: checking somebody's run must not run their code.
    try:
        last = last_round(folder, spec)
    except StoreError as error:
        return [str(error)]
    algorithm = spec.build_algorithm()
    recorded = {**(certificates.conditions.get("model_fingerprint") or {})}
    recorded |= {} if predictions is None else predictions.conditions.get("model_fingerprint", {})
    return [
        f"client {client}: the stored model is not the one that was certified"
        for client in range(spec.clients.count)
        if fingerprint(deployed_model(algorithm, last, client)) != recorded.get(str(client))
    ]
