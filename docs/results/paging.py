"""What the pages in docs/results have in common: commands, machines, times, pictures."""

from __future__ import annotations

import io
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

# What a reader puts in the place of folders of the machine that made the page.
_FOLDERS = {"--data-dir": "DATA", "--out": "runs/paper"}


def command_words(command: str) -> str:
    """A command as a reader would give it, without the folders of the machine at hand."""
    words = shlex.split(command)
    words[0] = Path(words[0]).name
    for at, word in enumerate(words[:-1]):
        if word in _FOLDERS:
            words[at + 1] = _FOLDERS[word]
    return shlex.join(words)


def machine_words(manifest: Mapping[str, Any]) -> str:
    """The machine and the versions of one run's manifest."""
    machine, versions = manifest["machine"], manifest["versions"]
    threads = f", {machine['threads']} thread for training" if machine.get("threads") == 1 else ""
    return (
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gb']} GB, "
        f"computed on {machine['device']}{threads}; torch {versions['torch']}, "
        f"Python {versions['python']}, certifl {versions['certifl']}"
    )


def duration(seconds: float) -> str:
    """Seconds for people: "50 s", "12 min", "1 h 05 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def picture(content: bytes, target: Path, most_bytes: int = 250_000, colors: int = 96) -> None:
    """Write a drawing as a PNG of few colors, made smaller until it is light enough."""
    with Image.open(io.BytesIO(content)) as opened:
        drawing = opened.convert("RGB")
    scale = 1.0
    while True:
        size = (round(drawing.width * scale), round(drawing.height * scale))
        resized = drawing if scale == 1.0 else drawing.resize(size, Image.Resampling.LANCZOS)
        smaller = io.BytesIO()
        few = resized.quantize(colors, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
        few.save(smaller, "PNG", optimize=True)
        if smaller.tell() <= most_bytes or scale < 0.3:
            target.write_bytes(smaller.getvalue())
            return
        scale *= 0.9


def head_commit() -> str:
    """The commit of the checkout this script lies in."""
    call = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"]
    return subprocess.run(call, check=True, capture_output=True, text=True).stdout.strip()
