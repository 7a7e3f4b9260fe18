"""Flower's processes: their environment, their logs, their lives."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import importlib
import ipaddress
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import httpx
from flwr.supercore.retry import RetryInvoker, exponential

from certifl.errors import StoreMismatch, WorkError
from certifl.runs.atomic import private_files

_QUIET = {
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
_THIS_MACHINE = ("localhost", "127.0.0.1", "::1")
_TERM_SECONDS = 10.0
_MMAP_THRESHOLD, _LARGE = -3, 1 << 18  # glibc's M_MMAP_THRESHOLD, in bytes


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Lock a folder of a federation for one process, whose files are private meanwhile."""
    with private_files(), (folder / ".lock").open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StoreMismatch(
                f"Another process is at work for {folder}. Server and clients are started once."
            ) from None
        yield


@contextlib.contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """An event that is set on SIGTERM or SIGINT."""
    stop = threading.Event()
    before = {
        number: signal.signal(number, lambda *_: stop.set())
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def environment(home: Path) -> dict[str, str]:
    """Variables that disable installing at run time and telemetry; Flower's files go to `home`."""
    return {**_QUIET, "FLWR_HOME": str(home.resolve())}


def configure_flower(home: Path) -> None:
    """Set this environment for the current process, before Flower is used."""
    os.environ.update(environment(home))
    bypass_proxies()


def bypass_proxies(*hosts: str) -> None:
    """Connect to these hosts, and to this machine, without a proxy of the environment.

    A proxy would see the secrets of processes on this machine, and the server's certificate is
    checked on a direct connection before anything is sent.
    """
    for name in ("NO_PROXY", "no_proxy"):
        present = [host for host in os.environ.get(name, "").split(",") if host.strip()]
        os.environ[name] = ",".join(dict.fromkeys([*present, *_THIS_MACHINE, *hosts]))


def return_freed_memory() -> None:
    """Let this process return large blocks to the system as soon as they are free.

    By default glibc caches blocks of the size of a layer, and never reuses half of them between
    short-lived tensors. Without glibc nothing happens.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _LARGE)


def free_port() -> int:
    """An unused port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def tail(log: Path, lines: int = 15) -> str:
    """The end of a log."""
    with contextlib.suppress(OSError):
        return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
    return ""


class Child:
    """One of Flower's processes; it ends with this one.

    Args:
        entry: "module:function" that it runs.
        arguments: of its command line.
        log: where its output goes.
        home: Flower's folder.
    """

    def __init__(self, entry: str, arguments: Sequence[str], log: Path, home: Path) -> None:
        module, _, function = entry.partition(":")
        code = (
            "import sys\n"
            "from flwr.supercore.app_utils import start_parent_process_monitor\n"
            f"start_parent_process_monitor({os.getpid()})\n"
            f"from {module} import {function}\n"
            f"sys.argv[0] = {function.replace('_', '-')!r}\n"
            f"{function}()\n"
        )
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        with log.open("ab") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code, *arguments],
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **environment(home)},
                start_new_session=True,  # Ctrl-C goes to the parent, which stops it
            )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def ended(self) -> int | None:
        """Its exit code; None while it runs."""
        return self._process.poll()

    def stop(self) -> None:
        """Terminate it, or else kill it."""
        if self.ended is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(_TERM_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


def retrying(seconds: float) -> RetryInvoker:
    """Repeat calls for this long while the other side does not answer."""
    return RetryInvoker(
        wait_gen_factory=lambda: exponential(max_delay=5),
        recoverable_exceptions=(
            httpx.ConnectError,
            httpx.ReadError,
            httpx.WriteError,
            httpx.RemoteProtocolError,
            httpx.TimeoutException,
        ),
        max_tries=None,
        max_time=seconds,
        should_giveup=lambda error: "certificate" in str(error).lower(),
    )


class Heartbeat:
    """Reports to Flower every few seconds that a task is alive.

    Args:
        beat: sends one heartbeat; False where Flower has dropped the task.
    """

    _SECONDS = 15.0

    def __init__(self, beat: Callable[[], bool]) -> None:
        self._beat = beat
        self._stop = threading.Event()
        self.refused = False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(httpx.HTTPError, WorkError):  # reported where it matters
                if not self._beat():
                    self.refused = True
                    return
            self._stop.wait(self._SECONDS)

    @contextlib.contextmanager
    def beating(self) -> Iterator[Heartbeat]:
        """Send heartbeats meanwhile."""
        self._thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            self._thread.join(timeout=2.0)


# Flower's SuperLink behind a gate: from other machines, only clients' requests pass.
#
# A SuperLink answers on one port: clients, but also anyone who starts runs or registers keys.
# Behind this gate the latter is possible on the server's own machine only.


_FOR_ALL = ("/v1/fleet/", "/health")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Gate:
    """Refuses requests from other machines that are not a client's.

    Args:
        app: the application behind the gate.
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] == "lifespan" or allowed(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            plain = [(b"content-type", b"text/plain")]
            await send({"type": "http.response.start", "status": 403, "headers": plain})
            await send({"type": "http.response.body", "body": b"not from this machine"})


def allowed(scope: Scope) -> bool:
    """Whether a request may pass: a client's, or one from this machine."""
    path = str(scope.get("path", ""))
    if ".." not in path and path.startswith(_FOR_ALL):
        return True
    address = (scope.get("client") or ("",))[0]
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = getattr(parsed, "ipv4_mapped", None)
    return (mapped or parsed).is_loopback


def main() -> None:
    """Run a SuperLink with the arguments of `flower-superlink`."""
    import uvicorn
    from flwr.superlink.main import create_app

    # The package has a function with the module's name.
    flower = importlib.import_module("flwr.superlink.cli.flower_superlink")

    config = flower._parse_superlink_lifespan_config()
    app = Gate(create_app(config, flower.SuperLinkLifespan))
    uvicorn.run(
        app=app,
        host=config.host,
        port=config.port,
        log_level="warning",
        access_log=False,
        proxy_headers=False,  # a client must not choose its own address
        ssl_keyfile=config.ssl_keyfile,
        ssl_certfile=config.ssl_certfile,
        workers=1,
    )
