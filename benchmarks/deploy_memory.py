"""Memory of the server of a federation, in models: ResNet-18 (45 MB), 8 clients, one round.

Answers lie on disk until they are asked for, as they lie with Flower's SuperLink, and are put
together from their pieces as Flower's grid does. Measured is how far the resident memory of the
process that runs the study rises above what it was before the round.

    python benchmarks/deploy_memory.py [--clients 2 8] [--algorithm fedadam] [--rounds 2]
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))

import torch  # noqa: E402
from flwr.app import ConfigRecord, Message, RecordDict  # noqa: E402
from flwr.proto.node_pb2 import NodeInfo  # noqa: E402
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects  # noqa: E402
from flwr.supercore.inflatable.inflatable_utils import (  # noqa: E402
    inflate_object_from_contents,
)

from certifl.deploy.flower import return_freed_memory  # noqa: E402
from certifl.deploy.messages import (  # noqa: E402
    Content,
    GridTransport,
    encode,
    to_records,
)
from certifl.deploy.server.coordinator import coordinate  # noqa: E402
from certifl.errors import WorkError  # noqa: E402
from certifl.models import build, fingerprint  # noqa: E402
from certifl.spec import with_settings  # noqa: E402
from deploy_factory import MemoryGrid, options  # noqa: E402
from tiny_study import VALUES  # noqa: E402


def network() -> torch.nn.Module:
    """The network that is trained."""
    return build("resnet18", 1, 10, 0, {}, (8, 8)).eval()


class DiskGrid(MemoryGrid):
    """Clients whose trained model lies on disk until their answer is asked for."""

    def __init__(self, clients: int, folder: Path) -> None:
        super().__init__({})
        self.clients, self.folder = clients, folder
        self.orders: dict[str, tuple[int, dict]] = {}
        record = encode({"model": network().state_dict()})["model"]
        self.model = record.object_id
        self.pieces = list(get_all_nested_objects(record))
        for name, value in get_all_nested_objects(record).items():
            (folder / name).write_bytes(value.deflate())
        self.initial = fingerprint(network())

    def get_nodes(self) -> Iterable[NodeInfo]:
        """All clients."""
        return [NodeInfo(node_id=100 + i, last_activated_at="x") for i in range(self.clients)]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Take orders; of each only the facts are kept."""
        names = []
        for message in messages:
            held = message.content.config_records["certifl"]
            name = f"order {len(self.orders)} {time.monotonic_ns()}"
            fields = json.loads(str(held["json"]))["facts"]
            self.orders[name] = (message.metadata.dst_node_id - 100, fields)
            names.append(name)
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """Answers to orders."""
        for name in message_ids:
            if name in self.orders:
                yield self._answer(*self.orders.pop(name))

    def _answer(self, client: int, fields: dict) -> Message:
        records = to_records(Content({"fault": {"kind": "raised", "reason": "enough"}}))
        if fields["order"] == "join":
            records = to_records(Content({"joined": self._joined(client), "client": client}))
        elif fields["order"] == "round":
            records = self._trained(client, fields)
        return Message(records, 1, "train")

    def _joined(self, client: int) -> dict:
        return {
            "in_channels": 1,
            "image_size": [8, 8],
            "class_names": [str(i) for i in range(10)],
            "train_images": 30,
            "client": client,
            "initial_model": self.initial,
        }

    def _trained(self, client: int, fields: dict) -> RecordDict:
        update = {"client": client, "weight": 30.0, "metrics": {"loss": 1.0}, "model": True}
        told = {
            "update": update,
            "client": client,
            "round": fields["round"],
            "started_from": fields["broadcast"],
        }
        pieces = {name: (self.folder / name).read_bytes() for name in self.pieces}
        records = RecordDict({"part:model": inflate_object_from_contents(self.model, pieces)})
        text = json.dumps({"format": 2, "parts": ["model"], "facts": told})
        records["certifl"] = ConfigRecord({"json": text})
        return records


def resident() -> int:
    """Bytes of memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def highest() -> Iterator[list[int]]:
    """The highest resident memory meanwhile."""
    seen, over = [resident()], threading.Event()

    def watch() -> None:
        while not over.wait(0.002):
            seen[0] = max(seen[0], resident())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def measure(clients: int, algorithm: str, rounds: int) -> None:
    """One study of so many rounds."""
    settings = [
        'model.name="resnet18"',
        f'algorithm={{name="{algorithm}"}}',
        f"clients.count={clients}",
        f"training.rounds={rounds}",
    ]
    study = with_settings(VALUES, settings)
    size = sum(v.numel() * v.element_size() for v in network().state_dict().values())
    with tempfile.TemporaryDirectory() as place:
        return_freed_memory()  # as `certifl deploy run` does
        grid = DiskGrid(clients, Path(place))
        gc.collect()
        before = resident()
        with highest() as seen, contextlib.suppress(WorkError):
            coordinate(study, GridTransport(grid), options(Path(place) / "run"))
    rose = seen[0] - before
    print(
        f"{algorithm}, {clients} clients: {rose / 1e6:.0f} MB = "
        f"{rose / size:.1f} models of {size / 1e6:.0f} MB"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--algorithm", default="fedavg")
    parser.add_argument("--rounds", type=int, default=1)
    asked = parser.parse_args()
    for count in asked.clients:
        measure(count, asked.algorithm, asked.rounds)
