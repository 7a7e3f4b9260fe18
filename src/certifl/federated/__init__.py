"""Training together: algorithms, a client's local training, the rounds in one process.

Names are imported when they are first used, so that specs are checked without torch.
"""

from certifl.federated.algorithms import ALGORITHMS
from certifl.lazy import lazy_names

_HOMES = {
    "certifl.federated.algorithms": ("describe", "from_description"),
    "certifl.federated.algorithms.base": ("Algorithm", "GlobalModel"),
    "certifl.federated.batches": ("Augmentation",),
    "certifl.federated.local_training": ("LocalTraining", "Trained"),
    "certifl.federated.rounds": ("Progress", "client_state", "deployed_model", "server_state"),
    "certifl.federated.trainer": ("total_rounds", "train"),
    "certifl.federated.schedule": ("Schedule",),
    "certifl.federated.states": (
        *("ClientData", "ClientState", "ModelState", "ServerState", "Update"),
    ),
    "certifl.models": ("state_of",),
}

__getattr__ = lazy_names(
    __name__,
    {name: home for home, names in _HOMES.items() for name in names}
    | {row.attribute: row.module for row in ALGORITHMS.rows.values()},
)
