"""The sections of a spec, each checked on its own; nothing here imports torch or scipy."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from certifl.certification.settings import (
    PRECISIONS,
    REMOVED_PRECISIONS,
    Settings,
    removed_precision,
)
from certifl.data import SPLITS
from certifl.data.preparation import Preparation, preparation_of
from certifl.errors import InputError
from certifl.federated.aggregation import RULES, make_rule
from certifl.federated.schedule import Schedule, participants
from certifl.models import MODELS
from certifl.path_checks import WEIGHTS, check_file
from certifl.perturbations import describe, from_description, from_record
from certifl.perturbations.units import parse_amount, parse_amounts
from certifl.registry import choices
from certifl.safe_io import DATA_BYTES, open_regular

if TYPE_CHECKING:
    from certifl.data import Column, Splitter
    from certifl.federated.aggregation.rules import Rule
    from certifl.federated.privacy import Budget

R = TypeVar("R")

NONE, SAME, OWN = "none", "same", "own"
# Contexts of validation: a run's own record is read (what an older version could compute stays
# readable, though it can no longer be asked for); or a server's spec, which may name no file here.
STORED, RECEIVED = {"stored": True}, {"received": True}


class Section(BaseModel):
    """A table of a spec: no unknown keys, no conversions, unchangeable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def once(method: Callable[[Any], R]) -> Callable[[Any], R]:
    """A method without arguments, called once per object: its result is cached."""
    key = f"_{method.__name__}"

    @functools.wraps(method)
    def cached(self: Any) -> R:
        values = self.__dict__  # pydantic compares and writes fields alone
        if key not in values:
            values[key] = method(self)
        return values[key]

    return cached


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
        return describe(from_description(value))

    return BeforeValidator(check)


