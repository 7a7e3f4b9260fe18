"""What a run was computed on, for its record."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from certifl._version import __version__

__all__ = ["machine_facts", "versions"]

_RECORDED = ("torch", "numpy", "scipy")


def machine_facts(device: str) -> dict[str, Any]:
    """Processor, cores, memory and the device asked for."""
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "threads": torch.get_num_threads(),
        "system": platform.platform(terse=True),
    }


def _processor() -> str:
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {name: metadata.version(name) for name in _RECORDED}
    return {"certifl": __version__, "python": platform.python_version(), **found}
