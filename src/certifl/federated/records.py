"""Frozen records of hyper-parameters: named in a table, refused where a value is not allowed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import MISSING, fields
from typing import Any

from certifl.errors import SpecError

__all__ = ["check_choice", "check_flag", "check_number", "named_record"]


def named_record(
    kind: str, description: Mapping[str, Any] | str, records: Mapping[str, type[Any]]
) -> tuple[type[Any], dict[str, Any]]:
    """The record that a table names, and the table's hyper-parameters, which are all its own.

    Args:
        kind: what is described, for messages.
        description: a table with a "name", or a bare name.
        records: the records by name.

    Raises:
        SpecError: an unknown name or hyper-parameter, or a missing one.
    """
    table: dict[str, Any] = (
        {"name": description} if isinstance(description, str) else {**description}
    )
    name = table.pop("name", None)
    if not isinstance(name, str) or name not in records:
        raise SpecError(f"{kind} name = {name!r} is unknown: choose one of {', '.join(records)}.")
    options = {option.name: option for option in fields(records[name])}
    for key in table:
        if key not in options:
            allowed = ", ".join(options) or "no hyper-parameters"
            raise SpecError(f"{name} has no hyper-parameter {key!r}: it has {allowed}.")
    for key, option in options.items():
        needed = option.default is MISSING and option.default_factory is MISSING
        if needed and key not in table:
            raise SpecError(f"{name} needs the hyper-parameter {key!r}.")
    return records[name], table


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
    """Refuse a hyper-parameter that is not a number in its range; `allowed` says it in words."""
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


def check_flag(key: str, value: object) -> None:
    """Refuse a hyper-parameter that is neither true nor false."""
    if not isinstance(value, bool):
        raise SpecError(f"{key} = {value!r} is not allowed: it must be true or false.")


def check_choice(key: str, value: object, allowed: Collection[str]) -> None:
    """Refuse a hyper-parameter that is none of the allowed words."""
    if value not in allowed:
        raise SpecError(
            f"{key} = {value!r} is not allowed: choose one of {', '.join(sorted(allowed))}."
        )
