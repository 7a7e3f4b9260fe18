"""Certificates, and plain predictions: one row per image, and the metadata of all rows."""

from __future__ import annotations

import dataclasses
import importlib
import numbers
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from certifl.certification import metadata as groups
from certifl.errors import InputError, UnusualValue
from certifl.lazy import attribute
from certifl.perturbations.units import parse_amount, parse_amounts
from certifl.smoothing import curves
from certifl.smoothing.bounds import Bools, Floats, Ints

if TYPE_CHECKING:
    from pandas import DataFrame

ABSTAINED = -1
UNLABELED = -1
_MEANING = ("family", "sigma", "unit")


@dataclass(frozen=True, eq=False)
class Certificates:
    """Certificates of m images; every array has one row per image.

    Guarantee: for each image separately, with probability at least 1 - alpha over its votes, the
    smoothed classifier answers `predicted` at every parameter of norm at most `radius` (in
    `conditions["norm"]` and `conditions["unit"]`). Rows with `predicted == -1` promise nothing.

    Perturbations may differ between clients. Metadata that differ are then in
    `conditions["perturbations"]` with their clients (see `metadata`), `by_perturbation` splits
    such certificates, and radii of different meaning are never averaged.

    Attributes:
        client: (m,) the client whose test image it is; 0 outside a federation.
        index: (m,) position of the image in its data set.
        label: (m,) true class, -1 where unknown.
        predicted: (m,) certified class of the smoothed classifier, -1 = abstained.
        radius: (m,) certified radius, rounded down; 0 where abstained.
        p_lower: (m,) lower confidence bound of the predicted class's probability.
        p_upper: (m,) upper confidence bound of every other class's probability.
        counts: (m, classes) estimation votes per class.
        selection_counts: (m, classes) the n0 votes that chose the class; never part of `counts`.
        looks: (m,) how many looks at the votes were taken.
        level: (m,) confidence level spent on the look that decided.
        seconds: (m,) computing time attributed to the image, in proportion to its votes.
        interval: (m, 2) scan only: the two ends [low, high] of the certified interval, low <= 0 <=
            high; the radius is the shorter side. There p_lower and p_upper are unknown (NaN).
        scan_votes: (m,) scan only: the classes voted for in order, packed; see docs/scan.md.
        conditions: what holds for all rows: family, sigma, law, norm, unit, threat model,
            estimator, alpha, n0, n, seed, precision, device, fingerprints, versions.
    """

    client: Ints
    index: Ints
    label: Ints
    predicted: Ints
    radius: Floats
    p_lower: Floats
    p_upper: Floats
    counts: Ints
    selection_counts: Ints
    looks: Ints
    level: Floats
    seconds: Floats
    interval: Floats | None = None
    scan_votes: NDArray[np.object_] | None = None
    conditions: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.predicted)

    def __repr__(self) -> str:
        noise = ", ".join(
            f"{metadata.get('family')}, sigma={metadata.get('sigma')}"
            for _, metadata in groups.entries(self.conditions)
        )
        return f"Certificates({len(self)} images, {noise}, {int(self.abstained.sum())} abstained)"

    @property
    def votes(self) -> Ints:
        """(m,) estimation votes spent on each image."""
        return self.counts.sum(axis=1)

    @property
    def abstained(self) -> Bools:
        """(m,) where nothing could be certified."""
        return self.predicted == ABSTAINED

    @property
    def correct(self) -> Bools:
        """(m,) where the certified class is the label; false where abstained or unlabeled."""
        return (self.predicted == self.label) & ~self.abstained

    def certified_accuracy(self, radii: Sequence[float | str] | Floats) -> Floats:
        """Share of ALL images that are correct with radius >= R, for each R of `radii`.

        Args:
            radii: in the unit of the certificates; angles also as "5deg".

        Warns:
            UnusualValue: radii beyond all that these votes could certify, where the share is 0
                whatever the model.

        Raises:
            InputError: no image has a label, the radii mean different things (clients with
                perturbations of their own), or an amount is not in their unit.
        """
        self._require_comparable()
        requested = self._amounts(radii)
        self._warn_beyond(requested)
        return curves.certified_accuracy(self.correct, self.radius, requested)

    def average_certified_radius(self) -> float:
        """Mean over all images of radius times correct (ACR); raises as `certified_accuracy`."""
        self._require_comparable()
        return float(curves.average_certified_radius(self.correct, self.radius))

    def _require_comparable(self) -> None:
        """Refuse to average where labels are unknown or radii mean different things."""
        unknown = int((self.label == UNLABELED).sum())
        if unknown:
            raise InputError(
                f"{unknown} of {len(self)} certificates have no label, so it is unknown whether "
                "they are correct: give labels to certify(...), or look at .radius and .abstained."
            )
        if len(groups.kinds(self.conditions)) > 1:
            noise = [
                f"{metadata.get('family')} ({metadata.get('unit')})"
                for _, metadata in groups.entries(self.conditions)
            ]
            raise InputError(
                f"These certificates are of different perturbations: {', '.join(noise)}. Their "
                "radii mean different things and have no common average: split them with "
                "by_kind(), by_perturbation() or of_client(client)."
            )

    def _amounts(self, radii: Any) -> Floats:
        """Radii as they are stored; one alone stays one."""
        unit = str(self._metadata().get("unit", "a unit that the file does not name"))
        if isinstance(radii, (str, numbers.Real)):
            amount = radii if isinstance(radii, str) else float(radii)
            return np.asarray(parse_amount(amount, unit, "a radius"), np.float64)
        if isinstance(radii, np.ndarray) and radii.dtype.kind in "fiu":
            return radii.astype(np.float64)
        return np.asarray(parse_amounts(radii, unit), np.float64)

    def _metadata(self) -> Mapping[str, Any]:
        """Metadata of radii of one kind, from the largest sigma."""
        metadata = [entry for _, entry in groups.entries(self.conditions)]
        return max(metadata, key=lambda entry: float(entry.get("sigma") or 0.0))

    def _warn_beyond(self, requested: Floats) -> None:
        from certifl.certification.estimators import largest_radius

        metadata = self._metadata()
        largest = max(largest_radius(metadata), float(self.radius.max(initial=0.0)))
        if requested.size and requested.max() > largest:
            unit = metadata.get("unit")
            degrees = ' An angle in degrees is written "5deg".' if unit == "radians" else ""
            warnings.warn(
                f"Radii are in {unit}, and none above {largest:.4g} can be certified here (sigma "
                f"= {metadata.get('sigma'):.4g}, n = {metadata.get('n')}), so the certified "
                f"accuracy at {requested.max():g} is 0 whatever the model.{degrees}",
                UnusualValue,
                stacklevel=3,
            )

    def select(self, rows: NDArray[Any]) -> Certificates:
        """The certificates of some rows, given as a mask or as positions.

        Their metadata are those of the remaining clients.
        """
        picked = {name: getattr(self, name)[rows] for name in _columns(self)}
        left = groups.narrowed(self.conditions, np.unique(picked["client"]).tolist())
        return dataclasses.replace(self, **picked, conditions=left)

    def of_client(self, client: int) -> Certificates:
        """One client's rows."""
        return self.select(self.client == client)

    def by_perturbation(self) -> tuple[Certificates, ...]:
        """The rows of each perturbation, with plain conditions; itself where there is one."""
        return self._split([clients for clients, _ in groups.entries(self.conditions)])

    def by_kind(self) -> tuple[Certificates, ...]:
        """The rows whose radii mean the same: one perturbation in all but sigma."""
        return self._split(list(groups.kinds(self.conditions).values()))

    def _split(self, clients: Sequence[Sequence[int] | None]) -> tuple[Certificates, ...]:
        if len(clients) == 1:
            return (self,)
        selected = (self.select(np.isin(self.client, part or [])) for part in clients)
        return tuple(part for part in selected if len(part))

    def same_results(self, other: Certificates) -> bool:
        """Whether all columns but the computing time agree exactly."""
        names = [name for name in _columns(self) if name != "seconds"]
        return names == [name for name in _columns(other) if name != "seconds"] and all(
            np.array_equal(getattr(self, n), getattr(other, n), equal_nan=n != "scan_votes")
            for n in names
        )

    def to_pandas(self) -> DataFrame:
        """One row per image; needs pandas, the extra `certifl[pandas]`.

        Returns:
            Columns client, index, label, predicted (-1 = abstained), correct, abstained, radius,
            p_lower, p_upper, votes, looks, level, seconds; of a scan also interval_low and
            interval_high; where clients certify different perturbations also family, sigma and
            unit. Otherwise `attrs` has the last three, norm, alpha and estimator.

        Raises:
            InputError: pandas is not installed, or the clients shared curves only.
        """
        require_rows(self)
        names = ("client", "index", "label", "predicted", "correct", "abstained", "radius")
        names += ("p_lower", "p_upper", "votes", "looks", "level", "seconds")
        columns: dict[str, Any] = {name: getattr(self, name) for name in names}
        if self.interval is not None:
            columns["interval_low"], columns["interval_high"] = self.interval.T
        metadata = self.conditions
        if groups.PERTURBATIONS in metadata:
            entry = np.stack(groups.masks(metadata, self.client)).argmax(axis=0)
            for name in _MEANING:
                values = [own.get(name) for _, own in groups.entries(metadata)]
                columns[name] = np.array(values, dtype=object)[entry]
        frame = pandas().DataFrame(columns)
        of_all = (*_MEANING, "norm", "alpha", "estimator")
        frame.attrs = {n: metadata[n] for n in of_all if n in metadata and n not in columns}
        return frame

    def curves(self, radii: Sequence[float | str] | Floats | None = None) -> DataFrame:
        """Certified accuracy by radius: `RunResults.curves` of these certificates alone."""
        return self._results().curves(radii)

    def table(self, by: str | None = None) -> DataFrame:
        """Radii and accuracies in rows: `RunResults.table` of these certificates alone."""
        return self._results().table(by)

    def plot(
        self,
        ax: Any = None,
        *,
        label: str | None = None,
        color: str | None = None,
        unit: str | None = None,
        bands: bool = True,
    ) -> Any:
        """Draw certified accuracy against the radius on matplotlib axes: `RunResults.plot`."""
        return self._results().plot(ax, label=label, color=color, unit=unit, bands=bands)

    def _results(self) -> Any:
        """What reports are made of; found by its name, since nothing else here needs reports."""
        return attribute("certifl.report.results", "results_of")(self)

    def save(self, path: str | Path) -> None:
        """Write `.parquet` (everything) or `.tsv` (as published code); else InputError."""
        from certifl.certification.files import save

        save(self, Path(path))

    @staticmethod
    def load(path: str | Path) -> Certificates:
        """Read what `save` wrote, or a published log; InputError where it cannot be read."""
        from certifl.certification.files import load

        return load(Path(path))

    @staticmethod
    def concatenate(parts: Sequence[Certificates]) -> Certificates:
        """Rows of all parts; metadata other than the perturbation's are those of the first."""
        if not parts:
            raise InputError("There are no certificates to concatenate.")
        described = [
            (int(client), groups.of_client(part.conditions, int(client)))
            for part in parts
            for client in np.unique(part.client)
        ]
        joined = {
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in _columns(parts[0])
        }
        metadata = groups.joined(described) if described else parts[0].conditions
        return dataclasses.replace(parts[0], **joined, conditions=metadata)


