"""States as a committed round holds them."""

from __future__ import annotations

from certifl.federated.base import Algorithm
from certifl.federated.states import ClientState, ModelState, ServerState
from certifl.store.checkpoints import StoredRound

__all__ = ["client_state", "deployed_model", "server_state"]


def server_state(stored: StoredRound) -> ServerState:
    """The server's state in a committed round."""
    return ServerState(stored.number, stored.server())


def client_state(stored: StoredRound, client: int) -> ClientState:
    """A client's state in a committed round.

    Args:
        stored: the round, as `Checkpoints.latest` gives it.
        client: its number, from 0.

    Raises:
        StoreError: its file is damaged.
    """
    return ClientState(stored.client(client))


def deployed_model(algorithm: Algorithm, stored: StoredRound, client: int) -> ModelState:
    """The model that client `client` uses at test time, as of a committed round.

    Args:
        algorithm: the one that trained it.
        stored: usually the last round.
        client: its number, from 0.

    Raises:
        StoreError: a file of the round is damaged.
    """
    return algorithm.deployed(server_state(stored), client_state(stored, client))
