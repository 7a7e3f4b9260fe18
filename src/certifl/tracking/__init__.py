"""Experiment trackers: told of a run as it goes on, offline unless the user says otherwise.

TensorBoard, MLflow and Weights & Biases stand behind one small interface, `Tracker`. A tracker is
told plain dicts: the spec and what is known of the run, each committed round, and what the
certificates came to. It never decides anything, and a tracker that fails never harms a run.
"""

from __future__ import annotations

from collections.abc import Sequence

from certifl.errors import RequestError
from certifl.tracking.backends import MLflow, TensorBoard, WeightsAndBiases
from certifl.tracking.base import Tracker, TrackerFactory
from certifl.tracking.follower import Follower

__all__ = ["TRACKERS", "Follower", "Tracker", "check_trackers"]

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
