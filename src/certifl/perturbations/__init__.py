"""Perturbations: what may happen to an image, and the noise that smooths a classifier against it.

| family | parameters | law | unit |
|---|---|---|---|
| pixel | one per pixel and channel | Gaussian | intensity |
| translation | (t_u, t_v) | Gaussian | half-widths |
| rotation | angle | uniform | radians |
| scaling | factor - 1 | uniform | relative |
| affine | 6, added to the identity's | Gaussian | coefficients |
| smooth_flow | 2 k^2 cosine coefficients | Gaussian | coefficients |
| dense_flow | one (u, v) per pixel | Gaussian | half-widths |
"""

from __future__ import annotations

from certifl.perturbations.base import Perturbation
from certifl.perturbations.deformations import Affine, Rotation, Scaling, Translation
from certifl.perturbations.flows import DenseFlow, SmoothFlow
from certifl.perturbations.pixel import PixelNoise
from certifl.perturbations.registry import PERTURBATIONS, describe, from_description, from_record
from certifl.perturbations.units import format_amount, parse_sigma

__all__ = [
    "PERTURBATIONS",
    "Affine",
    "DenseFlow",
    "Perturbation",
    "PixelNoise",
    "Rotation",
    "Scaling",
    "SmoothFlow",
    "Translation",
    "describe",
    "format_amount",
    "from_description",
    "from_record",
    "parse_sigma",
]
