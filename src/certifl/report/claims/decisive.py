"""What of a stored spec can tell two runs apart: all that is not a default."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from certifl.spec import Spec

__all__ = ["decisive_settings"]


def decisive_settings(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a spec by "section.key", without those that have their default.

    A version that adds a key writes it into every spec; a run of before, which lacks it, was
    computed as the key's default has it, and is still the same.
    """
    defaults = dict(_defaults(Spec))
    return {
        key: value for key, value in _flat(spec) if key not in defaults or value != defaults[key]
    }


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _defaults(section: type[BaseModel], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from _defaults(inner, f"{before}{key}.")
        elif not field.is_required() and field.default_factory is None:
            yield f"{before}{key}", field.default
