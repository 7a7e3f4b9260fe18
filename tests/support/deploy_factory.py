"""Federations without a network: Flower's messages carried from hand to hand."""

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="Flower is not installed: pip install certifl[flower]")

from flwr.app import Message, RecordDict
from flwr.app.error import Error
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity

from certifl.deploy.client.client import Client
from certifl.deploy.client.settings import Settings
from certifl.deploy.client.state import NEVER
from certifl.deploy.client_app import respond
from certifl.deploy.messages import Content, GridTransport, fingerprint_of
from certifl.deploy.server.coordinator import Options, coordinate
from certifl.deploy.server.remote_runner import Timeouts
from certifl.models import build
from certifl.runs.folder import RunFolder
from certifl.spec import Spec

ID = "0123456789abcdef"
NO_WAIT = Timeouts(answer=60.0, start=0.0, absent=0.0)

Change = Callable[[int, Message, Message], Message | None]
"""From node, order and reply to the reply that arrives; None = none does."""


def carried(message: Message) -> Message:
    """A message taken apart into bytes and put together again, as Flower does on the way."""
    held = get_all_nested_objects(message)
    contents = {name: value.deflate() for name, value in held.items()}
    made = inflate_object_from_contents(message.object_id, contents)
    assert isinstance(made, Message)
    made.metadata.__dict__["_message_id"] = message.object_id
    return made


class MemoryGrid(Grid):
    """Nodes that answer at once, in this process; `change` plays tricks on their replies."""

    def __init__(self, clients: dict[int, Client], change: Change | None = None) -> None:
        self.clients, self.change = clients, change
        self.since = dict.fromkeys(clients, "first start")
        self.sent: list[tuple[int, Message]] = []
        self.replies: dict[str, Message] = {}
        self.pulled: list[str] = []
        self._count = itertools.count()
        TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [
            NodeInfo(node_id=node, last_activated_at=self.since[node], public_key=b"key %d" % node)
            for node in self.clients
        ]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return [self._push(message) for message in messages]

    def _push(self, message: Message) -> str:
        name = f"{next(self._count)}"
        message.metadata.__dict__["_message_id"] = message.object_id
        request = carried(message)
        node = request.metadata.dst_node_id
        self.sent.append((node, request))
        client = self.clients.get(node)
        if client is None:
            self.replies[name] = Message(Error(5, "Node Unavailable"), reply_to=request)
            return name
        reply: Message | None = carried(respond(request, client))
        if self.change is not None:
            reply = self.change(node, request, reply)
        if reply is not None:
            self.replies[name] = reply
        return name

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        found = [name for name in message_ids if name in self.replies]
        self.pulled += found
        return [self.replies.pop(name) for name in found]

    def send_and_receive(self, messages, *, timeout=None):
        raise NotImplementedError

    def create_message(self, content: RecordDict, message_type, dst_node_id, group_id, ttl=None):
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self.clients)

    def set_run(self, run) -> None:
        raise NotImplementedError

    @property
    def run(self):
        raise NotImplementedError


def clients_of(folder: Path, count: int = 2, **settings) -> dict[int, Client]:
    """Clients that each take their share of digits; node 100 + i is client i."""
    return {
        100 + client: Client(
            Settings(client=client, data="digits", dealt=True, **settings),
            folder / f"client-{client}",
        )
        for client in range(count)
    }


def options(out: Path, **changes) -> Options:
    return Options(out=out, **{"timeouts": NO_WAIT, **changes})


def coordinated(study: Spec, to: dict[int, Client] | Grid, asked: Path | Options) -> RunFolder:
    grid = to if isinstance(to, Grid) else MemoryGrid(to)
    asked = asked if isinstance(asked, Options) else options(asked)
    return coordinate(study, GridTransport(grid), asked)


def dealt(folder: Path, **settings) -> Client:
    return Client(Settings(client=0, data="digits", dealt=True, **settings), folder)


def model(change: float = 0.0) -> dict:
    """The initial network of the tiny study, with all its numbers changed."""
    state = build("small_cnn", 1, 10, 0, {}, (8, 8)).state_dict()
    return {"model": {name: value + change for name, value in state.items()}}


def study_of(asked: Spec, id: str = ID, **changes) -> dict:
    named = {"id": id, "spec": asked.to_toml(), "hash": asked.hash(), "own_perturbation": False}
    return {**named, **changes}


def ask(to: Client, /, asked: Spec, parts=None, id: str = ID, **fields) -> Content:
    """A client's answer to the request of a round, or to another with the same fields."""
    parts = model() if parts is None else parts
    request = {"order": "round", "study": study_of(asked, id), "client": 0, "round": 0}
    request |= {"counted": NEVER, "broadcast": fingerprint_of(parts), **fields}
    return to.answer(Content(request, parts))
