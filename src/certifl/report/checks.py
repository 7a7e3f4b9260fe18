"""Stored results that cannot be summarized, and why: they may come from anyone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from certifl.certification.certificates import UNLABELLED, Certificates
from certifl.certification.metadata import entries, masks

_REQUIRED_METADATA = ("family", "sigma", "norm", "unit", "alpha")


def certificates_problem(certificates: Certificates) -> str | None:
    """Why these certificates cannot be summarized, or None."""
    try:
        described = [metadata for _, metadata in entries(certificates.conditions)]
    except (KeyError, TypeError, ValueError):
        return "its conditions do not say whose perturbation is which"
    missing = [n for n in _REQUIRED_METADATA if any(n not in one for one in described)]
    if missing:
        return f"its conditions do not name {', '.join(missing)}"
    if len(certificates) == 0:
        return "it contains no image"
    if not np.all(np.isfinite(certificates.radius) & (certificates.radius >= 0)):
        return "a radius is not a finite number from 0 up"
    if np.any(certificates.label == UNLABELLED):
        return "some images have no label, so nothing can be called correct"
    images = np.stack([certificates.client, certificates.index], axis=1)
    if len(np.unique(images, axis=0)) != len(images):
        return "the same image of a client appears twice"
    if not all(math.isfinite(float(metadata["sigma"])) for metadata in described):
        return "its sigma is not a finite number"
    owners = np.sum(masks(certificates.conditions, certificates.client), axis=0)
    if np.any(owners != 1):
        return "it does not say which perturbation some client certified"
    return None


def round_problem(entry: Mapping[str, Any]) -> str:
    """Why the page cannot compute with a round; "" where it can."""
    if not isinstance(entry.get("round", 0), int):
        return "its round is not a number"
    clients, left_out = entry.get("clients", {}), entry.get("left_out", [])
    rows = list(clients.values()) if isinstance(clients, dict) else clients
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        return "its clients are not objects"
    if not isinstance(left_out, list) or not all(_is_fault(fault) for fault in left_out):
        return "it does not say which client was left out, and why"
    return ""


def _is_fault(fault: object) -> bool:
    return (
        isinstance(fault, dict)
        and isinstance(fault.get("client"), int)
        and isinstance(fault.get("reason"), str)
    )
