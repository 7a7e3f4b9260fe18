"""What a client may share of its certificates: a curve, rows, or nothing.

Radii and predictions of single images describe private images. A curve has, for every radius of a
grid that follows from the study alone, the number of test images that are certified correct at
it, and the average certified radius.
"""

from __future__ import annotations

import dataclasses
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
from certifl.certification.metadata import AMOUNTS, requested_conditions
from certifl.certification.settings import PRECISIONS, Settings
from certifl.deploy.schemas import Curve, MalformedMessage
from certifl.errors import CertiflError, InputError, StoreError, one_line
from certifl.federated.states import ModelState
from certifl.perturbations import Perturbation, from_record
from certifl.safe_io import MALFORMED
from certifl.smoothing.curves import impossible_curve
from certifl.spec import Spec

_LARGEST_ROWS = 1 << 30
_MOST_VERSIONS = 16
# Grids of one study computed by two releases of scipy differ by a few units of the last place.
_LAST_PLACES = 1e-12
_PUBLIC_METADATA = (
    *("family", "sigma", "description", "law", "norm", "unit", "threat"),
    *("estimator", "bounds", "alpha", "n0", "n"),
    *AMOUNTS,
    *("label_aware", "keep", "seed", "precision", "batch_norm_folded", "versions"),
)
"""Metadata that follow from the study or the software; nothing about data or models."""
_OF_THE_MACHINE = {"device", "batch_size", "threads", "tf32", "data_fingerprint"}


def curve_of(
    certificates: Certificates, perturbation: Perturbation, settings: Settings
) -> dict[str, Any]:
    """A client's curve: radii, images certified correct at each, images, ACR, public metadata."""
    grid = settings.estimator_for(perturbation).grid()
    correct, radius = certificates.correct, certificates.radius
    counts = [int((correct & (radius >= r)).sum()) for r in grid]
    metadata = certificates.conditions
    return {
        "radii": [float(r) for r in grid],
        "correct": counts,
        "images": len(certificates),
        "acr": certificates.average_certified_radius(),
        "conditions": {name: metadata[name] for name in _PUBLIC_METADATA if name in metadata},
    }


