"""Flower's processes: their environment, their logs, their lives."""

from __future__ import annotations

import contextlib
import ctypes
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

from certifl.errors import WorkError

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
def private_files() -> Iterator[None]:
    """Files and folders made meanwhile, also by processes started here, are their owner's alone.

    They are so from their beginning: permissions taken away afterwards come too late.
    """
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def environment(home: Path) -> dict[str, str]:
    """Nothing is installed at run time, nobody is called home, Flower's files stay in a folder."""
    return {**_QUIET, "FLWR_HOME": str(home.resolve())}


def quiet(home: Path) -> None:
    """Give this very process that environment, before Flower is used."""
    os.environ.update(environment(home))
    direct()


def direct(*hosts: str) -> None:
    """Reach these hosts, and this machine itself, past any proxy of the environment.

    A proxy would be asked for the processes on this very machine, and told their secrets; and the
    server's certificate is checked on a direct connection before anything is sent.
    """
    for name in ("NO_PROXY", "no_proxy"):
        known = [host for host in os.environ.get(name, "").split(",") if host.strip()]
        os.environ[name] = ",".join(dict.fromkeys([*known, *_THIS_MACHINE, *hosts]))


def give_memory_back() -> None:
    """Let this process return large blocks to the system as soon as they are free.

    Left to itself, glibc keeps blocks of the size of a layer for later, and between tensors that
    come and go it never finds a use for half of them. Where there is no glibc, nothing happens.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _LARGE)


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def tail(log: Path, lines: int = 15) -> str:
    """The end of a log."""
    with contextlib.suppress(OSError):
        return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
    return ""


class Child:
    """A process of Flower's that ends with this one.

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
                start_new_session=True,  # Ctrl-C is for the parent, which ends it in order
            )

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    @property
    def ended(self) -> int | None:
        """Its exit code; None while it lives."""
        return self._process.poll()

    def stop(self) -> None:
        """End it, in order if it can."""
        if self.ended is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(_TERM_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


def patient(seconds: float) -> RetryInvoker:
    """Repeats calls for so long while the other side is not there."""
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
    """Tells Flower every few seconds that a piece of work is alive.

    Args:
        beat: one heartbeat; False where Flower does not want the work any more.
    """

    _SECONDS = 15.0

    def __init__(self, beat: Callable[[], bool]) -> None:
        self._beat = beat
        self._stop = threading.Event()
        self.refused = False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(httpx.HTTPError, WorkError):  # seen where it matters
                if not self._beat():
                    self.refused = True
                    return
            self._stop.wait(self._SECONDS)

    @contextlib.contextmanager
    def beating(self) -> Iterator[Heartbeat]:
        """Beat meanwhile."""
        self._thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            self._thread.join(timeout=2.0)


# Flower's SuperLink with a gate: from other machines, nothing but what clients need.
#
# A SuperLink answers everybody on one port: clients, but also whoever starts runs or registers
# keys.
# Behind this gate the latter works on the server's own machine alone.


_FOR_ALL = ("/v1/fleet/", "/health")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Gate:
    """Refuses what does not come from this machine and is none of a client's requests.

    Args:
        app: the application behind the gate.
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] == "lifespan" or allowed(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            plain = [(b"content-type", b"text/plain")]
            await send({"type": "http.response.start", "status": 403, "headers": plain})
            await send({"type": "http.response.body", "body": b"not from this machine"})


def allowed(scope: Scope) -> bool:
    """Whether a request may pass: a client's, or one of this machine."""
    path = str(scope.get("path", ""))
    if ".." not in path and path.startswith(_FOR_ALL):
        return True
    address = (scope.get("client") or ("",))[0]
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = getattr(found, "ipv4_mapped", None)
    return (mapped or found).is_loopback


def main() -> None:
    """Run a SuperLink with the arguments of `flower-superlink`."""
    import uvicorn
    from flwr.superlink.main import create_app

    # The package has a function of the module's name.
    flower = importlib.import_module("flwr.superlink.cli.flower_superlink")

    config = flower._parse_superlink_lifespan_config()
    app = Gate(create_app(config, flower.SuperLinkLifespan))
    uvicorn.run(
        app=app,
        host=config.host,
        port=config.port,
        log_level="warning",
        access_log=False,
        proxy_headers=False,  # nobody may say that he comes from elsewhere
        ssl_keyfile=config.ssl_keyfile,
        ssl_certfile=config.ssl_certfile,
        workers=1,
    )
