"""Committed rounds: whole or absent, damage noticed, the disk full, the process killed."""

import errno
import json
import logging
import os
import shutil

import pytest
import torch

from certifl.errors import StoreError
from certifl.runs import checkpoints as module
from certifl.runs.checkpoints import Checkpoints
from tiny_federation import assert_same

IDENTITY = {"algorithm": {"name": "fedavg"}, "seed": 3}


def parts(value):
    model = {"layer.weight": torch.full((3, 2), float(value)), "steps": torch.tensor(value)}
    return {"model": model, "momentum": {"layer.weight": -torch.full((3, 2), float(value))}}


def commit(checkpoints, number, clients=(0, 1), carried=()):
    previous = checkpoints.latest()
    with checkpoints.begin(number) as pending:
        for client in clients:
            pending.put_client(client, parts(100 * client + number))
        for client in carried:
            pending.carry_client(client, previous)
        pending.put_server(parts(number))
        history = [{"round": r, "loss": 1 / 3} for r in range(number)]
        return pending.commit(identity=IDENTITY, history=history)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_was_committed_is_read_back(tmp_path):
    checkpoints = Checkpoints(tmp_path / "new" / "folder")
    assert checkpoints.latest() is None
    assert checkpoints.history() == []
    written = commit(checkpoints, 0)
    for stored in (written, checkpoints.latest()):
        assert (stored.number, stored.identity, stored.history) == (0, IDENTITY, [])
        assert stored.clients == [0, 1]
        assert_same(stored.server(), parts(0))
        assert_same(stored.client(1), parts(100))
        assert stored.client(2) == {}
    commit(checkpoints, 1)
    assert checkpoints.history() == [{"round": 0, "loss": 1 / 3}]


def test_only_the_last_two_rounds_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for number in range(5):
        commit(checkpoints, number)
    assert names(tmp_path) == ["round-00003", "round-00004"]


def test_a_client_that_keeps_nothing_has_no_file(tmp_path):
    with Checkpoints(tmp_path).begin(0) as pending:
        pending.put_client(0, {})
        pending.put_client(1, {"momentum": {}})
        pending.put_server(parts(0))
        stored = pending.commit(identity={}, history=[])
    assert stored.clients == []
    assert stored.client(0) == {}


def test_parts_may_share_memory(tmp_path):
    shared = torch.arange(6.0).reshape(2, 3)
    with Checkpoints(tmp_path).begin(0) as pending:
        pending.put_server({"model": {"a": shared, "b": shared.T}, "anchor": {"a": shared}})
        stored = pending.commit(identity={}, history=[])
    assert_same(stored.server(), {"model": {"a": shared, "b": shared.T}, "anchor": {"a": shared}})


