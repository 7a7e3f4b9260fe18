"""Certificates as a pandas data frame; pandas is optional and imported when asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import numpy as np

from certifl.certification.certificates import Certificates
from certifl.certification.metadata import CURVES_ONLY, PERTURBATIONS, entries, masks
from certifl.errors import InputError

if TYPE_CHECKING:
    from pandas import DataFrame

_COLUMNS = ("client", "index", "label", "predicted", "correct", "abstained", "radius")
_MORE = ("p_lower", "p_upper", "votes", "looks", "level", "seconds")
_MEANING = ("family", "sigma", "unit")
_OF_ALL = (*_MEANING, "norm", "alpha", "estimator")


def pandas() -> Any:
    """The library.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.import_module("pandas")
    except ImportError as error:
        raise InputError(
            "Data frames need pandas, which is optional: pip install 'certifl[pandas]'. Arrays "
            "such as .radius and .predicted need nothing."
        ) from error


def require_rows(certificates: Certificates) -> None:
    """Refuse certificates that only stand for curves.

    Raises:
        InputError: the clients shared curves only.
    """
    if CURVES_ONLY in certificates.conditions:
        raise InputError(
            "The clients of this run shared curves and kept the certificates of their images: "
            "there are no rows of single images or classes here. curves() and table() have what "
            "was shared."
        )


def per_image(certificates: Certificates) -> DataFrame:
    """One row per image; see `Certificates.to_pandas`."""
    require_rows(certificates)
    columns: dict[str, Any] = {n: getattr(certificates, n) for n in (*_COLUMNS, *_MORE)}
    if certificates.interval is not None:
        columns["interval_low"] = certificates.interval[:, 0]
        columns["interval_high"] = certificates.interval[:, 1]
    metadata = certificates.conditions
    if PERTURBATIONS in metadata:
        columns |= {name: _by_client(certificates, name) for name in _MEANING}
    frame = pandas().DataFrame(columns)
    frame.attrs = {n: metadata[n] for n in _OF_ALL if n in metadata and n not in columns}
    return frame


def _by_client(certificates: Certificates, name: str) -> np.ndarray:
    """(m,) metadata of the perturbation that each row's client certifies."""
    values = [metadata.get(name) for _, metadata in entries(certificates.conditions)]
    rows = np.stack(masks(certificates.conditions, certificates.client))
    return np.array(values, dtype=object)[rows.argmax(axis=0)]
