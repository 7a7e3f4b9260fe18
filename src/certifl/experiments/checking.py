"""Everything about a finished run that can be checked again from its own files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from certifl.certification import Certificates, verify
from certifl.errors import StoreError
from certifl.experiments.networks import last_round
from certifl.experiments.parts import finished_run, run_spec
from certifl.federated.engine import deployed_model
from certifl.models import fingerprint
from certifl.spec import Spec
from certifl.store.runs import RunFolder

__all__ = ["Verification", "verify_run"]


@dataclass(frozen=True)
class Verification:
    """What came of checking a run or a file of certificates.

    Attributes:
        checked: number of certificates. problems: one sentence each; empty when all is well.
    """

    checked: int
    problems: tuple[str, ...]


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
    certificates = folder.load_certificates()
    problems = [*_from_votes(certificates), *_as_asked(certificates, spec)]
    if spec.hash() != manifest.get("spec_hash"):
        problems.append("spec.toml was changed after the run was begun")
    problems += _of_the_models(folder, spec, certificates)
    return Verification(len(certificates), tuple(problems))


def _from_votes(certificates: Certificates) -> list[str]:
    found = verify(certificates)
    return [f"client {f.client}, image {f.index}: {f.problem}" for f in found]


def _as_asked(certificates: Certificates, spec: Spec) -> list[str]:
    """The conditions in the file must be those of the spec, and no image may appear twice."""
    facts, settings, perturbation = (
        certificates.conditions,
        spec.certification,
        spec.perturbation(),
    )
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
        f"the certificates say {key} = {facts.get(key)!r}, the spec {value!r}"
        for key, value in wanted.items()
        if facts.get(key) != value
    ]
    rows = np.stack([certificates.client, certificates.index], axis=1)
    if len(np.unique(rows, axis=0)) != len(rows):
        problems.append("an image is certified twice for one client")
    if sorted(set(certificates.client.tolist())) != list(range(spec.clients.count)):
        problems.append("some clients have no certificates")
    return problems


def _of_the_models(folder: RunFolder, spec: Spec, certificates: Certificates) -> list[str]:
    # States alone, without the network: checking somebody's run must not run their code.
    try:
        last = last_round(folder, spec)
    except StoreError as error:
        return [str(error)]
    algorithm = spec.build_algorithm()
    recorded = certificates.conditions.get("model_fingerprint") or {}
    return [
        f"client {client}: the stored model is not the one that was certified"
        for client in range(spec.clients.count)
        if fingerprint(deployed_model(algorithm, last, client)) != recorded.get(str(client))
    ]
