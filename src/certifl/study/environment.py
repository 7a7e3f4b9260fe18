"""The machine: what a run records of it, and what it lacks for which command."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from certifl._version import __version__
from certifl.certification.network import computes_bfloat16
from certifl.data import EMBEDDED
from certifl.data.dataset import cache_folder
from certifl.data.loading import DATA_ENV
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


@functools.cache
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


# What this machine has, and what is missing for which command.


# extra -> (a module it brings, what is not possible without it)
EXTRAS = {
    "hub": ("datasets", "data sets by their name on the Hugging Face hub"),
    "pandas": ("pandas", "data frames of results in Python"),
    "hf": ("transformers", "--model hf:OWNER/NAME: classifiers of the Hugging Face hub"),
    "dicom": ("pydicom", "DICOM images"),
    "flower": ("flwr", "`certifl deploy`: federations over a network"),
    "dp": ("opacus", "[privacy] in a spec: differential privacy"),
    "tensorboard": ("tensorboard", "`certifl run --track tensorboard`"),
    "mlflow": ("mlflow", "`certifl run --track mlflow`"),
    "wandb": ("wandb", "`certifl run --track wandb`"),
}
_SCARCE_GB = 2.0


@dataclass(frozen=True)
class Check:
    """One line of the examination.

    Attributes:
        topic: what it is about. found: what there is.
        missing: what cannot be done for want of it, and how to get it; "" where nothing is.
    """

    topic: str
    found: str
    missing: str = ""


def examine(data_dir: Path | None = None) -> list[Check]:
    """Look at everything a command may need; changes nothing and asks no network."""
    return [*_hardware(), *_storage(), *_data(data_dir), *_extras()]


def _hardware() -> list[Check]:
    machine, rounded = machine_metadata("cpu"), computes_bfloat16(torch.device("cpu"))
    names = ("torch", "numpy", "scipy")
    libraries = ", ".join(f"{name} {versions()[name]}" for name in names)
    found = [
        Check("certifl", f"{__version__}, Python {platform.python_version()}, {libraries}"),
        Check("processor", f"{machine['processor']}, {machine['cores']} cores"),
        Check("memory", f"{machine['memory_gb']} GB"),
        Check(
            "bfloat16",
            "computed by this processor; whether votes are cast in it is measured"
            if rounded
            else "not computed by this processor: votes are cast in float32",
        ),
    ]
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        word = "with" if computes_bfloat16(torch.device("cuda", index)) else "without"
        size = gpu.total_memory / 2**30
        found.append(Check(f"cuda:{index}", f"{gpu.name}, {size:.0f} GB, {word} bfloat16"))
    if not torch.cuda.is_available():
        why = "" if torch.version.cuda is None else " (torch has CUDA, but finds no device)"
        found.append(Check("GPU", f"none; everything runs on the processor{why}"))
    return found


def _storage() -> list[Check]:
    here = Path.cwd()
    free = shutil.disk_usage(here).free / 2**30
    scarce = f"a study may need more than {_SCARCE_GB:.0f} GB: choose --out on another disk"
    found = [Check("disk", f"{free:.1f} GB free here", scarce if free < _SCARCE_GB else "")]
    if not os.access(here, os.W_OK):
        found.append(Check("this folder", "read-only", "runs: give --out a folder you may write"))
    return found


def _data(data_dir: Path | None) -> list[Check]:
    found = [Check("embedded data", ", ".join(EMBEDDED))]
    given = data_dir or os.environ.get(DATA_ENV)
    if given is None:
        found.append(Check("data folder", f"none given (--data-dir, or the variable {DATA_ENV})"))
    else:
        folder = Path(given).expanduser()
        names = sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
        missing = "" if names else "data sets other than digits: see docs/data.md for the layout"
        found.append(Check("data folder", f"{folder}: {', '.join(names) or 'nothing'}", missing))
    cache = cache_folder()
    files = sorted(cache.glob("*.safetensors")) if cache.is_dir() else []
    size = sum(file.stat().st_size for file in files) / 2**30
    found.append(Check("decoded data", f"{len(files)} data sets, {size:.2f} GB in {cache}"))
    return found


def _extras() -> list[Check]:
    found = []
    for extra, (module, purpose) in EXTRAS.items():
        if importlib.util.find_spec(module) is None:
            how = f"{purpose}; pip install 'certifl[{extra}]'"
            found.append(Check(f"extra {extra}", "not installed", how))
        else:
            found.append(Check(f"extra {extra}", f"{module} {metadata.version(module)}"))
    return found
