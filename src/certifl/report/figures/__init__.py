"""Figures of stored results; matplotlib's global state is left alone.

Every figure is a function of runs and returns a `Drawing`: the figure and the numbers it shows.
`save` writes both. No other part of the program imports matplotlib.
"""

from certifl.report.figures.files import Drawing, image_bytes, save
from certifl.report.figures.plots import (
    average_radius_figure,
    certified_accuracy_figure,
    history_figure,
    per_client_figure,
)

__all__ = [
    "Drawing",
    "average_radius_figure",
    "certified_accuracy_figure",
    "history_figure",
    "image_bytes",
    "per_client_figure",
    "save",
]
