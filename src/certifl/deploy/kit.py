"""What each party of a federation gets: certificates, keys, settings, scripts, a page to read."""

from __future__ import annotations

import re
import secrets
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tomli_w

from certifl.deploy import kittexts
from certifl.deploy.apps import app_files
from certifl.deploy.keeping import private_folder
from certifl.deploy.keys import Authority, node_key, write_secret
from certifl.deploy.running import private_files
from certifl.errors import InputError, SpecError, StoreMismatch
from certifl.outside import SPEC_BYTES, read_bytes, read_toml
from certifl.requests import CONNECTION, check_party
from certifl.store.atomic import write_bytes, write_text

__all__ = ["Connection", "client_name", "init", "load_connection", "renew"]

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
        write_text(party / "flower.env", kittexts.environment_file())
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
    write_text(folder / "README.md", kittexts.readme(connection.address, clients, insecure))
    return parties


def _client(place: Path, client: int, home: Path, insecure: bool) -> None:
    if not insecure:
        node_key(place / "node.key", home / "clients" / f"{client_name(client)}.pub")
    write_text(place / "client.toml", kittexts.client_settings(client))
    _scripts(place, "client", client_name(client))


def _server(home: Path, connection: Connection) -> None:
    for name, content in app_files().items():
        write_bytes(home / "app" / name, content)
    flower = home / "flower"
    authority = None if connection.insecure else (home / "ca.crt").resolve()
    local = f"{'[::1]' if connection.listen == '::' else '127.0.0.1'}:{connection.port}"
    write_text(flower / "config.toml", kittexts.flower_connection(local, authority))
    _scripts(home, "server", "server")


def _scripts(place: Path, command: str, name: str) -> None:
    script = place / "start.sh"
    write_text(script, kittexts.start_script(command))
    script.chmod(0o700)
    text = kittexts.unit(command, name, shlex.quote(str(place.resolve())))
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
