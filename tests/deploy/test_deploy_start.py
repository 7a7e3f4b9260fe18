"""With which clients a study starts; a client that is not accepted waits, and says why."""

import contextlib
import copy
import os
import stat
import time
from pathlib import Path

import pytest
from test_deploy_lies import KEYS, STUDY, Replayed, honest, put

from certifl.deploy import flower
from certifl.deploy.bundle import Connection, init, load_connection
from certifl.deploy.client import process as serving
from certifl.deploy.client.process import Accepted, Retry, _refused
from certifl.deploy.flower import Endpoint
from certifl.deploy.keys import node_key
from certifl.deploy.messages import GridTransport
from certifl.deploy.server.process import (
    KeyFolder,
    _KeyAdmission,
    _not_started,
    client_keys,
    local_endpoint,
)
from certifl.deploy.server.start import check_clients
from certifl.errors import InputError, RequestError, StoreMismatch, WorkError
from certifl.runs.checkpoints import Checkpoints
from deploy_factory import coordinated, options
from deploy_network import free_port
from tiny_study import spec

pytest.importorskip("flwr", reason="Flower is not installed: pip install certifl[flower]")


__all__ = ["honest"]  # a fixture


def nothing(content):
    pass


def joined(record, client: int, **properties):
    """A record in which a client says other properties of itself."""
    changed = {key: (copy.deepcopy(fields), parts) for key, (fields, parts) in record.items()}
    changed[100 + client, "join"][0]["joined"].update(properties)
    return changed


LARGE = {"image_size": [9, 8], "initial_model": "0" * 64}
FEWER = {"class_names": ["0", "1"], "initial_model": "0" * 64}


@pytest.mark.parametrize(
    ("properties", "words"),
    [
        (LARGE, [r"client 0 was refused, its image size is \[9, 8\], others have \[8, 8\]"]),
        (FEWER, ["client 0 was refused, its classes are 2", r'classes = \["0", "1", "2"']),
        ({"in_channels": 3}, ["number of channels is 3, others have 1"]),
        ({"initial_model": "0" * 64}, ["initial network differs"]),
    ],
)
def test_a_mismatched_client_stops_the_study_even_if_it_joined_first(
    properties, words, honest, tmp_path
):
    grid = Replayed(joined(honest[False][0], 0, **properties), "", nothing)
    for word in words:
        with pytest.raises(RequestError, match=word):
            coordinated(STUDY, grid, options(tmp_path / "run", keys=KEYS))
    assert not (tmp_path / "run" / "checkpoints").exists()
    listed = []
    asked = options(tmp_path / "run", keys=KEYS, log=listed.append)
    assert "client 0 was refused" in str(check_clients(STUDY, GridTransport(grid), asked))
    assert "3 clients:" in listed[0]
    assert "1 channel, 8 x 8; classes: 10 (0, 1, " in " ".join(listed)
    assert any("client 0 does not take part: its " in line for line in listed)


def test_with_min_clients_the_others_start_and_a_late_mismatch_is_named(honest, tmp_path, caplog):
    grid = Replayed(joined(honest[True][0], 0, **LARGE), "", nothing)
    folder = coordinated(STUDY, grid, options(tmp_path / "run", keys=KEYS, min_clients=2))
    entry = Checkpoints(folder.training).history()[0]
    assert [row["client"] for row in entry["clients"]] == [1, 2]
    assert "image size" in entry["left_out"][0]["reason"]
    assert "Client 0 is refused: its image size" in caplog.text
    assert list(folder.manifest()["deployment"]["left_out"]) == ["0"]


def test_without_a_majority_nothing_starts(honest, tmp_path):
    record = joined(honest[False][0], 0, **LARGE)
    grid = Replayed(record, "", nothing)
    del grid.clients[101]
    for least in (None, 1):
        asked = options(tmp_path / "run", keys=KEYS, min_clients=least)
        study = STUDY if least is None else spec("clients.count=3", 'data.name="elsewhere"')
        with pytest.raises(
            RequestError, match=r"of client 2: its image size.*others have \[9, 8\]"
        ):
            coordinated(study, grid, options(tmp_path / f"{least}", keys=KEYS))
        assert "no group of clients" in str(check_clients(study, GridTransport(grid), asked))