def _columns(certificates: Certificates) -> list[str]:
    names = [f.name for f in dataclasses.fields(certificates) if f.name != "conditions"]
    return [name for name in names if getattr(certificates, name) is not None]


def pandas() -> Any:
    """The library, which is optional; InputError where it is not installed."""
    try:
        return importlib.import_module("pandas")
    except ImportError as error:
        raise InputError(
            "Data frames need pandas, which is optional: pip install 'certifl[pandas]'. Arrays "
            "such as .radius and .predicted need nothing."
        ) from error


def require_rows(certificates: Certificates) -> None:
    """Refuse certificates that only stand for curves (InputError)."""
    if groups.CURVES_ONLY in certificates.conditions:
        raise InputError(
            "The clients of this run shared curves and kept the certificates of their images: "
            "there are no rows of single images or classes here. curves() and table() have what "
            "was shared."
        )


@dataclass(frozen=True, eq=False)
class Predictions:
    """The network's own answers on m unperturbed images, of clients that certify nothing.

    They promise nothing about any perturbation, so they are no certificates: they have no radius
    and are stored in a file of their own. Every array has one row per image.

    Attributes:
        client: (m,) the client whose test image it is.
        index: (m,) position of the image in its data set.
        label: (m,) true class.
        predicted: (m,) the class the client's model gives.
        conditions: model_fingerprint (by client), data_fingerprint, precision, device, versions.
    """

    client: Ints
    index: Ints
    label: Ints
    predicted: Ints
    conditions: Mapping[str, Any] = field(default_factory=dict)

    COLUMNS = ("client", "index", "label", "predicted")

    def __len__(self) -> int:
        return len(self.predicted)

    @property
    def correct(self) -> Bools:
        """(m,) where the prediction is the label."""
        return self.predicted == self.label

    @property
    def clients(self) -> list[int]:
        """Who predicted, in order."""
        return np.unique(self.client).tolist()

    def accuracy(self, client: int) -> float:
        """Share of one client's images that its model gets right; no certificate is behind it."""
        return float(self.correct[self.client == client].mean())

    @staticmethod
    def concatenate(parts: Sequence[Predictions]) -> Predictions:
        """Rows put together; the conditions are those of the first part."""
        names = Predictions.COLUMNS
        columns = {n: np.concatenate([getattr(part, n) for part in parts]) for n in names}
        return dataclasses.replace(parts[0], **columns)

    def save(self, path: Path) -> None:
        """Write them as Parquet, whole or not at all."""
        from certifl.certification.files import save_predictions

        save_predictions(self, path)

    @staticmethod
    def load(path: Path) -> Predictions:
        """Read what `save` wrote; InputError where the file is missing or damaged."""
        from certifl.certification.files import load_predictions

        return load_predictions(path)