def test_unchanged_states_are_carried_over_without_writing_them_again(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    first = commit(checkpoints, 0)
    second = commit(checkpoints, 1, clients=(0,), carried=(1, 7))
    assert_same(second.client(1), parts(100))
    assert second.clients == [0, 1]  # client 7 kept nothing
    files = [stored.path / "clients/00001.safetensors" for stored in (first, second)]
    assert files[0].samefile(files[1])
    for number in (2, 3):
        commit(checkpoints, number, clients=(0,), carried=(1,))
    assert_same(checkpoints.latest().client(1), parts(100))


def test_carrying_over_copies_where_hard_links_do_not_work(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    commit(checkpoints, 0)

    def refuse(*_):
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    second = commit(checkpoints, 1, clients=(), carried=(0, 1))
    assert second.damage() is None
    assert_same(second.client(1), parts(100))


def test_leaving_without_a_commit_leaves_nothing(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    commit(checkpoints, 0)

    def interrupted():
        with checkpoints.begin(1) as pending:
            pending.put_server(parts(1))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names(tmp_path) == ["round-00000"]


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def change_a_number(path):
    path.write_bytes(path.read_bytes().replace(b"0.333", b"0.334"))


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("server.safetensors", cut),
        ("server.safetensors", flip_a_bit),
        ("clients/00001.safetensors", flip_a_bit),
        ("clients/00000.safetensors", os.unlink),
        ("round.json", cut),
        ("round.json", os.unlink),
        ("round.json", change_a_number),
        ("round.json", lambda path: path.write_bytes(b"")),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_damaged_round_is_left_aside_with_a_warning(name, harm, tmp_path, caplog):
    checkpoints = Checkpoints(tmp_path)
    commit(checkpoints, 1)
    newest = commit(checkpoints, 2)
    harm(newest.path / name)
    with caplog.at_level(logging.WARNING):
        stored = checkpoints.latest()
    assert stored.number == 1
    assert_same(stored.server(), parts(1))
    assert "round-00002 is damaged" in caplog.text
    # The round is trained again and takes the damaged one's place.
    commit(checkpoints, 2)
    assert checkpoints.latest().number == 2


def test_a_format_of_another_version_is_not_read(tmp_path, monkeypatch, caplog):
    checkpoints = Checkpoints(tmp_path)
    monkeypatch.setattr(module, "_FORMAT", 99)
    commit(checkpoints, 0)
    monkeypatch.undo()
    assert checkpoints.latest() is None
    assert "another version" in caplog.text


def test_the_record_is_plain_json(tmp_path):
    stored = commit(Checkpoints(tmp_path), 2)
    record = json.loads((stored.path / "round.json").read_text())["record"]
    assert record["number"] == 2
    named = ("clients/00000", "clients/00001", "server")
    assert sorted(record["files"]) == [f"{name}.safetensors" for name in named]


def test_half_written_rounds_are_cleaned_and_never_read(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    stored = commit(checkpoints, 0)
    for leftover in (".round-00001.tmp", ".round-00000.tmp"):
        shutil.copytree(stored.path, tmp_path / leftover)
    assert checkpoints.latest().number == 0
    commit(checkpoints, 1)  # also without cleaning
    checkpoints.clean()
    assert names(tmp_path) == ["round-00000", "round-00001"]


class Killed(BaseException):
    """Stands for the end of the process: nothing after it may touch the disk."""


TOUCHING = ("fsync", "rename", "link", "open", "mkdir", "rmdir", "unlink")


def dying_at(step, monkeypatch):
    calls = 0

    def wrap(real):
        def call(*args, **options):
            nonlocal calls
            calls += 1
            if calls >= step:
                raise Killed
            return real(*args, **options)

        return call

    for name in TOUCHING:
        monkeypatch.setattr(os, name, wrap(getattr(os, name)))


def test_whatever_step_of_a_commit_is_the_last_one_a_whole_round_is_read(tmp_path, monkeypatch):
    step, survived = 0, set()
    while True:
        step += 1
        folder = tmp_path / str(step)
        checkpoints = Checkpoints(folder)
        for number in (0, 1):
            commit(checkpoints, number)
        previous = checkpoints.latest()
        with monkeypatch.context() as patch:
            dying_at(step, patch)
            try:
                with checkpoints.begin(2) as pending:
                    pending.put_client(0, parts(2))
                    pending.carry_client(1, previous)
                    pending.put_server(parts(2))
                    pending.commit(identity=IDENTITY, history=[{"round": 1}])
                finished = True
            except Killed:
                finished = False
        stored = Checkpoints(folder).latest()
        survived.add(stored.number)
        assert_same(stored.server(), parts(stored.number))
        assert_same(stored.client(0), parts(stored.number))
        assert_same(stored.client(1), parts(101))
        checkpoints.clean()
        assert all(name.startswith("round-") for name in names(folder))
        if finished:
            break
    assert step > 15
    assert survived == {1, 2}


@pytest.mark.parametrize("fails", ["fsync", "rename"])
def test_a_full_disk_is_a_clear_error_and_loses_nothing(fails, tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    commit(checkpoints, 0)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, fails, full)
        with pytest.raises(StoreError, match=r"No space left.*free some space"):
            commit(checkpoints, 1)
    assert names(tmp_path) == ["round-00000"]
    assert checkpoints.latest().damage() is None


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="Cannot write"):
        commit(Checkpoints(tmp_path / "file"), 0)
