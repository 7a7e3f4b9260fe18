"""What travels arrives as it was sent, and what is not one of certifl is refused."""

import json
import math
import pickle
import struct

import pytest

pytest.importorskip("flwr", reason="Flower is not installed: pip install certifl[flower]")

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from certifl.deploy.messages import (
    Content,
    MalformedMessage,
    encode,
    from_records,
    to_records,
    update_from,
    update_to,
)
from certifl.errors import SpecError
from certifl.federated import (
    ClientState,
    LocalTraining,
    Personalized,
    ServerState,
    Update,
    state_of,
)
from certifl.federated.privacy import ExampleLevel
from certifl.federated.privacy.planning import allowed
from private_federation import KEY, SCHEDULE, PlainNet, algorithm_of
from tiny_federation import assert_same, client_data

TYPES = [
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64),
    *(torch.int64, torch.int8, torch.uint8, torch.bool),
]


def drawn(kind, shape):
    values = torch.arange(max(1, math.prod(shape)), dtype=torch.float64) - 3.5
    return values[: math.prod(shape)].reshape(shape).to(kind)


@pytest.mark.parametrize("kind", TYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 4), (2, 3, 4)], ids=str)
def test_tensors_arrive_bit_for_bit(kind, shape):
    parts = {"model": {"a.weight": drawn(kind, shape)}, "nothing": {}}
    assert_same(from_records(to_records(Content({}, parts))).parts, parts)


def test_non_contiguous_tensors_arrive():
    value = torch.arange(12.0).reshape(3, 4).t()
    special = torch.tensor([float("nan"), float("inf"), -0.0])
    parts = {"model": {"a": value, "b": special}}
    assert_same(from_records(to_records(Content({}, parts))).parts, parts)


def test_parts_are_encoded_once_for_many_messages():
    parts = {"model": {"a": torch.ones(3)}}
    again = from_records(to_records(Content({"x": 1}, encoded=encode(parts))))
    assert again.fields == {"x": 1}
    assert_same(again.parts, parts)


@given(st.dictionaries(st.text(), st.floats() | st.integers() | st.text() | st.none()))
def test_fields_arrive_exactly(fields):
    back = from_records(to_records(Content(fields))).fields
    assert repr(back) == repr(fields)


def test_an_update_arrives_without_the_clients_state():
    model, extra = {"w": torch.randn(3)}, {"control": {"w": torch.randn(3)}}
    sent = Update(3, 17.0, model, {"loss": 0.1, "accuracy": 0.5}, extra)
    back, state = update_from(from_records(to_records(update_to(sent))))
    assert (back.client, back.weight, repr(back.metrics)) == (3, 17.0, repr(sent.metrics))
    assert_same(back.model, model)
    assert_same(back.extra, extra)
    assert state.parts == {}
    silent = update_to(Update(0, 1.0, None, {}))
    assert update_from(from_records(to_records(silent)))[0].model is None


def raw(array: Array, name: str = "tensors-0") -> RecordDict:
    fields = {"format": 2, "parts": ["model"], "facts": {}}
    told = ConfigRecord({"json": json.dumps(fields)})
    return RecordDict({"certifl": told, "part:model": ArrayRecord({name: array})})


KIND = "certifl.safetensors"
GOOD = save({"a": torch.ones(4)})
HUGE = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()


def raws(*contents: bytes) -> RecordDict:
    record = raw(packed(contents[0]))
    for number, content in enumerate(contents[1:], 1):
        record.array_records["part:model"][f"tensors-{number}"] = packed(content)
    return record


def packed(content: bytes, kind: str = KIND) -> Array:
    return Array("uint8", (len(content),), kind, content)


