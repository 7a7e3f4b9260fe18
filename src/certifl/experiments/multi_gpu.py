"""Certification shared over several devices of one machine, a process each.

Votes do not depend on where the work is cut, so a process takes every k-th client, casts its votes
and saves them as a single process would. The run then concludes from the saved votes.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import queue
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from certifl.certification.network import choose_device
from certifl.errors import CertiflError, InputError, WorkError
from certifl.progress import StageCallback
from certifl.study.certify import certify_clients
from certifl.study.opened_run import OpenRun
from certifl.study.setup import code_folder


@dataclass(frozen=True)
class _Share:
    run: Path
    data_dir: Path | None
    device: str
    number: int
    of: int
    threads: int
    code: Path | None


def device_names(text: str) -> tuple[str, ...]:
    """Devices named in one option, "cuda:0,cuda:1"; all must be of one kind.

    Raises:
        InputError: no device, one that is not here, or devices of different kinds, whose votes
            would be votes of differently rounding networks.
    """
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise InputError("device is empty; give auto, cpu, cuda, or several as cuda:0,cuda:1.")
    kinds = {_kind(choose_device(name)) for name in names}
    if len(kinds) > 1:
        raise InputError(
            f"The devices {text} are of different kinds ({', '.join(sorted(kinds))}); the clients "
            "of one study are certified on one kind."
        )
    return names


def _kind(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def cast_votes(
    run: OpenRun, data_dir: Path | None, devices: Sequence[str], report: StageCallback | None
) -> None:
    """Cast and save the votes of all clients of a trained run, one process per device.

    Raises:
        WorkError: a process failed; the votes saved so far are kept.
    """
    context = multiprocessing.get_context("spawn")
    messages: Any = context.Queue()
    threads = torch.get_num_threads()
    folder = code_folder(run.spec.model.name)
    code = None if folder is None else Path(folder)
    shares = [
        _Share(run.path, data_dir, name, number, len(devices), threads, code)
        for number, name in enumerate(devices)
    ]
    processes = [context.Process(target=_cast, args=(share, messages)) for share in shares]
    with _running(processes):
        _listen(processes, messages, report)
    if any(process.exitcode for process in processes):
        raise WorkError(
            "A process that cast votes ended early. The votes saved so far are kept; repeat the "
            "command, with fewer devices if memory ran out."
        )


@contextlib.contextmanager
def _running(processes: Sequence[BaseProcess]) -> Iterator[None]:
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
            process.join()


def _listen(processes: Sequence[BaseProcess], messages: Any, report: StageCallback | None) -> None:
    """Pass progress on until all processes have ended, or one has failed."""
    progress: dict[int, tuple[int, int]] = {}
    while any(p.is_alive() for p in processes) and not any(p.exitcode for p in processes):
        with contextlib.suppress(queue.Empty):
            number, done, total, failure = messages.get(timeout=0.2)
            if failure:
                raise WorkError(failure)
            progress[number] = (done, total)
            if report is not None and len(progress) == len(processes):
                sums = [sum(part) for part in zip(*progress.values(), strict=True)]
                report("certifying", sums[0], sums[1], "votes at most")


def _cast(share: _Share, messages: Any) -> None:
    """One process: the votes of every client of this share."""
    torch.set_num_threads(share.threads)
    messages.put((share.number, 0, 0, ""))  # clients that certify nothing report no more

    def send(_what: str, done: int, total: int, _unit: str) -> None:
        messages.put((share.number, done, total, ""))

    try:
        run = OpenRun(share.run, share.data_dir, share.code)
        certify_clients(run, share.device, send, (share.number, share.of))
    except CertiflError as error:
        messages.put((share.number, 0, 0, str(error)))
        raise SystemExit(1) from error
