"""Each lie of one client against the server's real loop: the liar is named, the rest is right."""

import contextlib
import copy
import json
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr", reason="Flower is not installed: pip install certifl[flower]")

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.app.error import Error
from safetensors.torch import save
from test_deploy_messages import packed

from certifl.deploy.client.curves import CertificateChecks
from certifl.deploy.messages import Content, MalformedMessage, from_records, to_records
from certifl.deploy.schemas import Certified
from certifl.deploy.server.collect import _ClientProgress
from certifl.errors import WorkError
from certifl.report import write_report
from certifl.report.results import load_run
from certifl.runs.atomic import read_json
from certifl.runs.checkpoints import Checkpoints
from certifl.runs.folder import RunFolder
from deploy_factory import MemoryGrid, carried, clients_of, coordinated, options
from tiny_federation import assert_same
from tiny_study import spec

STUDY = spec(
    *("clients.count=3", 'algorithm={name="fedavg",weighting="size"}', "training.rounds=1"),
    *("certification.images=3", "certification.n=40", "certification.n0=5"),
)
KEYS = {client: b"key %d" % (100 + client) for client in range(3)}
CERTIFYING = "query.certify"
KINDS = {"query.join": "join", "train": "round", CERTIFYING: "certify"}

Lie = Callable[[Content], object]
"""Changes an honest answer, or returns what arrives in its place."""


class Replayed(MemoryGrid):
    """Answers as they were recorded; those of client 0 to one kind of request are lies."""

    def __init__(self, record: dict, kind: str, lie: Lie) -> None:
        super().__init__(dict.fromkeys((100, 101, 102)))
        self.record, self.kind, self.lie = record, kind, lie

    def _push(self, message: Message) -> str:
        name = str(next(self._count))
        message.metadata.__dict__["_message_id"] = message.object_id
        node, kind = message.metadata.dst_node_id, KINDS[message.metadata.message_type]
        self.sent.append((node, message))
        fields, parts = self.record[node, kind]
        content: Any = Content(copy.deepcopy(fields), {k: dict(v) for k, v in parts.items()})
        if node == 100 and kind == self.kind:
            changed = self.lie(content)
            content = changed if isinstance(changed, (RecordDict, Error)) else content
        if isinstance(content, Content):
            content = to_records(content)
        self.replies[name] = Message(content, reply_to=message)
        return name


def recorded(root: Path, silent: bool) -> tuple[dict, dict]:
    """Honest answers by node and kind, and what they come to."""
    record = {}

    def listen(node, request, reply):
        content = from_records(carried(reply).content)
        kind = KINDS[request.metadata.message_type]
        record[node, kind] = content.fields, content.parts
        lost = silent and node == 100 and kind == "round"
        return Message(Error(1, "lost"), reply_to=request) if lost else reply

    grid = MemoryGrid(clients_of(root, 3), listen)
    folder = coordinated(STUDY, grid, root / "run")
    last = Checkpoints(folder.training).latest()
    return record, {"model": last.server()["model"], **read_json(folder.curves)["clients"]}


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    """What three clients answer and come to; and the same where the first trains in vain."""
    return {s: recorded(tmp_path_factory.mktemp("honest"), s) for s in (False, True)}


def put(*path: str, value: object) -> Lie:
    def lie(content: Content) -> None:
        stored: Any = content.fields
        for name in path[:-1]:
            stored = stored[name]
        stored[path[-1]] = value

    return lie


def without(*path: str) -> Lie:
    def lie(content: Content) -> None:
        stored: Any = content.fields
        for name in path[:-1]:
            stored = stored[name]
        del stored[path[-1]]

    return lie


def raw(text: str) -> Lie:
    def lie(content: Content) -> RecordDict:
        records = to_records(content)
        records["certifl"] = ConfigRecord({"json": text})
        return records

    return lie


