"""Certificates of any classifier of images, by randomized smoothing."""

from certifl.certification.api import certify, conditions, predict
from certifl.certification.certificates import Certificates
from certifl.certification.enumeration import ShiftCertificates, certify_shifts
from certifl.certification.settings import ESTIMATORS, Settings
from certifl.certification.verify import Finding, unverified, verify

__all__ = [
    "ESTIMATORS",
    "Certificates",
    "Finding",
    "Settings",
    "ShiftCertificates",
    "certify",
    "certify_shifts",
    "conditions",
    "predict",
    "unverified",
    "verify",
]
