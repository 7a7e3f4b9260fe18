"""A study that takes a second, and the command line called in this process or in its own."""

import contextlib
import hashlib
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from certifl.cli import main
from certifl.runs.atomic import load_tensors, save_tensors
from certifl.spec import Spec, with_settings

ROTATION = {"family": "rotation", "sigma": "0.1pi"}
VALUES: dict[str, Any] = {
    "name": "tiny",
    "data": {"name": "digits", "train_images": 60, "test_images": 40},
    "clients": {"count": 2},
    "model": {"name": "small_cnn"},
    "algorithm": {"name": "fedavg"},
    "training": {"rounds": 2, "local_epochs": 1, "batch_size": 16, "lr": 0.05},
    "augmentation": {"federated": ROTATION},
    "certification": {"perturbation": ROTATION, "images": 6, "n": 200},
}


def spec(*settings: str) -> Spec:
    return with_settings(VALUES, settings)


def write_spec(folder: Path, *settings: str) -> Path:
    path = folder / "tiny.toml"
    path.write_text(spec(*settings).to_toml())
    return path


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    def refused(self, *words: str, code: int = 2) -> None:
        """It ended with this code and one line on the error stream that holds these words."""
        assert self.code == code, self.err
        assert "Traceback" not in self.err
        lines = [line for line in self.err.splitlines() if line.startswith("certifl: ")]
        assert len(lines) == 1, self.err
        for word in words:
            assert word in lines[0], lines[0]

    def fine(self, *words: str) -> None:
        """It ended well, and these words stand in its output."""
        assert self.code == 0, self.err
        assert "Traceback" not in self.err
        said = " ".join(self.out.split())
        for word in words:
            assert word in said, said


def cli(*arguments: str | Path) -> Outcome:
    """The command in this process; an error it did not foresee fails the test."""
    out, err = io.StringIO(), io.StringIO()
    code: object = 0
    with (
        mock.patch.object(sys, "argv", ["certifl", *map(str, arguments)]),
        mock.patch.object(sys, "path", list(sys.path)),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as exit:
            code = exit.code or 0
    assert isinstance(code, int)
    return Outcome(code, out.getvalue(), err.getvalue())


def process(*arguments: str | Path, **options: Any) -> Outcome:
    command = [sys.executable, "-m", "certifl", *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment(), check=False, **options
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


@contextlib.contextmanager
def undrawn() -> Iterator[None]:
    from matplotlib.figure import Figure

    def saved(_figure: Figure, target: Any, **_: Any) -> None:
        target.write(b"<svg></svg>") if hasattr(target, "write") else Path(target).touch()

    with (
        mock.patch.object(Figure, "savefig", saved),
        mock.patch.object(Figure, "draw_without_rendering"),
    ):
        yield


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def files(folder: Path) -> dict[str, tuple[str, int]]:
    """Content and time of change of every file, by its path."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        found[str(path.relative_to(folder))] = (content, path.stat().st_mtime_ns)
    return found


def weights(folder: Path) -> dict[str, str]:
    """Content of every file of weights below a folder's training checkpoints."""
    training = folder / "checkpoints" / "training"
    found = {k: v[0] for k, v in files(training).items() if k.endswith(".safetensors")}
    assert found, f"no checkpoints in {training}"
    return found


def replace_a_checkpoint(run: Path) -> None:
    """Weights that nobody trained, in the newest checkpoint of a run."""
    newest = max((run / "checkpoints" / "training").glob("round-*"))
    file = newest / "server.safetensors"
    tensors = load_tensors(file)
    name = next(name for name in tensors if name.endswith("weight"))
    save_tensors(file, {**tensors, name: tensors[name] + 1e-3})
