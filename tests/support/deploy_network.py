"""A server and clients as processes of their own, on loopback."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tiny_study import Outcome, environment

__all__ = ["Federation", "Running", "free_port", "until"]


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
    """A command under way; its output is kept in a file."""

    def __init__(self, log: Path, *arguments: str | Path) -> None:
        self.log = log
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "certifl", *map(str, arguments)],
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment(),
            )

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def says(self, text: str, seconds: float = 90.0) -> None:
        until(
            lambda: text in self.said or self.process.poll() is not None, seconds, f"for {text!r}"
        )
        assert text in self.said, self.said

    def kill(self) -> None:
        """As a power cut does."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.kill()

    def result(self, seconds: float = 150.0) -> Outcome:
        code = self.process.wait(seconds)
        return Outcome(code, self.said, self.said)


class Federation:
    """A kit, its server and its clients."""

    def __init__(self, place: Path, clients: int, *options: str) -> None:
        from certifl.deploy.provision.kit import init

        self.place, self.kit = place, place / "kit"
        self.port = free_port()
        init(self.kit, clients, f"127.0.0.1:{self.port}", "--insecure" in options)
        self.running: list[Running] = []

    def start(self, name: str, *arguments: str | Path) -> Running:
        made = Running(self.place / f"{name}.out", "deploy", *arguments)
        self.running.append(made)
        return made

    def server(self) -> Running:
        return self.start("server", "server", self.kit / "server")

    def client(self, number: int) -> Running:
        folder = self.kit / f"client-{number}"
        return self.start(f"client-{number}", "client", folder, "--data", "digits", "--dealt")

    def study(self, spec: Path, out: Path, *options: str) -> Running:
        made = ("run", spec, "--kit", self.kit / "server", "--out", out, *options)
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
                if one.process.poll() is None:
                    one.process.send_signal(signal.SIGTERM)
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
