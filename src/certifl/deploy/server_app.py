"""The server's app for Flower, for deployments of Flower that others operate.

`flwr run APP --run-config 'spec="study.toml" out="runs/study"'`: the spec lies on the server's
machine, and the run folder is written there. `certifl deploy run` does not use it.
"""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from certifl.deploy.flower import return_freed_memory
from certifl.deploy.messages import GridTransport
from certifl.deploy.server.coordinator import Options, coordinate
from certifl.errors import InputError
from certifl.spec import load

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the study that the run's configuration names; InputError where it names none."""
    config = {key: str(value) for key, value in context.run_config.items()}
    if not config.get("spec") or not config.get("out"):
        raise InputError(
            "Name a study and a run folder on the server's machine: --run-config "
            '\'spec="/path/study.toml" out="/path/run"\'.'
        )
    return_freed_memory()
    min_clients = config.get("min-clients", "0")
    if not (min_clients.isascii() and min_clients.isdigit()):
        raise InputError(f"min-clients must be a whole number; got {min_clients!r}.")
    options = Options(
        Path(config["out"]),
        share=config.get("share", "curve"),
        command="flwr run",
        min_clients=int(min_clients) or None,
    )
    coordinate(load(Path(config["spec"])), GridTransport(grid), options)
