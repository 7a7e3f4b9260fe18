"""A whole study: read from files, values and settings, its combinations, its hash and its TOML."""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import tomli_w
from pydantic import (
    BaseModel,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from certifl.errors import InputError, SpecError, StoreError
from certifl.federated.algorithms import ALGORITHMS
from certifl.federated.objectives import OBJECTIVES
from certifl.federated.schedule import check_arithmetic
from certifl.path_checks import read_spec_file
from certifl.perturbations import from_record as perturbation_from
from certifl.perturbations.units import from_records
from certifl.safe_io import parse_toml
from certifl.spec import sections

if TYPE_CHECKING:
    from certifl.federated.algorithms.base import Algorithm
    from certifl.federated.batches import PerClient
    from certifl.federated.objectives.base import Objective
    from certifl.perturbations import Perturbation

    Choice = Perturbation | PerClient | None

# Raised when a default of the spec changes its value, or what it means, so that results differ.
_DEFAULTS = 1


class Spec(sections.Section):
    """A whole study of one algorithm.

    Attributes:
        name: free text for people. seed: the one seed all streams are derived from.
        algorithm: { name = "fedavg", ... } with the algorithm's own parameters.
        objective: { name = "augmented", ... }, what clients minimize on a batch, in federated
            training and in fine-tuning, with the objective's own parameters.
    """

    name: str = "study"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    data: sections.Data
    clients: sections.Clients = sections.Clients()
    model: sections.Model = sections.Model()
    # Described in full also where it is left out: a spec and its stored text have one hash.
    algorithm: dict[str, Any] = Field({"name": "fedavg"}, validate_default=True)
    objective: dict[str, Any] = Field(default_factory=lambda: {"name": "augmented"})
    training: sections.Training = sections.Training()
    aggregation: sections.Aggregation = sections.Aggregation()
    privacy: sections.Privacy = sections.Privacy()
    augmentation: sections.Augmentation = sections.Augmentation()
    certification: sections.Certification

    @field_validator("algorithm")
    @classmethod
    def _known_algorithm(cls, value: dict[str, Any]) -> dict[str, Any]:
        return ALGORITHMS.check(value)

    @field_validator("objective")
    @classmethod
    def _known_objective(cls, value: dict[str, Any]) -> dict[str, Any]:
        return OBJECTIVES.check(value)

    @model_validator(mode="after")
    def _combinations(self, info: ValidationInfo) -> Spec:
        personal = self.algorithm["name"] == "personalized"
        if self.augmentation.personalized != sections.SAME and not personal:
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
                f"clients.unseen is not available with {trained['name']!r}: {row.no_unseen}. "
                'Remove it, or choose an algorithm with one global model, such as "fedavg", or '
                '"personalized"'
            )
        self._check_objective()
        try:
            self.aggregation.check(self.clients.participants)
        except InputError as error:
            raise ValueError(f"aggregation: {error}") from error
        self._check_privacy(stored=info.context == sections.STORED)
        self._check_votes()  # last: it imports torch and scipy
        return self

    def _check_privacy(self, stored: bool) -> None:
        """A kind of privacy beside what it can be had with; runs of 0.1.0 may have int8."""
        kind = self.privacy.kind
        if kind == "none":
            return
        if self.certification.precision == "int8" and not stored:
            raise ValueError(
                'certification.precision = "int8" votes with ranges of activations on training '
                "images, which are stored in the certificates and have no noise, so no epsilon of "
                '[privacy] bounds them: choose "auto", "float32" or "bfloat16"'
            )
        from certifl.federated.privacy import check_algorithm

        check_algorithm(self.algorithm, kind)
        if kind == "example":
            check_arithmetic(self.training.precision, self.training.memory_format)
            return
        self.privacy.budget().check_delta(self.clients.training_count, "clients")
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
        chosen = self.augmentation
        nothing = chosen.federated == sections.NONE and (
            chosen.personalized in (sections.NONE, sections.SAME)
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
        if all(self.certification.of(client) == sections.NONE for client in range(count)):
            raise ValueError(
                'certification.own gives every client "none": no client certifies anything'
            )

    @sections.once
    def build_algorithm(self) -> Algorithm:
        """The algorithm as an object."""
        return ALGORITHMS.build(self.algorithm)

    @sections.once
    def build_objective(self) -> Objective:
        """The objective as an object."""
        return OBJECTIVES.build(self.objective)

    @sections.once
    def perturbation(self) -> Perturbation:
        """The perturbation that all clients certify that have none of their own."""
        return perturbation_from(self.certification.perturbation)

    @sections.once
    def perturbations(self) -> tuple[Perturbation | None, ...]:
        """What each client certifies; None = nothing."""
        return tuple(_built(description) for description in self._descriptions())

    def _descriptions(self) -> list[Any]:
        return [self.certification.of(client) for client in range(self.clients.count)]

    @sections.once
    def augmentations(self) -> tuple[Choice, Choice]:
        """What augments federated training and personalization: for all, or per client."""
        personal = self.augmentation.personalized
        federated = self._augmentation(self.augmentation.federated)
        return federated, federated if personal == sections.SAME else self._augmentation(personal)

    def _augmentation(self, description: Any) -> Choice:
        if description == sections.OWN:
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
            if value == sections.OWN:  # in full: it comes from the section that is left out
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
    return None if description == sections.NONE else perturbation_from(description)


def _hash(values: Any) -> str:
    text = json.dumps({"defaults": _DEFAULTS, **values}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# Specs from files, plain values and `--set key=value`; one clear message for what is wrong.


def load(path: Path, settings: Sequence[str] = ()) -> Spec:
    """Read a spec file and apply `key=value` settings to it.

    Args:
        path: a TOML file. settings: such as `training.lr=0.05`; later ones win.

    Raises:
        SpecError: the file is missing, is not TOML, or a key, type, range or combination is wrong.
    """
    return with_settings(read_spec_file(path), settings)


def load_stored(path: Path) -> Spec:
    """Read the spec that a run wrote into its folder.

    Raises:
        StoreError: it is missing or no longer a spec: the run is damaged.
    """
    try:
        with from_records():
            return _checked(read_spec_file(path), sections.STORED)
    except SpecError as error:
        raise StoreError(f"{path} is damaged: {error}") from error


def received(text: str) -> Spec:
    """A spec that a server sent to a client: it may name no file of this machine.

    Raises:
        SpecError: a key, type, range or combination is wrong. InputError: the text is not TOML.
    """
    return _checked(parse_toml(text), sections.RECEIVED)


def with_settings(values: dict[str, Any], settings: Sequence[str] = ()) -> Spec:
    """A checked spec from plain values and `key=value` settings such as `training.lr=0.05`.

    Args:
        values: as a TOML file holds them; they are not changed.
        settings: later ones win.

    Raises:
        SpecError: a key, type, range or combination is wrong; the message names the key.
    """
    return _checked(merged(values, settings))


def merged(values: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """Plain values with `key=value` settings applied, not checked yet.

    Raises:
        SpecError: a setting is not `key=value`, or goes into what is not a section.
    """
    result = copy.deepcopy(dict(values))
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key.strip():
            raise SpecError(
                f"--set takes key=value, for instance training.lr=0.05; got {setting!r}."
            )
        _set_value(result, key.strip().split("."), _value(text.strip()), key.strip())
    return result


def _checked(values: dict[str, Any], context: Mapping[str, Any] | None = None) -> Spec:
    try:
        return Spec.model_validate(values, context=context)
    except ValidationError as error:
        raise SpecError(_message(error)) from error
    except InputError as error:
        raise SpecError(str(error)) from error


def _set_value(values: dict[str, Any], keys: list[str], value: Any, whole: str) -> None:
    for key in keys[:-1]:
        inner = values.get(key, {})
        if not isinstance(inner, dict):
            raise SpecError(f"--set {whole}: {key!r} is a value, not a section.")
        values[key] = {**inner}  # a table that two keys share is changed under one of them
        values = values[key]
    values[keys[-1]] = value


def _value(text: str) -> Any:
    """A TOML value; what is not TOML is taken as text, so that quotes may be omitted."""
    try:
        return parse_toml(f"value = {text}")["value"]
    except InputError as error:
        if isinstance(error.__cause__, tomllib.TOMLDecodeError):
            return text
        raise SpecError(f"--set: the value {text[:30]!r}... cannot be taken: {error}.") from error


def _message(error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    reason = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        reason = _unknown_key(first["loc"])
    elif first["type"] == "missing":
        shown = key in _EXAMPLES or "." not in key  # where the name alone does not say it
        reason = f"this key is required{f', {_example(key)}' if shown else ''}"
    elif first["type"] in ("model_type", "dict_type"):
        reason = f"must be a table, {_example(key)}; got {first['input']!r}"
    elif first["type"] not in ("value_error",):
        reason = f"{_plainly(first)}; got {first['input']!r}"
    return f"{key}: {reason}" if key else reason


_KINDS = {
    "float_type": "a number",
    "int_type": "a whole number",
    "bool_type": "true or false",
    "list_type": "a list, written in [ ]",
    "string_type": "a string, in quotes",
}


def _plainly(error: ErrorDetails) -> str:
    """What is wrong with a value, in the words of TOML."""
    if error["type"] in _KINDS:
        given = error["input"]
        quoted = isinstance(given, str) and isinstance(_value(given), int | float)
        return f"must be {_KINDS[error['type']]}{', without quotes' if quoted else ''}"
    return error["msg"].removeprefix("Value error, ").replace("Input should be", "must be")


_EXAMPLES = {
    "algorithm": 'such as algorithm = { name = "fedavg" }',
    "objective": 'such as objective = { name = "consistency" }',
    "certification.perturbation": 'such as perturbation = { family = "rotation", '
    'sigma = "18deg" }',
}


def _example(key: str) -> str:
    return _EXAMPLES.get(key, f"written as a section [{key}] with its own keys")


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The section that a key holds, also as `list[Section] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_section_in, get_args(annotation))), None)


def _unknown_key(location: tuple[str | int, ...]) -> str:
    section: type[BaseModel] = Spec
    for part in location[:-1]:
        if isinstance(part, int):  # an entry of a list of tables
            continue
        inner = _section_in(section.model_fields[part].annotation)
        if inner is None:
            break
        section = inner
    near = difflib.get_close_matches(str(location[-1]), list(section.model_fields), 1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"no such key.{hint} Allowed here: {', '.join(section.model_fields)}"
