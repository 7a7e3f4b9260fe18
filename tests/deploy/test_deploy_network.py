"""Real processes on loopback, with TLS and keys: training, certificates, kills, wrong keys."""

from __future__ import annotations

import os
import runpy
import shutil
import signal
import socket
import ssl
import stat
import threading
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="Flower is not installed: pip install certifl[flower]")

import torch
from PIL import Image
from test_deploy_rounds import same_training

from certifl.deploy.provision.keys import Authority, check_certificate, node_key, reach
from certifl.deploy.provision.kit import Connection
from certifl.deploy.transport.flower_processes import allowed
from certifl.errors import InputError, WorkError
from certifl.experiments.run import Options, run
from certifl.runs.checkpoints import Checkpoints
from certifl.runs.folder import RunFolder
from deploy_network import Federation, alive, children, free_port, until
from tiny_study import cli, spec, write_spec

MIXTURE = 'algorithm={name="mixture",personalization=0.5}'
KEEP = 'training.momentum_between_rounds="keep"'
PATIENT = ("--wait", "120", "--absent", "120", "--answer-within", "150")


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    """A server and two clients, with certificates and keys."""
    made = Federation(tmp_path_factory.mktemp("federation"), 2)
    with made.ended():
        made.server().says("2 clients may connect")
        clients = [made.client(number) for number in range(2)]
        for client in clients:
            client.says("has accepted this client", 180)
        yield made


class _Folder:
    """A client's folder, as `same_training` wants to see a party."""

    def __init__(self, kit: Path, client: int) -> None:
        self._folder = kit / f"client-{client}"
        self.settings = type("Number", (), {"client": client})


def as_in_one_process(study, place: Path, kit: Path) -> None:
    torch.set_num_threads(1)
    at = {client: _Folder(kit, client) for client in range(study.clients.count)}
    same_training(study, place.with_name(place.name + "-own"), RunFolder(place), at)


def test_training_and_certificates_are_those_of_one_process(federation, tmp_path):
    study = spec(MIXTURE, KEEP)
    for client in range(2):
        settings = federation.kit / f"client-{client}" / "client.toml"
        assert 'share = "curve"' in settings.read_text()
    path, place = write_spec(tmp_path, MIXTURE, KEEP), tmp_path / "run"
    federation.study(path, place, *PATIENT, "--share", "rows").result().fine("Report:")
    as_in_one_process(study, place, federation.kit)
    assert RunFolder(place).complete()
    assert not (place / "certificates.parquet").exists()  # their own settings win: curves alone
    own = run(study, Options(tmp_path / "here", device="cpu")).load_certificates()
    from certifl.report.results import load_run
    from certifl.report.summary import client_curves, radius_grid

    told, grid = load_run(place), radius_grid([load_run(tmp_path / "here")])
    here = load_run(tmp_path / "here")
    assert (client_curves(told, grid) == client_curves(here, grid)).all()
    assert len(own) == len(told.certificates)
    assert cli("deploy", "status", federation.kit / "server").out.count("online") == 2
    cli("deploy", "status", federation.kit / "client-0").fine("It answers", "certificates")
    cli("deploy", "log", federation.kit / "client-0").fine("round 1", "certified.curve.correct")
    for name in ("client-0/studies", "client-0/log", "client-0/flower", "server/log"):
        assert stat.S_IMODE((federation.kit / name).stat().st_mode) == 0o700, name
    for name in ("server/state.db", "client-0/sent.jsonl", "client-0/log/supernode.log"):
        assert stat.S_IMODE((federation.kit / name).stat().st_mode) == 0o600, name
    Image.new("L", (8, 8)).save(tmp_path / "x.png")
    cli("predict", tmp_path / "x.png", "--run", place).refused("with its clients")


def test_a_run_killed_in_the_middle_goes_on_to_the_same_models(federation, tmp_path):
    settings = (MIXTURE, KEEP, "certification.images=2")
    path, place = write_spec(tmp_path, *settings), tmp_path / "run"
    first = federation.study(path, place, *PATIENT)
    until(lambda: (place / "checkpoints/training/round-00001").is_dir())
    first.kill()
    assert len(Checkpoints(place / "checkpoints/training").history()) < 2
    federation.study(path, place, *PATIENT).result().fine("Report:")
    as_in_one_process(spec(*settings), place, federation.kit)


