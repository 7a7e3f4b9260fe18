"""Names of a package that are imported when they are first used.

A spec is checked without torch, so packages on its way import nothing heavy themselves.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lazy_names(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """A package's `__getattr__`: the module of a name is imported when the name is first used.

    No name may be that of a submodule: importing the submodule would take its place.

    Args:
        package: `__name__` of the package.
        modules: module of each name.
    """

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return attribute(modules[name], name)

    return get


def attribute(module: str, name: str) -> Any:
    """An attribute of a module that is imported now."""
    return getattr(importlib.import_module(module), name)
