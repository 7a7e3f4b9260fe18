"""The section [privacy] of a spec, and what it can be combined with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from certifl.errors import SpecError
from certifl.federated.privacy import Budget, check_algorithm
from certifl.spec.sections import Aggregation, Clients, Section

__all__ = ["Privacy", "check_privacy"]

Above0 = Annotated[float, Field(gt=0)]


class Privacy(Section):
    """Differential privacy of training; docs/privacy.md says what it covers and what not.

    Attributes:
        kind: "none", "example" (one image of a client replaced by nothing; every client adds noise
            to its own steps) or "client" (one client more or less; the server adds noise to the
            average, and `clients.participation` is the probability of each client to take part in
            a round).
        noise_multiplier: noise in units of `max_norm`; or
        target_epsilon: what the schedule's rounds may spend, from which the multiplier is found.
        max_norm: Euclidean length to which every image's gradient, or the change of every client's
            model, is clipped.
        delta: probability of the guarantee to fail; well below 1 / number of images or clients.
        noise_key: "seed" (who knows the spec can take the noise away: for studies) or "secret" (a
            key drawn by the operating system, kept in the run folder as privacy.key).
    """

    kind: Literal["none", "example", "client"] = "none"
    noise_multiplier: Above0 | None = None
    target_epsilon: Above0 | None = None
    max_norm: Above0 = 1.0
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    noise_key: Literal["seed", "secret"] = "seed"

    @model_validator(mode="after")
    def _one_amount(self) -> Privacy:
        given = [name for name in ("noise_multiplier", "target_epsilon") if getattr(self, name)]
        if self.kind == "none":
            if named := sorted(self.model_fields_set - {"kind"}):
                value = getattr(self, named[0])
                if value != type(self).model_fields[named[0]].default:
                    raise ValueError(
                        f'{named[0]} has no effect with kind = "none": set kind = "example" or '
                        'kind = "client", or remove it'
                    )
        elif len(given) != 1:
            raise ValueError(
                f'kind = "{self.kind}" needs either noise_multiplier or target_epsilon'
                + (", not both" if given else "")
            )
        return self

    def budget(self) -> Budget:
        """As the federated rooms take it."""
        return Budget(self.max_norm, self.delta, self.noise_multiplier, self.target_epsilon)


def check_privacy(
    privacy: Privacy, algorithm: Mapping[str, Any], clients: Clients, aggregation: Aggregation
) -> None:
    """Refuse a kind of privacy beside what it cannot be had with.

    Args:
        privacy: the section.
        algorithm: as described by `federated.describe`.
        clients: who takes part.
        aggregation: the server's rule.

    Raises:
        ValueError: the combination is not possible; the message says why and what to do.
    """
    if privacy.kind == "none":
        return
    try:
        check_algorithm(algorithm, privacy.kind)
        if privacy.kind == "client":
            privacy.budget().check_delta(clients.count, "clients")
    except SpecError as error:
        raise ValueError(str(error)) from error
    if privacy.kind == "client" and aggregation.build() is not None:
        raise ValueError(
            'privacy.kind = "client" is a rule of aggregation itself, with clipping of its own: '
            "remove the section [aggregation]"
        )
    if privacy.kind == "client" and clients.min_clients is not None:
        raise ValueError(
            'privacy.kind = "client" draws each client by chance, so any number may take part: '
            "remove clients.min_clients"
        )
