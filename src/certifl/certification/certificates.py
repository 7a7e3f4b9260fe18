"""Certificates: one row per image, and the metadata of all rows."""

from __future__ import annotations

import csv
import dataclasses
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from certifl.certification import metadata as groups
from certifl.certification.counts import UNLABELLED
from certifl.certification.metadata import kinds, require_groups
from certifl.errors import InputError, UnusualValue
from certifl.lazy import attribute
from certifl.perturbations.units import parse_amount, parse_amounts
from certifl.safe_io import MALFORMED, open_parquet, parse_json, replacing
from certifl.smoothing import curves
from certifl.smoothing.arrays import Floats, Ints
from certifl.smoothing.rounding import floor_text
from certifl.torch_env import exact_convolutions, one_thread

if TYPE_CHECKING:
    from pandas import DataFrame

    from certifl.certification.network import Network

ABSTAINED = -1


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
        requested = self._amounts(radii)
        self._warn_beyond(requested)
        return curves.certified_accuracy(self.correct, self.radius, requested)

    def _amounts(self, radii: Any) -> Floats:
        """Radii as they are stored; one alone stays one."""
        unit = str(self._metadata().get("unit", "a unit that the file does not name"))
        if isinstance(radii, (str, float, int)):
            return np.asarray(parse_amount(radii, unit, "a radius"), np.float64)
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
        return self._apart([clients for clients, _ in groups.entries(self.conditions)])

    def by_kind(self) -> tuple[Certificates, ...]:
        """The rows whose radii mean the same: one perturbation in all but sigma."""
        return self._apart(list(groups.kinds(self.conditions).values()))

    def _apart(self, parts: Sequence[Sequence[int] | None]) -> tuple[Certificates, ...]:
        if len(parts) == 1:
            return (self,)
        selected = (self.select(np.isin(self.client, part or [])) for part in parts)
        return tuple(part for part in selected if len(part))

    def _require_labels(self) -> None:
        unknown = int((self.label == UNLABELLED).sum())
        if unknown:
            raise InputError(
                f"{unknown} of {len(self)} certificates have no label, so it is unknown whether "
                "they are correct: give labels to certify(...), or look at .radius and .abstained."
            )

    def _require_one_kind(self) -> None:
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

    def same_results(self, other: Certificates) -> bool:
        """Whether all columns but the computing time agree exactly."""
        names = [name for name in _columns(self) if name != "seconds"]
        return names == [name for name in _columns(other) if name != "seconds"] and all(
            np.array_equal(getattr(self, n), getattr(other, n), equal_nan=n not in ("scan_votes",))
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
        from certifl.certification.frames import per_image

        return per_image(self)

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
        """Write `.parquet` (everything) or `.tsv` (the layout of published code)."""
        save(self, Path(path))

    @staticmethod
    def load(path: str | Path) -> Certificates:
        """Read what `save` wrote, or a published TSV."""
        return load(Path(path))

    @staticmethod
    def concatenate(parts: Sequence[Certificates]) -> Certificates:
        """Concatenate rows; metadata other than the perturbation's are those of the first part.

        Raises:
            InputError: there are no parts.
        """
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


# Certificates as files: Parquet with everything, tab-separated as in published code.


_KEY = b"certifl"
_SCALARS = ("client", "index", "label", "predicted", "radius", "p_lower", "p_upper")
_ENDING = ("looks", "level", "seconds")
_LISTS = ("counts", "selection_counts")
_TSV_DIGITS = 6
_FLOATS = ("radius", "p_lower", "p_upper", "level", "seconds")
_INTERVAL, _PACKED = ("interval_low", "interval_high"), "scan_votes"


def save(certificates: Certificates, path: Path) -> None:
    """Write certificates whole or not at all; the ending chooses the format.

    Raises:
        InputError: the ending is neither .parquet nor .tsv, or a .tsv, which has no place for a
            unit, is asked for certificates of several.
    """
    writers = {".parquet": _write_parquet, ".tsv": _write_tsv}
    writer = writers.get(path.suffix.lower())
    if writer is None:
        raise InputError(f"Cannot save certificates as {path.name!r}: use .parquet or .tsv.")
    with replacing(path) as part:
        writer(certificates, part)


def load(path: Path) -> Certificates:
    """Read certificates from .parquet or .tsv, or a published log under any name.

    Raises:
        InputError: the file is missing, damaged, or has other columns.
    """
    if not path.is_file():
        raise InputError(f"There is no certificate file at {path}.")
    try:
        return _reader(path)(path)
    # InputError too (a ValueError): what opens files says what is wrong, and not with which.
    except (OSError, pa.ArrowException, *MALFORMED) as error:
        raise InputError(
            f"{path} holds no certificates this version can read: {str(error).rstrip('.')}."
        ) from error


def _reader(path: Path) -> Callable[[Path], Certificates]:
    """What reads a file of this ending, or of this header."""
    from certifl.certification.published_logs import TSV_HEADER, is_log, read_log

    readers = {".parquet": _read_parquet, ".tsv": read_log, ".txt": read_log}
    reader = readers.get(path.suffix.lower())
    if reader is None and is_log(path):  # published logs are named sigma_0.25, for instance
        reader = read_log
    if reader is None:
        raise InputError(
            "its name does not end in .parquet or .tsv. If it is a log of published code, it must "
            f"begin with {' '.join(TSV_HEADER)}, separated by tabs; otherwise rename it by what "
            "it is"
        )
    return reader


def _write_parquet(certificates: Certificates, path: Path) -> None:
    columns: dict[str, Any] = {name: getattr(certificates, name) for name in _SCALARS}
    columns["correct"] = certificates.correct
    columns["votes"] = certificates.votes
    columns.update({name: getattr(certificates, name) for name in _ENDING})
    columns.update({name: _as_lists(getattr(certificates, name)) for name in _LISTS})
    if certificates.interval is not None:
        columns["interval_low"] = certificates.interval[:, 0]
        columns["interval_high"] = certificates.interval[:, 1]
    if certificates.scan_votes is not None:
        columns["scan_votes"] = pa.array(certificates.scan_votes, pa.binary())
    conditions = json.dumps(dict(certificates.conditions), sort_keys=True).encode()
    table = pa.table(columns).replace_schema_metadata({_KEY: conditions})
    pq.write_table(table, path)


def _as_lists(counts: np.ndarray) -> pa.Array:
    rows, classes = counts.shape
    return (
        pa.FixedSizeListArray.from_arrays(pa.array(counts.reshape(-1)), classes).cast(
            pa.list_(pa.int64())
        )
        if rows
        else pa.array([], pa.list_(pa.int64()))
    )


def _read_parquet(path: Path) -> Certificates:
    file = open_parquet(path, _SCALARS + _ENDING + _LISTS)
    names = file.schema_arrow.names
    ends = [name for name in _INTERVAL if name in names]
    packed = [name for name in (_PACKED,) if name in names]
    _require_types(file.schema_arrow, ends, packed)
    table = file.read([*_SCALARS, *_ENDING, *_LISTS, *ends, *packed])
    columns = {name: column_of_numbers(table, name) for name in _SCALARS + _ENDING}
    columns.update({name: _as_matrix(table, name) for name in _LISTS})
    if ends:
        columns["interval"] = np.stack([column_of_numbers(table, n) for n in _INTERVAL], axis=1)
    if packed:
        columns["scan_votes"] = np.array(table[_PACKED].to_pylist(), dtype=object)
    conditions = parse_json((table.schema.metadata or {}).get(_KEY, b"{}"))
    if not isinstance(conditions, dict):
        raise ValueError("its conditions are not an object")
    require_groups(conditions)
    return Certificates(**columns, conditions=conditions)


def _require_types(schema: pa.Schema, ends: list[str], packed: list[str]) -> None:
    """Refuse columns of other types before they are read: a text expands to any size."""
    floats = {*_FLOATS, *ends}
    for name in (*_SCALARS, *_ENDING, *ends):
        fits = pa.types.is_floating if name in floats else pa.types.is_integer
        if not fits(schema.field(name).type):
            raise ValueError(f"the column {name!r} holds {schema.field(name).type}")
    for name in _LISTS:
        kind = schema.field(name).type
        if not (pa.types.is_list(kind) and pa.types.is_integer(kind.value_type)):
            raise ValueError(f"the column {name!r} holds {kind}")
    if packed and not pa.types.is_binary(schema.field(_PACKED).type):
        raise ValueError(f"the column {_PACKED!r} holds {schema.field(_PACKED).type}")


def column_of_numbers(table: pa.Table, name: str) -> np.ndarray:
    """A column of numbers without gaps.

    Raises:
        ValueError: a number is missing, or does not fit into 64 bits.
    """
    column = table[name]
    if column.null_count:
        raise ValueError(f"the column {name!r} has rows without a value")
    kind = pa.int64() if pa.types.is_integer(column.type) else pa.float64()
    return column.cast(kind).to_numpy()


def _as_matrix(table: pa.Table, name: str) -> np.ndarray:
    """A column of lists of one length: what is missing or longer elsewhere cannot be votes."""
    if table.num_rows == 0:
        return np.zeros((0, 0), np.int64)
    column = pa.concat_arrays(table[name].chunks)
    lengths, values = column.value_lengths(), column.flatten()
    if column.null_count or values.null_count:
        raise ValueError(f"the column {name!r} has rows without a value")
    width = lengths[0].as_py()
    if not np.all(lengths.to_numpy() == width):
        raise ValueError(f"the column {name!r} has rows of different length")
    return values.cast(pa.int64()).to_numpy().reshape(table.num_rows, width)


def _write_tsv(certificates: Certificates, path: Path) -> None:
    from certifl.certification.published_logs import TSV_HEADER

    if len(kinds(certificates.conditions)) > 1:
        raise InputError(
            "A .tsv says nowhere which perturbation a radius belongs to, and these certificates "
            "are of several. Write one file for each of by_kind(), or a .parquet."
        )
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(TSV_HEADER)
        for row in range(len(certificates)):
            writer.writerow(
                (
                    int(certificates.index[row]),
                    int(certificates.label[row]),
                    int(certificates.predicted[row]),
                    floor_text(float(certificates.radius[row]), _TSV_DIGITS),
                    int(certificates.correct[row]),
                    f"{certificates.seconds[row]:.6f}",
                )
            )


# Plain predictions of clients that certify nothing: one vote of the network per pristine image.
#
# They promise nothing about any perturbation, so they are no certificates: they have no radius and
# are kept in a file of their own.


_COLUMNS = ("client", "index", "label", "predicted")


@dataclass(frozen=True, eq=False)
class Predictions:
    """The network's own answers on m unperturbed images; every array has one row per image.

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

    def __len__(self) -> int:
        return len(self.predicted)

    @property
    def correct(self) -> NDArray[np.bool_]:
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
        columns = {n: np.concatenate([getattr(part, n) for part in parts]) for n in _COLUMNS}
        return dataclasses.replace(parts[0], **columns)

    def save(self, path: Path) -> None:
        """Write them as Parquet, whole or not at all."""
        columns = {name: getattr(self, name) for name in _COLUMNS}
        about = json.dumps(dict(self.conditions), sort_keys=True).encode()
        table = pa.table({**columns, "correct": self.correct})
        with replacing(path) as part:
            pq.write_table(table.replace_schema_metadata({_KEY: about}), part)

    @staticmethod
    def load(path: Path) -> Predictions:
        """Read what `save` wrote.

        Raises:
            InputError: the file is missing, damaged, or has other columns.
        """
        if not path.is_file():
            raise InputError(f"There are no plain predictions at {path}.")
        try:
            file = open_parquet(path, _COLUMNS)
            schema = file.schema_arrow
            if not all(pa.types.is_integer(schema.field(name).type) for name in _COLUMNS):
                raise ValueError("a column does not hold integers")
            table = file.read(list(_COLUMNS))
            columns = {name: column_of_numbers(table, name) for name in _COLUMNS}
            conditions = parse_json((table.schema.metadata or {}).get(_KEY, b"{}"))
            if not isinstance(conditions, dict):
                raise ValueError("its conditions are not an object")
        except (pa.ArrowException, KeyError, ValueError, TypeError, OSError) as error:
            raise InputError(f"{path} holds no plain predictions: {error}.") from error
        return Predictions(**columns, conditions=conditions)


def predict_plain(network: Network, images: Tensor) -> Ints:
    """The network's class of every image as it is, one call each in batches of one shape.

    Args:
        network: as it would vote.
        images: (m, c, h, w) in [0, 1].

    Returns:
        (m,) classes.
    """
    answers = []
    for part in images.to(network.device).split(network.batch_size):
        # Every call has the same number of rows, as in voting; what fills it up is not looked at.
        filled = part[torch.arange(network.batch_size, device=part.device) % len(part)]
        with (
            torch.inference_mode(),
            exact_convolutions(network.device),
            one_thread(network.threads == 1),
        ):
            logits = network.call(filled)[: len(part)]
        answers.append(logits.argmax(dim=1).cpu().numpy())
    return np.concatenate(answers).astype(np.int64)
