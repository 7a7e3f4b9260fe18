"""What a client does not do."""

from __future__ import annotations

from certifl.errors import CertiflError

__all__ = ["Refusal"]


class Refusal(CertiflError):
    """What a client does not do; its text is told to the server and holds nothing private."""
