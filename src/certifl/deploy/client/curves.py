"""What a client may tell of its certificates: a curve, rows, or nothing.

Radii and predictions of single images describe private images. The curve is, for every radius of a
grid that follows from the study alone, the number of test images that are certified correct at
it; with it goes the average certified radius.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from certifl.certification import Certificates, verify
from certifl.certification.certify import asked_conditions
from certifl.certification.precisions import PRECISIONS
from certifl.certification.scan import scan_of
from certifl.certification.settings import Settings
from certifl.deploy.transport.schemas import Curve, MalformedMessage
from certifl.errors import CertiflError, InputError, one_line
from certifl.federated.states import ModelState
from certifl.perturbations import Perturbation, from_record
from certifl.spec import Spec
from certifl.study.curves import impossible_curve

_LARGEST_ROWS = 1 << 30
_MOST_VERSIONS = 16
_TOLD = (
    "family",
    "sigma",
    "description",
    "law",
    "norm",
    "unit",
    "threat",
    "estimator",
    "bounds",
    "alpha",
    "n0",
    "n",
    "look_votes",
    "look_levels",
    "scan",
    "reach",
    "radii",
    "label_aware",
    "keep",
    "seed",
    "precision",
    "batch_norm_folded",
    "versions",
)
"""Facts that follow from the study, or from the software; nothing of data or models."""


def told_conditions(conditions: Mapping[str, Any]) -> dict[str, Any]:
    """The conditions of certificates as far as they are no secret of the client."""
    return {name: conditions[name] for name in _TOLD if name in conditions}


def curve_of(
    certificates: Certificates, perturbation: Perturbation, settings: Settings
) -> dict[str, Any]:
    """A client's curve: how many of its images are certified correct at each radius.

    Returns:
        radii, correct (counts), images, acr, and conditions (see `told_conditions`).
    """
    grid = settings.grid(perturbation)
    correct, radius = certificates.correct, certificates.radius
    counts = [int((correct & (radius >= r)).sum()) for r in grid]
    return {
        "radii": [float(r) for r in grid],
        "correct": counts,
        "images": len(certificates),
        "acr": certificates.average_certified_radius(),
        "conditions": told_conditions(certificates.conditions),
    }


def rows_of(certificates: Certificates) -> ModelState:
    """All rows, as a part of a message."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.parquet"
        certificates.save(path)
        return {"parquet": torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)}


