"""A server and clients as processes, forked from one that has torch and Flower loaded.

Flower's own processes (SuperLink, SuperNode) are forks as well, unless `anew` is asked for: then
they are new interpreters, as outside of tests. `quick_flower/sitecustomize.py` shortens what they
wait for: the poll of a SuperNode and the time until a silent node is offline.
"""

import contextlib
import ctypes
import functools
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from multiprocessing.forkserver import ForkServer
from pathlib import Path
from typing import IO
from unittest import mock

from tiny_study import Outcome

__all__ = ["Federation", "Running", "free_port", "quick_flower", "until"]

_QUICK = Path(__file__).with_name("quick_flower")
_FORKS = ForkServer()  # not the one that other tests and workers of a training share
_CERTIFL = ("client.process", "server.coordinator", "gate")
_FLOWER = ("supernode.cli", "superlink.cli.flower_superlink", "superlink.main")
_FORKS.set_forkserver_preload(
    ["torch._dynamo", "uvicorn", *(f"certifl.deploy.{name}" for name in _CERTIFL)]
    + [f"flwr.{name}" for name in _FLOWER]
)


def quick_flower() -> dict[str, str]:
    """Variables with which Flower's processes wait less."""
    present = filter(None, [os.environ.get("PYTHONPATH")])
    return {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(_QUICK), *present]),
        "FLWR_TELEMETRY_ENABLED": "0",
    }


_NAMESPACE = "CERTIFL_TEST_NAMESPACE"


def _command(
    log: Path, arguments: tuple[str, ...], anew: bool, folder: Path | None, namespace: str
) -> None:
    """The command line in a forked process, its output in a file; reports have no figures."""
    from certifl import report
    from certifl.cli import main
    from certifl.deploy import flower
    from certifl.deploy.client import process

    _write_to(log)
    os.environ |= {**quick_flower(), _NAMESPACE: namespace}
    _enter(namespace)
    os.chdir(folder or Path.cwd())
    process._FIRST_WAIT = process._LONGEST_WAIT = 0.5
    flower._HEARTBEAT_SECONDS = 1.5
    if not anew:
        forkserver._forkserver.ensure_running = lambda: None  # it is this process's own
        multiprocessing.current_process().daemon = False  # it may have children
        flower.subprocess = mock.Mock(wraps=subprocess, Popen=_Fork)
    report.write_report = functools.partial(report.write_report, figures=False)
    sys.argv = ["certifl", *arguments]
    main()


def _write_to(log: Path) -> None:
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115


def _enter(namespace: str) -> None:
    """Work on the machine that a network namespace stands for; "" = this one."""
    if namespace:
        with open(f"/run/netns/{namespace}") as handle:
            assert ctypes.CDLL(None, use_errno=True).setns(handle.fileno(), 0) == 0


def _flower(code: str, arguments: list[str], log: Path, environment: dict[str, str]) -> None:
    """What a new interpreter would do with `-c`, without importing Flower again."""
    os.setsid()
    _write_to(log)
    log.with_suffix(".pid").write_text(f"{os.getpid()}")
    os.environ |= environment
    _enter(environment[_NAMESPACE])
    sys.argv = ["-c", *arguments]
    exec(code, {"__name__": "__main__"})


class _Fork:
    """In the place of `subprocess.Popen`, for one of Flower's processes."""

    def __init__(
        self, command: list[str], stdout: IO[bytes], env: dict[str, str], **_options: object
    ) -> None:
        _python, _c, code, *arguments = command
        self._process = multiprocessing.get_context("forkserver").Process(
            target=_flower, args=(code, arguments, Path(stdout.name), env)
        )
        self._process.start()

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self._process.pid is not None and self._process.is_alive():
            os.kill(self._process.pid, number)

    def wait(self, timeout: float | None = None) -> None:
        self._process.join(timeout)
        if self._process.is_alive():
            raise subprocess.TimeoutExpired("Flower", timeout or 0.0)

    def kill(self) -> None:
        self._process.kill()


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
    """A command under way; its output goes to a file.

    Args:
        log: this file. arguments: of `certifl`.
        anew: Flower's own processes are new interpreters.
        folder: to work in. namespace: of the network that it is in.
    """

    def __init__(
        self,
        log: Path,
        *arguments: str | Path,
        anew: bool = False,
        folder: Path | None = None,
        namespace: str = "",
    ) -> None:
        self.log, self._arguments = log, tuple(map(str, arguments))
        log.touch()
        self.process = multiprocessing.get_context("forkserver").Process(
            target=_command, args=(log, self._arguments, anew, folder, namespace), daemon=True
        )
        forks = mock.patch.object(
            forkserver, "connect_to_new_process", _FORKS.connect_to_new_process
        )
        with forks, mock.patch.dict(os.environ, quick_flower()):
            self.process.start()

    @property
    def pid(self) -> int:
        return self.process.pid

    def flower(self) -> list[int]:
        noted = Path(self._arguments[2]).glob("log/*.pid")
        return [*children(self.pid), *(int(path.read_text()) for path in noted)]

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
    def __init__(self, folder: Path, clients: int, *options: str) -> None:
        from certifl.deploy.bundle import init

        self.folder, self.bundle = folder, folder / "bundle"
        self.port = free_port()
        init(self.bundle, clients, f"127.0.0.1:{self.port}", "--insecure" in options)
        self.running: list[Running] = []

    def start(self, name: str, *arguments: str | Path, anew: bool = False) -> Running:
        made = Running(self.folder / f"{name}.out", "deploy", *arguments, anew=anew)
        self.running.append(made)
        return made

    def last(self, name: str) -> Running:
        return next(one for one in reversed(self.running) if one.log.stem == name)

    def server(self, anew: bool = False) -> Running:
        return self.start("server", "server", self.bundle / "server", anew=anew)

    def client(self, number: int, anew: bool = False) -> Running:
        folder, data = self.bundle / f"client-{number}", ("--data", "digits", "--dealt")
        return self.start(f"client-{number}", "client", folder, *data, anew=anew)

    def study(self, spec: Path, out: Path, *options: str) -> Running:
        made = ("run", spec, "--kit", self.bundle / "server", "--out", out, *options)
        log = out.with_suffix(".out")
        log.unlink(missing_ok=True)
        started = Running(log, "deploy", *made)
        self.running.append(started)
        return started

    @contextlib.contextmanager
    def ended(self) -> "Iterator[Federation]":
        try:
            yield self
        finally:
            for one in self.running:
                if one.process.is_alive():
                    one.process.terminate()
            for one in self.running:
                one.stop()


def children(pid: int) -> list[int]:
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
