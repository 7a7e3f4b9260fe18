"""The server's app for Flower, for federations whose Flower is run by somebody else.

`flwr run APP --run-config 'spec="study.toml" out="runs/study"'`: the spec lies on the server's
machine, and the run folder is written there. `certifl deploy run` needs none of this.
"""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from certifl.deploy.server.coordinator import Options, conduct
from certifl.deploy.transport.flower_processes import give_memory_back
from certifl.deploy.transport.transport import GridTransport
from certifl.errors import InputError
from certifl.spec import load

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Conduct the study that the run's configuration names.

    Raises:
        InputError: it names none. CertiflError: the study fails.
    """
    asked = {key: str(value) for key, value in context.run_config.items()}
    if not asked.get("spec") or not asked.get("out"):
        raise InputError(
            "Name a study and a run folder on the server's machine: --run-config "
            '\'spec="/path/study.toml" out="/path/run"\'.'
        )
    give_memory_back()
    enough = asked.get("min-clients", "0")
    if not (enough.isascii() and enough.isdigit()):
        raise InputError(f"min-clients must be a whole number; got {enough!r}.")
    options = Options(
        Path(asked["out"]),
        share=asked.get("share", "curve"),
        command="flwr run",
        min_clients=int(enough) or None,
    )
    conduct(load(Path(asked["spec"])), GridTransport(grid), options)
