"""Certificates of any classifier of images, by randomized smoothing; loaded on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from certifl.lazy import lazy_names

if TYPE_CHECKING:
    from certifl.certification.api import certify, conditions, predict
    from certifl.certification.certificates import Certificates
    from certifl.certification.recompute import unverified, verify
    from certifl.certification.settings import ESTIMATORS

__all__ = [
    "ESTIMATORS",
    "Certificates",
    "certify",
    "conditions",
    "predict",
    "unverified",
    "verify",
]

__getattr__ = lazy_names(
    __name__,
    {
        "Certificates": "certifl.certification.certificates",
        "ESTIMATORS": "certifl.certification.settings",
        "certify": "certifl.certification.api",
        "conditions": "certifl.certification.api",
        "predict": "certifl.certification.api",
        "unverified": "certifl.certification.recompute",
        "verify": "certifl.certification.recompute",
    },
)
