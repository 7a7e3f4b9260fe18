"""The names of the arithmetics a network can vote in; this module needs no torch."""

from __future__ import annotations

PRECISIONS = ("float32", "bfloat16", "int8")
# Precisions of 0.1.0, which stored votes may still name, and what to choose in their place.
REMOVED_PRECISIONS = {"float32-compiled": "float32", "bfloat16-compiled": "bfloat16"}


def removed_precision(name: str) -> str:
    """What to say to somebody who asks for a precision of `REMOVED_PRECISIONS`."""
    return (
        f'the precision "{name}" was removed in 0.2.0: choose "{REMOVED_PRECISIONS[name]}", the '
        "same arithmetic in another order, so votes differ only where rounding decides."
    )