def test_a_client_killed_and_started_again_and_a_server_too(federation, tmp_path):
    settings = (MIXTURE, "training.rounds=3", "certification.images=2")
    path, place = write_spec(tmp_path, *settings), tmp_path / "run"
    running = federation.study(path, place, *PATIENT)
    until(lambda: (place / "checkpoints/training/round-00001").is_dir())
    server, client = (
        next(r for r in reversed(federation.running) if r.log.stem == name)
        for name in ("server", "client-1")
    )
    supernode = children(client.process.pid)
    client.kill()
    until(lambda: not any(map(alive, supernode)), 20, "for the SuperNode to end with its client")
    federation.client(1)
    until(lambda: (place / "checkpoints/training/round-00002").is_dir())
    superlink = children(server.process.pid)
    server.kill()
    until(lambda: not any(map(alive, superlink)), 20, "for the SuperLink to end with its server")
    federation.server().says("2 clients may connect")
    outcome = running.result()
    if outcome.code != 0:  # it may have been between two calls; then the same command goes on
        assert "repeat the command" in outcome.err
        federation.study(path, place, *PATIENT).result().fine("Report:")
    as_in_one_process(spec(*settings), place, federation.kit)


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern")  # of Flower, as below
def test_truth_about_failure_and_late_clients(federation, tmp_path):
    """A study of three clients: the third is not there, then comes late."""
    settings = ("clients.count=3", "clients.min_clients=2", "certification.images=2")
    path, place = write_spec(tmp_path, *settings, "training.rounds=1"), tmp_path / "run"
    few = ("--wait", "8", "--absent", "0", "--answer-within", "60")
    outcome = federation.study(path, place, *few).result()
    outcome.refused("2 of 3", "client 2 is not there", "--min-clients", code=1)
    kit = federation.kit / "server"
    checked = cli("deploy", "check", path, "--kit", kit, "--wait", "5")
    checked.refused("client 2 is not there")
    assert "client 1: certifl" in checked.out
    cli("deploy", "check", path, "--kit", kit, "--wait", "5", "--min-clients", "2").fine(
        "would start"
    )
    outcome = federation.study(path, place, *few, "--min-clients", "2").result()
    outcome.refused("1 of 3 clients have not certified", "client 2 (it is not there)", code=1)
    kit = federation.kit
    shutil.copytree(kit / "client-1", kit / "client-2", ignore=shutil.ignore_patterns("studies"))
    node_key(kit / "client-2" / "node.key", kit / "server" / "clients" / "client-2.pub")
    text = (kit / "client-2" / "client.toml").read_text().replace("client = 1 ", "client = 2 ")
    (kit / "client-2" / "client.toml").write_text(text)
    federation.client(2).says("has accepted this client", 180)
    federation.study(path, place, *PATIENT).result().fine("Report:")
    history = Checkpoints(place / "checkpoints/training").history()
    assert [len(entry["clients"]) for entry in history] == [2]


@pytest.mark.slow
def test_a_client_that_is_counted_as_connected_waits_until_it_is_accepted(federation, tmp_path):
    """As one that was killed with its SuperNode and started again: Flower's answer is the same."""
    client = next(r for r in reversed(federation.running) if r.log.stem == "client-1")
    again = tmp_path / "client-1"
    unneeded = shutil.ignore_patterns("studies", "log", ".lock")
    shutil.copytree(federation.kit / "client-1", again, ignore=unneeded)
    waiting = federation.start("waiting", "client", again, "--data", "digits", "--dealt")
    waiting.says("does not accept this client yet, as it did before", 180)
    assert "key" not in waiting.said
    supernode = children(client.process.pid)
    for pid in (client.process.pid, *supernode):
        os.kill(pid, signal.SIGKILL)
    client.process.wait()
    waiting.says("has accepted this client", 180)
    waiting.stop()
    federation.client(1).says("has accepted this client", 180)


