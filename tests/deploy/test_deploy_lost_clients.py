"""Clients that are lost in a round: asked again, and never waited for long."""

import time
from types import SimpleNamespace

import pytest

pytest.importorskip("flwr", reason="Flower is not installed: pip install certifl[flower]")

from certifl.deploy.messages import Content, Node, NoReply
from certifl.deploy.schemas import Certified
from certifl.deploy.server.collect import _Collector
from certifl.deploy.server.remote_runner import (
    ClientRegistry,
    ConnectedClient,
    Pending,
    RemoteRunner,
    Timeouts,
    _Round,
)
from certifl.federated.workers import ClientResult
from certifl.runs.atomic import write_json
from certifl.runs.folder import RunFolder
from tiny_study import spec

GONE = NoReply("its machine is gone", gone=True, crashed=False)
CRASHED = NoReply("ClientApp stopped responding", gone=False, crashed=True)
HERE = Node(1, "a")


class Replies:
    """A transport in which every request gets this reply, from nodes that are there or not."""

    def __init__(self, reply: NoReply, connected: bool) -> None:
        self.reply, self.connected, self.sent = reply, connected, 0
        self.waiting = {"request 0"}

    def nodes(self) -> dict[int, Node]:
        return {1: HERE} if self.connected else {}

    def send(self, *_request: object) -> str:
        self.sent += 1
        self.waiting.add(f"request {self.sent}")
        return f"request {self.sent}"

    def take_reply(self, name: str) -> NoReply | None:
        found = name in self.waiting
        self.waiting.discard(name)
        return self.reply if found else None


def answered(replies: Replies, answer: float) -> ClientResult:
    registry = ClientRegistry(replies, {"id": "x"}, lambda _joined: None)
    entry = ConnectedClient(0, HERE, SimpleNamespace(train_images=10, client=0))
    if replies.connected:
        registry.connected[0], registry._nodes[1] = entry, HERE
    timeouts = Timeouts(answer=answer, start=1.0, absent=0.1)
    remote = RemoteRunner(
        registry, timeouts, lambda parts: parts, lambda: None, lambda _n: ("model",),
        lambda _client, _round: 0, {},
    )  # fmt: skip
    current = SimpleNamespace(number=0, history=[], server=lambda: {"model": {}})
    now = time.monotonic()
    return _Round(remote, current).answer(0, Pending(entry, "request 0", now, now + answer))


def test_a_client_that_disconnects_again_and_again_is_left_out():
    replies = Replies(GONE, connected=True)
    result = answered(replies, answer=60.0)
    assert result.fault is not None
    assert result.fault.kind == "ended"
    assert replies.sent == 9


@pytest.mark.parametrize("reply", [GONE, CRASHED])
def test_a_lost_client_that_does_not_return_is_waited_for_as_one_that_is_absent(reply):
    began = time.monotonic()
    result = answered(Replies(reply, connected=False), answer=600.0)
    assert result.fault is not None
    assert time.monotonic() - began < 60.0


@pytest.mark.parametrize("own", [False, True])
def test_a_client_asked_for_no_certificates_may_share_its_accuracy(own, tmp_path):
    study = spec('certification.own=[{clients=[1], perturbation="none"}]', "clients.count=2")
    folder = RunFolder(tmp_path)
    record = {"status": "running", "deployment": {}, "data": {"num_classes": 10}}
    write_json(tmp_path / "run.json", record)
    folder.shared(1).parent.mkdir(parents=True)
    registry = SimpleNamespace(study={"own_perturbation": own})
    plain = {"images": 5, "correct": 3}
    certified = Certified.model_validate({"share": "curve", "done": True, "plain": plain})
    collector = _Collector(folder, study, registry, None, SimpleNamespace(), {})
    collector._store(1, certified, Content())
    assert '"plain"' in folder.shared(1).read_text()
