"""Certificates of any classifier of images, by randomized smoothing.

`certify` and `verify` are in the modules of these names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from certifl.lazy import lazy_names

if TYPE_CHECKING:
    from certifl.certification.certificates import Certificates
    from certifl.certification.certify import conditions, predict
    from certifl.certification.settings import ESTIMATORS
    from certifl.certification.verify import unverified

__all__ = ["ESTIMATORS", "Certificates", "conditions", "predict", "unverified"]

__getattr__ = lazy_names(
    __name__,
    {
        "Certificates": "certifl.certification.certificates",
        "ESTIMATORS": "certifl.certification.settings",
        "conditions": "certifl.certification.certify",
        "predict": "certifl.certification.certify",
        "unverified": "certifl.certification.verify",
    },
)
