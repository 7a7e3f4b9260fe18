"""Seconds of a round over Flower, beside Flower's own with a client that does nothing.

A round of certifl (two clients that train a small network on 30 digits each, TLS and keys) beside
a round of stock Flower whose client returns what it got, insecure; on the same machine, in turns.

    python benchmarks/deploy.py [--repetitions 2]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))

ROUNDS = 6
PROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "nothing"
version = "1.0.0"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "nobody"
[tool.flwr.app.components]
serverapp = "nothing.server:app"
clientapp = "nothing.client:app"
[tool.flwr.app.config]
out = ""
nodes = 2
rounds = 6
"""
CLIENT = """\
from flwr.app import Message
from flwr.clientapp import ClientApp
app = ClientApp()
@app.train()
def train(message, context):
    return Message(message.content, reply_to=message)
"""
SERVER = """\
import json, time
import numpy as np
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.serverapp import ServerApp
app = ServerApp()
@app.main()
def main(grid, context):
    config = context.run_config
    while len(list(grid.get_node_ids())) < int(config["nodes"]):
        time.sleep(0.2)
    record = ArrayRecord([np.zeros(40_000, np.float32)])
    took = []
    for number in range(int(config["rounds"])):
        began = time.time()
        messages = [
            Message(RecordDict({"model": record}), node, "train", group_id=str(number))
            for node in grid.get_node_ids()
        ]
        replies = list(grid.send_and_receive(messages, timeout=300))
        assert len(replies) == int(config["nodes"]) and not any(m.has_error() for m in replies)
        took.append(time.time() - began)
    with open(config["out"], "w") as file:
        json.dump(took, file)
"""


def stock(place: Path) -> list[float]:
    """Seconds of each round of stock Flower with clients that do nothing."""
    from certifl.deploy.flower import environment
    from deploy_network import free_port, until

    app, port = place / "app", free_port()
    (app / "nothing").mkdir(parents=True)
    (app / "pyproject.toml").write_text(PROJECT)
    for name, text in {"__init__": "", "client": CLIENT, "server": SERVER}.items():
        (app / "nothing" / f"{name}.py").write_text(text)
    home = place / "home"
    home.mkdir()
    (home / "config.toml").write_text(
        '[superlink]\ndefault = "d"\n'
        f'[superlink.d]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, **environment(home), "PATH": path, "OMP_NUM_THREADS": "1"}
    out = place / "took.json"
    link = ["flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port)]
    node = ["flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}", "--port"]
    nodes = [[*node, str(free_port()), "--host", "127.0.0.1"] for _ in range(2)]
    with processes([link, *nodes], env, place / "stock.log"):
        time.sleep(10)
        subprocess.run(
            ["flwr", "run", str(app), "--run-config", f'out="{out}" rounds={ROUNDS} nodes=2'],
            env=env,
            check=True,
            capture_output=True,
        )
        until(out.is_file, 600)
        time.sleep(1)
    return json.loads(out.read_text())


@contextlib.contextmanager
def processes(commands: list[list[str]], env: dict[str, str], log: Path) -> Iterator[None]:
    with log.open("wb") as out:
        started = [
            subprocess.Popen(c, env=env, stdout=out, stderr=out, start_new_session=True)
            for c in commands
        ]
        try:
            yield
        finally:
            for one in reversed(started):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(one.pid, signal.SIGTERM)
            for one in started:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    one.wait(10)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(one.pid, signal.SIGKILL)


def ours(place: Path) -> list[float]:
    """Seconds of each round of certifl."""
    from certifl.runs.checkpoints import Checkpoints
    from deploy_network import Federation
    from tiny_study import write_spec

    federation = Federation(place, 2)
    with federation.ended():
        federation.server().prints("2 clients may connect")
        for client in (federation.client(0), federation.client(1)):
            client.prints("has accepted this client", 180)
        settings = (f"training.rounds={ROUNDS}", "certification.images=1")
        spec, out = write_spec(place, *settings), place / "run"
        federation.study(spec, out).result(600).fine("Report:")
    return [entry["seconds"] for entry in Checkpoints(out / "checkpoints/training").history()]


def rounds(repetitions: int) -> None:
    """Both in turns; the first round of each start is left out."""
    took: dict[str, list[float]] = {"stock Flower, does nothing": [], "certifl, trains": []}
    for _ in range(repetitions):
        for name, measure in zip(took, (stock, ours), strict=True):
            with tempfile.TemporaryDirectory() as place:
                took[name] += measure(Path(place))[1:]
    for name, seconds in took.items():
        middle, worst = statistics.median(seconds), max(seconds)
        print(f"{name:28} {middle:6.2f} s a round (median of {len(seconds)}, worst {worst:.2f})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=2)
    rounds(parser.parse_args().repetitions)
