"""Studies by name: what to compute, as specs."""

from __future__ import annotations

from typing import Any

from certifl.spec import Spec, with_settings

__all__ = ["REGIMES", "quickstart"]

REGIMES: dict[str, dict[str, Any]] = {
    "local": {"name": "local"},
    "fedavg": {"name": "fedavg"},
    "personalized": {"name": "personalized", "base": {"name": "fedavg"}, "epochs": 4, "lr": 0.01},
    "mixture": {"name": "mixture", "personalization": 0.5},
}
"""The paper's four ways of training (3.3), in the order of its legends."""


def quickstart(seed: int = 0) -> dict[str, Spec]:
    """The main job on embedded data: digits, ten clients, rotation, all four regimes.

    Fifty training images per client: few on purpose, that is the regime the paper is about. One
    schedule for all; rotation by up to 18 degrees (0.1 pi) as in the paper's Figure 1.
    """
    rotation = {"family": "rotation", "sigma": "0.1pi"}
    shared = {
        "seed": seed,
        "data": {"name": "digits", "train_images": 500},
        "clients": {"count": 10},
        "model": {"name": "small_cnn"},
        "training": {
            "rounds": 30,
            "local_epochs": 2,
            "batch_size": 16,
            "lr": 0.05,
            "momentum": 0.9,
            "weight_decay": 5e-4,
            "decay_every": 20,
            "decay_factor": 0.3,
        },
        "augmentation": {"federated": rotation},
        "certification": {"perturbation": rotation, "images": 40, "n": 10_000},
    }
    return {
        regime: with_settings({**shared, "name": f"quickstart {regime}", "algorithm": algorithm})
        for regime, algorithm in REGIMES.items()
    }
