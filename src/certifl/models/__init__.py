"""Networks from images in [0, 1] to logits, and their states."""

from __future__ import annotations

from certifl.models.architectures import Normalize, resnet18, small_cnn, small_resnet
from certifl.models.building import MODELS, build, check_logits
from certifl.models.state import (
    adopt_code,
    allow_code,
    allowed_code,
    code_fingerprint,
    fingerprint,
    require_code,
    state_of,
)

__all__ = [
    "MODELS",
    "Normalize",
    "adopt_code",
    "allow_code",
    "allowed_code",
    "build",
    "check_logits",
    "code_fingerprint",
    "fingerprint",
    "require_code",
    "resnet18",
    "small_cnn",
    "small_resnet",
    "state_of",
]
