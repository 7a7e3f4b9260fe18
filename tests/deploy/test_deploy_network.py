"""Real processes on loopback, with TLS and keys: training, certificates, kills, wrong keys.

All tests of the running federation share one; xdist gives them to one worker (`--dist loadgroup`).
The server and client 0 are at first new interpreters, also those of Flower; the rest are forks.
"""

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

from certifl.deploy.bundle import Connection
from certifl.deploy.gate import allowed
from certifl.deploy.keys import (
    Authority,
    check_certificate,
    connection_problem,
    node_key,
)
from certifl.errors import InputError, WorkError
from certifl.experiments.run import Options, run
from certifl.report.results import load_run
from certifl.report.summary import client_curves, radius_grid
from certifl.runs.checkpoints import Checkpoints
from certifl.runs.folder import RunFolder
from deploy_network import Federation, Running, alive, free_port, until
from tiny_study import cli, spec, write_spec

MIXTURE = 'algorithm={name="mixture",personalization=0.5}'
NETWORK = pytest.mark.xdist_group("federation")
KEEP = 'training.momentum_between_rounds="keep"'
PATIENT = ("--wait", "120", "--absent", "120", "--answer-within", "150")


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    made = Federation(tmp_path_factory.mktemp("federation"), 2)
    with made.ended():
        made.server(anew=True).prints("2 clients may connect")
        clients = [made.client(0, anew=True), made.client(1)]
        for client in clients:
            client.prints("has accepted this client", 180)
        yield made


class _Folder:
    """A client's folder, as `same_training` wants to see a client."""

    def __init__(self, bundle: Path, client: int) -> None:
        self._folder = bundle / f"client-{client}"
        self.settings = type("Number", (), {"client": client})


STUDY = (MIXTURE, KEEP, "training.rounds=3")


def round_committed(run_folder: Path, number: int) -> None:
    folder = run_folder / f"checkpoints/training/round-{number:05d}"
    until(folder.is_dir, what=f"for {folder}")


def end_with_its_children(running: Running, what: str) -> None:
    """As if the machine's power failed; Flower's process notices and ends."""
    flower = running.flower()
    assert flower
    running.kill()
    until(lambda: not any(map(alive, flower)), 20, f"for the {what} to end with its parent")


@pytest.fixture(scope="module")
def survived(federation, tmp_path_factory):
    """The folder of a study whose run, client and server were killed, one after the other."""
    for client in range(2):
        settings = federation.bundle / f"client-{client}" / "client.toml"
        assert 'share = "curve"' in settings.read_text()
    folder = tmp_path_factory.mktemp("killed")
    path, run_folder = write_spec(folder, *STUDY), folder / "run"
    asked = (*PATIENT, "--share", "rows")
    first = federation.study(path, run_folder, *asked)
    round_committed(run_folder, 1)
    first.kill()
    assert len(Checkpoints(run_folder / "checkpoints/training").history()) < 3
    end_with_its_children(federation.last("client-1"), "SuperNode")
    federation.client(1)
    second = federation.study(path, run_folder, *asked)
    round_committed(run_folder, 2)
    end_with_its_children(federation.last("server"), "SuperLink")
    federation.server().prints("2 clients may connect")
    outcome = second.result()
    if outcome.code != 0:  # it may have been between two calls; then the same command resumes
        assert "repeat the command" in outcome.err
        outcome = federation.study(path, run_folder, *asked).result()
    outcome.fine("Report:")
    return run_folder


@NETWORK
def test_a_run_a_client_and_a_server_killed_give_the_models_and_curves_of_one_process(
    survived, federation, tmp_path
):
    study = spec(*STUDY)
    torch.set_num_threads(1)
    at = {client: _Folder(federation.bundle, client) for client in range(2)}
    same_training(study, tmp_path / "own", RunFolder(survived), at)
    assert RunFolder(survived).complete()
    # The clients' own settings win over the requested rows: only curves are there.
    assert not (survived / "certificates.parquet").exists()
    run(study, Options(tmp_path / "here", device="cpu", explore=False))
    there, here = load_run(survived), load_run(tmp_path / "here")
    grid = radius_grid([here])
    assert (client_curves(there, grid) == client_curves(here, grid)).all()
    assert len(there.certificates) == len(here.certificates)


