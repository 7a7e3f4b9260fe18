"""Registries of named components: a spec is checked against them without loading any component.

A row says in which module a class is, which parameters it takes and how people call it. The class
is imported on first use. `Parameters` are pydantic models; what they refuse is reported in one
form, whether it comes from a spec or from a class that was constructed in Python.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, Generic, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic.fields import FieldInfo

from certifl.errors import SpecError


class Parameters(BaseModel):
    """Parameters of a component; the description of a field completes "it must be ..."."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


Number = Annotated[float, Field(description="a number")]
NonNegative = Annotated[float, Field(ge=0, description="a number of at least 0")]
Positive = Annotated[float, Field(gt=0, description="a number above 0")]
PositiveInt = Annotated[int, Field(ge=1, description="a whole number of at least 1")]
Share = Annotated[float, Field(ge=0, le=1, description="a number from 0 (global) to 1 (local)")]
Fraction = Annotated[float, Field(ge=0, lt=1, description="a number from 0 to below 1")]
Flag = Annotated[bool, Field(description="true or false")]
Weighting = Literal["uniform", "size"]


def parameters(**fields: Any) -> type[Parameters]:
    """A model of parameters: `mu=NonNegative` is required, `lr=(Positive, 0.1)` has a default."""
    typed: dict[str, Any] = {k: v if isinstance(v, tuple) else (v, ...) for k, v in fields.items()}
    return create_model("Parameters", __base__=Parameters, **typed)


@dataclass(frozen=True)
class Row:
    """One component of a registry.

    Attributes:
        home: "package.module:Class"; imported when the component is first built.
        parameters: what it takes.
        label: its name for people.
        wraps: parameter that is another component of the same registry; None = no such parameter.
    """

    home: str
    parameters: type[Parameters]
    label: str
    wraps: str | None = None

    @property
    def module(self) -> str:
        """Where the class is."""
        return self.home.partition(":")[0]

    @property
    def attribute(self) -> str:
        """Name of the class."""
        return self.home.partition(":")[2]


R = TypeVar("R", bound=Row)


class Registry(Mapping[str, type[Any]], Generic[R]):
    """Components by name; indexing imports the class.

    Args:
        kind: what is registered, for messages, e.g. "algorithm".
        rows: by name, in the order in which people see them.
        key: under which a description, and a component itself, has the name of its row.
        also: what may be named beside the rows, for messages.
    """

    def __init__(
        self, kind: str, rows: Mapping[str, R], key: str = "name", also: str = ""
    ) -> None:
        self.kind = kind
        self.rows = dict(rows)
        self.key = key
        self.also = also

    def __getitem__(self, name: str) -> type[Any]:
        row = self.rows[name]
        return getattr(importlib.import_module(row.module), row.attribute)

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __contains__(self, name: object) -> bool:
        return name in self.rows

    def check(self, description: Mapping[str, Any] | str) -> dict[str, Any]:
        """The description in full: its name and every parameter, defaults included.

        Parameters that are None are left out, so that the table can be written as TOML.

        Args:
            description: a table with the name under `key`, or a bare name.

        Raises:
            SpecError: an unknown name or parameter, a missing one, or a value that is not allowed;
                the message names the key and what is allowed.
        """
        table: dict[str, Any] = (
            {self.key: description} if isinstance(description, str) else {**description}
        )
        name = table.pop(self.key, None)
        return {self.key: name, **self.check_named(name, table)}

    def check_named(self, name: object, options: Mapping[str, Any]) -> dict[str, Any]:
        """Every parameter of the component of that name; see `check`."""
        if not isinstance(name, str) or name not in self.rows:
            raise SpecError(
                f"{self.kind} {self.key} = {name!r} is unknown: {choices(name, self, self.also)}"
            )
        row, table = self.rows[name], {**options}
        if row.wraps is not None and row.wraps in table:
            table[row.wraps] = self._wrapped(row.wraps, table[row.wraps])
        values = check_parameters(name, row.parameters, table)
        return {key: value for key, value in values.items() if value is not None}

    def build(self, description: Mapping[str, Any] | str) -> Any:
        """The component described; see `check` for what is refused."""
        table = self.check(description)
        name = table.pop(self.key)
        wraps = self.rows[name].wraps
        if wraps in table:
            table[wraps] = self.build(table[wraps])
        return self[name](**table)

    def describe(self, component: Any) -> dict[str, Any]:
        """A component as a plain table; `build` gives the equal component back."""
        table: dict[str, Any] = {self.key: getattr(component, self.key)}
        for option, value in _options(component).items():
            if value is not None:
                table[option] = self.describe(value) if is_dataclass(value) else value
        return table

    def check_component(self, component: Any) -> None:
        """Refuse parameters of a component that was constructed in Python.

        A component of a class that has no row here is the caller's own and is not checked.
        """
        name = getattr(component, self.key)
        row = self.rows.get(name)
        if row is None:
            return
        table = _options(component)
        wrapped = table.get(row.wraps) if row.wraps else None
        if wrapped is not None:
            self._refuse_second(str(row.wraps), wrapped.name)
        check_parameters(name, row.parameters, table)

    def _wrapped(self, key: str, description: object) -> dict[str, Any]:
        if not isinstance(description, Mapping | str):
            raise SpecError(
                f"{key} = {description!r} is not allowed: it must be the name of another "
                f"{self.kind}, or a table with its name and parameters."
            )
        table = self.check(description)
        self._refuse_second(key, table["name"])
        return table

    def _refuse_second(self, key: str, name: str) -> None:
        if name in self.rows and self.rows[name].wraps is not None:
            raise SpecError(f"{key} = {name} is not allowed: {name} cannot wrap itself.")


