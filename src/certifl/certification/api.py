"""`certify` and `predict`: certificates for any classifier of images."""

from __future__ import annotations

import contextlib
import hashlib
import platform
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from certifl._version import __version__
from certifl.certification import engine
from certifl.certification.certificates import ABSTAINED, Certificates
from certifl.certification.guards import Model, check_exact, check_images, check_labels
from certifl.certification.network import Network, prepare
from certifl.certification.settings import Settings
from certifl.certification.votes import Request, VoteCounter
from certifl.models import fingerprint
from certifl.perturbations import describe
from certifl.perturbations.base import Perturbation
from certifl.progress import Progress, bar
from certifl.smoothing.bounds import two_sided_sign_test
from certifl.streams import image_key

__all__ = ["certify", "conditions", "predict"]

# Images on the device at once; results do not depend on it.
_BLOCK = 256


def certify(
    model: Model,
    images: Tensor | np.ndarray,
    perturbation: Perturbation,
    *,
    labels: Tensor | np.ndarray | None = None,
    n0: int = 100,
    n: int = 100_000,
    alpha: float = 1e-3,
    estimator: str = "sequential",
    radii: Sequence[float] | None = None,
    seed: int = 0,
    precision: str = "auto",
    device: str | torch.device = "auto",
    batch_size: int | str = "auto",
    progress: bool | Progress = False,
    label_aware: bool = True,
) -> Certificates:
    """Certify the smoothed classifier of a model at some images.

    Guarantee: for each image separately, with probability at least 1 - alpha over the votes, the
    smoothed classifier g_delta(x) = E[onehot(argmax f(T_{delta+eps} x))] has the same most likely
    class for all ||delta|| <= radius. See `perturbation.threat` for what this does not cover.

    Args:
        model: callable from images (m, c, h, w) in [0, 1] to logits (m, classes); modules must be
            in evaluation mode.
        images: (m, c, h, w) floating point in [0, 1].
        perturbation: for instance `certifl.Rotation(sigma="18deg")`; its sigma is in its own unit.
        labels: (m,) true classes; they only mark which certificates are correct and, with
            `sequential`, let votes stop early on wrong ones.
        n0: votes that choose the class. n: fresh votes that bound its probability (at most).
        alpha: probability of a wrong certificate, per image.
        estimator: "top-class" (Cohen et al. 2019), "runner-up", "sequential" (stops early;
            valid by a union bound over looks fixed in advance), "sequential-top-class".
        radii: the radii that will be reported, where `sequential` may stop; None stands for an
            even grid of 50 up to the largest radius that n votes can give.
        seed: votes are a function of (seed, image content), not of the position of an image.
        precision: arithmetic of the network: "auto", "float32", "bfloat16".
        device: "auto" or a torch device. batch_size: noisy images per call, or "auto".
        progress: True for a bar with the time left, or a function of (votes so far, at most).
        label_aware: with labels and `sequential`, stop at the first look on wrong images.

    Raises:
        InputError: images, labels or settings that cannot be used.
        ModelError: a model that is no function of one image, see `guards`.

    Source: Cohen et al. 2019, algorithm CERTIFY; Alfarra et al. 2022, Corollary 1.
    """
    settings = Settings(
        estimator, n0, n, alpha, None if radii is None else tuple(radii), label_aware
    )
    values = check_images(images)
    check_exact(values, perturbation)
    network = prepare(model, values, device, precision, batch_size)
    known = check_labels(labels, len(values), network.classes)
    counter = VoteCounter(network, perturbation, seed)
    facts = conditions(perturbation, settings, network, seed, model, _fingerprint(values))
    parts: list[Certificates] = []
    with _reporting(progress) as report:
        for start in range(0, len(values), _BLOCK):
            rows = slice(start, start + _BLOCK)
            block = values[rows].to(network.device)
            block_labels = None if known is None else known[rows]
            votes = engine.fresh(len(block), network.classes)
            shifted = _shifted(report, start, len(values), settings)
            engine.count_all(counter, block, block_labels, settings, votes, progress=shifted)
            index = np.arange(start, start + len(block))
            parts.append(
                engine.conclude(
                    votes, settings, perturbation, block_labels, index, conditions=facts
                )
            )
    return Certificates.concatenate(parts)


