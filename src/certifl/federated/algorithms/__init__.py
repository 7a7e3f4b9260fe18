"""All algorithms: one row each. A new algorithm is one file and one row.

Nothing here imports torch: specs are checked against these rows, and an algorithm's class is
loaded when it is first built. A row also says why each kind of privacy is not available; the
default is to refuse privacy, until it has been shown that all an algorithm sends is protected.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from certifl.registry import (
    Flag,
    Fraction,
    NonNegative,
    Parameters,
    Positive,
    PositiveInt,
    Registry,
    Row,
    Share,
    Weighting,
    parameters,
)

Table = Mapping[str, Any]
UNKNOWN = "nobody has shown that all it sends is protected"
PERSONAL = "every client deploys what it trained in the rounds; an unseen client has no such model"


@dataclass(frozen=True)
class AlgorithmRow(Row):
    """An algorithm.

    Attributes:
        sends_nothing: whether clients send nothing.
        no_example_privacy: why example-level privacy is not available; None = it is. Everything
            that a client sends or keeps must be a function of noisy sums, of which every batch
            gives at most one.
        no_client_privacy: the same of client-level privacy. The server must send nothing but
            functions of the models' private average, so clients may send nothing else.
        no_unseen: why a client that took part in no round cannot be given a model; None = it can:
            the global model, or what the algorithm's extra rounds make of it.
        epochs: (its table, the schedule's local epochs) -> epochs that a client trains in a
            round.
        stable: (its table, learning rate, momentum) -> whether its pull converges. SGD with
            momentum shrinks a penalty of curvature a while lr a < 2 (1 + momentum).
        unstable: completes "training.lr = 1 makes ..." where it does not.
    """

    sends_nothing: bool = False
    no_example_privacy: str | None = UNKNOWN
    no_client_privacy: str | None = UNKNOWN
    no_unseen: str | None = PERSONAL
    epochs: Callable[[Table, int], int] = lambda _, local_epochs: local_epochs
    stable: Callable[[Table, float, float], bool] = lambda *_: True
    unstable: str = ""


_UNIFORM = (Weighting, "uniform")
_SERVER_LR = (Positive, 0.01)
_TAU = (Positive, 1e-3)

_Probability = Annotated[float, Field(gt=0, lt=1, description="a probability above 0 and below 1")]
_SomeShare = Annotated[float, Field(gt=0, le=1, description="a number above 0 up to 1 (local)")]
_Rate = Annotated[float | None, Field(gt=0, description="a number above 0")]
_Head = Annotated[
    str | None,
    Field(description="the name of a part of the network, or left out for its last layer"),
]


def _one_model(home: str, label: str, takes: type[Parameters]) -> AlgorithmRow:
    """An algorithm with one global model that may be trained with either kind of privacy."""
    return AlgorithmRow(
        f"{__name__}.{home}",
        takes,
        label,
        no_example_privacy=None,
        no_client_privacy=None,
        no_unseen=None,
    )


def _proximal(
    home: str, label: str, epochs: Callable[[Table, int], int], no_unseen: str | None
) -> AlgorithmRow:
    """An algorithm whose clients are pulled with the strength mu."""
    return AlgorithmRow(
        f"{__name__}.{home}",
        parameters(mu=NonNegative, weighting=_UNIFORM),
        label,
        no_example_privacy=None,
        no_client_privacy=None,
        no_unseen=no_unseen,
        epochs=epochs,
        stable=lambda table, lr, momentum: lr * table["mu"] < 2.0 * (1.0 + momentum),
        unstable="the pull of mu overshoot ever further: lr mu must stay below 2 (1 + momentum), "
        "so lower one of them",
    )


_ADAPTIVE = parameters(
    server_lr=_SERVER_LR,
    beta1=(Fraction, 0.9),
    beta2=(Fraction, 0.99),
    tau=_TAU,
    weighting=_UNIFORM,
)

ALGORITHMS: Registry[AlgorithmRow] = Registry(
    "algorithm",
    {
        "local": AlgorithmRow(
            f"{__name__}.local:Local",
            parameters(),
            "Local",
            sends_nothing=True,
            no_example_privacy=None,
            no_client_privacy="its clients send nothing, so there is nothing to protect",
            no_unseen="every client trains alone, so there is no model for an unseen client",
        ),
        "fedavg": _one_model("fedavg:FedAvg", "FedAvg", parameters(weighting=_UNIFORM)),
        "personalized": AlgorithmRow(
            f"{__name__}.personalized:Personalized",
            parameters(base=Any, epochs=(PositiveInt, 2), lr=(_Rate, None)),
            "Personalized",
            wraps="base",
            no_unseen=None,
        ),
        "mixture": AlgorithmRow(
            f"{__name__}.proximal:Mixture",
            parameters(personalization=Share),
            "Mixture",
            no_example_privacy=None,
            no_client_privacy=None,
            stable=lambda table, lr, momentum: (
                lr * (1.0 - table["personalization"]) < 1.0 + momentum
            ),
            unstable="the pull of Eq. (5) overshoot ever further: lr (1 - personalization) must "
            "stay below 1 + momentum",
        ),
        "fedprox": _proximal("proximal:FedProx", "FedProx", lambda _, epochs: epochs, None),
        "scaffold": AlgorithmRow(
            f"{__name__}.scaffold:Scaffold",
            parameters(server_lr=(Positive, 1.0)),
            "SCAFFOLD",
            no_example_privacy=None,
            no_client_privacy="its clients send control variates, which are not protected",
            no_unseen=None,
        ),
        "fedavgm": _one_model(
            "fedopt:FedAvgM",
            "FedAvgM",
            parameters(beta=(Fraction, 0.9), server_lr=(Positive, 1.0), weighting=_UNIFORM),
        ),
        "fedadam": _one_model("fedopt:FedAdam", "FedAdam", _ADAPTIVE),
        "fedyogi": _one_model("fedopt:FedYogi", "FedYogi", _ADAPTIVE),
        "fedadagrad": _one_model(
            "fedopt:FedAdagrad",
            "FedAdagrad",
            parameters(server_lr=_SERVER_LR, beta1=(Fraction, 0.0), tau=_TAU, weighting=_UNIFORM),
        ),
        "l2gd": AlgorithmRow(
            f"{__name__}.l2gd:L2GD",
            parameters(personalization=_SomeShare, probability=(_Probability, 0.1)),
            "L2GD",
            no_example_privacy="its number of steps is random and not accounted for",
            no_client_privacy=None,
            # Momentum acts on local steps alone.
            stable=lambda table, lr, _: (
                lr * (1.0 - table["personalization"]) < table["probability"]
            ),
            unstable="a step towards the average overshoot ever further: lr (1 - personalization) "
            "must stay below probability",
        ),
        "ditto": _proximal("proximal:Ditto", "Ditto", lambda _, epochs: 2 * epochs, PERSONAL),
        "flix": AlgorithmRow(
            f"{__name__}.mixed_models:FLIX",
            parameters(personalization=Share, weighting=_UNIFORM),
            "FLIX",
            no_example_privacy="it trains models beforehand whose steps are not accounted for",
            no_client_privacy=None,
        ),
        "apfl": AlgorithmRow(
            f"{__name__}.mixed_models:APFL",
            parameters(alpha=(Share, 0.5), adaptive=(Flag, True), weighting=_UNIFORM),
            "APFL",
            no_example_privacy="it takes two gradients of one batch",
            no_client_privacy=None,
        ),
        "fedbn": AlgorithmRow(
            f"{__name__}.personal_layers:FedBN",
            parameters(layers=(Literal["batch", "all"], "batch"), weighting=_UNIFORM),
            "FedBN",
            no_example_privacy=None,
            no_client_privacy=None,
        ),
        "fedrep": AlgorithmRow(
            f"{__name__}.personal_layers:FedRep",
            parameters(head=(_Head, None), head_epochs=(PositiveInt, 1), weighting=_UNIFORM),
            "FedRep",
            no_example_privacy=None,
            no_client_privacy=None,
            epochs=lambda table, local_epochs: (
                local_epochs + (0 if table.get("head") == "" else table["head_epochs"])
            ),
        ),
        "perfedavg": AlgorithmRow(
            f"{__name__}.perfedavg:PerFedAvg",
            parameters(
                inner_lr=(NonNegative, 0.01),
                approximation=(Literal["first-order", "hessian-free"], "first-order"),
                weighting=_UNIFORM,
            ),
            "Per-FedAvg",
            no_example_privacy="it takes several gradients of one batch",
            no_client_privacy=None,
            no_unseen=None,
        ),
    },
)


def describe(algorithm: Any) -> dict[str, Any]:
    """An algorithm as a plain table, nested where it wraps one; see `Registry.describe`."""
    return ALGORITHMS.describe(algorithm)


def from_description(description: Table | str) -> Any:
    """The algorithm described, `{"name": "mixture", "personalization": 0.5}`, or a bare name.

    `base` of `personalized` is described in the same way. SpecError names the key that is
    wrong, and what is allowed.
    """
    return ALGORITHMS.build(description)