def test_a_client_that_is_refused_ends_when_asked_and_names_its_key(federation, tmp_path):
    kit = federation.kit
    stranger = tmp_path / "client-0"
    shutil.copytree(kit / "client-0", stranger, ignore=shutil.ignore_patterns("studies", "log"))
    node_key(stranger / "node.key", tmp_path / "unknown.pub")
    wrong = federation.start("stranger", "client", stranger, "--data", "digits", "--dealt")
    wrong.says("does not know this client's key", 180)
    assert "clients/client-0.pub" in wrong.said
    assert wrong.process.poll() is None
    wrong.process.send_signal(signal.SIGINT)
    wrong.process.wait(20)
    # Its key is admitted later: it is accepted.
    again = federation.start("stranger-2", "client", stranger, "--data", "digits", "--dealt")
    again.says("does not know this client's key", 180)
    shutil.copy(tmp_path / "unknown.pub", kit / "server" / "clients" / "client-7.pub")
    again.says("has accepted this client", 180)
    again.stop()
    (kit / "server" / "clients" / "client-7.pub").unlink()


def test_a_wrong_authority_is_refused(federation, tmp_path):
    kit = federation.kit
    stranger = tmp_path / "client-0"
    shutil.copytree(kit / "client-0", stranger, ignore=shutil.ignore_patterns("studies", "log"))
    other = Authority.new()
    other.save(tmp_path / "other.key", stranger / "ca.crt")
    lost = federation.start("lost", "client", stranger, "--data", "digits", "--dealt")
    lost.result(60).refused("not the server of this federation", "Nothing was sent", code=1)


def test_a_party_is_started_once_and_needs_its_data(federation):
    busy = federation.kit / "client-0"
    cli("deploy", "client", busy, "--data", "digits", "--dealt").refused("Another process")
    cli("deploy", "client", busy).refused("no data")
    cli("deploy", "client", busy, "--data", "/no/such/folder").refused("no folder")
    cli("deploy", "client", federation.place).refused("client.toml")
    cli("deploy", "run", "x.toml", "--kit", busy).refused("no spec")


