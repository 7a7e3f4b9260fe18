"""Requests that go wrong in the ways people meet most often, each by the title of its advice.

The working directory is a case's own; it gets a finished run, and answers with what certifl said.
The titles are the headings of docs/troubleshooting.md.
"""

import fcntl
import io
import json
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import nn

import certifl
import tiny_study as tiny
from certifl.data import load
from certifl.errors import CertiflError
from certifl.experiments.run import Options
from certifl.experiments.run import run as compute

__all__ = ["CASES"]

Case = Callable[[Path], str]
NOISE = certifl.PixelNoise(0.25)


def said(*arguments: str | Path) -> str:
    outcome = tiny.cli(*arguments)
    assert outcome.code in (1, 2), outcome.out
    lines = [line for line in outcome.err.splitlines() if line.startswith("certifl: ")]
    assert len(lines) == 1, outcome.err
    return lines[0].removeprefix("certifl: ")


def study(*settings: str, options: tuple[str | Path, ...] = ("--out", "runs/new")) -> str:
    path = tiny.write_spec(Path())
    given = [word for setting in settings for word in ("--set", setting)]
    return said("run", path, *options, *given)


def raised(call: Callable[[], object]) -> str:
    try:
        call()
    except CertiflError as error:
        return str(error)
    raise AssertionError("nothing was refused")


def picture(path: Path, shape: tuple[int, ...] = (8, 8), kind: Any = np.uint8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros(shape, kind)).save(path)


def leaves(test: bool = True) -> None:
    for split in ("train", "test") if test else ("train",):
        for name in ("ash", "oak"):
            picture(Path("DATA/leaves") / split / name / "1.png")


def table(**columns: Any) -> None:
    Path("DATA/leaves").mkdir(parents=True)
    content = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(content, format="png")
    image = [{"bytes": content.getvalue(), "path": None}] * 2
    made = pa.table({"image": image, **columns})
    for split in ("train", "test"):
        pq.write_table(made, f"DATA/leaves/{split}-00000-of-00001.parquet")


def of_leaves() -> str:
    return raised(lambda: load("leaves", "DATA"))


def module(text: str) -> str:
    Path("my_net.py").write_text(text)
    sys.modules.pop("my_net", None)
    try:
        return study("model.name=my_net:make")
    finally:
        sys.modules.pop("my_net", None)


def certify(model: Any, images: torch.Tensor | None = None) -> str:
    shown = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(7))
    return raised(lambda: certifl.certify(model, shown if images is None else images, NOISE))


def linear() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))


class Batchwise(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - x.mean(0)).flatten(1)


class Chance(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) + torch.rand(len(x), 64)


# --- data


def no_such_data(_run: Path) -> str:
    with mock.patch.dict(sys.modules, {"datasets": None}):
        return study("data.name=leaves")


def no_layout(_run: Path) -> str:
    picture(Path("DATA/leaves/ash/1.png"))
    return of_leaves()


def no_test_images(_run: Path) -> str:
    leaves(test=False)
    return of_leaves()


def other_sizes(_run: Path) -> str:
    leaves()
    picture(Path("DATA/leaves/train/oak/2.png"), (8, 12))
    return of_leaves()


def deep_grey(_run: Path) -> str:
    leaves()
    picture(Path("DATA/leaves/train/oak/2.png"), kind=np.uint16)
    return of_leaves()


def two_labels(_run: Path) -> str:
    table(species=[0, 1], genus=[0, 1])
    return of_leaves()


def hidden_labels(_run: Path) -> str:
    leaves()
    shutil.move("DATA/leaves/test/oak", "DATA/leaves/test/elm")
    return of_leaves()


# --- spec


def missing_key(_run: Path) -> str:
    Path("study.toml").write_text('[data]\nname = "digits"\n')
    return said("run", "study.toml")


# --- model


def batch_statistics(_run: Path) -> str:
    norm = nn.BatchNorm2d(1, track_running_stats=False)
    return certify(nn.Sequential(norm, linear()).eval())


def private_batch_norm(_run: Path) -> str:
    private = 'privacy={ kind = "example", noise_multiplier = 1.0 }'
    return study("model.name=small_resnet", private)


# --- runs and training