def rows_of(certificates: Certificates) -> ModelState:
    """All rows, as a part of a message."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.parquet"
        certificates.save(path)
        return {"parquet": torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)}


@dataclass(frozen=True)
class CertificateChecks:
    """What the server checks a client's certificates against.

    Attributes:
        spec: of the study. client: its number.
        images: how many test images it certifies; None = unknown.
        exact: whether the client reported `images`; otherwise it may have fewer.
        classes: of the study. own: whether it may certify its own perturbation.
    """

    spec: Spec
    client: int
    images: int | None
    classes: int
    own: bool = False
    exact: bool = False

    def curve(self, curve: Curve) -> dict[str, Any]:
        """A checked curve to be stored; what follows from the study is not the client's to say."""
        perturbation, conditions = self._conditions(curve.conditions)
        try:
            estimator = self._settings().estimator_for(perturbation)
            radii = [float(radius) for radius in estimator.grid()]
        except InputError as error:
            raise MalformedMessage(f"its perturbation does not fit the study ({error})") from error
        same = len(curve.radii) == len(radii)
        if not same or not np.allclose(curve.radii, radii, rtol=_LAST_PLACES, atol=0.0):
            raise MalformedMessage("its curve has other radii than the study's grid")
        self.check_count(curve.images)
        largest = estimator.largest_radius()
        problem = impossible_curve(radii, curve.correct, curve.images, curve.acr, largest)
        if problem is not None:
            raise MalformedMessage(f"its curve is impossible: {problem}")
        return {
            "radii": radii,
            "correct": curve.correct,
            "images": curve.images,
            "acr": curve.acr,
            "conditions": conditions,
        }

    def rows(self, part: ModelState, model: str | None) -> Certificates:
        """Rows that follow from their votes and the study; else MalformedMessage.

        Their metadata are the study's, and of the client's what concerns its own machine alone.
        """
        if model is None:
            raise MalformedMessage("it does not say which model its rows are of")
        rows = _rows_from(part, self.images)
        try:
            _, conditions = self._conditions(rows.conditions)
            self._check_rows(rows, model)
        except MalformedMessage:
            raise
        except (CertiflError, *MALFORMED) as error:
            raise MalformedMessage(f"its rows are not certificates ({error})") from error
        for name in _OF_THE_MACHINE & rows.conditions.keys():
            value = rows.conditions[name]
            conditions[name] = value if isinstance(value, int) else one_line(value, 128)
        conditions["model_fingerprint"] = model
        return dataclasses.replace(rows, conditions=conditions)

    def _check_rows(self, rows: Certificates, model: str) -> None:
        if not len(rows) or set(rows.client.tolist()) != {self.client}:
            raise MalformedMessage("its rows are of another client")
        self.check_count(len(rows))
        if len(set(rows.index.tolist())) < len(rows) or int(rows.index.min()) < 0:
            raise MalformedMessage("its rows have an image twice, or an impossible position")
        for name, low in (("label", 0), ("predicted", -1)):
            column = getattr(rows, name)
            if int(column.min()) < low or int(column.max()) >= self.classes:
                raise MalformedMessage(
                    f"its rows have a {name} beyond the study's {self.classes} classes"
                )
        if not np.isfinite(rows.seconds).all() or (rows.seconds < 0).any():
            raise MalformedMessage("its rows have an impossible duration")
        if rows.conditions.get("model_fingerprint") != model:
            raise MalformedMessage("its rows are of another model than it names")
        discrepancies = verify(rows)
        if discrepancies:
            raise MalformedMessage(
                f"its rows do not follow from their votes: {discrepancies[0].problem}"
            )

    def check_count(self, images: int) -> None:
        """Refuse another number of images than the client certifies (MalformedMessage)."""
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
        """The study's for this client, or its own where that is allowed."""
        if self.own:
            try:
                return from_record(conditions["description"])
            except (CertiflError, LookupError, TypeError, ValueError) as error:
                raise MalformedMessage(
                    "its certificates do not say what perturbation they are of"
                ) from error
        perturbation = self.spec.perturbations()[self.client]
        if perturbation is None:
            raise MalformedMessage("it was asked for no certificates")
        return perturbation

    def _conditions(self, sent: Mapping[str, Any]) -> tuple[Perturbation, dict[str, Any]]:
        """The perturbation, and the metadata that follow from the study; the client's, checked."""
        perturbation = self._perturbation(sent)
        try:
            derived = requested_conditions(perturbation, self._settings(), self.spec.seed)
        except InputError as error:
            raise MalformedMessage(f"its perturbation does not fit the study ({error})") from error
        expected = json.loads(json.dumps(derived))
        for name, value in expected.items():
            if name != "threat" and sent.get(name) != value:
                raise MalformedMessage(
                    f"its {name} is {sent.get(name)!r}, and the study has {value!r}"
                )
        return perturbation, {**expected, **_own_metadata(sent)}


def _own_metadata(sent: Mapping[str, Any]) -> dict[str, Any]:
    """What only the client knows: how it computed."""
    precision, folded = sent.get("precision"), sent.get("batch_norm_folded", False)
    versions = sent.get("versions", {})
    if precision not in PRECISIONS or not isinstance(folded, bool):
        raise MalformedMessage("it does not say in which precision it computed")
    if not isinstance(versions, dict) or len(versions) > _MOST_VERSIONS:
        raise MalformedMessage("it does not say with which versions it computed")
    named = {one_line(name, 40): one_line(value, 80) for name, value in versions.items()}
    return {"precision": precision, "batch_norm_folded": folded, "versions": named}


def _rows_from(part: ModelState, most: int | None) -> Certificates:
    """Rows that a client sent, `most` at most; MalformedMessage for anything else."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.parquet"
        try:
            content = part["parquet"].numpy().tobytes()
            try:
                path.write_bytes(content)
            except OSError as error:  # this machine's fault, not the client's
                raise StoreError(f"Cannot write {path}: {error}. Free some space.") from error
            file = pq.ParquetFile(path).metadata
            size = sum(file.row_group(i).total_byte_size for i in range(file.num_row_groups))
            if size > _LARGEST_ROWS or (most is not None and file.num_rows > most):
                raise MalformedMessage(
                    f"it sent {file.num_rows} rows of {size} bytes, which are impossible"
                )
            return Certificates.load(path)
        except (MalformedMessage, StoreError):
            raise
        except (MemoryError, OSError, RuntimeError, *MALFORMED) as error:
            raise MalformedMessage(f"its rows are not certificates ({error})") from error