@dataclass(frozen=True)
class Asking:
    """What the server knows of a client's certificates before it sees them.

    Attributes:
        spec: of the study. client: its number.
        images: how many test images it certifies; None = that is not known.
        exact: whether `images` is what it said itself; otherwise it may have fewer.
        classes: of the study. own: whether it may certify a perturbation of its own.
    """

    spec: Spec
    client: int
    images: int | None
    classes: int
    own: bool = False
    exact: bool = False

    def curve(self, told: Curve) -> dict[str, Any]:
        """A curve as it may be stored; what follows from the study is not taken from the client.

        Raises:
            MalformedMessage: no certificates of this study come to it.
        """
        perturbation, settings = self._perturbation(told.conditions), self._settings()
        conditions = self._conditions(told.conditions, perturbation, settings)
        radii = _grid(settings, perturbation)
        if told.radii != radii:
            raise MalformedMessage("its curve has other radii than the study's grid")
        self._as_many(told.images)
        largest = _largest(perturbation, settings)
        problem = impossible_curve(radii, told.correct, told.images, told.acr, largest)
        if problem is not None:
            raise MalformedMessage(f"its curve is impossible: {problem}")
        return {
            "radii": radii,
            "correct": told.correct,
            "images": told.images,
            "acr": told.acr,
            "conditions": conditions,
        }

    def rows(self, part: ModelState, model: str | None) -> Certificates:
        """Rows as they may be stored: each follows from its votes, and from the study.

        Raises:
            MalformedMessage: these are not certificates of this client and study, or no model is
                named.
        """
        if model is None:
            raise MalformedMessage("it does not say which model its rows are of")
        rows = rows_from(part, self.images)
        try:
            self._check_rows(rows, model)
        except (ArithmeticError, CertiflError, LookupError, TypeError, ValueError) as error:
            if isinstance(error, MalformedMessage):
                raise
            raise MalformedMessage(f"its rows are no certificates ({error})") from error
        return rows

    def _check_rows(self, rows: Certificates, model: str) -> None:
        perturbation, settings = self._perturbation(rows.conditions), self._settings()
        self._conditions(rows.conditions, perturbation, settings)
        if not len(rows) or set(rows.client.tolist()) != {self.client}:
            raise MalformedMessage("its rows are of another client")
        self._as_many(len(rows))
        if len(set(rows.index.tolist())) < len(rows) or int(rows.index.min()) < 0:
            raise MalformedMessage("its rows have an image twice, or one that cannot be")
        for name, low in (("label", 0), ("predicted", -1)):
            column = getattr(rows, name)
            if int(column.min()) < low or int(column.max()) >= self.classes:
                raise MalformedMessage(
                    f"its rows have a {name} beyond the study's {self.classes} classes"
                )
        if not np.isfinite(rows.seconds).all() or (rows.seconds < 0).any():
            raise MalformedMessage("its rows took a time that cannot be")
        if rows.conditions.get("model_fingerprint") != model:
            raise MalformedMessage("its rows are of another model than it names")
        found = verify(rows)
        if found:
            raise MalformedMessage(f"its rows do not follow from their votes: {found[0].problem}")

    def images_of(self, images: int) -> int:
        """A number of test images as it may be stored.

        Raises:
            MalformedMessage: the client certifies another number.
        """
        self._as_many(images)
        return images

    def _as_many(self, images: int) -> None:
        if self.images is None or images == self.images:
            return
        if self.exact or images > self.images:
            most = "" if self.exact else " at most"
            raise MalformedMessage(
                f"it counts {images} test images, and certifies {self.images}{most}"
            )

    def _settings(self) -> Settings:
        return self.spec.certification.settings(self.client)

    def _perturbation(self, conditions: Mapping[str, Any]) -> Perturbation:
        """The study's for this client, or the client's own where that is allowed."""
        if self.own:
            try:
                return from_record(conditions["description"])
            except (CertiflError, LookupError, TypeError, ValueError) as error:
                raise MalformedMessage(
                    "its certificates do not say what perturbation they are of"
                ) from error
        asked = self.spec.perturbations()[self.client]
        if asked is None:
            raise MalformedMessage("it is asked for no certificates")
        return asked

    def _conditions(
        self, told: Mapping[str, Any], perturbation: Perturbation, settings: Settings
    ) -> dict[str, Any]:
        """Those that follow from the study, as it has them, and the client's own, checked."""
        try:
            asked = asked_conditions(perturbation, settings, self.spec.seed)
        except InputError as error:
            raise MalformedMessage(
                f"its perturbation does not go with the study ({error})"
            ) from error
        known = json.loads(json.dumps(asked))
        for name, value in known.items():
            if name != "threat" and told.get(name) != value:
                raise MalformedMessage(
                    f"its {name} is {told.get(name)!r}, and the study has {value!r}"
                )
        return {**known, **_of_its_own(told)}


def _of_its_own(told: Mapping[str, Any]) -> dict[str, Any]:
    """What only the client knows: how it computed."""
    precision, folded = told.get("precision"), told.get("batch_norm_folded", False)
    versions = told.get("versions", {})
    if precision not in PRECISIONS or not isinstance(folded, bool):
        raise MalformedMessage("it does not say in which precision it computed")
    if not isinstance(versions, dict) or len(versions) > _MOST_VERSIONS:
        raise MalformedMessage("it does not say with which versions it computed")
    named = {one_line(name, 40): one_line(value, 80) for name, value in versions.items()}
    return {"precision": precision, "batch_norm_folded": folded, "versions": named}


def _grid(settings: Settings, perturbation: Perturbation) -> list[float]:
    try:
        return [float(radius) for radius in settings.grid(perturbation)]
    except InputError as error:
        raise MalformedMessage(f"its perturbation does not go with the study ({error})") from error


def _largest(perturbation: Perturbation, settings: Settings) -> float:
    """The largest radius that a certificate of these settings can have."""
    if settings.estimator == "scan":
        scan = scan_of(perturbation, settings)
        return max(abs(scan.low), abs(scan.high))
    law = perturbation.law
    return float(law.largest_radius(perturbation.sigma, settings.n, settings.alpha))


def rows_from(part: ModelState, most: int | None = None) -> Certificates:
    """Rows that a client sent.

    Args:
        part: of the message. most: as many rows at most.

    Raises:
        MalformedMessage: they are no certificates, or too many.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.parquet"
        try:
            path.write_bytes(part["parquet"].numpy().tobytes())
            file = pq.ParquetFile(path).metadata
            size = sum(file.row_group(i).total_byte_size for i in range(file.num_row_groups))
            if size > _LARGEST_ROWS or (most is not None and file.num_rows > most):
                raise MalformedMessage(
                    f"it sent {file.num_rows} rows of {size} bytes, which are impossible"
                )
            return Certificates.load(path)
        except MalformedMessage:
            raise
        except (
            ArithmeticError,
            AttributeError,
            InputError,
            LookupError,
            MemoryError,
            OSError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            raise MalformedMessage(f"its rows are no certificates ({error})") from error
