"""A client that the server does not accept waits, says why, and does not fill the disk."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="Flower is not installed: pip install certifl[flower]")

from certifl.deploy.bundle import Connection, init, load_connection
from certifl.deploy.client import process as serving
from certifl.deploy.client.process import Accepted, Retry, _refused
from certifl.deploy.server.process import Endpoint, _not_started, local_endpoint
from certifl.errors import WorkError
from deploy_network import free_port


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
    assert said.endswith("The connection ended; connects again.")
    assert "has accepted this client" in said
    assert Accepted(folder).before()
