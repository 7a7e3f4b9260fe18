"""Updates of one tensor each, and what an average of what a rule hands on comes to."""

from collections.abc import Callable, Iterable, Iterator

import torch

from certifl.federated import ServerState, Update
from certifl.federated.aggregation import Rule
from certifl.federated.averaging import average_models

EMPTY = ServerState(0, {})


def updates(*values: object, dtype: torch.dtype = torch.float64) -> list[Update]:
    models = [{"w": torch.as_tensor(value, dtype=dtype).reshape(-1)} for value in values]
    return [Update(i, 1.0 + i, model, {"loss": float(i)}) for i, model in enumerate(models)]


def result(rule: Rule, sent: Iterable[Update], broadcast: ServerState = EMPTY) -> torch.Tensor:
    """The uniform average of what the rule hands on."""
    model = average_models(rule(broadcast, sent))
    return model["w"]


def most_alive(consume: Callable[[Iterator[Update]], object]) -> int:
    """How many of twenty models live at the same time, at the most, while they are consumed."""
    alive = most = 0

    class Watched(dict[str, torch.Tensor]):
        def __init__(self, value: torch.Tensor) -> None:
            super().__init__(w=value)
            nonlocal alive
            alive += 1

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def sent() -> Iterator[Update]:
        nonlocal most
        for client in range(20):
            yield Update(client, 1.0, Watched(torch.ones(3) * client), {})
            most = max(most, alive)

    consume(sent())
    return most
