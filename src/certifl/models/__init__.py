"""Networks from images in [0, 1] to logits, and their states: one row for each network.

Nothing here imports torch: a network's module is loaded when it is first built.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from certifl.lazy import lazy_names
from certifl.registry import Number, Positive, Registry, Row, parameters

if TYPE_CHECKING:
    from certifl.models.architectures import Normalize, resnet18, small_cnn, small_resnet
    from certifl.models.building import build, check_logits
    from certifl.models.state import (
        adopt_code,
        allow_code,
        allowed_code,
        code_fingerprint,
        fingerprint,
        is_users_code,
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
    "is_users_code",
    "require_code",
    "resnet18",
    "small_cnn",
    "small_resnet",
    "state_of",
]

_ARCHITECTURES, _STATE = "certifl.models.architectures", "certifl.models.state"
_MEAN, _STD = (Number, 0.5), (Positive, 0.25)
_RESNET = parameters(mean=_MEAN, std=_STD, norm=(Literal["batch", "group"], "batch"))
_Width = Annotated[int, Field(ge=4, multiple_of=4, description="a multiple of 4")]

MODELS: Registry[Row] = Registry(
    "model",
    {
        "resnet18": Row(f"{_ARCHITECTURES}:resnet18", _RESNET, "ResNet-18"),
        "small_resnet": Row(f"{_ARCHITECTURES}:small_resnet", _RESNET, "ResNet-8"),
        "small_cnn": Row(
            f"{_ARCHITECTURES}:small_cnn",
            parameters(mean=_MEAN, std=_STD, width=(_Width, 16)),
            "small CNN",
        ),
    },
    also="your own as module:function, or hf:OWNER/NAME of the Hugging Face hub",
)

__getattr__ = lazy_names(
    __name__,
    {
        **{row.attribute: row.module for row in MODELS.rows.values()},
        "Normalize": _ARCHITECTURES,
        **dict.fromkeys(("build", "check_logits"), "certifl.models.building"),
        **dict.fromkeys(("adopt_code", "allow_code", "allowed_code", "code_fingerprint"), _STATE),
        **dict.fromkeys(("fingerprint", "is_users_code", "require_code", "state_of"), _STATE),
    },
)
