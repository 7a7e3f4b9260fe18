"""What a study is: data, clients, model, algorithm, training, augmentation, certification, seed.

A spec is a TOML file. It is checked as a whole before anything is read or written, it can be
written back, and its hash names what was computed. Everything that changes a number stands in it;
everything that does not (folders, device, progress) is an option of the command instead.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from certifl.certification.scan import scan_of
from certifl.certification.settings import Settings
from certifl.data import Splitter, make_splitter
from certifl.errors import InputError, SpecError, StoreError
from certifl.federated import Algorithm, Personalized, Schedule
from certifl.federated import describe as describe_algorithm
from certifl.federated import from_description as algorithm_from
from certifl.models import MODELS
from certifl.perturbations import Perturbation
from certifl.perturbations import describe as describe_perturbation
from certifl.perturbations import from_description as perturbation_from

__all__ = [
    "Augmentation",
    "Certification",
    "Clients",
    "Data",
    "Model",
    "Spec",
    "Training",
    "load",
    "load_stored",
    "with_settings",
]

NONE, SAME = "none", "same"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _perturbation(*words: str) -> BeforeValidator:
    """Accepts these words, or a perturbation, which is kept in its canonical description."""

    def check(value: Any) -> Any:
        if isinstance(value, str) and value in words:
            return value
        if not isinstance(value, dict):
            also = "".join(f'"{word}", or ' for word in words)
            raise ValueError(
                f'must be {also}a table such as {{ family = "rotation", sigma = "18deg" }}; '
                f"got {value!r}"
            )
        return describe_perturbation(perturbation_from(value))

    return BeforeValidator(check)


Positive = Annotated[int, Field(ge=1)]


class Data(_Section):
    """Which images.

    Attributes:
        name: digits, mnist, cifar10, fashion_mnist, a hub name, or a folder.
        train_images, test_images: use a fixed random part of so many; absent = all.
        label_column: which column is the label, where a data set has several.
    """

    name: Annotated[str, Field(min_length=1)]
    train_images: Positive | None = None
    test_images: Positive | None = None
    label_column: str | None = None


class Clients(_Section):
    """Who takes part, and how the images are dealt out.

    Attributes:
        count: number of clients.
        split: a name in `data.PARTITIONS`; training and test images of a client follow it alike.
        options: the splitter's own options, for instance { alpha = 0.3 } for dirichlet.
    """

    count: Positive = 10
    split: str = "uniform"
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _splitter_exists(self) -> Clients:
        self.splitter()
        return self

    def splitter(self) -> Splitter:
        """The partition rule."""
        return make_splitter(self.split, self.options)


class Model(_Section):
    """The network.

    Attributes:
        name: resnet18, small_resnet, small_cnn, or your own as `module:function`.
        options: further arguments of your own function.
    """

    name: str = "resnet18"
    options: dict[str, Any] = Field(default_factory=dict)

    @field_validator("name")
    @classmethod
    def _known_model(cls, value: str) -> str:
        return value if ":" in value else _one_of(value, MODELS, "your own as module:function")


class Training(_Section):
    """The schedule, the same for every algorithm; the defaults are the paper's.

    Attributes:
        rounds: communication rounds. local_epochs: passes of a client over its data per round.
        batch_size, lr, momentum, weight_decay: stochastic gradient descent.
        decay_every: local epochs, counted over the whole training, after which lr is multiplied by
            `decay_factor`; 0 = never.
        momentum_between_rounds: "reset", or "keep" (each client keeps its own buffers).
        flip, crop: random mirror image, random crop after zero padding by so many pixels.
    """

    rounds: Positive = 45
    local_epochs: Positive = 2
    batch_size: Positive = 64
    lr: Annotated[float, Field(gt=0)] = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    decay_every: Annotated[int, Field(ge=0)] = 30
    decay_factor: Annotated[float, Field(gt=0, le=1)] = 0.1
    momentum_between_rounds: Literal["reset", "keep"] = "reset"
    flip: bool = False
    crop: Annotated[int, Field(ge=0)] = 0

    def schedule(self) -> Schedule:
        """As the federated rooms take it."""
        values = self.model_dump()
        return Schedule(**{**values, "decay_every": self.decay_every or None})


class Augmentation(_Section):
    """One random parameter per image and step, drawn from a perturbation.

    Attributes:
        federated: during federated (or local) training; "none" or a perturbation.
        personalized: while `personalized` fine-tunes; "same", "none" or a perturbation.
    """

    federated: Annotated[Any, _perturbation(NONE)] = NONE
    personalized: Annotated[Any, _perturbation(NONE, SAME)] = SAME


class Certification(_Section):
    """The certificates.

    Attributes:
        perturbation: what is certified, e.g. { family = "rotation", sigma = "0.1pi" }.
        images: test images per client, a fixed random choice; absent = all.
        estimator, n0, n, alpha, radii, label_aware: as in `certifl.certify`.
        precision: arithmetic of the network: auto, float32, bfloat16.
    """

    perturbation: Annotated[dict[str, Any], _perturbation()]
    images: Positive | None = 500
    estimator: str = "sequential"
    n0: int = 100
    n: int = 100_000
    alpha: float = 1e-3
    radii: list[float] | None = None
    label_aware: bool = True
    precision: Literal["auto", "float32", "bfloat16"] = "auto"

    @model_validator(mode="after")
    def _settings_fit(self) -> Certification:
        settings = self.settings()
        if settings.estimator == "scan":
            scan_of(perturbation_from(self.perturbation), settings)
        return self

    def settings(self) -> Settings:
        """As the certification room takes it."""
        radii = None if self.radii is None else tuple(self.radii)
        return Settings(self.estimator, self.n0, self.n, self.alpha, radii, self.label_aware)


class Spec(_Section):
    """A whole study of one algorithm.

    Attributes:
        name: free text for people. seed: the one seed all streams are derived from.
        algorithm: { name = "fedavg", ... } with the algorithm's own parameters.
    """

    name: str = "study"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    data: Data
    clients: Clients = Clients()
    model: Model = Model()
    algorithm: dict[str, Any] = Field(default_factory=lambda: {"name": "fedavg"})
    training: Training = Training()
    augmentation: Augmentation = Augmentation()
    certification: Certification

    @field_validator("algorithm")
    @classmethod
    def _known_algorithm(cls, value: dict[str, Any]) -> dict[str, Any]:
        try:
            return describe_algorithm(algorithm_from(value))
        except SpecError as error:
            raise ValueError(str(error)) from error  # pydantic then says which key it is

    @model_validator(mode="after")
    def _combinations(self) -> Spec:
        personal = isinstance(self.build_algorithm(), Personalized)
        if self.augmentation.personalized != SAME and not personal:
            raise ValueError(
                f"augmentation.personalized has no effect with {self.algorithm['name']!r}: "
                'remove it, or choose name = "personalized"'
            )
        pull = 2.0 * (1.0 - self.algorithm.get("personalization", 1.0)) * self.training.lr
        if pull >= 2.0 * (1.0 + self.training.momentum):
            raise ValueError(
                f"training.lr = {self.training.lr} makes the pull of Eq. (5) overshoot for ever: "
                "lr (1 - personalization) must stay below 1 + momentum"
            )
        tests, clients = self.data.test_images, self.clients.count
        if tests is not None and tests < clients:
            raise ValueError(
                f"data.test_images = {tests} leaves some of clients.count = {clients} clients "
                "without a test image"
            )
        return self

    def build_algorithm(self) -> Algorithm:
        """The algorithm as an object."""
        return algorithm_from(self.algorithm)

    def perturbation(self) -> Perturbation:
        """The perturbation that is certified."""
        return perturbation_from(self.certification.perturbation)

    def augmentations(self) -> tuple[Perturbation | None, Perturbation | None]:
        """Perturbations that augment federated training and personalisation."""
        federated = _built(self.augmentation.federated)
        chosen = self.augmentation.personalized
        return federated, federated if chosen == SAME else _built(chosen)

    def to_toml(self) -> str:
        """The spec as TOML, every default spelled out."""
        return tomli_w.dumps(self.model_dump(exclude_none=True))

    def hash(self) -> str:
        """A short name of everything that changes a result."""
        return _hash(self.model_dump(exclude={"name"}))

    def training_hash(self, of_base: bool = False) -> str:
        """A name of the training alone: equal for specs that differ only in certification.

        Args:
            of_base: of the federated training that a `personalized` algorithm starts from.
        """
        values = self.model_dump(exclude={"name", "certification"})
        if of_base and "base" in values["algorithm"]:
            values["algorithm"] = values["algorithm"]["base"]
        if "base" not in values["algorithm"]:
            values["augmentation"]["personalized"] = SAME
        return _hash(values)


def _built(description: Any) -> Perturbation | None:
    return None if description == NONE else perturbation_from(description)


def _hash(values: Any) -> str:
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _one_of(value: str, known: Any, also: str = "") -> str:
    if value not in known:
        near = difflib.get_close_matches(value, list(known), 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        more = f", or {also}" if also else ""
        raise ValueError(f"must be one of {', '.join(known)}{more}; got {value!r}.{hint}")
    return value


def load(path: Path, settings: Sequence[str] = ()) -> Spec:
    """Read a spec file and apply `key=value` settings to it.

    Raises:
        SpecError: the file is missing, is no TOML, or a key, type, range or combination is wrong.
    """
    try:
        values = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise SpecError(
            f"There is no spec at {path}. Correct the path, or write one: README.md and the "
            "folder examples show how."
        ) from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SpecError(f"{path} cannot be read as a spec (TOML): {error}") from error
    return with_settings(values, settings)


def load_stored(path: Path) -> Spec:
    """Read the spec that a run wrote into its folder.

    Raises:
        StoreError: it is missing or no longer a spec, so the run is damaged.
    """
    try:
        return load(path)
    except SpecError as error:
        raise StoreError(f"{path} is damaged: {error}") from error


def with_settings(values: dict[str, Any], settings: Sequence[str] = ()) -> Spec:
    """A checked spec from plain values and `key=value` settings such as `training.lr=0.05`."""
    merged = copy.deepcopy(values)
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key.strip():
            raise SpecError(
                f"--set takes key=value, for instance training.lr=0.05; got {setting!r}."
            )
        _place(merged, key.strip().split("."), _value(text.strip()), key.strip())
    try:
        return Spec.model_validate(merged)
    except ValidationError as error:
        raise SpecError(_message(error)) from error
    except (InputError, SpecError) as error:
        raise SpecError(str(error)) from error


def _place(values: dict[str, Any], keys: list[str], value: Any, whole: str) -> None:
    for key in keys[:-1]:
        values = values.setdefault(key, {})
        if not isinstance(values, dict):
            raise SpecError(f"--set {whole}: {key!r} is a value, not a section.")
    values[keys[-1]] = value


def _value(text: str) -> Any:
    """A TOML value; what is no TOML is taken as text, so that quotes may be left out."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _message(error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    reason = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        reason = _unknown_key(first["loc"])
    elif first["type"] == "missing":
        reason = "this key is required"
    elif first["type"] in ("model_type", "dict_type"):
        reason = f"must be a table, {_example(key)}; got {first['input']!r}"
    elif first["type"] not in ("value_error",):
        reason = f"{reason}; got {first['input']!r}"
    return f"{key}: {reason}" if key else reason


def _example(key: str) -> str:
    """How a section or an inline table is written."""
    inline = {"algorithm": 'such as algorithm = { name = "fedavg" }'}
    return inline.get(key, f"written as a section [{key}] with its own keys")


def _unknown_key(location: tuple[str | int, ...]) -> str:
    section: type[BaseModel] = Spec
    for part in location[:-1]:
        inner = section.model_fields[str(part)].annotation
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            break
        section = inner
    near = difflib.get_close_matches(str(location[-1]), list(section.model_fields), 1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"no such key.{hint} Allowed here: {', '.join(section.model_fields)}"