def busy(run: Path) -> str:
    with (run / ".lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        return study("training.lr=0.01", options=("--out", run, "--overwrite"))


def unfinished(run: Path) -> str:
    facts = json.loads((run / "run.json").read_text())
    changed = {"status": "running", "command": "certifl run tiny.toml"}
    (run / "run.json").write_text(json.dumps({**facts, **changed}))
    return said("report", run)


def incomparable(run: Path) -> str:
    noise = 'certification.perturbation={ family = "pixel", sigma = 0.2 }'
    compute(tiny.spec(noise), Options(Path("runs/noise")))
    return said("report", run, "runs/noise")


def changed_certificates(run: Path) -> str:
    path = run / "certificates.parquet"
    held = pq.read_table(path)
    where = held.column_names.index("radius")
    raised_radii = pa.array([2.0] * len(held), held.schema.field("radius").type)
    pq.write_table(held.set_column(where, held.schema.field("radius"), raised_radii), path)
    outcome = tiny.cli("verify", run)
    assert outcome.code == 1
    return outcome.err.splitlines()[0]


def other_size_to_predict(run: Path) -> str:
    picture(Path("digit.png"), (28, 28))
    return said("predict", "digit.png", "--run", run)


# --- federations and extras


def no_flower(_run: Path) -> str:
    with mock.patch("importlib.util.find_spec", return_value=None):
        return said("deploy", "init", "federation")


def kit_is_there(_run: Path) -> str:
    Path("federation").mkdir()
    Path("federation/README.md").touch()
    return said("deploy", "init", "federation")


def no_server(_run: Path) -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tiny.cli("deploy", "init", "federation", "--insecure", "--server", f"127.0.0.1:{port}").fine()
    spec = tiny.write_spec(Path())
    return said("deploy", "run", spec, "--kit", "federation/server", "--out", "runs/new")


def no_tracker(_run: Path) -> str:
    with mock.patch("importlib.util.find_spec", return_value=None):
        return study(options=("--out", "runs/new", "--track", "mlflow"))


def no_opacus(_run: Path) -> str:
    with mock.patch.dict(sys.modules, {"opacus": None, "opacus.grad_sample": None}):
        return study('privacy={ kind = "example", noise_multiplier = 1.0 }')


CASES: dict[str, Case] = {
    "The data set is not here": no_such_data,
    "The folder of the data set is not understood": no_layout,
    "There are no test images": no_test_images,
    "Images differ in size": other_sizes,
    "Gray with 16 bits": deep_grey,
    "Several label columns": two_labels,
    "Test images of other classes": hidden_labels,
    "The data folder does not exist": lambda _run: study(
        "data.name=leaves", options=("--out", "runs/new", "--data-dir", "DATA")
    ),
    "More clients than images": lambda _run: study("clients.count=50"),
    "A key that does not exist": lambda _run: study("training.epochs=3"),
    "A key that must be given": missing_key,
    "Text in place of a number": lambda _run: study('training.lr="0.1"'),
    "An algorithm's parameter is misspelled": lambda _run: study(
        'algorithm={ name = "mixture", lambda = 0.3 }'
    ),
    "A pull that overshoots": lambda _run: study('algorithm={ name = "ditto", mu = 100.0 }'),
    "An objective without a perturbation": lambda _run: study(
        'objective={ name = "consistency" }', "augmentation.federated=none"
    ),
    "An angle for something that does not turn": lambda _run: study(
        'certification.perturbation={ family = "pixel", sigma = "18deg" }'
    ),
    "Your network cannot be imported": lambda _run: study("model.name=nowhere:make"),
    "The wrong number of logits": lambda _run: module(
        "from torch import nn\n\n"
        "def make(in_channels, num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64 * in_channels, 2))\n"
    ),
    "The model is in training mode": lambda _run: certify(linear()),
    "The model uses batch statistics": batch_statistics,
    "The answer depends on the rest of the batch": lambda _run: certify(Batchwise().eval()),
    "The model is random": lambda _run: certify(Chance().eval()),
    "Images outside [0, 1]": lambda _run: certify(
        linear().eval(), torch.full((1, 1, 8, 8), 255.0)
    ),
    "BatchNorm beside differential privacy": private_batch_norm,
    "The folder holds another study": lambda run: study(
        "training.lr=0.01", options=("--out", run)
    ),
    "Another process is using the folder": busy,
    "The run is not finished": unfinished,
    "Runs that cannot be compared": incomparable,
    "A certificate does not follow from its votes": changed_certificates,
    "Training diverged": lambda _run: study("training.lr=1e30"),
    "No such device": lambda _run: study(options=("--out", "runs/new", "--device", "cuda:7")),
    "An image of another size": other_size_to_predict,
    "Flower is not installed": no_flower,
    "The federation's folder is not empty": kit_is_there,
    "The server does not answer": no_server,
    "A tracker is not installed": no_tracker,
    "opacus is not installed": no_opacus,
}
"""Every case by its title."""