@NETWORK
def test_status_and_log_describe_the_folders_and_their_files_are_private(
    survived, federation, tmp_path
):
    assert cli("deploy", "status", federation.bundle / "server").out.count("online") == 2
    cli("deploy", "status", federation.bundle / "client-0").fine("It answers", "certificates")
    cli("deploy", "log", federation.bundle / "client-0").fine("round 1", "certified.curve.correct")
    for name in ("client-0/studies", "client-0/log", "client-0/flower", "server/log"):
        assert stat.S_IMODE((federation.bundle / name).stat().st_mode) == 0o700, name
    for name in ("server/state.db", "client-0/sent.jsonl", "client-0/log/supernode.log"):
        assert stat.S_IMODE((federation.bundle / name).stat().st_mode) == 0o600, name
    Image.new("L", (8, 8)).save(tmp_path / "x.png")
    cli("predict", tmp_path / "x.png", "--run", survived).refused("with its clients")


@NETWORK
@pytest.mark.filterwarnings("ignore:GitWildMatchPattern")  # of Flower, as below
def test_absent_clients_are_named_and_a_late_one_completes_the_study(federation, tmp_path):
    settings = ("clients.count=3", "clients.min_clients=2", "certification.images=2")
    path, run_folder = write_spec(tmp_path, *settings, "training.rounds=1"), tmp_path / "run"
    bundle = federation.bundle
    few = ("--wait", "5", "--absent", "0", "--answer-within", "60", "--min-clients", "2")
    outcome = federation.study(path, run_folder, *few).result()
    assert "client 1: certifl" in outcome.out
    assert "client 2 is not connected" in outcome.out
    outcome.refused("1 of 3 clients have not certified", "client 2 (it is not connected)", code=1)
    shutil.copytree(
        bundle / "client-1", bundle / "client-2", ignore=shutil.ignore_patterns("studies")
    )
    node_key(bundle / "client-2" / "node.key", bundle / "server" / "clients" / "client-2.pub")
    text = (bundle / "client-2" / "client.toml").read_text().replace("client = 1 ", "client = 2 ")
    (bundle / "client-2" / "client.toml").write_text(text)
    late = federation.client(2)
    federation.study(path, run_folder, *PATIENT).result().fine("Report:")
    history = Checkpoints(run_folder / "checkpoints/training").history()
    assert [len(entry["clients"]) for entry in history] == [2]
    assert "has accepted this client" in late.output
    checked = cli("deploy", "check", path, "--kit", bundle / "server", "--wait", "120")
    checked.fine("client 2: certifl", "would start")


@NETWORK
@pytest.mark.slow
def test_a_client_that_is_counted_as_connected_waits_until_it_is_accepted(federation, tmp_path):
    """As one that was killed with its SuperNode and started again: Flower's answer is the same."""
    client = federation.last("client-1")
    again = tmp_path / "client-1"
    unneeded = shutil.ignore_patterns("studies", "log", ".lock")
    shutil.copytree(federation.bundle / "client-1", again, ignore=unneeded)
    waiting = federation.start("waiting", "client", again, "--data", "digits", "--dealt")
    waiting.prints("does not accept this client at the moment", 180)
    assert "key" not in waiting.output
    for pid in (*client.flower(), client.pid):
        os.kill(pid, signal.SIGKILL)
    waiting.prints("has accepted this client", 180)
    waiting.stop()
    federation.client(1).prints("has accepted this client", 180)


@NETWORK
def test_a_client_with_an_unknown_key_names_it_waits_and_is_accepted_once_admitted(
    federation, tmp_path
):
    bundle, stranger = federation.bundle, tmp_path / "client-0"
    shutil.copytree(bundle / "client-0", stranger, ignore=shutil.ignore_patterns("studies", "log"))
    admitted = bundle / "server" / "clients" / "client-7.pub"
    node_key(stranger / "node.key", tmp_path / "unknown.pub")
    running = federation.start("stranger", "client", stranger, "--data", "digits", "--dealt")
    running.prints("does not know this client's key", 180)
    assert "clients/client-0.pub" in running.output
    assert running.process.is_alive()
    shutil.copy(tmp_path / "unknown.pub", admitted)
    running.prints("has accepted this client", 180)
    running.stop(signal.SIGINT)
    assert running.process.exitcode == 0
    admitted.unlink()


@NETWORK
def test_a_wrong_authority_is_refused(federation, tmp_path):
    bundle = federation.bundle
    stranger = tmp_path / "client-0"
    shutil.copytree(bundle / "client-0", stranger, ignore=shutil.ignore_patterns("studies", "log"))
    other = Authority.new()
    other.save(tmp_path / "other.key", stranger / "ca.crt")
    lost = federation.start("lost", "client", stranger, "--data", "digits", "--dealt")
    lost.result(60).refused("not the server of this federation", "Nothing was sent", code=1)


