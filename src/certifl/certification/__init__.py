"""Certificates of any classifier of images, by randomized smoothing."""

from certifl.certification.certificates import Certificates
from certifl.certification.certify import certify, conditions, predict
from certifl.certification.settings import ESTIMATORS
from certifl.certification.verify import unverified, verify

__all__ = [
    "ESTIMATORS",
    "Certificates",
    "certify",
    "conditions",
    "predict",
    "unverified",
    "verify",
]
