"""A client's own settings: `client.toml`, beside its data, overrides the server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from certifl.data.preparation import Preparation, preparation_of
from certifl.errors import CertiflError, InputError, SpecError
from certifl.path_checks import check_client_settings, quotes_missing
from certifl.perturbations import describe as describe_perturbation
from certifl.perturbations import from_description as perturbation_from
from certifl.safe_io import SPEC_BYTES, parse_toml, read_text
from certifl.spec.sections import Section

SHARES = {
    "none": "the server learns only that the client has finished",
    "curve": "numbers of certified images at fixed radii, and the average certified radius",
    "rows": "every test image's certificate: class, radius, votes, label, position",
}
"""Disclosure levels of a client's certificates, lowest first."""


class Settings(Section):
    """A client's own settings.

    Attributes:
        client: its number in the study, from 0.
        data: its images: a folder with train and test parts, or a data set's name.
        dealt: `data` is a data set that every client has; the study's split allocates its images.
            For trying a federation out.
        data_dir: folder of named data sets.
        label_column: which column of its images is the label, where they are a table; a server
            cannot choose it.
        resize, crop, window: what is done to every image, as in a spec's `data`; a study that
            names one of them is refused unless it is the same here.
        classes: the names of all classes of the study, in order. They are sent to the server;
            names found in the images never are.
        share: highest disclosure level of its certificates, a name in `SHARES`.
        perturbation: certify this instead of the study's, where the study allows it.
        networks: its own networks, as module:function, that a study may name; no other module is
            loaded at a server's request.
        max_epsilon: privacy budget of its images, over all studies; a study in which it adds no
            noise is refused then. None = what each study planned.
        delta: at which epsilon is counted; None = each study's.
        device: "auto" or a torch device. threads: of torch; 0 = as torch chooses.
    """

    client: Annotated[int, Field(ge=0)]
    data: str = ""
    dealt: bool = False
    data_dir: str | None = None
    label_column: str | None = None
    resize: int | list[int] | None = None
    crop: Literal["center", "pad"] | None = None
    window: list[float] | None = None
    classes: list[str] | None = None
    share: Literal["none", "curve", "rows"] = "curve"
    perturbation: Any = None
    networks: list[str] = Field(default_factory=list)
    max_epsilon: Annotated[float, Field(gt=0)] | None = None
    delta: Annotated[float, Field(gt=0, lt=1)] | None = None
    device: str = "auto"
    threads: Annotated[int, Field(ge=0)] = 1

    @model_validator(mode="after")
    def _known_preparation(self) -> Settings:
        try:
            self.preparation()
        except InputError as error:
            raise ValueError(str(error)) from error
        return self

    def preparation(self) -> Preparation:
        """What is done to every image."""
        return preparation_of(self.resize, self.crop, self.window)

    @field_validator("perturbation")
    @classmethod
    def _known_perturbation(cls, value: Any) -> Any:
        if value is None:
            return None
        if not isinstance(value, dict):
            raise ValueError('must be a table such as { family = "rotation", sigma = "18deg" }')
        try:
            return describe_perturbation(perturbation_from(value))
        except CertiflError as error:
            raise ValueError(str(error)) from error


def check_share(name: str) -> None:
    """Refuse a name that is not in `SHARES`.

    Raises:
        InputError: it is not.
    """
    if name not in SHARES:
        raise InputError(f"share must be one of {', '.join(SHARES)}; got {name!r}.")


def lower_level(one: str, other: str) -> str:
    """The lower of two disclosure levels."""
    order = list(SHARES)
    return order[min(order.index(one), order.index(other))]


def load_settings(path: Path) -> Settings:
    """Read a client's settings.

    Raises:
        SpecError: the file is missing, is not TOML, or holds a wrong key or value.
    """
    check_client_settings(path)
    text = ""
    try:
        text = read_text(path, SPEC_BYTES)
        values = parse_toml(text)
    except (OSError, InputError) as error:
        raise SpecError(
            f"{path} cannot be read as TOML: {error}.{quotes_missing(text)}"
        ) from error
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        allowed = ", ".join(Settings.model_fields)
        reason = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            reason = f"no such key; allowed here: {allowed}"
        raise SpecError(f"{path}: {key}: {reason}.") from error