def test_the_data_set_of_the_spec_wins_against_a_majority(honest, tmp_path):
    record = joined(joined(honest[True][0], 0, **LARGE, name="other"), 2, **LARGE, name="other")
    grid = Replayed(record, "", nothing)
    asked = options(tmp_path / "run", keys=KEYS, min_clients=1)
    assert check_clients(STUDY, GridTransport(grid), asked) is None
    elsewhere = spec("clients.count=3", 'data.name="elsewhere"')
    assert "client 1 was refused" in str(
        check_clients(elsewhere, GridTransport(grid), options(tmp_path / "run", keys=KEYS))
    )


def test_all_clients_must_join_unless_fewer_are_allowed(honest, tmp_path):
    grid = Replayed(honest[False][0], "", nothing)
    del grid.clients[101]
    with pytest.raises(WorkError, match=r"2 of 3.*client 1 is not connected.*--min-clients"):
        coordinated(STUDY, grid, options(tmp_path / "run", keys=KEYS))
    for least, words in ((0, "from 1 to 3"), (4, "from 1 to 3")):
        with pytest.raises(RequestError, match=words):
            coordinated(STUDY, grid, options(tmp_path / "run", min_clients=least))
    one = spec("clients.count=1")
    with pytest.raises(RequestError, match="not a federation"):
        coordinated(one, grid, tmp_path / "one")
    private = spec("clients.count=3", 'privacy.kind="example"', "privacy.noise_multiplier=1.0")
    with pytest.raises(RequestError, match="how much noise"):
        coordinated(private, grid, options(tmp_path / "private", min_clients=2))


def test_a_client_that_rejoins_with_other_images_is_named(honest, tmp_path):
    grid = Replayed(honest[True][0], "round", put("update", "weight", value=7))
    asked = options(tmp_path / "run", keys=KEYS, min_clients=2)
    with pytest.raises(WorkError, match="answered round 0"):
        coordinated(spec("clients.count=3", "training.rounds=2"), grid, asked)
    again = Replayed(joined(honest[True][0], 0, train_images=10**7), "", nothing)
    listed = []
    asked = options(tmp_path / "run", keys=KEYS, min_clients=2, log=listed.append)
    with pytest.raises(WorkError):
        coordinated(spec("clients.count=3", "training.rounds=2"), again, asked)
    assert any("10000000 training images, and had 20" in line for line in listed)


def test_a_servers_files_are_private(honest, tmp_path):
    before = os.umask(0o022)
    try:
        grid = Replayed(honest[False][0], "", nothing)
        folder = coordinated(STUDY, grid, options(tmp_path / "run", keys=KEYS))
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)
    for path in (folder.path, *folder.path.rglob("*")):
        assert path.stat().st_mode & 0o077 == 0, path


