"""What a run was computed on, for its record."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from certifl._version import __version__
from certifl.torch_env import is_small, one_thread

_ROUNDING = ("avx", "amx", "fma", "sse4", "asimd", "bf16", "sve", "i8mm")
_RECORDED = ("torch", "numpy", "scipy")


def now() -> str:
    """The time as records hold it: 2026-01-31T12:00:00Z."""
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def machine_metadata(device: str) -> dict[str, Any]:
    """Processor, cores, memory and the device asked for; of several, the first."""
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    first = device.partition(",")[0].strip()
    flags = f"{_cpuinfo('flags')} {_cpuinfo('Features')}".split()
    return {
        "processor": _cpuinfo("model name") or platform.processor() or platform.machine(),
        # They decide how a network rounds; processors of one name may differ in them.
        "instructions": " ".join(sorted({flag for flag in flags if flag.startswith(_ROUNDING)})),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "device": torch.cuda.get_device_name(None if first == "auto" else first)
        if on_gpu
        else "cpu",
        "threads": torch.get_num_threads(),
        "system": platform.platform(terse=True),
    }


def _cpuinfo(field: str) -> str:
    """A field of the first processor, "" where there is none."""
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text().splitlines():
            if line.startswith(field):
                return line.partition(":")[2].strip()
    return ""


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {name: metadata.version(name) for name in _RECORDED}
    return {"certifl": __version__, "python": platform.python_version(), **found}


def threads_of_workers(model: nn.Module, workers: int) -> dict[str, Any]:
    """What training in workers changes for a machine's record: nothing for small networks.

    A worker has one thread. Sums of larger networks round differently on several.
    """
    return {"training_threads": 1} if workers and not is_small(model) else {}


@contextlib.contextmanager
def training_threads(model: nn.Module) -> Iterator[None]:
    """Train small networks on one thread, for steps of a millisecond are not worth sharing.

    The choice depends on the model alone, whatever is asked for, so a resumed run repeats it.
    """
    with one_thread(is_small(model)):
        yield


def release_memory() -> None:
    """Hand back what torch keeps of a GPU's memory without using it.

    The memory of dropped graphs and models can then be had by other processes on the same GPU, and
    in pieces of other sizes by this one.
    """
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
