"""Training together: algorithms, a client's local training, the rounds in one process.

Names are imported when they are first used, so that specs are checked without torch.
"""

from certifl.lazy import lazy_names

_HOMES = {
    "certifl.federated.algorithms": ("ALGORITHMS", "describe", "from_description"),
    "certifl.federated.algorithms.apfl": ("APFL",),
    "certifl.federated.algorithms.base": ("Algorithm", "GlobalModel"),
    "certifl.federated.training.batches": ("Augmentation",),
    "certifl.federated.training.local_training": ("LocalTraining", "Trained"),
    "certifl.federated.algorithms.ditto": ("Ditto",),
    "certifl.federated.rounds": (*("Progress", "client_state", "deployed_model", "server_state"),),
    "certifl.federated.trainer": ("total_rounds", "train"),
    "certifl.federated.algorithms.fedavg": ("FedAvg",),
    "certifl.federated.algorithms.fedbn": ("FedBN",),
    "certifl.federated.algorithms.fedopt": ("FedAdagrad", "FedAdam", "FedAvgM", "FedYogi"),
    "certifl.federated.algorithms.fedprox": ("FedProx",),
    "certifl.federated.algorithms.fedrep": ("FedRep",),
    "certifl.federated.algorithms.flix": ("FLIX",),
    "certifl.federated.algorithms.l2gd": ("L2GD",),
    "certifl.federated.algorithms.local": ("Local",),
    "certifl.federated.algorithms.mixture": ("Mixture",),
    "certifl.federated.algorithms.perfedavg": ("PerFedAvg",),
    "certifl.federated.algorithms.personalized": ("Personalized",),
    "certifl.federated.algorithms.scaffold": ("Scaffold",),
    "certifl.federated.training.schedule": ("Schedule",),
    "certifl.federated.states": (
        *("ClientData", "ClientState", "ModelState", "ServerState", "Update"),
    ),
    "certifl.models": ("state_of",),
}

__getattr__ = lazy_names(__name__, {n: home for home, names in _HOMES.items() for n in names})
