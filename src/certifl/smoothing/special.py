"""scipy.special, which takes a while to import: loaded when a bound is first computed."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    from scipy import special

    return getattr(special, name)