@pytest.mark.parametrize(
    ("records", "word"),
    [
        (raw(packed(GOOD), "other"), "not one of certifl"),
        (raw(packed(GOOD), "tensors-1"), "not one of certifl"),
        (raws(GOOD, GOOD), "a tensor twice"),
        (raws(GOOD, GOOD[:-1]), "not whole"),
        (raw(packed(GOOD, "numpy.ndarray")), "unknown here"),
        (raw(packed(GOOD[:-1])), "not whole"),
        (raw(packed(GOOD + b"x")), "not whole"),
        (raw(packed(b"")), "not whole"),
        (raw(packed(pickle.dumps({"a": 1}))), "not whole"),
        (raw(packed(struct.pack("<Q", len(HUGE)) + HUGE)), "not whole"),
        (raw(packed(struct.pack("<Q", 2**62) + HUGE)), "not whole"),
    ],
)
def test_malformed_parts_are_refused_before_allocation(records, word):
    with pytest.raises(MalformedMessage, match=word):
        from_records(records)


def test_a_large_part_travels_in_pieces_of_whole_tensors(monkeypatch):
    monkeypatch.setattr("certifl.deploy.messages._PIECE", 40)
    parts = {"model": {f"w{i}": torch.randn(i) for i in (3, 4, 30, 1, 0, 2)}}
    records = to_records(Content({}, parts))
    assert len(records.array_records["part:model"]) == 3
    back = from_records(records)
    assert_same(back.parts, parts)
    assert not records.array_records["part:model"]  # one copy is enough


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused(content):
    with pytest.raises(MalformedMessage):
        from_records(raw(packed(content)))


@pytest.mark.parametrize(
    "text",
    [
        *(None, [1, 2], "no json", "[]", "", "null", "[" * 100_000, '"' + "x" * 4_000_000 + '"'),
        '{"a":' * 50_000 + "1" + "}" * 50_000,
        '{"format": 99, "parts": [], "facts": {}}',
        '{"format": 1e400, "parts": [], "facts": {}}',
        '{"format": 2, "parts": [], "facts": []}',
        '{"format": 2, "parts": [], "facts": null}',
        '{"format": 2, "parts": [], "facts": ' + "9" * 100_000 + "}",
        '{"format": 2, "parts": ["a"], "facts": {}}',
        '{"format": 2, "parts": [[]], "facts": {}}',
        '{"format": 2, "parts": ["model", "model"], "facts": {}}',
        '{"format": 2, "parts": ["%s"], "facts": {}}' % ("m" * 10_000),
    ],
    ids=lambda text: repr(text)[:40],
)
def test_other_messages_are_refused(text):
    with pytest.raises(MalformedMessage):
        from_records(RecordDict({} if text is None else {"certifl": ConfigRecord({"json": text})}))


@pytest.mark.parametrize("fields", [{}, {"update": 3}, {"update": {"model": True}}])
def test_an_answer_without_an_update_is_refused(fields):
    with pytest.raises(MalformedMessage):
        update_from(Content(fields))


def test_unknown_settings_are_refused(tmp_path):
    from certifl.deploy.bundle import client_settings
    from certifl.deploy.client.settings import load_settings

    path = tmp_path / "client.toml"
    path.write_text(client_settings(3))
    assert (load_settings(path).client, load_settings(path).share) == (3, "curve")
    for line, word in [
        ("shar = 1", "no such key"),
        ('share = "all"', "share"),
        ("perturbation = 3", "must be a table"),
        ('perturbation = { family = "twist", sigma = 1.0 }', "twist"),
        ("client = [", "TOML"),
    ]:
        path.write_text(f"client = 0\n{line}\n" if "client" not in line else line)
        with pytest.raises(SpecError, match=word):
            load_settings(path)


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in ("example", "client") for name in allowed(kind)]
)
def test_every_private_answer_passes_the_schema(kind, name):
    pytest.importorskip("opacus", reason="needs the extra [dp]")
    algorithm, data = Personalized(algorithm_of(name), epochs=1), client_data(0)
    level = ExampleLevel(0.5, 1.0, KEY) if kind == "example" else None
    training = LocalTraining(PlainNet(), SCHEDULE, seed=1, privacy=level)
    server, state = algorithm.init(state_of(PlainNet())), ClientState()
    rounds = SCHEDULE.rounds + algorithm.extra_rounds
    for round in (0, SCHEDULE.rounds, rounds - 1):  # the base's, and both kinds of extra rounds
        server = ServerState(round, server.parts)
        update, state = algorithm.client_round(server, state, data, training)
        arrived, _ = update_from(from_records(to_records(update_to(update))))
        assert arrived.metrics == update.metrics