@NETWORK
def test_a_client_is_started_once_and_needs_its_data(federation):
    busy = federation.bundle / "client-0"
    cli("deploy", "client", busy, "--data", "digits", "--dealt").refused("Another process")
    cli("deploy", "client", busy).refused("no data")
    cli("deploy", "client", busy, "--data", "/no/such/folder").refused("no folder")
    cli("deploy", "client", federation.folder).refused("client.toml")
    cli("deploy", "run", "x.toml", "--kit", busy).refused("no spec")


def _own_address() -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("10.255.255.255", 1))
        except OSError:
            return None
        found = probe.getsockname()[0]
    return None if found.startswith("127.") else found


@NETWORK
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
def test_only_client_requests_pass_the_gate_from_elsewhere(path, client, passes):
    assert allowed({"type": "http", "path": path, "client": (client, 1)}) is passes


class Listening(threading.Thread):
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
def test_certificates_are_checked_before_anything_is_sent(hosts, days, words, tmp_path):
    authority = Authority.new()
    authority.save(tmp_path / "ca.key", tmp_path / "ca.crt")
    authority.server(hosts, tmp_path / "s.key", tmp_path / "s.crt", days)
    server = Listening(tmp_path / "s.key", tmp_path / "s.crt")
    if words is None:
        assert connection_problem("127.0.0.1", server.port, tmp_path / "ca.crt") is None
        check_certificate(tmp_path / "s.crt")
    else:
        with pytest.raises(WorkError, match=words):
            connection_problem("127.0.0.1", server.port, tmp_path / "ca.crt")
    server.socket.close()
    assert "does not answer" in str(
        connection_problem("127.0.0.1", free_port(), tmp_path / "ca.crt")
    )


def test_an_expired_server_says_so_and_is_renewed(tmp_path):
    bundle = tmp_path / "bundle"
    cli("deploy", "init", bundle, "--server", "fl.example.org:9901").fine("client-1", "README.md")
    server = bundle / "server"
    authority = Authority.load(bundle / "authority.key", bundle / "ca.crt")
    authority.server(["127.0.0.1"], server / "server.key", server / "server.crt", days=-1)
    cli("deploy", "server", server).refused("expired on", "deploy renew", code=1)
    cli("deploy", "status", server).refused("There is a problem", code=1)
    cli("deploy", "renew", bundle).fine("server.crt")
    check_certificate(server / "server.crt")


def test_a_bundle_has_what_each_machine_needs_and_no_more(tmp_path):
    bundle = tmp_path / "bundle"
    cli("deploy", "init", bundle, "--clients", "3", "--server", "fl.example.org:9901").fine()
    names = {str(path.relative_to(bundle)) for path in bundle.rglob("*") if path.is_file()}
    for client in range(3):
        for name in ("ca.crt", "node.key", "client.toml", "connection.toml", "start.sh"):
            assert f"client-{client}/{name}" in names
        assert f"client-{client}/certifl-client-{client}.service" in names
        assert (bundle / f"client-{client}/node.key").stat().st_mode & 0o077 == 0
    keys = [name for name in names if name.endswith((".key", ".secret"))]
    assert sorted(keys) == [
        "authority.key",
        *(f"client-{client}/node.key" for client in range(3)),
        "server/server.key",
        "server/superexec.secret",
    ]
    for path in (bundle, *bundle.rglob("*")):
        assert path.stat().st_mode & 0o077 == 0, path
    assert "dependencies = []" in (bundle / "server/app/pyproject.toml").read_text()
    assert "fl.example.org:9901" in (bundle / "README.md").read_text()
    cli("deploy", "init", bundle).refused("not empty")
    with pytest.raises(InputError, match="HOST:PORT"):
        Connection.parse("no port")


def test_insecure_bundles_warn(tmp_path):
    outcome = cli("deploy", "init", tmp_path / "bundle", "--insecure")
    assert "WITHOUT ENCRYPTION" in outcome.err
    assert "WITHOUT ENCRYPTION" in (tmp_path / "bundle" / "README.md").read_text()
    assert not list((tmp_path / "bundle").rglob("*.key"))


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern")
def test_the_thin_app_is_one_that_flower_accepts(tmp_path):
    """Flower looks for names in the code without running it, and at every file it carries."""
    from flwr.cli.build import build_fab_from_disk
    from flwr.cli.config_utils import load_and_validate

    cli("deploy", "init", tmp_path / "bundle").fine()
    app = tmp_path / "bundle" / "server" / "app"
    config, _ = load_and_validate(app / "pyproject.toml")
    assert config["project"]["dependencies"] == []
    assert len(build_fab_from_disk(app)) < 10_000
    for half in ("client", "server"):
        loaded = runpy.run_path(str(app / "certifl_app" / f"{half}.py"))
        assert type(loaded["app"]).__name__ == f"{half.capitalize()}App"
