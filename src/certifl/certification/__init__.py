"""Certificates of any classifier of images, by randomized smoothing."""

from certifl.certification.certificates import Certificates
from certifl.certification.certify import certify, conditions, predict
from certifl.certification.settings import ESTIMATORS, Settings
from certifl.certification.verify import Finding, unverified, verify

__all__ = [
    "ESTIMATORS",
    "Certificates",
    "Finding",
    "Settings",
    "certify",
    "conditions",
    "predict",
    "unverified",
    "verify",
]
