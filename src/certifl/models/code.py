"""The code behind a network: two networks of equal weights can still be two functions."""

from __future__ import annotations

import hashlib
import inspect
import sys

from torch import nn

__all__ = ["code_fingerprint"]

_KNOWN_BY_VERSION = ("torch", "certifl")


def code_fingerprint(model: nn.Module) -> str:
    """SHA-256 over the source files of the classes of a network's layers, in the order of names.

    Layers of torch and of certifl are left out (records name their versions); "" where there is
    no other. What a file imports, and classes that have no file (made in a notebook), are not
    seen: the fingerprint shows that code changed, not that it did not.
    """
    names = {type(layer).__module__ for layer in model.modules()}
    own = sorted(name for name in names if name.partition(".")[0] not in _KNOWN_BY_VERSION)
    digest, found = hashlib.sha256(), False
    for name in own:
        source = _source(name)
        if source is not None:
            digest.update(f"{name}\x1f{source}\x1e".encode())
            found = True
    return digest.hexdigest() if found else ""


def _source(module: str) -> str | None:
    file = inspect.getsourcefile(sys.modules[module]) if _has_file(module) else None
    if file is None:
        return None
    try:
        with open(file, encoding="utf-8") as text:
            return text.read()
    except (OSError, UnicodeDecodeError):
        return None  # as if it had no file


def _has_file(module: str) -> bool:
    return getattr(sys.modules.get(module), "__file__", None) is not None
