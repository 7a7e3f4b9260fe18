"""Experiment trackers that log a run while it proceeds, offline unless the user asks otherwise.

TensorBoard, MLflow and Weights & Biases implement one small interface, `Tracker`. A tracker
receives the spec and metadata of the run, then named numbers. It never decides anything, and a
tracker that fails never harms a run.
"""

from certifl.tracking.backends import TRACKERS, Tracker, check_trackers

__all__ = ["TRACKERS", "Tracker", "check_trackers"]
