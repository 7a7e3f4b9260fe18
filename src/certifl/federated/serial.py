"""Clients worked on in this process, one after the other."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Protocol

from certifl.errors import InputError
from certifl.federated.base import Algorithm
from certifl.federated.client import LocalTraining
from certifl.federated.faults import Answer, Fault, attempt
from certifl.federated.states import ClientData
from certifl.federated.stored import client_state, server_state
from certifl.store.checkpoints import StoredRound

__all__ = ["Clients", "Serial", "data_of"]


class Clients(Protocol):
    """The clients' data by position: a list, or anything that loads client i when asked."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> ClientData: ...


def data_of(clients: Clients, client: int) -> ClientData:
    """The data of one client.

    Raises:
        InputError: at its place stands another client.
    """
    data = clients[client]
    if data.client != client:
        raise InputError(
            f"clients[{client}] is the data of client {data.client}: list clients in order."
        )
    return data


class Serial:
    """One client after the other, with one model object."""

    def __init__(self, algorithm: Algorithm, training: LocalTraining, clients: Clients) -> None:
        self._algorithm, self._training, self._clients = algorithm, training, clients

    def work(self, current: StoredRound, participants: Sequence[int]) -> Iterator[Answer]:
        """An answer from every participant, in the order given."""
        broadcast = server_state(current)
        for client in participants:
            started = time.perf_counter()

            def trained(client: int = client) -> object:
                state, data = client_state(current, client), data_of(self._clients, client)
                return self._algorithm.client_round(broadcast, state, data, self._training)

            result = attempt(client, trained)
            seconds = time.perf_counter() - started
            if isinstance(result, Fault):
                yield Answer(client, seconds, None, result)
            else:
                yield Answer(client, seconds, result)
            del result  # or it would be held while the next client trains