def test_a_half_copied_key_is_named_once_and_read_again(tmp_path, monkeypatch):
    init(tmp_path / "kit", 2, "127.0.0.1:9900", insecure=False)
    home, said, registered = tmp_path / "kit" / "server", [], []
    public = home / "clients" / "client-1.pub"
    whole = public.read_bytes()
    public.write_bytes(whole[: len(whole) // 2])
    (home / "clients" / "client-²٣.pub").write_bytes(whole)
    (home / "clients" / "client-4.pub").mkdir()
    os.mkfifo(home / "clients" / "client-5.pub")
    monkeypatch.setattr(flower, "register", lambda _, name, key: registered.append(name))
    admission = _KeyAdmission(home, Endpoint("127.0.0.1:1", None, b""), said.append)
    admission.check()
    admission.check()
    assert registered == ["client-0"]
    assert sum("client-1.pub" in line for line in said) == 1
    keys = KeyFolder(home)
    assert list(keys) == [0]
    public.write_bytes(whole)
    admission.check()
    assert registered[-1] == "client-1"
    assert sorted(keys) == [0, 1]
    node_key(tmp_path / "node.key", home / "clients" / "client-3.pub")
    assert sorted(client_keys(home, said.append)) == [0, 1, 3]


def test_a_command_given_twice_does_not_end_the_first(tmp_path, monkeypatch):
    ended, endpoint = [], Endpoint("127.0.0.1:1", None, b"")
    monkeypatch.setattr(flower, "_start", lambda _: 7)
    monkeypatch.setattr(flower, "_end", lambda _, number: ended.append(number))
    monkeypatch.setattr(flower, "_acquired", lambda *_: (None, ""))
    monkeypatch.setattr(flower, "_worked_on", lambda *_: contextlib.nullcontext())
    notes = tmp_path / "flower" / "run-1.txt"
    with flower.opened_run(endpoint, notes):
        with (
            pytest.raises(StoreMismatch, match="same run folder"),
            flower.opened_run(endpoint, notes),
        ):
            pass
        assert ended == []
        with flower.opened_run(endpoint, notes.with_name("run-2.txt")):
            pass
    notes.write_text("7\n")  # as one that was killed leaves it
    with flower.opened_run(endpoint, notes):
        assert ended == [7]


@pytest.mark.parametrize("host", ["ü.example.org", "a b", 'x"y', "..", "*", " "])
def test_a_server_that_no_certificate_can_name_is_refused_before_anything_is_written(
    host, tmp_path
):
    for server, names in ((f"{host}:9900", ()), ("127.0.0.1:9900", (host,))):
        with pytest.raises(InputError, match="name or address"):
            init(tmp_path / "kit", 1, server, False, names)
    assert not (tmp_path / "kit").exists()


def test_a_key_that_is_not_admitted_is_retried(tmp_path, monkeypatch):
    init(tmp_path / "kit", 1, "127.0.0.1:9900", insecure=False)
    said, tries = [], []

    def register(_endpoint, _name, key):
        tries.append(key)
        if len(tries) == 1:
            raise WorkError("The server refused: busy")

    monkeypatch.setattr(flower, "register", register)
    monkeypatch.setattr("certifl.deploy.server.process._RETRY_SECONDS", 0.05)
    server = tmp_path / "kit" / "server"
    admission = _KeyAdmission(server, Endpoint("127.0.0.1:1", None, b""), said.append)
    admission.check()
    time.sleep(0.1)
    admission.check()
    assert len(tries) == 2
    assert "could not be admitted and will be tried again" in said[0]
    assert said[-1] == "1 clients may connect."


def test_a_key_folder_is_true_while_no_key_can_be_read(tmp_path):
    init(tmp_path / "kit", 1, "127.0.0.1:9900", insecure=False)
    (tmp_path / "kit/server/clients/client-0.pub").write_bytes(b"ecdsa")
    assert KeyFolder(tmp_path / "kit" / "server")
    init(tmp_path / "open", 1, "127.0.0.1:9900", insecure=True)
    assert not KeyFolder(tmp_path / "open" / "server")


class Told:
    def __init__(self):
        self.now, self.lines = 0.0, []
        self.retry = Retry("fl.example.org:9900", 3, self.lines.append, lambda: self.now)

    def refused(self, before: bool, times: int) -> list[float]:
        waits = []
        for _ in range(times):
            waits.append(self.retry.refused(before))
            self.now += waits[-1]
        return waits


def test_waits_grow_to_half_a_minute_with_few_reports():
    at = Told()
    waits = at.refused(before=False, times=2000)
    assert waits[:5] == [2.0, 4.0, 8.0, 16.0, 30.0]
    assert set(waits[4:]) == {30.0}
    assert len(at.lines) <= at.now / 600 + 2
    assert "clients/client-3.pub" in at.lines[0]


def test_a_key_accepted_before_is_not_blamed_at_first():
    at = Told()
    at.refused(before=True, times=4)
    assert len(at.lines) == 1
    assert "about a minute" in at.lines[0]
    assert "node.key" not in at.lines[0]
    at.refused(before=True, times=4)  # longer than Flower remembers anybody
    assert len(at.lines) == 2
    assert "does not know its key, or another client with this key" in at.lines[1]
    at.retry.connected()
    at.refused(before=True, times=1)
    assert len(at.lines) <= 4


def test_an_unreachable_server_and_short_connections_are_reported_rarely():
    at = Told()
    for _ in range(100):
        at.now += at.retry.unreachable("fl.example.org:9900 does not answer (refused)")
        at.now += at.retry.ended(1.0)
    assert len(at.lines) <= 2 * (at.now / 600 + 1)
    assert at.retry.ended(60.0) == 2.0  # one that lasted: begin anew


def test_connections_of_the_federation_bypass_proxies(monkeypatch):
    from certifl.deploy.flower import bypass_proxies

    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "example.net")
    bypass_proxies("fl.example.org")
    bypass_proxies("fl.example.org")
    for name in ("NO_PROXY", "no_proxy"):
        assert os.environ[name] == "example.net,localhost,127.0.0.1,::1,fl.example.org"


def test_a_server_with_an_ipv6_address_listens_on_ipv6(tmp_path):
    init(tmp_path / "kit", 1, "[2001:db8::1]:9900", insecure=False)
    assert load_connection(tmp_path / "kit" / "server").listen == "::"
    assert load_connection(tmp_path / "kit" / "client-0").address == "[2001:db8::1]:9900"
    assert local_endpoint(tmp_path / "kit" / "server").address == "[::1]:9900"
    assert "[::1]:9900" in (tmp_path / "kit/server/flower/config.toml").read_text()
    for name in ("server", "client-0"):
        assert stat.S_IMODE((tmp_path / "kit" / name).stat().st_mode) == 0o700


def test_a_database_of_a_later_flower_is_named():
    root, log = Endpoint("127.0.0.1:9900", None, b""), Path("server.log")
    end = "alembic.util.exc.CommandError: Can't locate revision identified by 'd9bd9d502cf9'"
    assert "later release of Flower" in _not_started(root, end, log)
    assert "Is another program listening" in _not_started(root, "address in use", log)


def test_acceptance_is_remembered_per_key(tmp_path):
    (tmp_path / "node.key").write_text("one")
    assert not Accepted(tmp_path).before()
    Accepted(tmp_path).note()
    assert Accepted(tmp_path).before()
    (tmp_path / "node.key").write_text("another")
    assert not Accepted(tmp_path).before()


def test_only_a_missing_key_and_another_release_of_flower_are_final():
    connection = Connection("127.0.0.1", 9900)
    assert _refused("x [code: 2004] Failed to activate SuperNode.", connection)
    assert not _refused("all is well", connection)
    with pytest.raises(WorkError, match="another minor release of Flower"):
        _refused("[code: 1001] Runtime version compatibility check failed.", connection)
    with pytest.raises(WorkError, match="keys alone"):
        _refused("[code: 2001] SuperNode authentication is enabled.", connection)


def test_a_refused_client_tries_until_it_is_accepted_and_ends_when_asked(tmp_path, monkeypatch):
    init(tmp_path / "kit", 1, f"127.0.0.1:{free_port()}", insecure=True)
    folder = tmp_path / "kit" / "client-0"
    answers, lines = iter([False, False, True]), []

    def connected(_folder, _connection, _party, stop, accepted):
        served = next(answers, None)
        if served is None:
            stop.set()
        elif served:
            accepted()
        return bool(served)

    monkeypatch.setattr(serving, "_connected", connected)
    monkeypatch.setattr(serving, "connection_problem", lambda *_: None)
    monkeypatch.setattr("certifl.deploy.client.process._FIRST_WAIT", 0.01)
    settings = serving.Settings(client=0, data="digits", dealt=True)
    serving.run_client(folder, settings, lines.append)
    said = "\n".join(lines)
    assert "does not accept this client" in said
    assert said.endswith("The connection ended; reconnecting.")
    assert "has accepted this client" in said
    assert Accepted(folder).before()
