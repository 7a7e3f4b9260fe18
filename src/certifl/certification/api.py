"""`certify`, `predict` and `SmoothedClassifier`: certificates for any classifier of images."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import platform
import threading
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor, nn

from certifl._version import __version__
from certifl.certification import counts as engine
from certifl.certification.arithmetic import Trial, ready
from certifl.certification.certificates import ABSTAINED, Certificates
from certifl.certification.checks import (
    ImageLabels,
    Images,
    Model,
    check_labels,
    check_perturbation,
    checked_blocks,
    checked_seed,
)
from certifl.certification.estimators import least_that, too_few_votes
from certifl.certification.metadata import requested_conditions
from certifl.certification.network import (
    Network,
    choose_device,
    choose_precision,
    tf32_state,
)
from certifl.certification.quantization import calibration_of
from certifl.certification.sampling import VoteCounter, check_random_source_once
from certifl.certification.settings import Settings
from certifl.models import fingerprint
from certifl.perturbations.base import Perturbation
from certifl.perturbations.units import parse_amount, parse_amounts
from certifl.progress import ProgressCallback, bar
from certifl.smoothing.bounds import two_sided_sign_test
from certifl.torch_env import one_thread

# Images on the device at once; results do not depend on it.
_BLOCK = 256
_SELECTION = 100  # votes of an image with which `predict` compares two arithmetics


def certify(
    model: Model,
    images: Images,
    perturbation: Perturbation,
    *,
    labels: ImageLabels = None,
    n0: int = 100,
    n: int = 100_000,
    alpha: float = 1e-3,
    estimator: str = "sequential",
    radii: Sequence[float | str] | None = None,
    seed: int = 0,
    precision: str = "auto",
    device: str | torch.device = "auto",
    batch_size: int | str = "auto",
    progress: bool | ProgressCallback = False,
    label_aware: bool = True,
    reach: float | str | None = None,
    keep: str = "certificates",
    calibration: Tensor | np.ndarray | Mapping[str, Any] | None = None,
) -> Certificates:
    """Certify the smoothed classifier of a model at some images.

    Guarantee: for each image separately, with probability at least 1 - alpha over the votes, the
    smoothed classifier g_delta(x) = E[onehot(argmax f(T_{delta+eps} x))] has the same most likely
    class for all ||delta|| <= radius. See `perturbation.threat` for what this does not cover.

    This holds for ONE call per image. Another call with other n, alpha or estimator and the same
    seed draws the same votes again: the best of k such certificates of an image is wrong with
    probability up to k alpha; use alpha / k in each call to keep alpha in total.

    Radii of uniform laws (rotation, scaling) stay below sigma, unless the estimator is "scan".

    Args:
        model: callable from images (m, c, h, w) in [0, 1] to logits (m, classes), or to an object
            with `.logits`; modules must be in evaluation mode.
        images: (m, c, h, w) floating point in [0, 1]; or blocks of such, as an iterable that may
            read them one at a time, where they are more than memory holds. A `DataLoader` that
            does not shuffle, or a map-style data set, of images or of pairs (image, label).
        perturbation: for instance `certifl.Rotation(sigma="18deg")`; its sigma is in its own unit.
        labels: (m,) true classes, or as many blocks of them as of images; they only mark which
            certificates are correct and, with `sequential`, let votes stop early on wrong ones.
        n0: votes that choose the class.
        n: fresh votes that bound its probability (at most).
        alpha: probability of a wrong certificate, per image.
        estimator: "top-class" (Cohen et al. 2019), "runner-up", "sequential" (stops early;
            exact boundaries at looks fixed in advance), "sequential-top-class"; "scan" for
            rotation and scaling: votes along the whole axis certify an interval around 0, not
            capped at sigma, in `interval`; it stops early too (see docs/scan.md).
        radii: the radii that will be reported, where `sequential` and `scan` may stop: in the
            perturbation's unit, for angles also "5deg". With None, `sequential`
            stops where the average radius gains too little, see `keep`, and `scan` where its ends
            are known to a 50th of sigma.
        seed: votes are a function of (seed, image content), not of the position of an image.
        precision: arithmetic of the network: "float32", "bfloat16", "int8" (on a CPU), or "auto",
            which is measured once for each network, perturbation and machine, and then kept.
        device: "auto" or a torch device.
        batch_size: noisy images per call, or "auto".
        progress: True for a bar with the time left, or a function of (votes so far, at most).
        label_aware: with labels, `sequential` and `scan` stop at the first look on wrong images.
        reach: `scan` only: how far from 0 it looks, as `radii` are given; None stands for all the
            way round for rotation, and three times sigma for scaling.
        keep: what n votes must bring for `sequential` to cast them: with "certificates" .003
            steps of the radii an image, so that one image in a thousand misses a step that n votes
            reach; with "curve" .22 steps (about two in a hundred). Without radii 1 or 3 % of the
            largest radius, which costs about 1 or 2 % of the average radius.
        calibration: for "int8", images of the kind that the model was trained with, the first 128
            of which fix the ranges of 8 bits; or another record's `conditions["quantization"]`.

    Returns:
        A row for each image, in their order, with its votes, radius in the perturbation's unit
        (rounded down) and class (-1 = abstained); their metadata are in `conditions`.

    Raises:
        InputError: images, labels or settings that cannot be used.
        ModelError: a model that is not a function of one image, see `checks`.

    Source: Cohen et al. 2019, algorithm CERTIFY; Alfarra et al. 2022, Corollary 1.
    """
    check_perturbation(perturbation)
    seed = checked_seed(seed)
    unit = perturbation.unit
    amounts = None if radii is None else parse_amounts(radii, unit)
    farthest = None if reach is None else parse_amount(reach, unit, "reach")
    settings = Settings(estimator, n0, n, alpha, amounts, label_aware, farthest, keep)
    chosen = settings.estimator_for(perturbation)
    chosen.check()
    blocks = checked_blocks(images, labels, perturbation)
    first = next(blocks)
    trial = Trial.of(perturbation, settings, seed, len(first[0]))
    counter = _counter(model, first[0], trial, device, precision, batch_size, calibration)
    content, parts, done = hashlib.sha256(), list[Certificates](), 0
    shown = bar("certifying", "votes") if progress is True else nullcontext(progress or None)
    with shown as report:
        for values, given in itertools.chain([first], blocks):
            known = check_labels(given, len(values), counter.network.classes)
            content.update(values.cpu().numpy().tobytes())
            for start in range(0, len(values), _BLOCK):
                rows = slice(start, start + _BLOCK)
                shifted = _shifted(report, done + start, done + len(values), settings)
                part = None if known is None else known[rows]
                votes = engine.fresh(len(values[rows]), counter.network.classes)
                on_device = values[rows].to(counter.network.device)
                engine.count_all(counter, on_device, part, chosen, votes, progress=shifted)
                index = np.arange(done + start, done + start + len(on_device))
                parts.append(engine.finalize(votes, chosen, part, index))
            done += len(values)
    joined = Certificates.concatenate(parts)
    # Last, because the batch size may have been halved on the way.
    metadata = conditions(
        perturbation, settings, counter.network, seed, model, content.hexdigest()
    )
    return dataclasses.replace(joined, conditions=metadata)


def _counter(
    model: Model,
    images: Tensor,
    trial: Trial,
    device: str | torch.device,
    precision: str,
    batch_size: int | str,
    calibration: Tensor | np.ndarray | Mapping[str, Any] | None,
) -> VoteCounter:
    """The votes of a model prepared for images like these; the random source was tested."""
    scales = calibration_of(calibration, trial.perturbation, trial.seed)
    network = ready(model, images, trial, device, precision, batch_size, calibration=scales)
    check_random_source_once(trial.perturbation, tuple(images.shape[1:]), network.device)
    return VoteCounter(network, trial.perturbation, trial.seed)


def _shifted(
    report: ProgressCallback | None, before: int, images: int, settings: Settings
) -> ProgressCallback | None:
    """Progress of some images as progress of all of them."""
    if report is None:
        return None
    offset = engine.expected_votes(before, settings)
    everything = engine.expected_votes(images, settings)
    return lambda done, _total: report(offset + done, everything)


def conditions(
    perturbation: Perturbation,
    settings: Settings,
    network: Network,
    seed: int,
    model: Model,
    data: str,
) -> dict[str, Any]:
    """The metadata of all certificates of one call.

    Args:
        perturbation, settings, seed: of the votes. network: as it voted.
        model: as it was given, for its fingerprint. data: fingerprint of the images.
    """
    return {
        **requested_conditions(perturbation, settings, seed),
        "precision": network.precision,
        **_rounding(network),
        **_quantization(network, model),
        "batch_norm_folded": network.folded,
        "batch_size": network.batch_size,
        "device": torch.cuda.get_device_name(network.device)
        if network.device.type == "cuda"
        else str(network.device),
        "threads": network.threads,
        "model_fingerprint": fingerprint(model) if isinstance(model, nn.Module) else None,
        "data_fingerprint": data,
        "versions": {
            "certifl": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def _quantization(network: Network, model: Model) -> dict[str, Any]:
    """The scales of a network in int8, and how often it agrees with float32."""
    if network.quantized is None:
        return {}
    scales, layers = network.quantized.scales, network.quantized.layers
    weights = fingerprint(model) if isinstance(model, nn.Module) else None
    return {
        "quantization": {
            "fingerprint": scales.fingerprint(weights),
            "scales": scales.stored(),
            "layers": list(layers),
            "processor": torch.backends.cpu.get_cpu_capability(),
        },
        "agreement_with_float32": network.quantized.agreement,
    }


def _rounding(network: Network) -> dict[str, Any]:
    """What else decides how a network rounds: float32 is not one arithmetic on a GPU."""
    if network.device.type != "cuda" or network.precision != "float32":
        return {}
    return {"tf32": tf32_state()}


class Predicted(NamedTuple):
    """Answers of a smoothed classifier.

    Attributes:
        labels: (m,) int64, the class of each image, or -1 where the votes do not decide.
        radii: (m,) certified radius in the unit of the perturbation, rounded down; 0 where -1.
    """

    labels: np.ndarray
    radii: np.ndarray


@overload
def predict(
    model: Model,
    images: Images,
    perturbation: Perturbation,
    *,
    n: int = 1000,
    alpha: float = 1e-3,
    seed: int = 0,
    precision: str = "auto",
    device: str | torch.device = "auto",
    batch_size: int | str = "auto",
    calibration: Tensor | np.ndarray | Mapping[str, Any] | None = None,
    radius: Literal[False] = False,
) -> np.ndarray: ...


@overload
def predict(
    model: Model,
    images: Images,
    perturbation: Perturbation,
    *,
    n: int = 1000,
    alpha: float = 1e-3,
    seed: int = 0,
    precision: str = "auto",
    device: str | torch.device = "auto",
    batch_size: int | str = "auto",
    calibration: Tensor | np.ndarray | Mapping[str, Any] | None = None,
    radius: Literal[True],
) -> Predicted: ...


def predict(
    model: Model,
    images: Images,
    perturbation: Perturbation,
    *,
    n: int = 1000,
    alpha: float = 1e-3,
    seed: int = 0,
    precision: str = "auto",
    device: str | torch.device = "auto",
    batch_size: int | str = "auto",
    calibration: Tensor | np.ndarray | Mapping[str, Any] | None = None,
    radius: bool = False,
) -> np.ndarray | Predicted:
    """The smoothed classifier's class of each image, or -1 where the votes do not decide.

    Guarantee: for each image, with probability at least 1 - alpha, the answer is -1 or the most
    likely class of the smoothed classifier. With `radius` that of `certify`: with probability at
    least 1 - alpha, the label is -1 or the class at every parameter of norm at most the radius.
    Both statements are about one call: an image that is asked for with and without `radius` has
    two answers, each wrong with probability at most alpha.

    Args:
        model, images, perturbation, seed, precision, device, batch_size, calibration: as in
            `certify`; with the `precision` and the `quantization` of a record's conditions, it is
            the network that the record is about.
        n: votes per image; with `radius` those that bound a probability, after 100 others that
            choose the class: the votes that chose it would make it look too likely.
        alpha: level of the two-sided binomial test between the two most frequent classes; with
            `radius` probability of a wrong answer, per image.
        radius: also certify a radius, as `certify` does with n0 = 100.

    Returns:
        (m,) int64; with `radius` labels and radii, see `Predicted`.

    Raises:
        InputError: as `certify`; n so small that the answer could only be -1.

    Source: Cohen et al. 2019, algorithms PREDICT (test of Hung and Fithian) and CERTIFY.
    """
    if radius:
        certificates = certify(
            model,
            images,
            perturbation,
            n=n,
            alpha=alpha,
            seed=seed,
            precision=precision,
            device=device,
            batch_size=batch_size,
            calibration=calibration,
        )
        return Predicted(certificates.predicted, certificates.radius)
    check_perturbation(perturbation)
    seed = checked_seed(seed)
    n = Settings("runner-up", n=n, alpha=alpha).n  # the same ranges hold

    def decides(votes: int) -> bool:
        return bool(two_sided_sign_test(votes, 0) <= alpha)

    if not decides(n):  # not even where they all agree
        raise too_few_votes(n, alpha, least_that(decides))
    blocks = checked_blocks(images, None, perturbation)
    first = next(blocks)
    trial = Trial(perturbation, seed, min(_SELECTION, n), len(first[0]) * n)
    counter = _counter(model, first[0], trial, device, precision, batch_size, calibration)
    answers = []
    for values, _ in itertools.chain([first], blocks):
        for start in range(0, len(values), _BLOCK):
            block = values[start : start + _BLOCK].to(counter.network.device)
            votes = counter.count_each(block, "predict", n)
            order = np.argsort(-votes, axis=1, kind="stable")[:, :2]
            first_two = np.take_along_axis(votes, order, axis=1).T
            certain = np.asarray(two_sided_sign_test(*first_two)) <= alpha
            answers.append(np.where(certain, order[:, 0], ABSTAINED).astype(np.int64))
    return np.concatenate(answers)


# Voting sets torch's threads and arithmetic for the whole process; two calls at once, as a service
# makes them, would reset each other's.
_ONE_AT_A_TIME = threading.Lock()


class SmoothedClassifier:
    """The smoothed classifier of a model: the class that its network gives most often under noise.

        smoothed = certifl.SmoothedClassifier(model, certifl.Rotation("18deg"))
        labels, radii = smoothed.predict(images)

    Guarantee: that of `certify`, in each call and for each image: with probability at least
    1 - alpha over its votes the label is -1 (abstained), or the smoothed classifier gives it at
    every parameter of norm at most the radius. The n0 votes that choose a label are never among
    those that bound its probability.

    Votes are a function of the seed and the image, so the same image gets the same answer however
    often it is asked for. Who knows the seed can look for images on which the votes mislead;
    against somebody who chooses images, draw it (`secrets.randbits(63)`) and keep it to yourself.
    Even then about alpha of all images have a wrong answer, and somebody who may ask without limit
    can look for those.

    Attributes:
        model: callable from images (m, c, h, w) in [0, 1] to logits (m, classes).
        perturbation: what it is smoothed with.
        device: on which it votes.
    """

    def __init__(
        self,
        model: Model,
        perturbation: Perturbation,
        *,
        n0: int = 100,
        n: int = 1000,
        alpha: float = 1e-3,
        estimator: str = "sequential",
        seed: int = 0,
        precision: str = "auto",
        device: str | torch.device = "auto",
        batch_size: int | str = "auto",
        calibration: Tensor | np.ndarray | Mapping[str, Any] | None = None,
    ) -> None:
        """Name a model and how it votes, as in `certify`; nothing is computed yet.

        The first call fixes what "auto" is. InputError for settings that certify nothing.
        """
        check_perturbation(perturbation)
        seed = checked_seed(seed)
        choose_precision(precision)
        Settings(estimator, n0, n, alpha).estimator_for(perturbation).check()
        self.model, self.perturbation, self.device = model, perturbation, device
        self._certify = functools.partial(
            certify,
            n0=n0,
            n=n,
            alpha=alpha,
            estimator=estimator,
            seed=seed,
            calibration=calibration,
        )
        # Precision, batch size and threads: 1, or 0 for as many as torch computes with.
        self._asked: tuple[str, int | str, int] = (precision, batch_size, 0)
        self._fixed: tuple[str, int | str, int] | None = None

    def __repr__(self) -> str:
        return f"SmoothedClassifier({type(self.model).__name__}, {self.perturbation!r})"

    def predict(self, images: Images) -> Predicted:
        """Labels and certified radii of images (m, c, h, w) in [0, 1]; see the class."""
        certificates = self.certify(images)
        return Predicted(certificates.predicted, certificates.radius)

    def certify(self, images: Images, labels: ImageLabels = None) -> Certificates:
        """The certificates behind `predict`, with their votes and metadata; see `certify`.

        Args:
            images: as in `predict`.
            labels: (m,) true classes; they mark which certificates are correct, and let votes stop
                early on wrong ones.
        """
        with _ONE_AT_A_TIME:
            precision, batch_size, threads = self._fixed or self._asked
            with one_thread(threads == 1):
                made = self._certify(
                    self.model,
                    images,
                    self.perturbation,
                    labels=labels,
                    precision=precision,
                    device=self.device,
                    batch_size=batch_size,
                )
            if self._fixed is None:
                # Another call, of more images, might choose otherwise: one image, two answers.
                known = made.conditions
                self._fixed = known["precision"], known["batch_size"], known["threads"]
            return made

    def to(self, device: str | torch.device) -> SmoothedClassifier:
        """Move the model, if it is a module, and vote on another device; returns itself."""
        if isinstance(self.model, nn.Module):
            self.model.to(choose_device(device))
        with _ONE_AT_A_TIME:
            self.device, self._fixed = device, None
        return self
