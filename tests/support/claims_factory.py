"""Studies of made-up runs whose true effects are known.

Image i of a study has a difficulty of its own that all runs of that study meet. A run is correct
on it with probability `accuracy`, and then certifies a share of the largest possible radius, so
that its mean ACR is the planted `acr` of the client, as a share of the largest radius.
"""

import copy
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from certifl.paper.claims.catalogue import CLAIMS, ClaimResult, check_runs
from certifl.paper.claims.runs import StudyRun, read_run
from certifl.report.results import RunResults
from certifl.smoothing.laws import LAWS
from report_factory import FAMILIES, blank_certificates, make_manifest

ROTATION = {"family": "rotation", "sigma": 0.1 * math.pi}
LARGE_ROTATION = {"family": "rotation", "sigma": 0.5 * math.pi}
TRANSLATION = {"family": "translation", "sigma": 0.1}
LARGE_TRANSLATION = {"family": "translation", "sigma": 0.5}
PIXEL = {"family": "pixel", "sigma": 0.12}
LARGE_PIXEL = {"family": "pixel", "sigma": 0.5}
AFFINE = {"family": "affine", "sigma": 0.1}
SIX = (ROTATION, LARGE_ROTATION, TRANSLATION, LARGE_TRANSLATION, PIXEL, LARGE_PIXEL)

LOCAL: dict[str, Any] = {"name": "local"}
FEDAVG: dict[str, Any] = {"name": "fedavg"}
PERSONALIZED: dict[str, Any] = {
    "name": "personalized",
    "base": {"name": "fedavg"},
    "epochs": 4,
    "lr": 0.01,
}
N, ALPHA = 1000, 0.001
DRAWS = 2000


def mixture(value: float) -> dict[str, Any]:
    return {"name": "mixture", "personalization": value}


def spec(
    algorithm: Mapping[str, Any],
    certified: Mapping[str, Any] = ROTATION,
    *,
    federated: Mapping[str, Any] | str = "matching",
    clients: int = 10,
    seed: int = 0,
    lr: float = 0.1,
    data: str = "cifar10",
    alpha: float = ALPHA,
    precision: str = "auto",
) -> dict[str, Any]:
    start = certified if federated == "matching" else federated
    personal = "same" if federated == "matching" else certified
    tuned = algorithm["name"] == "personalized"
    return copy.deepcopy(
        {
            "name": f"{algorithm['name']} {clients}",
            "seed": seed,
            "data": {"name": data},
            "clients": {"count": clients, "split": "uniform", "options": {}},
            "model": {"name": "small_cnn", "options": {}},
            "algorithm": dict(algorithm),
            "training": {"rounds": 10, "local_epochs": 2, "lr": lr, "momentum": 0.9},
            "augmentation": {"federated": start, "personalized": personal if tuned else "same"},
            "certification": {
                "perturbation": dict(certified),
                "images": 40,
                "n0": 100,
                "n": N,
                "alpha": alpha,
                "precision": precision,
            },
        }
    )


def run(values: Mapping[str, Any], acr: float | Sequence[float], **planted: Any) -> StudyRun:
    """A run with planted ACR (a share of the largest radius; one, or one for each client)."""
    return read_run(results(values, acr, **planted))


def results(
    values: Mapping[str, Any],
    acr: float | Sequence[float],
    accuracy: float = 0.9,
    images: int = 40,
    noise: float = 0.05,
    first_image: int = 0,
) -> RunResults:
    text = tomli_w.dumps(dict(values))
    clients, seed = values["clients"]["count"], values["seed"]
    m = clients * images
    own = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)
    planted = np.repeat(np.broadcast_to(np.asarray(acr, float), (clients,)), images)
    shared, private = np.random.default_rng([seed, clients]), np.random.default_rng(own)
    label = shared.integers(0, 10, m)
    luck, ease = shared.random(m), shared.normal(0.0, 0.1, m)
    # Half of what decides is the image's, half the run's: paired runs agree, but not always.
    flips = private.random(m) < 0.1
    correct = np.where(flips, private.random(m), luck) < accuracy
    share = np.clip(planted / accuracy + ease + private.normal(0.0, noise, m), 0.0, 1.0)
    perturbation = values["certification"]["perturbation"]
    conditions = {**FAMILIES[perturbation["family"]], "alpha": ALPHA, "n": N, "n0": 100}
    certificates = blank_certificates(
        m,
        client=np.repeat(np.arange(clients), images),
        index=np.arange(m) + first_image,
        label=label,
        predicted=np.where(correct, label, (label + 1) % 10),
        radius=share * LAWS[conditions["law"]].largest_radius(perturbation["sigma"], N, ALPHA),
        conditions={**conditions, **perturbation},
    )
    name = values["algorithm"]["name"]
    manifest = {**make_manifest(name, name.title(), clients), "seed": seed}
    manifest["data"] = {**manifest["data"], "name": values["data"]["name"], "fingerprint": "f00"}
    return RunResults(Path("runs") / f"{own:08x}", name, manifest, certificates, (), text)


def write(place: Path, study: StudyRun, status: str = "finished") -> Path:
    held = study.results
    folder = place / "runs" / held.folder.name
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({**held.manifest, "status": status}))
    (folder / "spec.toml").write_text(held.spec)
    held.certificates.save(folder / "certificates.parquet")
    return folder


def claim(runs: Sequence[StudyRun], name: str) -> ClaimResult:
    named = [claim for claim in CLAIMS if claim.name == name]
    (result,) = check_runs(list(runs), DRAWS, claims=named).results
    return result


def pair(
    local: float, fedavg: float, clients: int = 10, images: int = 40, **more: Any
) -> list[StudyRun]:
    """Local training and federated averaging with these ACRs, alike in all else."""
    return [
        run(spec(LOCAL, clients=clients), local, images=images, **more),
        run(spec(FEDAVG, clients=clients), fedavg, images=images, **more),
    ]