def _own_address() -> str | None:
    """An address of this machine that is not its loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("10.255.255.255", 1))
        except OSError:
            return None
        found = probe.getsockname()[0]
    return None if found.startswith("127.") else found


def test_only_the_servers_own_machine_starts_runs_and_admits_keys(federation):
    address = _own_address()
    if address is None:
        pytest.skip("this machine has no address besides its loopback")
    import httpx

    base, check = f"https://{address}:{federation.port}", ssl.create_default_context()
    check.check_hostname, check.verify_mode = False, ssl.CERT_NONE
    paths = ["/v1/control/start-run", "/v1/control/register-node", "/v1/runtime/acquire-task"]
    for path in [*paths, "/docs", "/openapi.json"]:
        assert httpx.post(base + path, verify=check).status_code == 403
    assert httpx.post(base + "/v1/fleet/pull-messages", verify=check).status_code != 403


@pytest.mark.parametrize(
    ("path", "client", "passes"),
    [
        ("/v1/fleet/activate-node", "10.0.0.7", True),
        ("/v1/control/start-run", "10.0.0.7", False),
        ("/v1/runtime/acquire-task", "::ffff:10.0.0.7", False),
        ("/v1/fleet/../control/start-run", "10.0.0.7", False),
        ("/v1/control/start-run", "127.0.0.1", True),
        ("/v1/control/start-run", "::1", True),
        ("/v1/control/start-run", "::ffff:127.0.0.1", True),
        ("/", "unknown", False),
    ],
)
def test_the_gate(path, client, passes):
    assert allowed({"type": "http", "path": path, "client": (client, 1)}) is passes


class Listening(threading.Thread):
    """A TLS server that says nothing."""

    def __init__(self, key: Path, certificate: Path) -> None:
        super().__init__(daemon=True)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.context = context
        self.start()

    def run(self) -> None:
        while True:
            try:
                line, _ = self.socket.accept()
            except OSError:
                return
            try:
                self.context.wrap_socket(line, server_side=True).close()
            except OSError:
                line.close()


@pytest.mark.parametrize(
    ("hosts", "days", "words"),
    [
        (["127.0.0.1"], 1, None),
        (["127.0.0.1"], -1, "has expired"),
        (["elsewhere.example.org", "10.1.2.3"], 1, "for another name"),
    ],
)
def test_certificates_are_looked_at_before_anything_is_sent(hosts, days, words, tmp_path):
    authority = Authority.new()
    authority.save(tmp_path / "ca.key", tmp_path / "ca.crt")
    authority.server(hosts, tmp_path / "s.key", tmp_path / "s.crt", days)
    server = Listening(tmp_path / "s.key", tmp_path / "s.crt")
    if words is None:
        assert reach("127.0.0.1", server.port, tmp_path / "ca.crt") is None
        check_certificate(tmp_path / "s.crt")
    else:
        with pytest.raises(WorkError, match=words):
            reach("127.0.0.1", server.port, tmp_path / "ca.crt")
    server.socket.close()
    assert "does not answer" in str(reach("127.0.0.1", free_port(), tmp_path / "ca.crt"))


def test_an_expired_server_says_so_and_is_renewed(tmp_path):
    kit = tmp_path / "kit"
    cli("deploy", "init", kit, "--server", "fl.example.org:9901").fine("client-1", "README.md")
    server = kit / "server"
    authority = Authority.load(kit / "authority.key", kit / "ca.crt")
    authority.server(["127.0.0.1"], server / "server.key", server / "server.crt", days=-1)
    cli("deploy", "server", server).refused("expired on", "deploy renew", code=1)
    cli("deploy", "status", server).refused("Not everything", code=1)
    cli("deploy", "renew", kit).fine("server.crt")
    check_certificate(server / "server.crt")


def test_a_kit_holds_what_each_needs_and_no_more(tmp_path):
    kit = tmp_path / "kit"
    cli("deploy", "init", kit, "--clients", "3", "--server", "fl.example.org:9901").fine()
    names = {str(path.relative_to(kit)) for path in kit.rglob("*") if path.is_file()}
    for client in range(3):
        for name in ("ca.crt", "node.key", "client.toml", "connection.toml", "start.sh"):
            assert f"client-{client}/{name}" in names
        assert f"client-{client}/certifl-client-{client}.service" in names
        assert (kit / f"client-{client}/node.key").stat().st_mode & 0o077 == 0
    keys = [name for name in names if name.endswith((".key", ".secret"))]
    assert sorted(keys) == [
        "authority.key",
        *(f"client-{client}/node.key" for client in range(3)),
        "server/server.key",
        "server/superexec.secret",
    ]
    for path in (kit, *kit.rglob("*")):
        assert path.stat().st_mode & 0o077 == 0, path
    assert "dependencies = []" in (kit / "server/app/pyproject.toml").read_text()
    assert "fl.example.org:9901" in (kit / "README.md").read_text()
    cli("deploy", "init", kit).refused("not empty")
    with pytest.raises(InputError, match="HOST:PORT"):
        Connection.parse("no port")


def test_insecure_is_said_loudly(tmp_path):
    outcome = cli("deploy", "init", tmp_path / "kit", "--insecure")
    assert "WITHOUT ENCRYPTION" in outcome.err
    assert "WITHOUT ENCRYPTION" in (tmp_path / "kit" / "README.md").read_text()
    assert not list((tmp_path / "kit").rglob("*.key"))


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern")
def test_the_thin_app_is_one_that_flower_accepts(tmp_path):
    """Flower looks for names in the code without running it, and at every file it carries."""
    from flwr.cli.build import build_fab_from_disk
    from flwr.cli.config_utils import load_and_validate

    cli("deploy", "init", tmp_path / "kit").fine()
    app = tmp_path / "kit" / "server" / "app"
    config, _ = load_and_validate(app / "pyproject.toml")
    assert config["project"]["dependencies"] == []
    assert len(build_fab_from_disk(app)) < 10_000
    for half in ("client", "server"):
        loaded = runpy.run_path(str(app / "certifl_app" / f"{half}.py"))
        assert type(loaded["app"]).__name__ == f"{half.capitalize()}App"