@contextlib.contextmanager
def _reporting(progress: bool | Progress) -> Iterator[Progress | None]:
    if progress is True:
        with bar("certifying", "votes") as report:
            yield report
    else:
        yield progress or None


def _shifted(
    report: Progress | None, before: int, images: int, settings: Settings
) -> Progress | None:
    if report is None:
        return None
    offset = engine.expected_votes(before, settings)
    everything = engine.expected_votes(images, settings)
    return lambda done, _total: report(offset + done, everything)


def _fingerprint(images: Tensor) -> str:
    return hashlib.sha256(images.cpu().numpy().tobytes()).hexdigest()


def conditions(
    perturbation: Perturbation,
    settings: Settings,
    network: Network,
    seed: int,
    model: Model,
    data: str,
) -> dict[str, Any]:
    """What holds for all certificates of one call: printed beside every radius."""
    return {
        "family": perturbation.family,
        "sigma": perturbation.sigma,
        "description": describe(perturbation),
        "law": perturbation.law.name,
        "norm": perturbation.norm,
        "unit": perturbation.unit,
        "threat": perturbation.threat,
        "estimator": settings.estimator,
        "bounds": settings.bounds,
        "alpha": settings.alpha,
        "n0": settings.n0,
        "n": settings.n,
        "look_votes": list(settings.looks),
        "look_levels": list(settings.levels),
        "radii": None if settings.radii is None else list(settings.radii),
        "label_aware": settings.label_aware,
        "seed": seed,
        "precision": network.precision,
        "batch_norm_folded": network.folded,
        "batch_size": network.batch_size,
        "device": _device_name(network.device),
        "threads": torch.get_num_threads(),
        "model_fingerprint": fingerprint(model) if isinstance(model, nn.Module) else None,
        "data_fingerprint": data,
        "versions": {
            "certifl": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def predict(
    model: Model,
    images: Tensor | np.ndarray,
    perturbation: Perturbation,
    *,
    n: int = 1000,
    alpha: float = 1e-3,
    seed: int = 0,
    precision: str = "auto",
    device: str | torch.device = "auto",
    batch_size: int | str = "auto",
) -> np.ndarray:
    """The smoothed classifier's class of each image, or -1 where the votes do not decide.

    Guarantee: for each image, with probability at least 1 - alpha, the answer is -1 or the most
    likely class of the smoothed classifier. No radius is certified.

    Args:
        model, images, perturbation, seed, precision, device, batch_size: as in `certify`.
        n: votes per image.
        alpha: level of the two-sided binomial test between the two most frequent classes.

    Returns:
        (m,) int64.

    Source: Cohen et al. 2019, algorithm PREDICT (test of Hung and Fithian).
    """
    Settings(n=n, alpha=alpha)  # the same ranges hold
    values = check_images(images)
    check_exact(values, perturbation)
    network = prepare(model, values, device, precision, batch_size)
    counter = VoteCounter(network, perturbation, seed)
    answers = []
    for start in range(0, len(values), _BLOCK):
        block = values[start : start + _BLOCK].to(network.device)
        requests = [
            Request(row, row, image_key(image), "predict", 0, n) for row, image in enumerate(block)
        ]
        answers.append(_decided(counter.count(block, requests, slots=len(block)), alpha))
    return np.concatenate(answers)


def _decided(counts: np.ndarray, alpha: float) -> np.ndarray:
    order = np.argsort(-counts, axis=1, kind="stable")[:, :2]
    first, second = np.take_along_axis(counts, order, axis=1).T
    certain = np.asarray(two_sided_sign_test(first, second)) <= alpha
    return np.where(certain, order[:, 0], ABSTAINED).astype(np.int64)