def nested(depth: int, *path: str) -> Lie:
    def lie(content: Content) -> RecordDict:
        put(*path, value="@")(content)
        records = to_records(content)
        text = str(records.config_records["certifl"]["json"])
        deep = '{"a":' * depth + "1" + "}" * depth
        records["certifl"] = ConfigRecord({"json": text.replace('"@"', deep)})
        return records

    return lie


def cut_short(content: Content) -> RecordDict:
    records = to_records(content)
    several = {"tensors-0": packed(save({"a": torch.ones(2)})[:-1])}
    records["part:model"] = ArrayRecord(several)
    return records


def tensor(change: Callable[[torch.Tensor], torch.Tensor]) -> Lie:
    def lie(content: Content) -> None:
        model = content.parts["model"]
        name = next(name for name in sorted(model) if model[name].ndim > 1)
        model[name] = change(model[name])

    return lie


def scaled_curve(factor: int) -> Lie:
    def lie(content: Content) -> None:
        curve = content.fields["certified"]["curve"]
        curve["correct"] = [count * factor for count in curve["correct"]]
        curve["images"] *= factor

    return lie


def condition(name: str, value: object) -> Lie:
    return put("certified", "curve", "conditions", name, value=value)


HUGE, INF, NAN = 10**400, math.inf, math.nan
NO_COUNT = [True, HUGE, NAN, -1]
NO_WHOLE = [*NO_COUNT, None, "x", [], {}, -HUGE, INF, 1.5]
ESCAPES = "\x1b[2J\x1b]0;owned\x07\nclient 2: all is well\u202e"
NO_REPLY = [
    raw("{"),
    lambda content: content.fields.clear(),
    *(put("client", value=value) for value in (1, HUGE, None)),
    *(put("seconds", value=value) for value in (HUGE, NAN, -1.0, "x")),
    put("fault", value="x"),
    put("fault", value={"kind": HUGE, "reason": None}),
    nested(150, "seconds"),
]
JOIN = [
    *NO_REPLY,
    *(put("joined", value=value) for value in (None, "x", HUGE, [], {}, NAN)),
    *(put("joined", "client", value=v) for v in [*NO_COUNT, 1, 3, 10**6]),
    *(put("joined", "in_channels", value=v) for v in [*NO_COUNT, 0, 3, 10**9]),
    *(put("joined", "train_images", value=v) for v in [*NO_WHOLE, 10**12]),
    *(
        put("joined", "image_size", value=v)
        for v in (None, "x", [8], [8, 8, 8], [0, 8], [INF, 8], [HUGE, 8], [9, 8], [10**9, 10**9])
    ),
    *(
        put("joined", "class_names", value=v)
        for v in (None, "x", [], [None], [HUGE], ["a"] * 10, ["a", ESCAPES], ["a" * 10_000])
    ),
    put("joined", "class_names", value=[f"{i}" for i in range(100_000)]),
    put("joined", "class_names", value=["cat", "dog"]),
    *(put("joined", "initial_model", value=v) for v in (None, 1, "0" * 64, ESCAPES, "x" * 10**6)),
    put("joined", "name", value="another"),
    put("joined", "fingerprint", value="another"),
    put("joined", "versions", value={f"{i}": "1" for i in range(10_000)}),
    put("joined", "versions", value={"certifl": HUGE}),
    nested(20, "joined", "versions"),
    lambda content: Error(0, ESCAPES),
]
METRICS = ("client", "seconds", "reason", "round", "epsilon", "unheard of", ESCAPES)
ROUND = [
    *NO_REPLY,
    (raw("{"), "malformed"),
    (cut_short, "malformed"),
    *(put("round", value=v) for v in NO_COUNT),
    (put("round", value=7), "round 7"),
    *(put("started_from", value=v) for v in (None, 1, ESCAPES)),
    (put("started_from", value="0" * 64), "another model"),
    *(put("update", value=v) for v in (None, "x", HUGE, [], {})),
    *(put("update", "client", value=v) for v in NO_COUNT),
    (put("update", "client", value=1), "as client 1"),
    *(put("update", "weight", value=v) for v in (*NO_WHOLE, 0, 1e308, 10**8, 21)),
    *(put("update", "model", value=v) for v in (False, None, 1, "x", HUGE)),
    *(put("update", "metrics", value=v) for v in (None, "x", [], HUGE)),
    *(put("update", "metrics", "loss", value=v) for v in ("x", True, [], HUGE, INF, NAN, 1e308)),
    *(put("update", "metrics", "accuracy", value=v) for v in ("x", HUGE, NAN, -0.1, 1.5)),
    *(put("update", "metrics", name, value=1) for name in METRICS),
    *(put("update", "metrics", "private_steps", value=v) for v in (1, 10**18, HUGE, 0.5)),
    put("update", "metrics", value={f"m{i}": 1.0 for i in range(10_000)}),
    nested(20, "update", "metrics"),
    *(without("update", name) for name in ("client", "weight", "model", "metrics")),
    without("started_from"),
    (without("update"), "malformed"),
    lambda content: content.parts.clear(),
    (lambda content: content.parts["model"].popitem(), "missing"),
    lambda content: content.parts["model"].clear(),
    lambda content: content.parts.update({"extra:control_step": dict(content.parts["model"])}),
    lambda content: content.parts.update({"extra:model": content.parts.pop("model")}),
    lambda content: content.parts["model"].update({ESCAPES: torch.ones(1)}),
    (tensor(lambda value: value * math.nan), "not finite"),
    (tensor(lambda value: value.reshape(-1)), "does not fit"),
    tensor(lambda value: value + math.inf),
    tensor(lambda value: value + 1e30),
    tensor(lambda value: value[None]),
    tensor(lambda value: value.to(torch.float64)),
    tensor(lambda value: value.to(torch.float8_e4m3fn)),
    lambda content: Error(2, ESCAPES),
]
CERTIFY = [
    *NO_REPLY,
    *(put("certified", value=v) for v in (None, "x", HUGE, [], {})),
    *(put("certified", "share", value=v) for v in (None, "x", "rows", HUGE, ESCAPES)),
    (without("certified"), "not an answer about this client"),
    *(put("certified", "model", value=v) for v in (None, 1, ESCAPES)),
    (put("certified", "model", value="0" * 64), "another model"),
    *(put("certified", "done", value=v) for v in (None, False, "yes", 1, HUGE)),
    *(put("certified", "cast", value=v) for v in ("x", HUGE, INF, -1)),
    *(put("certified", "curve", value=v) for v in (None, "x", [], {}, HUGE)),
    *(put("certified", "curve", "images", value=v) for v in [*NO_WHOLE, 0, 4, 100_000]),
    *(
        put("certified", "curve", "acr", value=v)
        for v in (None, "x", HUGE, INF, -0.1, 0.3, 1000.0, 1e308)
    ),
    (put("certified", "curve", "acr", value=NAN), "impossible"),
    (put("certified", "curve", "correct", value=[9] * 50), "impossible"),
    (put("certified", "curve", "correct", value=list(range(50))), "impossible"),
    (put("certified", "curve", "correct", value=["x"]), "malformed"),
    *(
        put("certified", "curve", "correct", value=v)
        for v in (None, "x", [], [3], [0] * 49 + [3], [HUGE] * 50, [-1] * 50, [NAN] * 50, [4] * 50)
    ),
    *(
        put("certified", "curve", "radii", value=v)
        for v in (None, [], [NAN] * 50, [HUGE] * 50, [0.0] * 10_001)
    ),
    (put("certified", "curve", "radii", value=[0.0, 1.0]), "other radii"),
    *(put("certified", "curve", "conditions", value=v) for v in (None, "x", {}, HUGE)),
    *(
        condition(name, value)
        for name, value in (
            *(("family", "pixel"), ("sigma", HUGE), ("sigma", 100.0), ("n", 10**9)),
            *(("alpha", 0.4), ("unit", ESCAPES), ("norm", "l2"), ("seed", 1), ("radii", [0.0])),
            *(("look_votes", []), ("precision", ESCAPES), ("batch_norm_folded", "x")),
            ("versions", {f"{i}": "1" for i in range(10_000)}),
        )
    ),
    scaled_curve(2),
    scaled_curve(50_000),
    put("certified", "plain", value={"images": HUGE, "correct": -1}),
    nested(20, "certified", "curve", "conditions", "threat"),
    lambda content: Error(2, ESCAPES),
]
LIES: dict[str, list[Lie | tuple[Lie, str]]] = {  # with a word of the reason that is given
    "join": JOIN,
    "round": ROUND,
    "certify": CERTIFY,
}
EACH = [(kind, number) for kind, lies in LIES.items() for number in range(len(lies))]


