"""Characters of shown text: a number stays on one line with its sign or name."""

from __future__ import annotations

import re

_NBSP = "\N{NO-BREAK SPACE}"
_PER_CENT = re.compile(r"(?<=\d) (?=%)")
_NAMED = re.compile(r"\b(λ|lambda) = (?=[\d.])")


def unbroken(text: str) -> str:
    """The text with no line break within "95 %" or "λ = 0.5"; for people, never for data."""
    if " " not in text:
        return text
    return _NAMED.sub(rf"\1{_NBSP}={_NBSP}", _PER_CENT.sub(_NBSP, text))
