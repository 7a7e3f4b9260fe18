"""What of a stored spec can tell two runs apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["LATER", "decisive_settings"]

# Keys that specs of older runs lack, which were computed as these values have it.
LATER: Mapping[str, Any] = {"training.steps": "plain", "training.precision": "float32"}


def decisive_settings(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a spec by "section.key".

    Where a key that came later says what every run was before, it is left out, so that runs of
    older versions stand beside newer ones.
    """
    return {key: value for key, value in _flat(spec) if key not in LATER or value != LATER[key]}


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value