def test_the_table_of_lies_is_large():
    assert len(EACH) >= 250


def told(root: Path, caplog: pytest.LogCaptureFixture) -> Iterator[str]:
    yield from caplog.messages
    for path in root.rglob("*.json*"):
        yield path.read_text()


@pytest.mark.parametrize(("kind", "number"), EACH)
def test_a_lie_leaves_out_the_liar_and_no_other_client(kind, number, honest, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    record, result = honest[kind != "certify"]
    entry, listed = LIES[kind][number], []
    lie, word = entry if isinstance(entry, tuple) else (entry, "")
    grid = Replayed(record, kind, lie)
    asked = options(tmp_path / "run", min_clients=2, keys=KEYS, log=listed.append)
    folder, lost = RunFolder(tmp_path / "run"), _failure(lie) and kind != "round"
    # A client that failed, instead of lying, can be asked again by the same command.
    with pytest.raises(WorkError, match="client 0 ") if lost else contextlib.nullcontext():
        coordinated(STUDY, grid, asked)
    root, deployment = tmp_path / "run", read_json(tmp_path / "run" / "run.json")["deployment"]
    last = Checkpoints(root / "checkpoints/training").latest()
    assert_same(last.server()["model"], result["model"])
    rows = [row["client"] for row in last.history[0]["clients"]]
    assert rows == ([0, 1, 2] if kind == "certify" else [1, 2])
    if kind != "certify":
        assert [row["client"] for row in last.history[0]["left_out"]] == [0]
        assert word in last.history[0]["left_out"][0]["reason"]
    if kind == "join" and not lost:  # of a node without an answer nothing is known
        assert any("client 0 does not take part: " in line for line in listed), listed
    if not lost:
        assert folder.complete()
        curves = read_json(folder.curves)["clients"]
        for client in ("1", "2"):
            assert curves[client] == result[client]
        assert set(deployment["left_out"]) == (set() if kind == "round" else {"0"})
    if kind == "certify" and not lost:  # it was asked three times
        assert word in deployment["left_out"]["0"]
        assert "Client 0 is left out of the certificates" in caplog.text
        sent = [node for node, message in grid.sent if message.metadata.message_type == CERTIFYING]
        assert sorted(sent) == [100, 100, 100, 101, 102]
        json.loads((folder.path / "run.json").read_text(), parse_constant=pytest.fail)
    for text in (*told(root, caplog), *listed):
        assert "\x1b" not in text
        assert "\u202e" not in text


def _failure(lie: Lie) -> bool:
    probe = Content({"certified": {}})
    try:
        return isinstance(lie(probe), Error)
    except (KeyError, TypeError):
        return False


def test_radii_that_differ_in_the_last_place_are_those_of_the_study(honest, tmp_path):
    def next_ones(content: Content) -> None:
        curve = content.fields["certified"]["curve"]
        curve["radii"] = [radius * (1 + 2**-52) for radius in curve["radii"]]

    grid = Replayed(honest[False][0], "certify", next_ones)
    folder = coordinated(STUDY, grid, options(tmp_path / "run", min_clients=2, keys=KEYS))
    assert not folder.manifest()["deployment"].get("left_out")
    assert set(load_run(folder.path).certificates.client.tolist()) == {0, 1, 2}


def test_a_report_without_the_liar_names_it(honest, tmp_path):
    record, _ = honest[False]
    lie = put("certified", "curve", "acr", value=1000.0)
    asked = options(tmp_path / "run", min_clients=2, keys=KEYS)
    folder = coordinated(STUDY, Replayed(record, "certify", lie), asked)
    write_report([folder.path], tmp_path / "page.html", figures=False)
    assert "1000" in folder.manifest()["deployment"]["left_out"]["0"]


def test_the_number_of_test_images_must_not_change_after_joining(honest, tmp_path):
    record = {
        key: (copy.deepcopy(fields), parts) for key, (fields, parts) in honest[False][0].items()
    }
    for client in range(3):
        record[100 + client, "join"][0]["joined"]["test_images"] = 3
    lie = put("certified", "curve", "images", value=2)
    asked = options(tmp_path / "run", min_clients=2, keys=KEYS)
    folder = coordinated(STUDY, Replayed(record, "certify", lie), asked)
    why = folder.manifest()["deployment"]["left_out"]
    assert list(why) == ["0"]
    assert "2 test images, and certifies 3" in why["0"]


def told_so_far(cast: int, at_most: int = 10_000) -> Certified:
    return Certified(share="curve", model="0", done=False, cast=cast, at_most=at_most)


def test_certification_without_progress_is_ended():
    standing = _ClientProgress()
    standing.advance(told_so_far(5), 60.0, 60.0)
    with pytest.raises(MalformedMessage, match="no progress at 5"):
        all(standing.advance(told_so_far(5), 60.0, 60.0) is None for _ in range(2100))
    crawling = _ClientProgress()
    slow = [told_so_far(cast, 10**9) for cast in range(2100)]
    with pytest.raises(MalformedMessage, match="would not end"):
        all(crawling.advance(one, 60.0, 60.0) is None for one in slow)
    with pytest.raises(MalformedMessage, match=r"stopped after 0.1 of 60 seconds"):
        _ClientProgress().advance(told_so_far(5), 0.1, 60.0)
    steady = _ClientProgress()
    for cast in range(1, 2000):
        steady.advance(told_so_far(cast), 60.0, 60.0)


def test_slow_certification_reported_in_tenths_is_not_ended():
    slow = _ClientProgress()
    for piece in range(19_000):
        slow.advance(told_so_far(piece // 1900 * 1000), 60.0, 60.0)


def test_a_client_that_shares_nothing_must_still_end():
    silent, nothing = _ClientProgress(), Certified(share="none", done=False)
    with pytest.raises(MalformedMessage, match="did not end"):
        all(silent.advance(nothing, 60.0, 60.0) is None for _ in range(20_001))
    assert silent.pieces == 20_001
    with pytest.raises(MalformedMessage, match="how many votes"):
        _ClientProgress().advance(Certified(share="curve", done=False), 60.0, 60.0)


def test_rows_without_a_model_are_refused():
    with pytest.raises(MalformedMessage, match="which model"):
        CertificateChecks(STUDY, 0, 3, 10).rows({}, None)


def test_a_never_ending_certification_is_ended_by_the_server(honest, tmp_path, monkeypatch):
    monkeypatch.setattr("certifl.deploy.server.collect._MOST_IDLE", 20)
    record, result = honest[False]

    def never(content: Content) -> None:
        told = content.fields["certified"]
        del told["curve"]
        told |= {"done": False, "cast": 1, "at_most": 10**6}

    asked = options(tmp_path / "run", min_clients=2, keys=KEYS, piece=1e-9)
    grid = Replayed(record, "certify", never)
    folder = coordinated(STUDY, grid, asked)
    assert "makes no progress" in folder.manifest()["deployment"]["left_out"]["0"]
    assert read_json(folder.curves)["clients"]["1"] == result["1"]
    assert len(grid.sent) < 60
