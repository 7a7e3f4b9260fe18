"""The texts of a kit: scripts, units, settings with their meaning, the page for all parties."""

from __future__ import annotations

from pathlib import Path

from certifl._version import __version__

__all__ = [
    "client_settings",
    "environment_file",
    "flower_connection",
    "readme",
    "start_script",
    "unit",
]


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
