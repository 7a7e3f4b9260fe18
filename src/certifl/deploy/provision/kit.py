"""What each party of a federation gets: certificates, keys, settings, scripts, a page to read."""

from __future__ import annotations

import re
import secrets
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tomli_w

from certifl._version import __version__
from certifl.deploy.client.state import private_folder
from certifl.deploy.provision.keys import Authority, node_key, write_secret
from certifl.deploy.transport.flower_processes import private_files
from certifl.errors import InputError, SpecError, StoreMismatch
from certifl.path_checks import CONNECTION, check_party
from certifl.runs.atomic import write_bytes, write_text
from certifl.safe_io import SPEC_BYTES, read_bytes, read_toml

_LOCAL = ("localhost", "127.0.0.1", "::1")
_FILE = CONNECTION


@dataclass(frozen=True)
class Connection:
    """How a party's folder says where the server is.

    Attributes:
        host, port: of the server, as clients reach it.
        insecure: neither encryption nor keys.
        listen: address at which the server listens; its own folder alone uses it.
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
        """From HOST:PORT.

        Raises:
            InputError: it is not of this form.
        """
        host, _, port = text.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        number = int(port) if re.fullmatch(r"[0-9]{1,5}", port) else 0
        if not host or not 1 <= number <= 65535:
            raise InputError(
                f"--server must be HOST:PORT, such as fl.example.org:9900; got {text!r}."
            )
        return Connection(host, number, insecure, "::" if ":" in host else "0.0.0.0")

    def save(self, folder: Path) -> None:
        """Write it into a party's folder."""
        values = {"server": self.address, "insecure": self.insecure, "listen": self.listen}
        write_text(folder / _FILE, tomli_w.dumps(values))


def load_connection(folder: Path) -> Connection:
    """Where the server is, as a party's folder says.

    Raises:
        SpecError: the folder is none of a party's, or its file is wrong.
    """
    check_party(folder)
    try:
        held = read_toml(folder / _FILE)
        made = Connection.parse(str(held["server"]), held.get("insecure", False) is True)
        return Connection(made.host, made.port, made.insecure, str(held.get("listen", "0.0.0.0")))
    except (OSError, KeyError, InputError) as error:
        raise SpecError(f"{folder / _FILE} is wrong: {error}") from error


def client_name(client: int) -> str:
    """A client's folder, and the name of its node."""
    return f"client-{client}"


def init(
    folder: Path, clients: int, server: str, insecure: bool, names: Sequence[str] = ()
) -> list[Path]:
    """Write the folders of all parties.

    Args:
        folder: new or empty.
        clients: how many.
        server: HOST:PORT, as clients reach the server.
        insecure: without certificates and keys.
        names: further names and addresses of the server.

    Returns:
        The parties' folders, the server's first.

    Raises:
        InputError: the address is none, or the folder a file. StoreMismatch: the folder holds
            something.
    """
    connection = Connection.parse(server, insecure)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: give a new folder.")
    if folder.is_dir() and any(folder.iterdir()):
        raise StoreMismatch(
            f"{folder} is not empty. Choose a new folder: keys that parties have are not replaced."
        )
    if clients < 1:
        raise InputError("A federation needs at least one client: --clients 2.")
    with private_files():  # certificates, keys, and later states and votes lie here
        return _written(folder, clients, connection, names)


def _written(
    folder: Path, clients: int, connection: Connection, names: Sequence[str]
) -> list[Path]:
    home, insecure = folder / "server", connection.insecure
    parties = [home, *(folder / client_name(client) for client in range(clients))]
    for party in parties:
        private_folder(party)
        connection.save(party)
        write_text(party / "flower.env", environment_file())
    (home / "clients").mkdir()
    write_secret(home / "superexec.secret", secrets.token_bytes(32))
    if not insecure:
        authority = Authority.new()
        authority.save(folder / "authority.key", folder / "ca.crt")
        hosts = list(dict.fromkeys([connection.host, *names, *_LOCAL]))
        authority.server(hosts, home / "server.key", home / "server.crt")
        for party in parties:
            write_bytes(party / "ca.crt", read_bytes(folder / "ca.crt", SPEC_BYTES))
    for client in range(clients):
        _client(folder / client_name(client), client, home, insecure)
    _server(home, connection)
    write_text(folder / "README.md", readme(connection.address, clients, insecure))
    return parties


