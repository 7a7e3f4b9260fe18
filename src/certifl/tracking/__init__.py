"""Experiment trackers that log a run while it proceeds, offline unless the user asks otherwise.

TensorBoard, MLflow and Weights & Biases implement one small interface, `Tracker`. A tracker
receives the spec and metadata of the run, then named numbers. It never decides anything, and a
tracker that fails never harms a run.
"""

from __future__ import annotations

from collections.abc import Sequence

from certifl.errors import RequestError
from certifl.tracking.backends import (
    MLflow,
    TensorBoard,
    Tracker,
    TrackerFactory,
    WeightsAndBiases,
)

__all__ = ["TRACKERS", "Tracker", "check_trackers"]

TRACKERS: dict[str, TrackerFactory] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": WeightsAndBiases,
}


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that are unknown or not installed, before anything is written.

    Raises:
        RequestError: an unknown name, or one whose library is not installed.
    """
    for name in names:
        if name not in TRACKERS:
            raise RequestError(
                f"There is no tracker {name!r}. Known are {', '.join(sorted(TRACKERS))}."
            )
        if not TRACKERS[name].installed():
            raise RequestError(
                f"The tracker {name!r} is not installed. Install it with "
                f"`pip install 'certifl[{name}]'`, or leave --track {name} out."
            )
