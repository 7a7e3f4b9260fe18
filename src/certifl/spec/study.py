"""A whole study: its sections, their combinations, its hash and its TOML."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Annotated, Any

import tomli_w
from pydantic import Field, field_validator, model_validator

from certifl.errors import InputError
from certifl.federated.algorithms import ALGORITHMS
from certifl.federated.objectives import OBJECTIVES
from certifl.federated.schedule import check_arithmetic
from certifl.perturbations import from_record as perturbation_from
from certifl.spec.sections import (
    NONE,
    OWN,
    SAME,
    Aggregation,
    Augmentation,
    Certification,
    Clients,
    Data,
    Model,
    Privacy,
    Section,
    Training,
    once,
)

if TYPE_CHECKING:
    from certifl.federated.algorithms.base import Algorithm
    from certifl.federated.batches import PerClient
    from certifl.federated.objectives.base import Objective
    from certifl.perturbations import Perturbation

    Choice = Perturbation | PerClient | None

# Raised when a default of the spec changes its value, or what it means, so that results differ.
_DEFAULTS = 1


class Spec(Section):
    """A whole study of one algorithm.

    Attributes:
        name: free text for people. seed: the one seed all streams are derived from.
        algorithm: { name = "fedavg", ... } with the algorithm's own parameters.
        objective: { name = "augmented", ... }, what clients minimize on a batch, in federated
            training and in fine-tuning, with the objective's own parameters.
    """

    name: str = "study"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    data: Data
    clients: Clients = Clients()
    model: Model = Model()
    # Described in full also where it is left out: a spec and its stored text have one hash.
    algorithm: dict[str, Any] = Field({"name": "fedavg"}, validate_default=True)
    objective: dict[str, Any] = Field(default_factory=lambda: {"name": "augmented"})
    training: Training = Training()
    aggregation: Aggregation = Aggregation()
    privacy: Privacy = Privacy()
    augmentation: Augmentation = Augmentation()
    certification: Certification

    @field_validator("algorithm")
    @classmethod
    def _known_algorithm(cls, value: dict[str, Any]) -> dict[str, Any]:
        return ALGORITHMS.check(value)

    @field_validator("objective")
    @classmethod
    def _known_objective(cls, value: dict[str, Any]) -> dict[str, Any]:
        return OBJECTIVES.check(value)

    @model_validator(mode="after")
    def _combinations(self) -> Spec:
        personal = self.algorithm["name"] == "personalized"
        if self.augmentation.personalized != SAME and not personal:
            raise ValueError(
                f"augmentation.personalized has no effect with {self.algorithm['name']!r}: "
                'remove it, or choose name = "personalized"'
            )
        trained = self.algorithm.get("base", self.algorithm)
        row = ALGORITHMS.rows[trained["name"]]
        if not row.stable(trained, self.training.lr, self.training.momentum):
            raise ValueError(f"training.lr = {self.training.lr} makes {row.unstable}")
        tests, clients = self.data.test_images, self.clients.count
        if tests is not None and tests < clients:
            raise ValueError(
                f"data.test_images = {tests} leaves some of clients.count = {clients} clients "
                "without a test image: take fewer clients or more test images"
            )
        self._check_own()
        self._check_rounds()
        if self.clients.unseen and row.no_unseen is not None:
            raise ValueError(
                f"clients.unseen cannot be had with {trained['name']!r}: {row.no_unseen}. Remove "
                'it, or choose an algorithm with one global model, such as "fedavg", or '
                '"personalized"'
            )
        self._check_objective()
        try:
            self.aggregation.check(self.clients.participants)
        except InputError as error:
            raise ValueError(f"aggregation: {error}") from error
        self._check_privacy()
        self._check_votes()  # last: it imports torch and scipy
        return self

    def _check_privacy(self) -> None:
        """A kind of privacy beside what it can be had with."""
        kind = self.privacy.kind
        if kind == "none":
            return
        from certifl.federated.privacy import check_algorithm

        check_algorithm(self.algorithm, kind)
        if kind == "example":
            check_arithmetic(self.training.precision, self.training.memory_format)
            return
        self.privacy.budget().check_delta(self.clients.seen, "clients")
        if self.aggregation.build() is not None:
            raise ValueError(
                'privacy.kind = "client" is a rule of aggregation itself, with clipping of its '
                "own: remove the section [aggregation]"
            )
        if self.clients.min_clients is not None:
            raise ValueError(
                'privacy.kind = "client" draws each client by chance, so any number may take '
                "part: remove clients.min_clients"
            )

    def _check_votes(self) -> None:
        """The votes can certify something, also for clients that certify something else."""
        for client in self.certification.differing():
            perturbation = _built(self.certification.of(client))
            if perturbation is not None:
                try:
                    self.certification.settings(client).estimator_for(perturbation).check()
                except InputError as error:
                    raise ValueError(f"certification: {error}") from error

    def _check_objective(self) -> None:
        """A robust objective has a perturbation to train against somewhere."""
        nothing = self.augmentation.federated == NONE and self.augmentation.personalized in (
            NONE,
            SAME,
        )
        if self.objective["name"] != "augmented" and nothing:
            raise ValueError(
                f"objective.name = {self.objective['name']!r} needs a perturbation to train "
                "against, and nothing augments this training: set augmentation.federated, for "
                'instance to what is certified, or choose objective.name = "augmented"'
            )

    def _check_rounds(self) -> None:
        """Without rounds there is nothing but given weights to certify."""
        if self.training.rounds > 0:
            return
        if self.model.weights is None:
            raise ValueError(
                "training.rounds = 0 deploys the initial model: give model.weights, or 1 at least"
            )
        if self.build_algorithm().extra_rounds:
            raise ValueError(
                f"training.rounds = 0 leaves {self.algorithm['name']!r} nothing to begin its last "
                'round with: choose algorithm.name = "local", or give 1 round at least'
            )

    def _check_own(self) -> None:
        """Own perturbations are those of clients that exist, and somebody certifies something."""
        count = self.clients.count
        for own in self.certification.own or ():
            if max(own.clients) >= count:
                raise ValueError(
                    f"certification.own names client {max(own.clients)}, but clients.count = "
                    f"{count}, counted from 0"
                )
        if all(self.certification.of(client) == NONE for client in range(count)):
            raise ValueError(
                'certification.own gives every client "none": no client certifies anything'
            )

    @once
    def build_algorithm(self) -> Algorithm:
        """The algorithm as an object."""
        return ALGORITHMS.build(self.algorithm)

    @once
    def build_objective(self) -> Objective:
        """The objective as an object."""
        return OBJECTIVES.build(self.objective)

    @once
    def perturbation(self) -> Perturbation:
        """The perturbation that all clients certify that have none of their own."""
        return perturbation_from(self.certification.perturbation)

    @once
    def perturbations(self) -> tuple[Perturbation | None, ...]:
        """What each client certifies; None = nothing."""
        return tuple(_built(description) for description in self._descriptions())

    def _descriptions(self) -> list[Any]:
        return [self.certification.of(client) for client in range(self.clients.count)]

    @once
    def augmentations(self) -> tuple[Choice, Choice]:
        """What augments federated training and personalization: for all, or per client."""
        chosen = (self.augmentation.federated, self.augmentation.personalized)
        federated = self._augmentation(chosen[0])
        return federated, federated if chosen[1] == SAME else self._augmentation(chosen[1])

    def _augmentation(self, description: Any) -> Choice:
        if description == OWN:
            from certifl.federated.batches import combine_augmentations

            return combine_augmentations(self.perturbations())
        return _built(description)

    def to_toml(self) -> str:
        """The spec as TOML, every default spelled out."""
        return tomli_w.dumps(self.model_dump(exclude_none=True))

    def hash(self) -> str:
        """A short name of everything that changes a result.

        Keys that have their default are left out, so a key that a later version adds renames no
        study whose results it leaves alone. So is clients.min_clients: it says when training
        stops, not what it gives, and a training that stopped can be resumed with a lower one.
        """
        return _hash(_decisive(self.model_dump(exclude={"name"}, exclude_defaults=True)))

    def training_hash(self, of_base: bool = False) -> str:
        """A name of the training alone: equal for specs that differ only in certification.

        Args:
            of_base: of the federated training that a `personalized` algorithm starts from.
        """
        values = self.model_dump(exclude={"name", "certification"}, exclude_defaults=True)
        values = _decisive(values)
        values.setdefault("algorithm", self.algorithm)
        own = self._descriptions()  # one where all clients certify the same
        for key, value in values.get("augmentation", {}).items():
            if value == OWN:  # in full: it comes from the section that is left out
                alike = all(one == own[0] for one in own)
                values["augmentation"][key] = own[0] if alike else own
        if of_base and "base" in values["algorithm"]:
            values["algorithm"] = values["algorithm"]["base"]
        if "base" not in values["algorithm"]:
            values["augmentation"] = {
                key: value
                for key, value in values.get("augmentation", {}).items()
                if key != "personalized"
            }
        return _hash(values)


def _decisive(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a spec without those that change no result."""
    clients = {k: v for k, v in values.get("clients", {}).items() if k != "min_clients"}
    model = {k: v for k, v in values.get("model", {}).items() if k != "weights"}  # a path
    rest = {key: value for key, value in values.items() if key not in ("clients", "model")}
    left = {"clients": clients, "model": model}
    return rest | {section: own for section, own in left.items() if own}


def _built(description: Any) -> Perturbation | None:
    return None if description == NONE else perturbation_from(description)


def _hash(values: Any) -> str:
    text = json.dumps({"defaults": _DEFAULTS, **values}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
