"""The thin app that Flower carries: two names in the installed package, and no dependencies.

Flower would install what an app depends on, at every run, beside what is there. This one depends
on nothing; certifl is installed where it runs.
"""

from __future__ import annotations

from certifl._version import __version__

__all__ = ["app_files"]

_PROJECT = f"""\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "certifl-app"
version = "{__version__.partition("+")[0]}"
description = "Runs the installed certifl; nothing is installed for it."
license = "Apache-2.0"
requires-python = ">=3.11"
dependencies = []

[tool.flwr.app]
publisher = "certifl"

[tool.flwr.app.components]
serverapp = "certifl_app.server:app"
clientapp = "certifl_app.client:app"

[tool.flwr.app.config]
spec = ""
out = ""
share = "curve"
min-clients = 0
"""


def app_files() -> dict[str, bytes]:
    """The app's files by path."""
    return {
        "pyproject.toml": _PROJECT.encode(),
        "certifl_app/__init__.py": b'"""Names what the installed package holds."""\n',
        "certifl_app/client.py": b"from certifl.deploy import client\n\napp = client.app\n",
        "certifl_app/server.py": b"from certifl.deploy import server\n\napp = server.app\n",
    }
