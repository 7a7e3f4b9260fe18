"""An algorithm whose clients misbehave as planned; a module, for worker processes to import."""

import os
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch

from certifl.federated import ClientState, FedAvg, ServerState, Update

HANG_SECONDS = 120.0


class NotAString:
    def __reduce__(self):
        raise TypeError("not to be sent")


@dataclass(frozen=True)
class Misbehaving:
    """FedAvg, or another base, with faults: `plan` maps "client" or "client/round" to a deed."""

    plan: dict[str, str] = field(default_factory=dict, hash=False)
    base: Any = field(default_factory=FedAvg)

    name: ClassVar[str] = "misbehaving"
    deploys: ClassVar[str] = "whatever comes of it"
    keeps_client_state: ClassVar[bool] = False
    extra_rounds: ClassVar[int] = 0

    def init(self, model_state):
        return self.base.init(model_state)

    def client_round(self, broadcast, client_state, data, training):
        update, state = self.base.client_round(broadcast, client_state, data, training)
        deed = self.plan.get(f"{data.client}/{broadcast.round}", self.plan.get(f"{data.client}"))
        return (update, state) if deed is None else DEEDS[deed](update, state)

    def aggregate(self, server_state: ServerState, updates: Iterable[Update]) -> ServerState:
        return self.base.aggregate(server_state, updates)

    def deployed(self, server_state, client_state):
        return self.base.deployed(server_state, client_state)


def _raise(error):
    raise error


def _with(update, **tensors):
    return replace(update, model={**(update.model or {}), **tensors})


def _nan(update):
    weight = update.model["head.weight"].clone()
    weight[0, 0] = float("nan")
    return _with(update, **{"head.weight": weight})


def _hang(update, state):
    time.sleep(HANG_SECONDS)
    return update, state


def _infinite_part(update, state):
    return replace(update, extra={"control": {"c": torch.tensor([float("inf")])}}), state


DEEDS = {
    "raises": lambda u, s: _raise(RuntimeError("the camera is broken\nsecond line")),
    "nan": lambda u, s: (_nan(u), s),
    "infinity": lambda u, s: (_with(u, **{"head.bias": u.model["head.bias"] + float("inf")}), s),
    "infinite extra": _infinite_part,
    "infinite state": lambda u, s: (u, ClientState({"own": {"x": torch.tensor([float("inf")])}})),
    "nan metric": lambda u, s: (replace(u, metrics={"loss": float("nan")}), s),
    "missing key": lambda u, s: (
        replace(u, model={k: v for k, v in u.model.items() if k != "head.bias"}),
        s,
    ),
    "strange key": lambda u, s: (_with(u, strange=torch.ones(1)), s),
    "shape": lambda u, s: (_with(u, **{"head.bias": torch.zeros(4)}), s),
    "dtype": lambda u, s: (_with(u, **{"head.bias": u.model["head.bias"].double()}), s),
    "no tensors": lambda u, s: (replace(u, model={"head.bias": [1.0]}), s),
    "weight": lambda u, s: (replace(u, weight=float("nan")), s),
    "other client": lambda u, s: (replace(u, client=u.client + 1), s),
    "variance": lambda u, s: (_with(u, **{"norm.running_var": -u.model["norm.running_var"]}), s),
    "nothing": lambda u, s: None,
    "half": lambda u, s: (u, None),
    "memory": lambda u, s: _raise(MemoryError()),
    "hangs": _hang,
    "dies": lambda u, s: os.kill(os.getpid(), signal.SIGKILL),
    "exits": lambda u, s: os._exit(3),
    "cannot be sent": lambda u, s: (replace(u, metrics={"loss": NotAString()}), s),
}
