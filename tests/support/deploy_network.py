"""A server and clients as processes on loopback, forked from one that has torch and Flower loaded.

Flower's own processes (SuperLink, SuperNode) are new interpreters; `quick_flower/sitecustomize.py`
shortens what they wait for: the poll of a SuperNode and the time until a silent node is offline.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from multiprocessing.forkserver import ForkServer
from pathlib import Path
from unittest import mock

from tiny_study import Outcome

__all__ = ["Federation", "Running", "free_port", "quick_flower", "until"]

_FORKS = ForkServer()  # not the one that other tests and workers of a training share
_FORKS.set_forkserver_preload(
    ["torch._dynamo", "certifl.deploy.client.process", "certifl.deploy.server.coordinator"]
)


def quick_flower() -> dict[str, str]:
    """Variables with which Flower's processes wait less."""
    return {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(
            [
                str(Path(__file__).with_name("quick_flower")),
                *filter(None, [os.environ.get("PYTHONPATH")]),
            ]
        ),
        "FLWR_TELEMETRY_ENABLED": "0",
    }


def _command(log: Path, arguments: tuple[str, ...]) -> None:
    """The command line in a forked process, its output in a file."""
    from certifl.cli import main

    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.environ.update(quick_flower())
    sys.argv = ["certifl", *arguments]
    main()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(holds: Callable[[], object], seconds: float = 90.0, what: str = "") -> None:
    ends = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < ends, f"waited {seconds:g} s in vain {what}"
        time.sleep(0.1)


class Running:
    """A command under way; its output goes to a file."""

    def __init__(self, log: Path, *arguments: str | Path) -> None:
        self.log = log
        log.touch()
        self.process = multiprocessing.get_context("forkserver").Process(
            target=_command, args=(log, tuple(map(str, arguments))), daemon=True
        )
        with mock.patch.object(
            forkserver, "connect_to_new_process", _FORKS.connect_to_new_process
        ):
            self.process.start()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def prints(self, text: str, seconds: float = 90.0) -> None:
        until(lambda: text in self.output or not self.process.is_alive(), seconds, f"for {text!r}")
        assert text in self.output, self.output

    def kill(self) -> None:
        """As a power cut does."""
        self.process.kill()
        self.process.join()

    def stop(self, number: int = signal.SIGTERM) -> None:
        if self.process.is_alive():
            os.kill(self.pid, number)
            self.process.join(20)
        if self.process.is_alive():
            self.kill()

    def result(self, seconds: float = 240.0) -> Outcome:
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"no end within {seconds:g} s: {self.output}"
        return Outcome(self.process.exitcode, self.output, self.output)


class Federation:
    """A provisioning bundle, its server and its clients."""

    def __init__(self, folder: Path, clients: int, *options: str) -> None:
        from certifl.deploy.provision.bundle import init

        self.folder, self.bundle = folder, folder / "bundle"
        self.port = free_port()
        init(self.bundle, clients, f"127.0.0.1:{self.port}", "--insecure" in options)
        self.running: list[Running] = []

    def start(self, name: str, *arguments: str | Path) -> Running:
        made = Running(self.folder / f"{name}.out", "deploy", *arguments)
        self.running.append(made)
        return made

    def last(self, name: str) -> Running:
        """The process of this name that was started last."""
        return next(one for one in reversed(self.running) if one.log.stem == name)

    def server(self) -> Running:
        return self.start("server", "server", self.bundle / "server")

    def client(self, number: int) -> Running:
        folder = self.bundle / f"client-{number}"
        return self.start(f"client-{number}", "client", folder, "--data", "digits", "--dealt")

    def study(self, spec: Path, out: Path, *options: str) -> Running:
        made = ("run", spec, "--kit", self.bundle / "server", "--out", out, *options)
        log = out.with_suffix(".out")
        log.unlink(missing_ok=True)
        started = Running(log, "deploy", *made)
        self.running.append(started)
        return started

    @contextlib.contextmanager
    def ended(self) -> Iterator[Federation]:
        try:
            yield self
        finally:
            for one in self.running:
                if one.process.is_alive():
                    one.process.terminate()
            for one in self.running:
                one.stop()


def children(pid: int) -> list[int]:
    """Processes that a process started."""
    listed = Path(f"/proc/{pid}/task/{pid}/children")
    with contextlib.suppress(OSError):
        return [int(child) for child in listed.read_text().split()]
    return []


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True
