"""Commands about what there is: doctor, list.

Heavy imports happen inside the commands, so that help and errors of usage answer at once.
"""

from __future__ import annotations

from certifl.cli.common import (
    DataDir,
)

__all__ = ["doctor", "list_"]


def doctor(data_dir: DataDir = None) -> None:
    """What this machine has (devices, memory, data, extras), and what is missing for what."""
    from certifl import terminal
    from certifl.experiments.doctor import examine

    terminal.show_facts(examine(data_dir))


def list_() -> None:
    """What can stand in a spec: data, splits, models, algorithms, perturbations, estimators."""
    from certifl import terminal
    from certifl.certification import ESTIMATORS
    from certifl.data import EMBEDDED, SPLITS
    from certifl.federated import ALGORITHMS
    from certifl.federated.aggregation import RULES
    from certifl.federated.objectives import OBJECTIVES
    from certifl.models import MODELS
    from certifl.perturbations import PERTURBATIONS

    terminal.show_names(
        {
            "data sets": [
                *EMBEDDED,
                "mnist",
                "cifar10",
                "fashion_mnist",
                "owner/name",
                "a folder",
            ],
            "splits": list(SPLITS),
            "models": [*MODELS, "module:function"],
            "algorithms": list(ALGORITHMS),
            "objectives": list(OBJECTIVES),
            "rules": list(RULES),
            "perturbations": list(PERTURBATIONS),
            "estimators": list(ESTIMATORS),
        }
    )