def choices(name: object, known: Collection[str], also: str = "") -> str:
    """What to choose in the place of a name that is unknown, and what was perhaps meant."""
    near = difflib.get_close_matches(name, known, 1) if isinstance(name, str) else []
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"choose one of {', '.join(known)}{f', or {also}' if also else ''}.{hint}"


def _options(component: Any) -> dict[str, Any]:
    """What a component was constructed with; its constants are not options."""
    return {
        option.name: getattr(component, option.name) for option in fields(component) if option.init
    }


def check_parameters(
    name: str, model: type[Parameters], values: Mapping[str, Any]
) -> dict[str, Any]:
    """All parameters as given, with defaults; SpecError for what is not allowed."""
    try:
        checked = model.model_validate(values)
    except ValidationError as error:
        raise SpecError(_refusal(name, model, error)) from error
    return {key: values.get(key, getattr(checked, key)) for key in model.model_fields}


def _refusal(name: str, model: type[Parameters], error: ValidationError) -> str:
    faults = error.errors()
    first = next((fault for fault in faults if fault["type"] == "extra_forbidden"), faults[0])
    key = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        allowed = ", ".join(model.model_fields) or "no parameters"
        return f"{name} has no parameter {key!r}: it has {allowed}."
    field = model.model_fields[key]
    if first["type"] == "missing":
        return f"{name} needs the parameter {key!r}" + (
            f", {field.description}." if field.description else "."
        )
    return f"{key} = {first['input']!r} is not allowed: {_allowed(field)}."


def _allowed(field: FieldInfo) -> str:
    if get_origin(field.annotation) is Literal:
        return f"choose one of {', '.join(sorted(get_args(field.annotation)))}"
    return f"it must be {field.description}"


def check_number(
    key: str,
    value: object,
    allowed: str,
    *,
    low: float,
    high: float = float("inf"),
    open_low: bool = False,
    open_high: bool = False,
    whole: bool = False,
) -> None:
    """Refuse a parameter that is not a number in its range; `allowed` says it in words."""
    kinds = (int,) if whole else (int, float)
    inside = (
        isinstance(value, kinds)
        and not isinstance(value, bool)
        and low <= value <= high
        and abs(value) != float("inf")
        and not (open_low and value == low)
        and not (open_high and value == high)
    )
    if not inside:
        raise SpecError(f"{key} = {value!r} is not allowed: it must be {allowed}.")


def check_choice(key: str, value: object, allowed: Collection[str]) -> None:
    """Refuse a parameter that is none of the allowed words."""
    if value not in allowed:
        raise SpecError(
            f"{key} = {value!r} is not allowed: choose one of {', '.join(sorted(allowed))}."
        )
