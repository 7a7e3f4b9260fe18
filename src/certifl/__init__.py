"""Certified robustness in federated learning.

The public names are loaded when first used, so that importing the package costs next to nothing.
"""

import sys

_RUN_AS_MODULE = sys.argv[:1] == ["-m"] and sys.orig_argv[-len(sys.argv)].endswith("certifl")
if _RUN_AS_MODULE and not sys.flags.safe_path:
    # `python -m certifl` puts the working directory, which may be a folder that somebody sent,
    # in front of the import path. Nothing is taken from there, the imports below included.
    del sys.path[0]

import importlib  # noqa: E402
from typing import TYPE_CHECKING, Any  # noqa: E402

from certifl._version import __version__  # noqa: E402
from certifl.lazy import lazy_names  # noqa: E402

if TYPE_CHECKING:
    from certifl import models
    from certifl.certification import Certificates
    from certifl.certification.api import SmoothedClassifier, certify, predict
    from certifl.notebook import Study, load
    from certifl.perturbations import (
        Affine,
        Brightness,
        Contrast,
        DenseFlow,
        GaussianBlur,
        PixelNoise,
        Rotation,
        Scaling,
        SmoothFlow,
        Translation,
    )
    from certifl.report.figures import plot
    from certifl.report.table import table

__all__ = [
    "Affine",
    "Brightness",
    "Certificates",
    "Contrast",
    "DenseFlow",
    "GaussianBlur",
    "PixelNoise",
    "Rotation",
    "Scaling",
    "SmoothFlow",
    "SmoothedClassifier",
    "Study",
    "Translation",
    "__version__",
    "certify",
    "load",
    "models",
    "plot",
    "predict",
    "table",
]

_FAMILIES = (
    *("Affine", "Brightness", "Contrast", "DenseFlow", "GaussianBlur", "PixelNoise"),
    *("Rotation", "Scaling", "SmoothFlow", "Translation"),
)
_HOMES = {
    "Certificates": "certifl.certification",
    "SmoothedClassifier": "certifl.certification.api",
    "Study": "certifl.notebook",
    "certify": "certifl.certification.api",
    "load": "certifl.notebook",
    "plot": "certifl.report.figures",
    "predict": "certifl.certification.api",
    "table": "certifl.report.table",
    **dict.fromkeys(_FAMILIES, "certifl.perturbations"),
}
_get = lazy_names("certifl", _HOMES)


def __getattr__(name: str) -> Any:
    return importlib.import_module("certifl.models") if name == "models" else _get(name)


def __dir__() -> list[str]:
    return sorted(__all__)
