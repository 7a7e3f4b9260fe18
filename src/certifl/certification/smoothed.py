"""A classifier with its noise as one object: labels and radii of new images, for a service."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from certifl.certification.api import ImageLabels, Images, Predicted, certify
from certifl.certification.certificates import Certificates
from certifl.certification.checks import Model, check_perturbation, check_seed
from certifl.certification.network import choose_precision
from certifl.certification.settings import Settings
from certifl.perturbations.base import Perturbation
from certifl.torch_env import one_thread

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
        """Name a model and how it votes; nothing is computed yet.

        Args:
            model, perturbation, n0, alpha, estimator, seed, precision, device, batch_size,
                calibration: as in `certify`; what "auto" stands for is fixed by the first call.
            n: votes that bound a probability, at most. More give larger radii.

        Raises:
            InputError: settings that cannot be used, or so few votes that nothing is certified.
        """
        check_perturbation(perturbation)
        check_seed(seed)
        choose_precision(precision)
        Settings(estimator, n0, n, alpha).estimator_for(perturbation).check()
        self.model, self.perturbation, self.device = model, perturbation, device
        self._votes = _Votes(n0, n, alpha, estimator, seed, precision, batch_size, calibration)
        self._arithmetic: _Arithmetic | None = None

    def __repr__(self) -> str:
        return f"SmoothedClassifier({type(self.model).__name__}, {self.perturbation!r})"

    def predict(self, images: Images) -> Predicted:
        """Labels and certified radii; see the class for what is guaranteed.

        Args:
            images: (m, c, h, w) in [0, 1], or blocks of such.

        Returns:
            `labels`, (m,) int64, -1 where the votes do not decide, and `radii`, (m,) in the unit
            of the perturbation, rounded down, 0 where abstained.

        Raises:
            InputError, ModelError: as `certify`.
        """
        certificates = self.certify(images)
        return Predicted(certificates.predicted, certificates.radius)

    def certify(self, images: Images, labels: ImageLabels = None) -> Certificates:
        """The certificates behind `predict`, with their votes and metadata.

        Args:
            images: as in `predict`.
            labels: (m,) true classes; they mark which certificates are correct, and let votes stop
                early on wrong ones.

        Raises:
            InputError, ModelError: as `certify`.
        """
        votes = self._votes
        with _ONE_AT_A_TIME:
            fixed = self._arithmetic or _Arithmetic(votes.precision, votes.batch_size, 0)
            with one_thread(fixed.threads == 1):
                made = certify(
                    self.model,
                    images,
                    self.perturbation,
                    labels=labels,
                    n0=votes.n0,
                    n=votes.n,
                    alpha=votes.alpha,
                    estimator=votes.estimator,
                    seed=votes.seed,
                    precision=fixed.precision,
                    device=self.device,
                    batch_size=fixed.batch_size,
                    calibration=votes.calibration,
                )
            if self._arithmetic is None:
                # Another call, of more images, might choose otherwise: one image, two answers.
                facts = made.conditions
                self._arithmetic = _Arithmetic(
                    facts["precision"], facts["batch_size"], facts["threads"]
                )
            return made

    def to(self, device: str | torch.device) -> SmoothedClassifier:
        """Move the model, if it is a module, and vote on another device; returns itself."""
        if isinstance(self.model, nn.Module):
            self.model.to(device)
        with _ONE_AT_A_TIME:
            self.device, self._arithmetic = device, None
        return self


class _Votes(NamedTuple):
    """How a smoothed classifier votes."""

    n0: int
    n: int
    alpha: float
    estimator: str
    seed: int
    precision: str
    batch_size: int | str
    calibration: Tensor | np.ndarray | Mapping[str, Any] | None


class _Arithmetic(NamedTuple):
    """In which arithmetic all calls vote; threads: 1, or as many as torch computes with."""

    precision: str
    batch_size: int | str
    threads: int
