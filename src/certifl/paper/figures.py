"""The figures of the study as one table: figure -> rows of panels -> settings and regimes.

The table contains no specs: a `Scale` turns a setting and a regime into one. Where the study
leaves a choice open, docs/figures.md says what was chosen and why.

Source: the paper, sections 4.1 to 4.4 and appendices A.1, A.2, A.3, A.5.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from certifl.errors import InputError

Trained = Literal["matching", "nominal", "affine"]
Kind = Literal["curves", "clients", "mixture"]


@dataclass(frozen=True)
class Setting:
    """Data, clients and perturbation, in the study's own terms.

    Attributes:
        data: "cifar10" or "mnist". clients: their number.
        family, sigma: of the perturbation that is certified.
    """

    data: str
    clients: int
    family: str
    sigma: float | str

    @property
    def perturbation(self) -> dict[str, Any]:
        """As a spec takes it."""
        return {"family": self.family, "sigma": self.sigma}


@dataclass(frozen=True)
class Regime:
    """A way of training.

    Attributes:
        label: in the legend.
        algorithm: its name; "personalized" fine-tunes what `fedavg` deploys.
        trained: augmentation of federated (or local) training: the certified perturbation,
            none, or affine deformations. Personalization always takes the certified one.
        personalization: lambda of Eq. (4); None for algorithms without one.
        matched_steps: divide the learning rate by lambda, which Eq. (5) multiplies it by.
    """

    label: str
    algorithm: str
    trained: Trained = "matching"
    personalization: float | None = None
    matched_steps: bool = False


@dataclass(frozen=True)
class Panel:
    """One panel.

    Attributes:
        kind: "curves": certified accuracy, mean and band, a curve per regime; "clients": the same
            with a curve per client; "mixture": average certified radius against lambda.
        settings: one, or for "mixture" those that are drawn together.
        regimes: in the order of the legend.
    """

    kind: Kind
    settings: tuple[Setting, ...]
    regimes: tuple[Regime, ...]


@dataclass(frozen=True)
class Figure:
    """One figure.

    Attributes:
        title: what it shows. rows: of panels, from top to bottom.
        says: what the paper says of it, in our words; "" where the paper does not have it.
    """

    title: str
    rows: tuple[tuple[Panel, ...], ...] = field(repr=False)
    says: str = field(default="", repr=False)

    @property
    def panels(self) -> tuple[Panel, ...]:
        """All panels, row by row."""
        return tuple(panel for row in self.rows for panel in row)

    def curves(self) -> Iterator[tuple[Setting, Regime]]:
        """Every curve of every panel."""
        for panel in self.panels:
            for setting in panel.settings:
                for regime in panel.regimes:
                    yield setting, regime


ROTATION = ("rotation", ("0.1pi", "0.5pi"))
TRANSLATION = ("translation", (0.1, 0.5))
PIXEL = ("pixel", (0.12, 0.5))
SIX = (PIXEL, ROTATION, TRANSLATION)

LOCAL = Regime("Local", "local")
FEDAVG = Regime("FedAvg", "fedavg")
PERSONALIZED = Regime("Personalized", "personalized")
NOMINAL = Regime("FedAvg (nominal)", "fedavg", "nominal")
FROM_NOMINAL = Regime("Personalized (nominal start)", "personalized", "nominal")
AFFINE = Regime("FedAvg (affine)", "fedavg", "affine")
FROM_AFFINE = Regime("Personalized (affine start)", "personalized", "affine")
LAMBDAS = (0.1, 0.5, 0.9)
# lambda = 1 is local training bit for bit, so that run is shared with the other figures.
ALONE = Regime("λ = 1.0 (local)", "local", personalization=1.0)
MIXTURES = (
    FEDAVG,
    *(Regime(f"λ = {value}", "mixture", personalization=value) for value in LAMBDAS),
    ALONE,
)
MATCHED = (
    FEDAVG,
    *(
        Regime(f"λ = {value}, step / λ", "mixture", personalization=value, matched_steps=True)
        for value in LAMBDAS
    ),
    ALONE,
)

Family = tuple[str, tuple[float | str, ...]]


def _setting(clients: int, family: Family, size: int, data: str = "cifar10") -> Setting:
    return Setting(data, clients, family[0], family[1][size])


def _row(settings: Iterable[Setting], *regimes: Regime) -> tuple[Panel, ...]:
    return tuple(Panel("curves", (setting,), regimes) for setting in settings)


def _by_clients(family: Family, clients: tuple[int, ...]) -> tuple[tuple[Panel, ...], ...]:
    """Small sigma above large sigma, client counts from left to right."""
    return tuple(
        _row([_setting(n, family, size) for n in clients], LOCAL, FEDAVG, PERSONALIZED)
        for size in (0, 1)
    )


def _by_family(
    clients: int, families: tuple[Family, ...], *regimes: Regime
) -> tuple[tuple[Panel, ...], ...]:
    """Small sigma above large sigma, families from left to right."""
    return tuple(
        _row([_setting(clients, family, size) for family in families], *regimes) for size in (0, 1)
    )


def _mixture(
    family: Family, data: str = "cifar10", regimes: tuple[Regime, ...] = MIXTURES
) -> tuple[Panel, ...]:
    """Curves for both sigmas, then the average certified radius against lambda."""
    settings = tuple(_setting(10, family, size, data) for size in (0, 1))
    return (*_row(settings, *regimes), Panel("mixture", settings, regimes))


def _every_client(clients: int) -> tuple[tuple[Panel, ...], ...]:
    """Local training on the left, personalized on the right, a row per setting."""
    settings = [_setting(clients, f, size) for f in (ROTATION, TRANSLATION) for size in (0, 1)]
    return tuple(
        tuple(Panel("clients", (setting,), (regime,)) for regime in (LOCAL, PERSONALIZED))
        for setting in settings
    )


_EVERY_CLIENT = (
    "The paper (A.3) draws each of {clients} clients instead of their mean. It finds that clients "
    "differ far more with training alone than with personalized models, although their images "
    "were divided evenly."
)

FIGURES: Mapping[str, Figure] = {
    "figure1": Figure(
        "Local, federated and personalized training against rotation",
        _by_clients(ROTATION, (4, 10, 20)),
        "The paper (4.1) reads three things from it. With 4 clients, whose data are plenty, "
        "training alone is good enough. With 10 or 20 clients it falls behind FedAvg, in places "
        "by over 20 points of certified accuracy. Personalized models do as well as the global "
        "one, which was trained robustly already. The best and the worst client lie farther apart "
        "with training alone, the more so the more clients there are.",
    ),
    "figure2": Figure(
        "Personalization of a nominally trained model",
        _by_family(10, SIX, NOMINAL, FROM_NOMINAL),
        "In the paper (4.2) clients train together without augmentation, and each then fine-tunes "
        "with the perturbation that it wants to withstand. It finds that this improves robustness "
        "much, for all three perturbations and both values of sigma.",
    ),
    "figure3": Figure(
        "Personalization of a model trained with affine deformations",
        _by_family(10, (ROTATION, TRANSLATION), AFFINE, FROM_AFFINE),
        "In the paper (4.2) clients train together with affine deformations, another augmentation "
        "than the intended one. It finds that fine-tuning with rotations or translations still "
        "improves robustness.",
    ),
    "figure4": Figure(
        "Personalized from a nominal model, or trained robustly alone",
        (
            *_by_family(10, SIX, LOCAL, FROM_NOMINAL),
            _row([_setting(10, family, 1, "mnist") for family in SIX], LOCAL, FROM_NOMINAL),
        ),
        "The paper (4.3) asks what serves a client better: robust training alone, or robust "
        "fine-tuning of a model that was trained together without augmentation. At a small sigma, "
        "it finds, fine-tuning is clearly ahead, for less computation. At a large sigma the two "
        "are about equal, which it attributes to the small number of clients.",
    ),
    "figure5": Figure(
        "Mixtures of global and local models",
        (_mixture(ROTATION), _mixture(TRANSLATION)),
        "The paper (4.4) varies λ of Eq. (4) between FedAvg (0) and training alone (1). It finds "
        "mixtures ahead of FedAvg for both deformations, both values of sigma and nearly every λ, "
        "and λ = 0.1, the least personal one, ahead of all. Their clients lie closer together "
        "than those of fine-tuning and of training alone.",
    ),
    "figure6": Figure(
        "Local, federated and personalized training against translation",
        _by_clients(TRANSLATION, (4, 10)),
        "The paper (A.1) repeats its first figure for translations, with 4 and 10 clients, and "
        "sees the same: the more clients share the data, the worse training alone becomes.",
    ),
    "figure7": Figure(
        "Nominal federated training, robust personalization",
        _by_family(100, SIX, LOCAL, NOMINAL, FROM_NOMINAL),
        "With 100 clients each has too little data to train alone. The paper (A.2) finds that "
        "robust fine-tuning of a model that was trained together without augmentation is then "
        "farther ahead of training alone than with 10 clients.",
    ),
    "figure8": Figure("Every client", _every_client(4), _EVERY_CLIENT.format(clients=4)),
    "figure9": Figure("Every client", _every_client(10), _EVERY_CLIENT.format(clients=10)),
    "figure10": Figure(
        "Mixtures of global and local models, further data and perturbations",
        (
            *(_mixture(family, "mnist") for family in (ROTATION, TRANSLATION, PIXEL)),
            _mixture(PIXEL),
        ),
        "The paper (A.5) adds pixel perturbations, and MNIST. It finds mixtures ahead of FedAvg "
        "for most values of λ again, while the best λ depends on the perturbation and on sigma.",
    ),
}

EXTRA: Mapping[str, Figure] = {
    "figure5-matched": Figure(
        "Mixtures with the learning rate divided by λ",
        tuple(_mixture(family, regimes=MATCHED) for family in (ROTATION, TRANSLATION)),
        "The paper has no such figure. Eq. (5) multiplies the learning rate by λ, so a mixture "
        "also takes smaller steps than FedAvg. Here it is divided by λ, which leaves the pull to "
        "the mean as the only difference.",
    )
}
"""Beyond the paper; not part of `all`."""


def chosen_figures(name: str) -> dict[str, Figure]:
    """The figure of this name, or for "all" the study's ten.

    Raises:
        InputError: there is no such figure.
    """
    if name == "all":
        return dict(FIGURES)
    known = {**FIGURES, **EXTRA}
    if name in known:
        return {name: known[name]}
    near = difflib.get_close_matches(name, list(known), 1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise InputError(
        f"There is no figure {name!r}.{hint} Choose one of {', '.join(known)}, or all."
    )
