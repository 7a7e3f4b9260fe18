"""What a client does not do."""

from __future__ import annotations

from certifl.errors import CertiflError

_LONGEST = 500


class Rejected(CertiflError):
    """What a client does not do; its text is told to the server and holds nothing private."""


def plain(text: str) -> str:
    """Text from elsewhere on one line, without what could steer a terminal, and not too long."""
    shown = "".join(sign if sign.isprintable() else " " for sign in text)
    return shown if len(shown) <= _LONGEST else shown[:_LONGEST] + " ..."
