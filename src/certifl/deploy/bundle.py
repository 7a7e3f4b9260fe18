"""Provisioning bundles for server and clients: certificates, keys, settings, scripts, README."""

from __future__ import annotations

import contextlib
import ipaddress
import re
import secrets
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tomli_w

from certifl._version import __version__
from certifl.deploy.keys import Authority, node_key
from certifl.errors import InputError, SpecError, StoreMismatch
from certifl.path_checks import CONNECTION, check_deploy_folder
from certifl.runs.atomic import (
    private_files,
    private_folder,
    write_bytes,
    write_secret,
    write_text,
)
from certifl.safe_io import SPEC_BYTES, read_bytes, read_toml

_LOCAL = ("localhost", "127.0.0.1", "::1")
_FILE = CONNECTION
FLOWER_VARIABLES = {
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Environment of Flower's processes: nothing is installed at run time, nothing reported."""
INSECURE = (
    "WITHOUT ENCRYPTION AND WITHOUT KEYS: anybody on the network can read all models and join."
)


@dataclass(frozen=True)
class Connection:
    """The server's address, as stored in each bundle.

    Attributes:
        host, port: of the server, for clients.
        insecure: neither encryption nor keys.
        listen: address at which the server listens; used by its own folder only.
    """

    host: str
    port: int
    insecure: bool = False
    listen: str = "0.0.0.0"

    @property
    def address(self) -> str:
        """host:port, as Flower takes it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @staticmethod
    def parse(text: str, insecure: bool = False) -> Connection:
        """From HOST:PORT; InputError for another form."""
        host, _, port = text.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        number = int(port) if re.fullmatch(r"[0-9]{1,5}", port) else 0
        if not host or not 1 <= number <= 65535:
            raise InputError(
                f"--server must be HOST:PORT, such as fl.example.org:9900; got {text!r}."
            )
        _check_host(host)
        return Connection(host, number, insecure, "::" if ":" in host else "0.0.0.0")

    def save(self, folder: Path) -> None:
        """Write it into a bundle."""
        values = {"server": self.address, "insecure": self.insecure, "listen": self.listen}
        write_text(folder / _FILE, tomli_w.dumps(values))


def _check_host(host: str) -> None:
    """Refuse what a certificate cannot name (InputError)."""
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(host)
        return
    if not re.fullmatch(r"(\*\.)?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*", host):
        raise InputError(
            f"{host!r} is not a name or address of a server: give one such as fl.example.org (an "
            "international name in its ASCII form, xn--...) or 192.168.77.1."
        )


def load_connection(folder: Path) -> Connection:
    """Read the server's address from a bundle; SpecError where it is not a bundle, or damaged."""
    check_deploy_folder(folder)
    try:
        stored = read_toml(folder / _FILE)
        parsed = Connection.parse(str(stored["server"]), stored.get("insecure", False) is True)
        return Connection(
            parsed.host, parsed.port, parsed.insecure, str(stored.get("listen", "0.0.0.0"))
        )
    except (OSError, KeyError, InputError) as error:
        raise SpecError(f"{folder / _FILE} is wrong: {error}") from error


def init(
    folder: Path, clients: int, server: str, insecure: bool, names: Sequence[str] = ()
) -> list[Path]:
    """Write the bundles of the server and all clients; returns their folders, the server's first.

    Args:
        folder: new or empty (else StoreMismatch). clients: their number.
        server: HOST:PORT, for clients (else InputError). insecure: no certificates and keys.
        names: additional names and addresses of the server.
    """
    connection = Connection.parse(server, insecure)
    for name in names:
        _check_host(name)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: give a new folder.")
    if folder.is_dir() and any(folder.iterdir()):
        raise StoreMismatch(
            f"{folder} is not empty. Choose a new folder: existing keys are not replaced."
        )
    if clients < 1:
        raise InputError("A federation needs at least one client: --clients 2.")
    with private_files():  # for certificates, keys, and later states and votes
        return _written(folder, clients, connection, names)


def _written(
    folder: Path, clients: int, connection: Connection, names: Sequence[str]
) -> list[Path]:
    home, insecure = folder / "server", connection.insecure
    folders = [home, *(folder / f"client-{client}" for client in range(clients))]
    variables = "".join(f"{name}={value}\n" for name, value in FLOWER_VARIABLES.items())
    for bundle in folders:
        private_folder(bundle)
        connection.save(bundle)
        write_text(bundle / "flower.env", variables)
        _scripts(bundle)
    (home / "clients").mkdir()
    write_secret(home / "superexec.secret", secrets.token_bytes(32))
    if not insecure:
        authority = Authority.new()
        authority.save(folder / "authority.key", folder / "ca.crt")
        hosts = list(dict.fromkeys([connection.host, *names, *_LOCAL]))
        authority.server(hosts, home / "server.key", home / "server.crt")
        for bundle in folders:
            write_bytes(bundle / "ca.crt", read_bytes(folder / "ca.crt", SPEC_BYTES))
    for client, bundle in enumerate(folders[1:]):
        if not insecure:
            node_key(bundle / "node.key", home / "clients" / f"{bundle.name}.pub")
        write_text(bundle / "client.toml", client_settings(client))
    for name, content in app_files().items():
        write_bytes(home / "app" / name, content)
    write_text(home / "flower" / "config.toml", _flower_connection(home, connection))
    text = (_README_INSECURE if insecure else _README).format(
        address=connection.address, clients=clients, last=clients - 1, version=__version__
    )
    write_text(folder / "README.md", text)
    return folders


def _scripts(bundle: Path) -> None:
    """A script and a systemd unit that start the server or client of a bundle."""
    command = bundle.name.partition("-")[0]
    script, folder = bundle / "start.sh", shlex.quote(str(bundle.resolve()))
    write_text(script, _START.format(command=command))
    script.chmod(0o700)
    unit = _UNIT.format(command=command, name=bundle.name, folder=folder)
    write_text(bundle / f"certifl-{bundle.name}.service", unit)


def renew(folder: Path, names: Sequence[str] = ()) -> Path:
    """Write a new certificate for the server, signed by the authority that clients trust.

    Args:
        folder: as `init` wrote it, with the authority's key (else InputError).
        names: additional names and addresses of the server.
    """
    home = folder / "server"
    for name in names:
        _check_host(name)
    authority = Authority.load(folder / "authority.key", folder / "ca.crt")
    hosts = list(dict.fromkeys([load_connection(home).host, *names, *_LOCAL]))
    authority.server(hosts, home / "server.key", home / "server.crt")
    return home / "server.crt"


# The texts of a bundle: scripts, units, commented settings, the README.


def _flower_connection(home: Path, connection: Connection) -> str:
    """Settings of Flower's own command line, on the server's machine."""
    local = f"{'[::1]' if connection.listen == '::' else '127.0.0.1'}:{connection.port}"
    authority = f'root-certificates = "{(home / "ca.crt").resolve()}"'
    return (
        "[superlink]\n"
        'default = "certifl"\n\n'
        "[superlink.certifl]\n"
        f'address = "{local}"\n'
        f"{'insecure = true' if connection.insecure else authority}\n"
    )


_START = """\
#!/bin/sh
# Runs from this folder; additional options may follow.
cd "$(dirname "$0")" || exit 1
exec certifl deploy {command} . "$@"
"""

# PATH must lead to the environment that certifl is installed in.
_UNIT = """\
[Unit]
Description=certifl {name}
After=network-online.target
Wants=network-online.target

[Service]
# Correct both paths to where this folder and certifl are on this machine.
WorkingDirectory={folder}
EnvironmentFile={folder}/flower.env
ExecStart=/usr/bin/env certifl deploy {command} {folder}
Restart=on-failure
RestartSec=10
NoNewPrivileges=true
PrivateTmp=true
ProtectSystem=full

[Install]
WantedBy=multi-user.target
"""


def client_settings(client: int) -> str:
    """A client's commented settings."""
    return f"""\
# This client's own settings. They override the server's requests.

client = {client}           # its number in the study
data = ""            # its images: a folder with training and test images (or --data PATH)
# label_column = "finding"   # the label, where the images are a table with several such columns
# resize = 64         # pixels that every image is resampled to; with crop = "center" or "pad" and
#                    #   window = [low, high], as the study's spec says them (docs/data.md)
# dealt = true       # data is a data set that all clients have; the study allocates its images
# classes = ["cat", "dog", "horse"]   # all classes of the study, in order. These names are sent
#                    to the server; without them it gets numbers, and names in the files stay here

share = "curve"      # disclosure level of its certificates:
                     #   "none": only that it has finished
                     #   "curve": numbers of certified images at fixed radii, and their average
                     #   "rows": every test image's certificate, with label and position
# perturbation = {{ family = "rotation", sigma = "9deg" }}   # its own, if the study allows it
networks = []        # networks as module:function that a study may name; their code runs here

# max_epsilon = 8.0  # privacy budget of its images over all studies; studies in which clients
                     #   add no noise are then refused
# delta = 1e-5       # at which epsilon is counted; default: the study's

device = "auto"      # or "cpu", "cuda:0"
threads = 1          # of torch; 0 = torch's default. One gives the same bits everywhere
"""


_README = """\
# A federation of {clients} clients

| folder | for | secrets |
|---|---|---|
| `server/` | the server's operator, {address} | `server.key`, `superexec.secret` |
| `client-0/` ... `client-{last}/` | one client each | `node.key` |
| `authority.key` | no machine: keep it offline, to renew the server's certificate | all of it |

Deliver each folder over a confidential channel, then delete it here. A client that prefers its own
key runs `ssh-keygen -t ecdsa -b 384 -N "" -f node.key` and sends `node.key.pub`, which goes to
`server/clients/client-N.pub`.

## Who runs what

1. All machines install the same version of certifl. It is not on a package index yet: build a
   wheel in a checkout, `pip wheel --no-deps --wheel-dir dist .`, and deliver it with each folder.
   There: `pip install "certifl-{version}-py3-none-any.whl[flower]"`.
2. The server: `certifl deploy server server/`.
3. Every client: `certifl deploy client client-N/ --data IMAGES` (or `data` in `client.toml`).
4. On the server's machine: `certifl deploy run study.toml --kit server/`.

`start.sh` does 2 and 3; `certifl-*.service` is a systemd unit for it. Clients connect to the
server, so only the server needs an open port. `certifl deploy status server/` lists the clients.

All clients have equal weight in an average, however many images each has, unless the study sets
`weighting = "size"` in `[algorithm]`.

## What never leaves each machine

- A client's images, labels, and positions of images stay on its machine. So do its personal model,
  its momentum and other states, its certificates of single images (unless `share = "rows"` in its
  own `client.toml`), the votes behind them, and `node.key`.
- What leaves a client each round: its model (unless the algorithm keeps it: `local`, fine-tuning),
  the number of its training images, loss and accuracy on its training images. A model discloses
  something about its training images; `[privacy]` in the study bounds how much.
- When it joins, a client reports the size and number of its training images. Names of classes
  leave it only if it lists them as `classes` in its `client.toml`.
- What leaves a client at the end: with `share = "curve"` numbers of certified test images at fixed
  radii and their average radius; with "none" only that it has finished.
- A server cannot bring code to a client: messages are answered by the certifl installed there.
  Runs are started, and keys admitted, on the server's own machine alone.
- A client answers each round of a study once. `certifl deploy log client-N/` lists what left it.

The server's certificate expires after 825 days: `certifl deploy renew THIS_FOLDER` writes a new
`server/server.crt` and `server.key` with the authority's key; clients need no change.
"""

_README_INSECURE = """\
# A federation of {clients} clients WITHOUT ENCRYPTION AND WITHOUT KEYS

Anybody on the network can read all models, and can join as any client or pose as the server at
{address}. For trying out on one machine only. `certifl deploy init` without `--insecure` writes
a secure one.

1. All machines install the same version of certifl: a wheel made in a checkout with
   `pip wheel --no-deps --wheel-dir dist .`, then
   `pip install "certifl-{version}-py3-none-any.whl[flower]"`.
2. The server: `certifl deploy server server/`.
3. Every client, 0 to {last}: `certifl deploy client client-N/ --data IMAGES`.
4. On the server's machine: `certifl deploy run study.toml --kit server/`.
"""

# The app that Flower distributes: two names in the installed package, and no dependencies.
#
# Flower would install an app's dependencies at every run. This one has none; certifl is installed
# where it runs.


_PROJECT = f"""\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "certifl-app"
version = "{__version__.partition("+")[0]}"
description = "Runs the installed certifl; nothing is installed for it."
license = "Apache-2.0"
requires-python = ">=3.11"
dependencies = []

[tool.flwr.app]
publisher = "certifl"

[tool.flwr.app.components]
serverapp = "certifl_app.server:app"
clientapp = "certifl_app.client:app"

[tool.flwr.app.config]
spec = ""
out = ""
share = "curve"
min-clients = 0
"""


def app_files() -> dict[str, bytes]:
    """The app's files by path."""
    half = "from certifl.deploy import {0}_app\n\napp = {0}_app.app\n"
    halves = {f"certifl_app/{name}.py": half.format(name) for name in ("client", "server")}
    files = {
        "pyproject.toml": _PROJECT,
        "certifl_app/__init__.py": '"""The apps of the installed package."""\n',
        **halves,
    }
    return {path: text.encode() for path, text in files.items()}
