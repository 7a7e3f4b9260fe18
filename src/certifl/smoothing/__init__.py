"""The mathematics of certificates: bounds, laws, sequential stopping, curves. No torch in here."""

from __future__ import annotations

from certifl.smoothing.bounds import (
    BOUNDS,
    clopper_pearson_lower,
    clopper_pearson_upper,
    runner_up_bounds,
    top_class_bounds,
    two_sided_sign_test,
)
from certifl.smoothing.curves import (
    average_certified_radius,
    certified_accuracy,
    even_grid,
    floor_text,
    mean_and_band,
)
from certifl.smoothing.laws import EXPONENTIAL, GAUSSIAN, LAWS, UNIFORM, Law
from certifl.smoothing.sequential import grid_steps, levels, looks, reachable_radius

__all__ = [
    "BOUNDS",
    "EXPONENTIAL",
    "GAUSSIAN",
    "LAWS",
    "UNIFORM",
    "Law",
    "average_certified_radius",
    "certified_accuracy",
    "clopper_pearson_lower",
    "clopper_pearson_upper",
    "even_grid",
    "floor_text",
    "grid_steps",
    "levels",
    "looks",
    "mean_and_band",
    "reachable_radius",
    "runner_up_bounds",
    "top_class_bounds",
    "two_sided_sign_test",
]
