"""What this machine has, and what is missing for which command."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from certifl._version import __version__
from certifl.certification.network import computes_bfloat16
from certifl.data import EMBEDDED
from certifl.data.dataset import cache_folder
from certifl.data.loading import DATA_ENV
from certifl.study.environment import machine_metadata, versions

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
