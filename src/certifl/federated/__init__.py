"""Training together: algorithms, a client's local training, the rounds in one process.

Names are imported when they are first used, so that specs are checked without torch.
"""

from certifl.registry import lazy_names

_HOMES = {
    "certifl.federated.algorithm_table": ("ALGORITHMS", "describe", "from_description"),
    "certifl.federated.apfl": ("APFL",),
    "certifl.federated.base": ("Algorithm", "GlobalModel"),
    "certifl.federated.batches": ("Augmentation",),
    "certifl.federated.client": ("LocalTraining", "Trained"),
    "certifl.federated.ditto": ("Ditto",),
    "certifl.federated.engine": (
        *("Progress", "client_state", "deployed_model", "server_state", "total_rounds", "train"),
    ),
    "certifl.federated.fedavg": ("FedAvg",),
    "certifl.federated.fedbn": ("FedBN",),
    "certifl.federated.fedopt": ("FedAdagrad", "FedAdam", "FedAvgM", "FedYogi"),
    "certifl.federated.fedprox": ("FedProx",),
    "certifl.federated.fedrep": ("FedRep",),
    "certifl.federated.flix": ("FLIX",),
    "certifl.federated.l2gd": ("L2GD",),
    "certifl.federated.local": ("Local",),
    "certifl.federated.mixture": ("Mixture",),
    "certifl.federated.perfedavg": ("PerFedAvg",),
    "certifl.federated.personalized": ("Personalized",),
    "certifl.federated.scaffold": ("Scaffold",),
    "certifl.federated.schedule": ("Schedule",),
    "certifl.federated.states": (
        *("ClientData", "ClientState", "ModelState", "ServerState", "Update"),
    ),
    "certifl.models": ("state_of",),
}

__getattr__ = lazy_names(__name__, {n: home for home, names in _HOMES.items() for n in names})