def _client(place: Path, client: int, home: Path, insecure: bool) -> None:
    if not insecure:
        node_key(place / "node.key", home / "clients" / f"{client_name(client)}.pub")
    write_text(place / "client.toml", client_settings(client))
    _scripts(place, "client", client_name(client))


def _server(home: Path, connection: Connection) -> None:
    for name, content in app_files().items():
        write_bytes(home / "app" / name, content)
    flower = home / "flower"
    authority = None if connection.insecure else (home / "ca.crt").resolve()
    local = f"{'[::1]' if connection.listen == '::' else '127.0.0.1'}:{connection.port}"
    write_text(flower / "config.toml", flower_connection(local, authority))
    _scripts(home, "server", "server")


def _scripts(place: Path, command: str, name: str) -> None:
    script = place / "start.sh"
    write_text(script, start_script(command))
    script.chmod(0o700)
    text = unit(command, name, shlex.quote(str(place.resolve())))
    write_text(place / f"certifl-{name}.service", text)


def renew(folder: Path, names: Sequence[str] = ()) -> Path:
    """A new certificate for the server, signed by the authority that clients know.

    Args:
        folder: as `init` wrote it, with the authority's key.
        names: further names and addresses of the server.

    Raises:
        InputError: the authority's key is not there.
    """
    home = folder / "server"
    authority = Authority.load(folder / "authority.key", folder / "ca.crt")
    hosts = list(dict.fromkeys([load_connection(home).host, *names, *_LOCAL]))
    authority.server(hosts, home / "server.key", home / "server.crt")
    return home / "server.crt"


# The texts of a kit: scripts, units, settings with their meaning, the page for all parties.


def environment_file() -> str:
    """What Flower's processes are told; the commands set it themselves."""
    return (
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1\n"
        "FLWR_TELEMETRY_ENABLED=0\n"
        "FLWR_DISABLE_UPDATE_CHECK=1\n"
        "RAY_USAGE_STATS_ENABLED=0\n"
    )


def flower_connection(local: str, authority: Path | None) -> str:
    """For Flower's own command line, on the server's machine."""
    secured = "insecure = true" if authority is None else f'root-certificates = "{authority}"'
    return (
        "[superlink]\n"
        'default = "certifl"\n\n'
        "[superlink.certifl]\n"
        f'address = "{local}"\n'
        f"{secured}\n"
    )


def start_script(command: str) -> str:
    """Starts a party from its own folder."""
    return (
        "#!/bin/sh\n"
        "# Starts this party; further options may follow.\n"
        'cd "$(dirname "$0")" || exit 1\n'
        f'exec certifl deploy {command} . "$@"\n'
    )


def unit(command: str, name: str, place: str) -> str:
    """A systemd unit; PATH must lead to the environment that certifl is installed in."""
    return f"""\
[Unit]
Description=certifl {name}
After=network-online.target
Wants=network-online.target

[Service]
# Correct both paths to where this folder and certifl are on this machine.
WorkingDirectory={place}
EnvironmentFile={place}/flower.env
ExecStart=/usr/bin/env certifl deploy {command} {place}
Restart=on-failure
RestartSec=10
NoNewPrivileges=true
PrivateTmp=true
ProtectSystem=full

[Install]
WantedBy=multi-user.target
"""


def client_settings(client: int) -> str:
    """A party's settings, each with what it means."""
    return f"""\
# What this party decides for itself. It wins over what the server asks for.

client = {client}           # its number in the study
data = ""            # its images: a folder with train and test parts (or --data PATH)
# label_column = "finding"   # which column is the label, where the images are a table with several
# dealt = true       # data is a whole data set that all have; the study deals out shares of it
# classes = ["cat", "dog", "horse"]   # all classes of the study, in order. The server gets these
#                    names; without them it gets numbers, and names in the images' files stay here

share = "curve"      # the most that leaves of its certificates:
                     #   "none": only that it has finished
                     #   "curve": numbers of certified images at fixed radii, and their average
                     #   "rows": every test image's certificate, with label and position
# perturbation = {{ family = "rotation", sigma = "9deg" }}   # its own, where the study allows it
networks = []        # networks as module:function that a study may name; code runs here

# max_epsilon = 8.0  # the most it spends of its images' privacy, all studies together; studies
                     #   in which clients add no noise are refused then
# delta = 1e-5       # at which that is counted; left out: the study's

device = "auto"      # or "cpu", "cuda:0"
threads = 1          # of torch; 0 = as torch chooses. One gives the same bits everywhere
"""


