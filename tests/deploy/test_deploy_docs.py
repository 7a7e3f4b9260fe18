"""docs/deploy.md, "your first federation on two machines", word by word in two namespaces."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="Flower is not installed: pip install certifl[flower]")

from certifl.runs.folder import RunFolder
from deploy_network import Running

ROOT = Path(__file__).resolve().parents[2]
FIRST, SECOND = "192.168.77.1", "192.168.77.2"


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@contextlib.contextmanager
def two_machines() -> Iterator[tuple[str, str]]:
    """Two network namespaces, joined by a cable; nothing else of the machine is touched."""
    names = (f"certifl-a{os.getpid()}", f"certifl-b{os.getpid()}")
    ends = (f"cfa{os.getpid()}", f"cfb{os.getpid()}")
    try:
        for name in names:
            _ip("netns", "add", name)
        _ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for name, end, address in zip(names, ends, (FIRST, SECOND), strict=True):
            _ip("link", "set", end, "netns", name)
            _ip("-n", name, "address", "add", f"{address}/24", "dev", end)
            _ip("-n", name, "link", "set", end, "up")
            _ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def _possible() -> str | None:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return "two machines are two network namespaces, which need root and the command ip"
    probe = subprocess.run(["ip", "netns", "add", "certifl-probe"], capture_output=True, text=True)
    if probe.returncode != 0:
        return f"network namespaces cannot be made here: {probe.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", "certifl-probe"], check=True)
    return None


def steps() -> list[str]:
    text = (ROOT / "docs" / "deploy.md").read_text()
    section = text.split("## Your first federation on two machines")[1].split("\n## ")[0]
    blocks = re.findall(r"^```\w*\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


class Machine:
    """A namespace and a home folder; `certifl` is the one under test."""

    def __init__(self, namespace: str, home: Path) -> None:
        self.namespace, self.home = namespace, home
        home.mkdir()
        self.started: list[Running] = []

    def start(self, line: str, log: str) -> Running:
        command, *arguments = shlex.split(line)
        assert command == "certifl"
        log_file, folder = self.home / log, self.home
        running = Running(log_file, *arguments, folder=folder, namespace=self.namespace)
        self.started.append(running)
        return running

    def run(self, line: str) -> str:
        outcome = self.start(line, f"{len(self.started)}.out").result()
        outcome.fine()
        return outcome.out

    def stop(self) -> None:
        for running in reversed(self.started):
            running.stop(signal.SIGINT)


@pytest.mark.xdist_group("federation")  # with the tests that fork from the same process
@pytest.mark.slow
def test_the_first_federation_word_by_word(tmp_path):
    why_not = _possible()
    if why_not is not None:
        pytest.skip(why_not)
    init, copy, serve, first_client, second_client, status, study = steps()
    with two_machines() as (a, b):
        first, second = Machine(a, tmp_path / "first"), Machine(b, tmp_path / "second")
        try:
            shutil.copy(ROOT / "examples" / "deploy" / "digits.toml", first.home)
            first.run(init)
            scp, _, folder, target = copy.split()
            assert (scp, target) == ("scp", f"{SECOND}:")
            shutil.copytree(first.home / folder, second.home / Path(folder).name)
            server = first.start(serve, "server.out")  # clients wait for it until it answers
            clients = [first.start(first_client, "c.out"), second.start(second_client, "c.out")]
            server.prints("2 clients may connect", 240)
            for client in clients:
                client.prints("has accepted this client", 240)
            assert first.run(status).count("online") == 2
            assert "Report:" in first.run(study)
            folder = RunFolder(first.home / "first")
            assert folder.complete()
            assert "shared curves only: for each radius" in folder.report.read_text()
            assert list(second.home.glob("client-1/studies/*/certificates.parquet"))
            assert not list(first.home.glob("federation/client-1/studies"))
        finally:
            second.stop()
            first.stop()
