"""Run folders with made-up certificates that obey the rules of real ones."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from certifl.certification.certificates import Certificates
from certifl.report.results import RunResults
from certifl.smoothing.bounds import top_class_bounds
from certifl.smoothing.laws import LAWS

REGIMES = {
    "local": ("Local", 0.62),
    "fedavg": ("FedAvg", 0.90),
    "personalized": ("Personalized", 0.89),
    "mixture": ("Mixture, λ = 0.5", 0.80),
}
_TURNED = "The image is rotated about its center by an angle chosen by the adversary."
_ADDED = "A perturbation of bounded l2 norm is added to the pixel intensities."
ROTATION, PIXEL, TRANSLATION = (
    dict(zip(("family", "sigma", "law", "norm", "unit", "threat"), values, strict=True))
    for values in (
        ("rotation", 0.1 * math.pi, "uniform", "l1", "radians", _TURNED),
        ("pixel", 0.25, "gaussian", "l2", "intensity", _ADDED),
        ("translation", 0.2, "gaussian", "l2", "half-widths", "The image is shifted."),
    )
)
FAMILIES = {facts["family"]: facts for facts in (ROTATION, PIXEL, TRANSLATION)}
CLASSES = 10
N0, N, ALPHA = 100, 1000, 0.001


def blank_certificates(m: int, **columns: Any) -> Certificates:
    """Certificates of m images, in numbers that are wrong together wherever none are given."""
    made = {
        **dict.fromkeys(("client", "label", "predicted"), np.zeros(m, np.int64)),
        **dict.fromkeys(("counts", "selection_counts"), np.zeros((m, CLASSES), np.int64)),
        **{"index": np.arange(m), "looks": np.ones(m, np.int64), "radius": np.zeros(m)},
        **{"p_lower": np.full(m, 0.9), "p_upper": np.full(m, 0.1)},
        **{"level": np.full(m, ALPHA), "seconds": np.full(m, 0.01)},
    }
    return Certificates(**{**made, **columns})


def make_certificates(
    quality: float,
    clients: int = 10,
    images: int = 40,
    perturbation: Mapping[str, Any] = ROTATION,
    seed: int = 0,
    spread: float = 0.05,
) -> Certificates:
    """Certificates whose votes for the true class are Binomial with mean about `quality`."""
    rng = np.random.default_rng(seed)
    m = clients * images
    client = np.repeat(np.arange(clients), images)
    # Difficulty belongs to the image: all regimes meet the same one, as real paired runs do.
    difficulty = np.random.default_rng(99).normal(0.0, 0.35, m)
    shift = rng.normal(0.0, spread, clients)[client] + rng.normal(0.0, 0.06, m)
    p_true = np.clip(quality + shift + difficulty, 0.01, 0.999)
    label = np.random.default_rng(7).integers(0, CLASSES, m)
    selection, counts = _votes(rng, label, p_true, N0), _votes(rng, label, p_true, N)
    chosen = selection.argmax(axis=1)
    p_lower, p_upper = top_class_bounds(counts[np.arange(m), chosen], N, ALPHA)
    radius = LAWS[perturbation["law"]].radius(perturbation["sigma"], p_lower, p_upper)
    certified = np.asarray(p_lower > p_upper)
    conditions = {
        **perturbation,
        "estimator": "top-class",
        "bounds": "top-class",
        "alpha": ALPHA,
        "n0": N0,
        "n": N,
        "look_votes": [N],
        "look_levels": [ALPHA],
        "radii": None,
        "label_aware": True,
        "seed": 0,
        "precision": "bfloat16",
        "device": "cpu",
        "description": {"family": perturbation["family"], "sigma": perturbation["sigma"]},
    }
    return blank_certificates(
        m,
        client=client,
        label=label,
        predicted=np.where(certified, chosen, -1),
        radius=np.where(certified, radius, 0.0),
        p_lower=np.asarray(p_lower),
        p_upper=np.asarray(p_upper),
        counts=counts,
        selection_counts=selection,
        conditions=conditions,
    )


def _votes(rng: np.random.Generator, label: np.ndarray, p_true: np.ndarray, n: int) -> np.ndarray:
    rest = (1.0 - p_true)[:, None]
    p = np.empty((len(label), CLASSES))
    others = np.arange(CLASSES) != label[:, None]
    p[others] = (rest * np.array([0.6, 0.2, 0.1, 0.04, 0.02, 0.02, 0.01, 0.005, 0.005])).ravel()
    p[~others] = p_true
    return rng.multinomial(n, p / p.sum(axis=1, keepdims=True)).astype(np.int64)


def make_manifest(regime: str, label: str, clients: int = 10, images: int = 400) -> dict[str, Any]:
    return {
        "name": "digits-rotation",
        "regime": regime,
        "label": label,
        "status": "finished",
        "spec_hash": "8d1f0c9a7be2",
        "seed": 0,
        "data": {
            "name": "digits",
            "in_channels": 1,
            "image_size": [8, 8],
            "num_classes": CLASSES,
            "class_names": [str(i) for i in range(CLASSES)],
            "train_images": 1397,
            "test_images": images,
        },
        "clients": clients,
        "deploys": "the global model of the last round",
        "model": "small_cnn",
        "training_seconds": 12.34,
        "certification_seconds": 20.1,
        "votes": 440000,
        "machine": {
            "processor": "Some processor",
            "cores": 2,
            "device": "cpu",
            "precision": "bfloat16",
            "memory_gb": 24.0,
        },
        "versions": {"certifl": "0.1.0", "torch": "2.13.0", "python": "3.11.7"},
        "command": "certifl run spec.toml",
        "created": "2026-11-22T16:00:00Z",
    }


def make_history(clients: int, quality: float, rounds: int = 12) -> list[dict[str, Any]]:
    lines = []
    for r in range(rounds):
        progress = quality * (1 - math.exp(-(r + 1) / 3))
        measures = {
            str(c): {
                "loss": 2.3 * (1.05 - progress) + 0.03 * math.sin(c + r),
                "accuracy": min(1.0, progress + 0.02 * math.cos(3 * c + r)),
            }
            for c in range(clients)
        }
        lines.append({"round": r, "seconds": 1.25, "clients": measures})
    return lines


def write_run(
    folder: Path,
    certificates: Certificates,
    manifest: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]] = (),
    spec: str = 'seed = 0\n\n[data]\nname = "digits"\n\n[algorithm]\nname = "fedavg"\n',
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(manifest))
    (folder / "spec.toml").write_text(spec)
    lines = "".join(json.dumps(entry) + "\n" for entry in history)
    (folder / "history.jsonl").write_text(lines)
    certificates.save(folder / "certificates.parquet")
    return folder


def keep_to_themselves(
    folder: Path, certificates: Certificates, radii: np.ndarray | None = None
) -> Path:
    """A run whose clients share curves only, by default up to the largest radius of all."""
    if radii is None:
        radii = np.linspace(0.0, float(certificates.radius.max()), 50)
    clients = {}
    for client in np.unique(certificates.client).tolist():
        own = certificates.of_client(client)
        counts = [int((own.correct & (own.radius >= radius)).sum()) for radius in radii]
        clients[str(client)] = {
            "radii": radii.tolist(),
            "correct": counts,
            "images": len(own),
            "acr": own.average_certified_radius(),
            "conditions": dict(own.conditions),
        }
    (folder / "curves.json").write_text(json.dumps({"format": 1, "clients": clients}))
    (folder / "certificates.parquet").unlink()
    return folder


def make_run(
    certificates: Certificates, regime: str = "fedavg", label: str | None = None, **facts: Any
) -> RunResults:
    """A run that never was on disk."""
    manifest = {**make_manifest(regime, label or regime), **facts}
    return RunResults(Path("runs") / regime, label or regime, manifest, certificates, (), "")


def write_study(
    place: Path,
    regimes: Mapping[str, tuple[str, float]] = REGIMES,
    clients: int = 10,
    images: int = 40,
    perturbation: Mapping[str, Any] = ROTATION,
) -> list[Path]:
    folders = []
    for number, (regime, (label, quality)) in enumerate(regimes.items()):
        spread = 0.10 if regime == "local" else 0.03
        certificates = make_certificates(
            quality, clients, images, perturbation, seed=number, spread=spread
        )
        manifest = make_manifest(regime, label, clients, clients * images)
        history = make_history(clients, quality)
        folders.append(write_run(place / regime, certificates, manifest, history))
    return folders
