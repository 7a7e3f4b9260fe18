"""Specs from files, plain values and `--set key=value`; one clear message for what is wrong."""

from __future__ import annotations

import copy
import difflib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from certifl.errors import InputError, SpecError, StoreError
from certifl.path_checks import read_spec_file
from certifl.perturbations.units import from_records
from certifl.safe_io import parse_toml
from certifl.spec.sections import RECEIVED, STORED
from certifl.spec.study import Spec


def load(path: Path, settings: Sequence[str] = ()) -> Spec:
    """Read a spec file and apply `key=value` settings to it.

    Args:
        path: a TOML file.
        settings: such as `training.lr=0.05`; later ones win.

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
            return _checked(read_spec_file(path), STORED)
    except SpecError as error:
        raise StoreError(f"{path} is damaged: {error}") from error


def received(text: str) -> Spec:
    """A spec that a server sent to a client: it may name no file of this machine.

    Raises:
        SpecError: a key, type, range or combination is wrong. InputError: the text is not TOML.
    """
    return _checked(parse_toml(text), RECEIVED)


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
