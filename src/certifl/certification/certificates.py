"""The record of what was certified: one row per image, and the conditions of all rows."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from certifl.certification import groups
from certifl.errors import InputError, UnusualValue
from certifl.perturbations.units import parse_amount, parse_amounts
from certifl.smoothing import curves

__all__ = ["ABSTAINED", "UNLABELLED", "Certificates"]

ABSTAINED = -1
UNLABELLED = -1

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Certificates:
    """Certificates of m images; every array has one row per image.

    Guarantee: for each image separately, with probability at least 1 - alpha over its votes, the
    smoothed classifier answers `predicted` at every parameter of norm at most `radius` (in
    `conditions["norm"]` and `conditions["unit"]`). Rows with `predicted == -1` promise nothing.

    Clients may certify perturbations of their own. The facts that differ then stand under
    `conditions["perturbations"]` with the clients they hold for (see `groups`), `by_perturbation`
    takes such certificates apart, and radii of different meaning are never averaged.

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
            f"{facts.get('family')}, sigma={facts.get('sigma')}"
            for _, facts in groups.entries(self.conditions)
        )
        return f"Certificates({len(self)} images, {noise}, {int(self.abstained.sum())} abstained)"

    @property
    def votes(self) -> Ints:
        """(m,) estimation votes spent on each image."""
        return self.counts.sum(axis=1)

    @property
    def abstained(self) -> NDArray[np.bool_]:
        """(m,) where nothing could be certified."""
        return self.predicted == ABSTAINED

    @property
    def correct(self) -> NDArray[np.bool_]:
        """(m,) where the certified class is the label; false where abstained or unlabelled."""
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
        self._require_labels()
        self._require_one_kind()
        asked = self._amounts(radii)
        self._warn_beyond(asked)
        return curves.certified_accuracy(self.correct, self.radius, asked)

    def _amounts(self, radii: Any) -> Floats:
        """Radii as they are stored; one alone stays one."""
        unit = str(self._facts().get("unit", "a unit that the file does not name"))
        if isinstance(radii, (str, float, int)):
            return np.asarray(parse_amount(radii, unit, "a radius"), np.float64)
        if isinstance(radii, np.ndarray) and radii.dtype.kind in "fiu":
            return radii.astype(np.float64)
        return np.asarray(parse_amounts(radii, unit), np.float64)

    def _facts(self) -> Mapping[str, Any]:
        """What holds for the radii of one kind, taken from the largest sigma."""
        facts = [entry for _, entry in groups.entries(self.conditions)]
        return max(facts, key=lambda entry: float(entry.get("sigma") or 0.0))

    def _warn_beyond(self, asked: Floats) -> None:
        from certifl.certification.scan import largest_radius

        facts = self._facts()
        largest = max(largest_radius(facts), float(self.radius.max(initial=0.0)))
        if asked.size and asked.max() > largest:
            unit = facts.get("unit")
            degrees = ' An angle in degrees is written "5deg".' if unit == "radians" else ""
            warnings.warn(
                f"Radii are in {unit}, and none above {largest:.4g} can be certified here (sigma "
                f"= {facts.get('sigma'):.4g}, n = {facts.get('n')}), so at {asked.max():g} the "
                f"certified accuracy is 0 whatever the model.{degrees}",
                UnusualValue,
                stacklevel=3,
            )

    def average_certified_radius(self) -> float:
        """Mean over all images of radius times correct (ACR, the area under the curve).

        Raises:
            InputError: as `certified_accuracy`.
        """
        self._require_labels()
        self._require_one_kind()
        return float(curves.average_certified_radius(self.correct, self.radius))

    def select(self, rows: NDArray[Any]) -> Certificates:
        """The certificates of some rows, given as a mask or as positions.

        Their conditions are those of the clients that are left.
        """
        picked = {name: getattr(self, name)[rows] for name in _columns(self)}
        left = groups.narrowed(self.conditions, np.unique(picked["client"]).tolist())
        return dataclasses.replace(self, **picked, conditions=left)

    def of_client(self, client: int) -> Certificates:
        """One client's rows."""
        return self.select(self.client == client)

    def by_perturbation(self) -> tuple[Certificates, ...]:
        """The rows of each perturbation, with plain conditions; itself where there is one."""
        return self._apart([clients for clients, _ in groups.entries(self.conditions)])

    def by_kind(self) -> tuple[Certificates, ...]:
        """The rows whose radii mean the same: one perturbation in all but sigma."""
        return self._apart(list(groups.kinds(self.conditions).values()))

    def _apart(self, parts: Sequence[Sequence[int] | None]) -> tuple[Certificates, ...]:
        if len(parts) == 1:
            return (self,)
        found = (self.select(np.isin(self.client, part or [])) for part in parts)
        return tuple(part for part in found if len(part))

    def _require_labels(self) -> None:
        unknown = int((self.label == UNLABELLED).sum())
        if unknown:
            raise InputError(
                f"{unknown} of {len(self)} certificates have no label, so nobody knows whether "
                "they are correct: give labels to certify(...), or look at .radius and .abstained."
            )

    def _require_one_kind(self) -> None:
        if len(groups.kinds(self.conditions)) > 1:
            noise = [
                f"{facts.get('family')} ({facts.get('unit')})"
                for _, facts in groups.entries(self.conditions)
            ]
            raise InputError(
                f"These certificates are of different perturbations: {', '.join(noise)}. Their "
                "radii mean different things and have no common average: take them apart with "
                "by_kind(), by_perturbation() or of_client(client)."
            )

    def same_results(self, other: Certificates) -> bool:
        """Whether all columns but the computing time agree exactly."""
        names = [name for name in _columns(self) if name != "seconds"]
        return names == [name for name in _columns(other) if name != "seconds"] and all(
            np.array_equal(getattr(self, n), getattr(other, n), equal_nan=n not in ("scan_votes",))
            for n in names
        )

    def save(self, path: str | Path) -> None:
        """Write `.parquet` (everything) or `.tsv` (the layout of published code)."""
        from certifl.certification import formats

        formats.save(self, Path(path))

    @staticmethod
    def load(path: str | Path) -> Certificates:
        """Read what `save` wrote, or a published TSV."""
        from certifl.certification import formats

        return formats.load(Path(path))

    @staticmethod
    def concatenate(parts: Sequence[Certificates]) -> Certificates:
        """Put rows together; facts other than the perturbation's are those of the first part.

        Raises:
            InputError: there are no parts.
        """
        if not parts:
            raise InputError("There are no certificates to put together.")
        described = [
            (int(client), groups.of_client(part.conditions, int(client)))
            for part in parts
            for client in np.unique(part.client)
        ]
        joined = {
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in _columns(parts[0])
        }
        facts = groups.joined(described) if described else parts[0].conditions
        return dataclasses.replace(parts[0], **joined, conditions=facts)


def _columns(certificates: Certificates) -> list[str]:
    names = [f.name for f in dataclasses.fields(certificates) if f.name != "conditions"]
    return [name for name in names if getattr(certificates, name) is not None]
