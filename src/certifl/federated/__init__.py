"""Ways of training together: algorithms, a client's passes, the rounds in one process.

`ALGORITHMS` is a literal table. A new algorithm is one file and one row, and the conformance suite
in `tests/test_algorithms.py` then tests it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from certifl.errors import SpecError
from certifl.federated.apfl import APFL
from certifl.federated.base import Algorithm, describe
from certifl.federated.batches import Augmentation
from certifl.federated.client import LocalTraining, Trained
from certifl.federated.ditto import Ditto
from certifl.federated.engine import (
    Progress,
    client_state,
    deployed_model,
    server_state,
    total_rounds,
    train,
)
from certifl.federated.fedavg import FedAvg
from certifl.federated.fedbn import FedBN
from certifl.federated.fedopt import FedAdagrad, FedAdam, FedAvgM, FedYogi
from certifl.federated.fedprox import FedProx
from certifl.federated.fedrep import FedRep
from certifl.federated.flix import FLIX
from certifl.federated.l2gd import L2GD
from certifl.federated.local import Local
from certifl.federated.mixture import Mixture
from certifl.federated.perfedavg import PerFedAvg
from certifl.federated.personalized import Personalized
from certifl.federated.records import named_record
from certifl.federated.scaffold import Scaffold
from certifl.federated.schedule import Schedule
from certifl.federated.states import ClientData, ClientState, ModelState, ServerState, Update
from certifl.models import state_of

__all__ = [
    "ALGORITHMS",
    "APFL",
    "FLIX",
    "L2GD",
    "Algorithm",
    "Augmentation",
    "ClientData",
    "ClientState",
    "Ditto",
    "FedAdagrad",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedBN",
    "FedProx",
    "FedRep",
    "FedYogi",
    "Local",
    "LocalTraining",
    "Mixture",
    "ModelState",
    "PerFedAvg",
    "Personalized",
    "Progress",
    "Scaffold",
    "Schedule",
    "ServerState",
    "Trained",
    "Update",
    "client_state",
    "deployed_model",
    "describe",
    "from_description",
    "server_state",
    "state_of",
    "total_rounds",
    "train",
]

_Global = FedAvg | FedProx | Scaffold | FedAvgM | FedAdam | FedYogi | FedAdagrad
_Personal = Personalized | Mixture | L2GD | Ditto | FLIX | APFL | FedBN | FedRep | PerFedAvg

ALGORITHMS: dict[str, type[Local | _Global | _Personal]] = {
    "local": Local,
    "fedavg": FedAvg,
    "personalized": Personalized,
    "mixture": Mixture,
    "fedprox": FedProx,
    "scaffold": Scaffold,
    "fedavgm": FedAvgM,
    "fedadam": FedAdam,
    "fedyogi": FedYogi,
    "fedadagrad": FedAdagrad,
    "l2gd": L2GD,
    "ditto": Ditto,
    "flix": FLIX,
    "apfl": APFL,
    "fedbn": FedBN,
    "fedrep": FedRep,
    "perfedavg": PerFedAvg,
}


def from_description(description: Mapping[str, Any] | str) -> Algorithm:
    """The algorithm that `describe` described, e.g. `{"name": "mixture", "personalization": 0.5}`.

    A bare name stands for the algorithm with its defaults; `base` of `personalized` is described
    in the same way.

    Raises:
        SpecError: an unknown algorithm or hyper-parameter, a missing one, or a value that is not
            allowed; the message names the key and what is allowed.
    """
    algorithm, table = named_record("algorithm", description, ALGORITHMS)
    if "base" in table:
        table["base"] = _base(table["base"])
    return algorithm(**table)


def _base(description: object) -> Algorithm:
    if not isinstance(description, Mapping | str):
        raise SpecError(
            f"base = {description!r} is not allowed: it must be an algorithm's name or a table "
            "with its name and hyper-parameters."
        )
    return from_description(description)