def _whole(value: Any) -> Any:
    """1e4 is a float in TOML, and a whole number to the person who writes it."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]
WholeFrom0 = Annotated[int, BeforeValidator(_whole), Field(ge=0)]
PositiveWhole = Annotated[int, BeforeValidator(_whole), Field(ge=1)]
Above0 = Annotated[float, Field(gt=0)]


@functools.lru_cache
def _checksum(path: Path, _size: int, _changed: int) -> str:  # another file has others
    with open_regular(path, DATA_BYTES) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # pyright: ignore[reportArgumentType]


def _in_unit(value: Any, info: ValidationInfo) -> Any:
    """Radii or a reach as floats in the unit of what is certified; "5deg" is an amount too."""
    name, described = str(info.field_name), info.data.get("perturbation")
    if value is None or not isinstance(described, dict):
        return value  # the perturbation is refused, or there is nothing to certify
    unit = from_record(described).unit
    return parse_amount(value, unit, name) if name == "reach" else [*parse_amounts(value, unit)]


class Data(Section):
    """Which images.

    Attributes:
        name: digits, mnist, cifar10, fashion_mnist, a hub name, or a folder.
        train_images, test_images: use a fixed random part of so many; absent = all.
        label_column: which column is the label, where a data set has several.
        test_split: test, validation, valid or val: the split whose images are certified, for a
            data set whose test images have no public labels; absent = the first of these there is.
        resize: 64, or [height, width]: pixels that every image is resampled to.
        crop: center (cut out the largest square about the middle) or pad (black up to a square),
            before `resize`; where that is not a square, its aspect ratio.
        window: [low, high]: stored intensities of gray images of more than 8 bits (PNG, TIFF) or
            DICOM that become black and white; first of all.
    """

    name: Annotated[str, Field(min_length=1)]
    train_images: PositiveWhole | None = None
    test_images: PositiveWhole | None = None
    label_column: str | None = None
    test_split: Literal["test", "validation", "valid", "val"] | None = None
    resize: PositiveWhole | list[PositiveWhole] | None = None
    crop: Literal["center", "pad"] | None = None
    window: list[float] | None = None

    @model_validator(mode="after")
    def _known_preparation(self) -> Data:
        self.preparation()
        return self

    def preparation(self) -> Preparation:
        """What is done to every image."""
        return preparation_of(self.resize, self.crop, self.window)


class Clients(Section):
    """How many clients take part, and how the images are split over them.

    Attributes:
        count: number of clients.
        split: a name in `data.SPLITS`; training and test images of a client follow it alike.
        options: the splitter's own options, for instance { alpha = 0.3 } for dirichlet, or
            { column = "hospital" } for the split by a column of the data set.
        unseen: so many of them, the last ones, take part in no round. Then they are given the
            global model, which `personalized` fine-tunes for them as well, and certify it; the
            report shows them apart.
        participation: share of the others that takes part in a round, chosen anew each time.
        min_clients: how many participants of a round must not fail for training to go on; absent
            = half of them, rounded up.
    """

    count: PositiveWhole = 10
    split: str = "uniform"
    options: dict[str, Any] = Field(default_factory=dict)
    unseen: WholeFrom0 = 0
    participation: Annotated[float, Field(gt=0, le=1)] = 1.0
    min_clients: PositiveWhole | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Clients:
        SPLITS.check_named(self.split, self.options)
        if self.unseen >= self.count:
            raise ValueError(
                f"unseen = {self.unseen} of count = {self.count} clients leaves none to train: "
                "lower it, or raise count"
            )
        if self.min_clients is not None and self.min_clients > self.participants:
            raise ValueError(
                f"min_clients = {self.min_clients} is more than the {self.participants} clients "
                "that take part in a round: lower it, or raise participation or count"
            )
        return self

    @property
    def participants(self) -> int:
        """How many clients take part in a round."""
        return participants(self.participation, self.training_count)

    @property
    def training_count(self) -> int:
        """How many clients take part in training: those numbered from 0 up to here."""
        return self.count - self.unseen

    @once
    def splitter(self) -> Splitter | Column:
        """The partition rule."""
        return SPLITS[self.split](**self.options)


class Model(Section):
    """The network.

    Attributes:
        name: resnet18, small_resnet, small_cnn, or your own as `module:function`.
        options: further arguments of the function, for instance { norm = "group" }.
        weights: a file of weights that training begins with, .safetensors or .pt; absent = drawn
            from the seed. weights_sha256: its checksum, filled in when the spec is read, and part
            of the study's hash instead of the path.
    """

    name: str = "resnet18"
    options: dict[str, Any] = Field(default_factory=dict)
    weights: Annotated[str, Field(min_length=1)] | None = None
    weights_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None

    @model_validator(mode="before")
    @classmethod
    def _with_checksum(cls, values: Any, info: ValidationInfo) -> Any:
        """The checksum of the weights, which is the file's unless a run's own record is read."""
        if not isinstance(values, dict) or info.context == STORED:
            return values
        path, recorded = values.get("weights"), values.get("weights_sha256")
        if path is None or not isinstance(path, str):
            if recorded is not None:
                raise ValueError("weights_sha256 needs weights, the file that it is of")
            return values
        if info.context == RECEIVED:
            raise ValueError("weights name a file, which a server may not do: remove the key")
        try:
            check_file(file := Path(path), WEIGHTS)
            stat = file.stat()
            found = _checksum(file.resolve(), stat.st_size, stat.st_mtime_ns)
        except (InputError, OSError) as error:
            raise ValueError(f"weights: {error}") from error
        if recorded not in (None, found):
            raise ValueError(
                f"weights: {path} is not the file that weights_sha256 is of. Restore it, or "
                "remove weights_sha256 to begin with these weights"
            )
        return {**values, "weights_sha256": found}

    @model_validator(mode="after")
    def _known_model(self) -> Model:
        if ":" not in self.name:
            MODELS.check_named(self.name, self.options)
        return self


class Training(Section):
    """The schedule, the same for every algorithm; the defaults are the paper's.

    Attributes:
        rounds: communication rounds; 0 deploys `model.weights` as they are.
        local_epochs: passes of a client over its data per round.
        batch_size, lr, momentum, weight_decay: stochastic gradient descent.
        decay_every: local epochs, counted over the whole training, after which lr is multiplied by
            `decay_factor`; 0 = never.
        momentum_between_rounds: "reset", or "keep" (each client keeps its own buffers).
        flip, crop: random mirror image, random crop after zero padding by so many pixels.
        precision: "float32", or "bfloat16" (the network's arithmetic; weights stay in float32).
        memory_format: "contiguous" or "channels-last" layout of images and weights, which changes
            speed and rounding; "auto" is channels-last in bfloat16, contiguous in float32.
    """

    rounds: WholeFrom0 = 45
    local_epochs: PositiveWhole = 2
    batch_size: PositiveWhole = 64
    lr: Above0 = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    decay_every: Annotated[int, Field(ge=0)] = 30
    decay_factor: Annotated[float, Field(gt=0, le=1)] = 0.1
    momentum_between_rounds: Literal["reset", "keep"] = "reset"
    flip: bool = False
    crop: Annotated[int, Field(ge=0)] = 0
    precision: Literal["float32", "bfloat16"] = "float32"
    memory_format: Literal["auto", "contiguous", "channels-last"] = "auto"

    @model_validator(mode="before")
    @classmethod
    def _without_steps(cls, values: Any) -> Any:
        """Specs of 0.1.0 name `steps`, of which only "plain" is left."""
        if not isinstance(values, dict) or "steps" not in values:
            return values
        if values["steps"] != "plain":
            raise ValueError('steps = "captured" was removed in 0.2.0: remove the key')
        return {key: value for key, value in values.items() if key != "steps"}

    def schedule(self) -> Schedule:
        """As `certifl.federated` expects it."""
        values = self.model_dump(exclude={"precision", "memory_format"})
        return Schedule(**{**values, "decay_every": self.decay_every or None})


class Aggregation(Section):
    """What the server does against malicious updates, whatever the algorithm.

    Attributes:
        rule: a name in `federated.aggregation.RULES`: mean (nothing), median, trimmed-mean, krum.
        clip: largest Euclidean length of an update, before the rule; absent = any.
        trim: of trimmed-mean: share of the values dropped at each end.
        malicious, keep: of krum: share that may be malicious; how many updates are averaged.
    """

    rule: str = "mean"
    clip: Above0 | None = None
    trim: float | None = None
    malicious: float | None = None
    keep: PositiveWhole | None = None

    @model_validator(mode="after")
    def _rule_exists(self) -> Aggregation:
        RULES.check_named(self.rule, self._options())
        return self

    def _options(self) -> dict[str, Any]:
        return self.model_dump(exclude={"rule", "clip"}, exclude_none=True)

    def check(self, participants: int) -> None:
        """Raise a SpecError if so many participants cannot give what the rule promises."""
        RULES.rows[self.rule].check(self._options(), participants)

    def build(self) -> Rule | None:
        """The rule as an object; None for the plain mean."""
        return make_rule(self.rule, self._options(), self.clip)


class Augmentation(Section):
    """One random parameter per image and step, drawn from a perturbation.

    Attributes:
        federated: during federated (or local) training; "none", "own" (every client trains with
            the perturbation it certifies) or a perturbation.
        personalized: while `personalized` fine-tunes; "same", "none", "own" or a perturbation.
    """

    federated: Annotated[Any, _perturbation(NONE, OWN)] = NONE
    personalized: Annotated[Any, _perturbation(NONE, SAME, OWN)] = SAME


class OwnPerturbation(Section):
    """What some clients certify instead of the common perturbation.

    Attributes:
        clients: their numbers.
        perturbation: as in `certification`, or "none": these clients have nothing to certify, and
            the plain accuracy of their models is recorded instead.
        radii, reach: as in `certification`, in the unit of this perturbation.
    """

    clients: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    perturbation: Annotated[Any, _perturbation(NONE)]
    radii: list[float] | None = None
    reach: float | None = None

    _amounts = field_validator("radii", "reach", mode="before")(_in_unit)


class Certification(Section):
    """The certificates.

    Attributes:
        perturbation: what is certified, e.g. { family = "rotation", sigma = "0.1pi" }.
        own: what some clients certify instead: tables { clients = [1], perturbation = ... }, where
            the perturbation may be "none", with radii and reach of their own unit.
        images: test images per client, a fixed random choice; absent = all.
        estimator, n0, n, alpha, label_aware, keep: as in `certifl.certify`.
        radii, reach: likewise, in the perturbation's unit, which is radians for rotation, where
            "5deg" is understood as well.
        precision: arithmetic of the network: "float32", "bfloat16", "int8" (on a CPU; a client's
            training images fix the ranges of its 8 bits, so not with [privacy]), or "auto":
            float32 or bfloat16, whichever is measured to be faster, and then kept in the run.
    """

    perturbation: Annotated[dict[str, Any], _perturbation()]
    images: PositiveWhole | None = 500
    estimator: str = "sequential"
    n0: Whole = 100
    n: Whole = 100_000
    alpha: float = 1e-3
    radii: list[float] | None = None
    label_aware: bool = True
    reach: float | None = None
    keep: str = "certificates"
    precision: str = "auto"
    own: list[OwnPerturbation] | None = None

    _amounts = field_validator("radii", "reach", mode="before")(_in_unit)

    @field_validator("precision")
    @classmethod
    def _known_precision(cls, value: str, info: ValidationInfo) -> str:
        if value in REMOVED_PRECISIONS:
            if info.context == STORED:
                return value
            raise ValueError(removed_precision(value))
        if value != "auto" and value not in PRECISIONS:
            raise ValueError(f"{value!r} is unknown: {choices(value, PRECISIONS, 'auto')}")
        return value

    @model_validator(mode="after")
    def _settings_fit(self) -> Certification:
        named = sorted(client for own in self.own or () for client in own.clients)
        if twice := [client for client, next_ in pairwise(named) if client == next_]:
            raise ValueError(f"own names client {twice[0]} twice; a client has one perturbation")
        for client in self.differing():
            self.settings(client)
        return self

    def differing(self) -> list[int | None]:
        """One client of each group that certifies alike; None for all that have nothing own."""
        return [None, *(own.clients[0] for own in self.own or ())]

    def of(self, client: int | None = None) -> Any:
        """The description of what a client certifies, or "none"; by default the common one."""
        own = self._own(client)
        return self.perturbation if own is None else own.perturbation

    def _own(self, client: int | None) -> OwnPerturbation | None:
        return self._by_client().get(client)

    @once
    def _by_client(self) -> dict[int | None, OwnPerturbation]:
        return {client: own for own in self.own or () for client in own.clients}

    def _amount(self, name: str, client: int | None) -> Any:
        """An amount in the unit of what a client certifies: radii or reach."""
        own, common = self._own(client), getattr(self, name)
        if own is None or own.perturbation == NONE:
            return common
        if (specific := getattr(own, name)) is None and common is not None:
            units = [from_record(d).unit for d in (self.perturbation, own.perturbation)]
            if units[0] != units[1]:
                raise ValueError(
                    f"{name} is in {units[0]}, but own certifies {own.perturbation['family']} in "
                    f"{units[1]}: give that entry of own its {name}, or leave {name} out"
                )
        return common if specific is None else specific

    def settings(self, client: int | None = None) -> Settings:
        """As `certifl.certification` expects it for a client; by default the common settings."""
        radii = self._amount("radii", client)
        return Settings(
            estimator=self.estimator,
            n0=self.n0,
            n=self.n,
            alpha=self.alpha,
            radii=None if radii is None else tuple(radii),
            label_aware=self.label_aware,
            reach=self._amount("reach", client),
            keep=self.keep,
        )


class Privacy(Section):
    """Differential privacy of training; docs/privacy.md says what it covers and what not.

    Attributes:
        kind: "none", "example" (one image of a client replaced by nothing; every client adds noise
            to its own steps) or "client" (one client more or less; the server adds noise to the
            average, and `clients.participation` is the probability of each client to take part in
            a round).
        noise_multiplier: noise in units of `max_norm`, at least 0.001; or
        target_epsilon: what the schedule's rounds may spend, from which the multiplier is found;
            fine-tuning spends more.
        max_norm: Euclidean length to which every image's gradient, or the change of every client's
            model, is clipped.
        delta: probability of the guarantee to fail; well below 1 / number of images or clients.
        noise_key: "seed" (who knows the spec can take the noise away: for studies) or "secret" (a
            key drawn by the operating system, kept in the run folder as privacy.key).
    """

    kind: Literal["none", "example", "client"] = "none"
    noise_multiplier: Annotated[float, Field(ge=1e-3)] | None = None
    target_epsilon: Above0 | None = None
    max_norm: Above0 = 1.0
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    noise_key: Literal["seed", "secret"] = "seed"

    @model_validator(mode="after")
    def _one_amount(self) -> Privacy:
        given = [name for name in ("noise_multiplier", "target_epsilon") if getattr(self, name)]
        if self.kind == "none":
            for key in sorted(self.model_fields_set - {"kind"})[:1]:
                if getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(
                        f'{key} has no effect with kind = "none": set kind = "example" or '
                        'kind = "client", or remove it'
                    )
        elif len(given) != 1:
            raise ValueError(
                f'kind = "{self.kind}" needs either noise_multiplier or target_epsilon'
                + (", not both" if given else "")
            )
        return self

    def budget(self) -> Budget:
        """As `certifl.federated` expects it."""
        from certifl.federated.privacy import Budget

        return Budget(self.max_norm, self.delta, self.noise_multiplier, self.target_epsilon)