def readme(address: str, clients: int, insecure: bool) -> str:
    """The page for everybody."""
    return (_README_INSECURE if insecure else _README).format(
        address=address, clients=clients, last=clients - 1, version=__version__
    )


_README = """\
# A federation of {clients} clients

| folder | who gets it | secret in it |
|---|---|---|
| `server/` | whoever runs the server, {address} | `server.key`, `superexec.secret` |
| `client-0/` ... `client-{last}/` | one party each | `node.key` |
| `authority.key` | nobody: keep it off line, for renewing the server's certificate | all of it |

Hand each folder over on a safe way, then delete it here. A party that wants to make its own key
runs `ssh-keygen -t ecdsa -b 384 -N "" -f node.key` and sends `node.key.pub`, which goes to
`server/clients/client-N.pub`.

## Who runs what

1. Everybody installs the same version of certifl. No package index serves it yet: whoever runs the
   server makes a wheel in a checkout, `pip wheel --no-deps --wheel-dir dist .`, and hands it over
   with each folder. There: `pip install "certifl-{version}-py3-none-any.whl[flower]"`.
2. The server: `certifl deploy server server/`.
3. Every party: `certifl deploy client client-N/ --data IMAGES` (or `data` in `client.toml`).
4. On the server's machine: `certifl deploy run study.toml --kit server/`.

`start.sh` does 2 and 3; `certifl-*.service` is a systemd unit for it. Clients call the server, so
only the server needs an open port. `certifl deploy status server/` says who is there.

All clients count equally in an average, however many images each has, unless the study says
`weighting = "size"` in `[algorithm]`.

## What never leaves whose machine

- A party's images, labels, and positions of images: they stay with it. So do its personal model,
  its momentum and other states, its certificates of single images (unless `share = "rows"` in its
  own `client.toml`), the votes behind them, and `node.key`.
- What leaves a party each round: its model (unless the algorithm keeps it: `local`, fine-tuning),
  the number of its training images, loss and accuracy on its training images. A model tells
  something of the images it was trained on; `[privacy]` in the study bounds how much.
- When it joins, a party says how large its images are and how many it trains on. Names of classes
  leave it only where it lists them as `classes` in its `client.toml`.
- What leaves a party at the end: with `share = "curve"` numbers of certified test images at fixed
  radii and their average radius; with "none" only that it has finished.
- A server cannot bring code to a client: messages are answered by the certifl installed there.
  Runs are started, and keys admitted, on the server's own machine alone.
- It answers each round of a study once. `certifl deploy log client-N/` lists all that has left it.

The server's certificate ends after 825 days: `certifl deploy renew THIS_FOLDER` writes a new
`server/server.crt` and `server.key` with the authority's key; clients need nothing new.
"""

_README_INSECURE = """\
# A federation of {clients} clients WITHOUT ENCRYPTION AND WITHOUT KEYS

Anybody on the network can read all models, and can join as any client or pose as the server at
{address}. For trying out on one machine only. `certifl deploy init` without `--insecure` writes
a safe one.

1. Everybody installs the same version of certifl: a wheel made in a checkout with
   `pip wheel --no-deps --wheel-dir dist .`, then
   `pip install "certifl-{version}-py3-none-any.whl[flower]"`.
2. The server: `certifl deploy server server/`.
3. Every party, 0 to {last}: `certifl deploy client client-N/ --data IMAGES`.
4. On the server's machine: `certifl deploy run study.toml --kit server/`.
"""

# The thin app that Flower carries: two names in the installed package, and no dependencies.
#
# Flower would install what an app depends on, at every run, beside what is there. This one depends
# on nothing; certifl is installed where it runs.


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
        "certifl_app/__init__.py": '"""Names what the installed package holds."""\n',
        **halves,
    }
    return {path: text.encode() for path, text in files.items()}
