"""Training on a GPU: `certifl`'s training against a DataLoader loop.

All train the same clients by federated averaging with the same network, batch size, flips, crops,
perturbation and number of SGD steps, on random images of CIFAR-10's shape:

- loader: per image on the host: crop, flip, division by 255; then batches, copied to the device,
  where the perturbation is added and the step taken. As such loops are written, with worker
  processes that stay alive, pinned memory and torch's own settings.
- float32: certifl, checkpoints on disk included.
- bfloat16: the same with `precision = "bfloat16"`.

All begin with images on the host: the loader's are copied batch by batch, the engine's at the
beginning of each client's round, which is part of the time of either. `--loader-workers` is for
each client: its DataLoader has workers of its own that stay alive, but only one client's work at a
time.

One round of all after the other, as often as `--pairs` says, so that a drift of the machine
cancels; medians with their range. The first round of each is timed apart. `--full` then measures
the study's 45 rounds of 2 epochs; without it they are projected. `--at-once 2` adds so many
worker processes on the device (their rounds do not alternate with others).

It needs torch, numpy, scipy and safetensors, no GPU for a small size, and no installation:

    PYTHONPATH=src python benchmarks/training_gpu.py --full
    PYTHONPATH=src python benchmarks/training_gpu.py --device cpu --images 500 --batch 16 \\
        --model small_cnn
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from certifl import models
from certifl.federated import ClientData, FedAvg, LocalTraining, Schedule, state_of, train
from certifl.perturbations import Perturbation
from certifl.perturbations import from_description as perturbation_from
from certifl.runs.checkpoints import Checkpoints

SHAPE, CLASSES = (3, 32, 32), 10
PAPER_ROUNDS, PAPER_EPOCHS, PAPER_IMAGES = 45, 2, 50_000
CONTESTANTS = ("loader", "float32", "bfloat16")
PERTURBATIONS = {
    "none": None,
    "pixel": {"family": "pixel", "sigma": 0.12},
    "rotation": {"family": "rotation", "sigma": "0.1pi"},
}


@dataclass(frozen=True)
class Setting:
    """What is trained, the same for all; the clients' images are on the host."""

    clients: Sequence[ClientData]
    model: nn.Module
    schedule: Schedule
    perturbation: Perturbation | None
    device: torch.device

    @property
    def images(self) -> int:
        """Images of a round: those of all clients, as often as there are local epochs."""
        return sum(len(data) for data in self.clients) * self.schedule.local_epochs


class Images(Dataset[tuple[torch.Tensor, int]]):
    """One client's images with the usual transforms, one image at a time on the host."""

    def __init__(self, data: ClientData, flip: bool, crop: int) -> None:
        self.images = data.images.permute(0, 2, 3, 1).contiguous().numpy()
        self.labels = data.labels.numpy()
        self.flip, self.crop = flip, crop

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = self.images[index]
        if self.crop:
            margin = self.crop
            padded = np.pad(image, ((margin, margin), (margin, margin), (0, 0)))
            top, left = torch.randint(2 * margin + 1, (2,)).tolist()
            image = padded[top : top + image.shape[0], left : left + image.shape[1]]
        if self.flip and torch.rand(()).item() < 0.5:
            image = image[:, ::-1]
        tensor = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        return tensor.to(torch.float32).div_(255), int(self.labels[index])


class LoaderLoop:
    """Federated averaging in a plain loop over DataLoaders."""

    def __init__(self, setting: Setting, workers: int) -> None:
        self.setting = setting
        schedule = setting.schedule
        self.loaders = [
            DataLoader(
                Images(data, schedule.flip, schedule.crop),
                batch_size=schedule.batch_size,
                shuffle=True,
                num_workers=workers,
                persistent_workers=workers > 0,
                pin_memory=setting.device.type == "cuda",
            )
            for data in setting.clients
        ]
        self.model = copy.deepcopy(setting.model).to(setting.device).train()
        self.noise = torch.Generator(device=setting.device).manual_seed(0)

    def __call__(self) -> None:
        """One round."""
        setting, schedule = self.setting, self.setting.schedule
        states = []
        for loader in self.loaders:
            net = copy.deepcopy(self.model)
            optimizer = torch.optim.SGD(
                net.parameters(),
                schedule.lr,
                schedule.momentum,
                weight_decay=schedule.weight_decay,
            )
            for _ in range(schedule.local_epochs):
                for images, labels in loader:
                    images = self._perturbed(images.to(setting.device, non_blocking=True))
                    labels = labels.to(setting.device, non_blocking=True)
                    optimizer.zero_grad()
                    functional.cross_entropy(net(images), labels).backward()
                    optimizer.step()
            states.append(net.state_dict())
        mean = {
            name: torch.stack([state[name].double() for state in states]).mean(0).to(value.dtype)
            for name, value in states[0].items()
        }
        self.model.load_state_dict(mean)
        state_of(self.model)  # on the host, so that the round is over

    def _perturbed(self, images: torch.Tensor) -> torch.Tensor:
        perturbation = self.setting.perturbation
        if perturbation is None:
            return images
        channels, height, width = images.shape[1:]
        params = perturbation.sample(len(images), (channels, height, width), self.noise)
        return perturbation.apply(images, params)


class Engine:
    """One round of certifl at a time."""

    def __init__(self, setting: Setting, precision: str) -> None:
        self.setting = setting
        self.training = trainer(setting, 1, precision)

    def __call__(self) -> None:
        """One round, with its checkpoints on disk."""
        with tempfile.TemporaryDirectory() as folder:
            train(
                FedAvg(),
                self.setting.model,
                self.setting.clients,
                self.training,
                Checkpoints(Path(folder)),
            )


def trainer(setting: Setting, rounds: int, precision: str = "float32") -> LocalTraining:
    """A client's half in the engine."""
    return LocalTraining(
        setting.model,
        replace(setting.schedule, rounds=rounds),
        seed=0,
        augmentation=setting.perturbation,
        device=setting.device,
        precision=precision,
    )


def seconds_of(work: Callable[[], object]) -> float:
    """Wall-clock seconds."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def rate(images: int, seconds: Sequence[float]) -> str:
    """Images a second: median and range."""
    rates = sorted(images / taken for taken in seconds)
    return f"{statistics.median(rates):9.0f}  ({rates[0]:.0f}-{rates[-1]:.0f})"


def compare(setting: Setting, contestants: Mapping[str, Callable[[], None]], pairs: int) -> None:
    """Rounds in alternation, and what follows from them."""
    print(f"{'':10} first round (s)   images/s (range)")
    first = {name: seconds_of(work) for name, work in contestants.items()}
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(pairs):
        for name, work in contestants.items():
            taken[name].append(seconds_of(work))
    for name, seconds in taken.items():
        print(f"{name:10} {first[name]:15.2f}   {rate(setting.images, seconds)}")
    for name in [name for name in taken if name != "loader"]:
        for base in [base for base in ("loader", "float32") if base in taken and base != name]:
            ratios = sorted(b / own for b, own in zip(taken[base], taken[name], strict=True))
            print(
                f"{name} / {base}: {statistics.median(ratios):.2f} times the images/s "
                f"({ratios[0]:.2f}-{ratios[-1]:.2f})"
            )
    study = PAPER_ROUNDS * PAPER_EPOCHS * PAPER_IMAGES
    for name, seconds in taken.items():
        projected = study / setting.images * statistics.median(seconds)
        print(
            f"projected, {PAPER_ROUNDS} rounds x {PAPER_EPOCHS} epochs, {name}: {projected:.0f} s"
        )


def at_once(setting: Setting, processes: int, rounds: int) -> None:
    """The engine with worker processes on the same device; rounds once they are running."""
    training = trainer(setting, rounds + 1)
    with tempfile.TemporaryDirectory() as folder:
        done = train(
            FedAvg(),
            setting.model,
            setting.clients,
            training,
            Checkpoints(Path(folder)),
            workers=processes,
        )
    seconds = [entry["seconds"] for entry in done.history[1:]]
    print(f"{processes} clients at once: {rate(setting.images, seconds)} images/s")


def full(setting: Setting, precision: str) -> None:
    """The study's training, measured."""
    whole = replace(
        setting, schedule=replace(setting.schedule, local_epochs=PAPER_EPOCHS, decay_every=30)
    )
    training = trainer(whole, PAPER_ROUNDS, precision)

    def work() -> None:
        with tempfile.TemporaryDirectory() as folder:
            train(FedAvg(), whole.model, whole.clients, training, Checkpoints(Path(folder)))

    print(
        f"measured, {PAPER_ROUNDS} rounds x {PAPER_EPOCHS} epochs of "
        f"{sum(map(len, whole.clients))} images, {precision}: {seconds_of(work):.0f} s"
    )


def options_of() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--images", type=int, default=PAPER_IMAGES, help="of all clients")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--perturbation", default="rotation", choices=PERTURBATIONS)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument(
        "--loader-workers",
        type=int,
        default=min(8, os.cpu_count() or 1),
        help="of the loader loop, for each client",
    )
    parser.add_argument("--only", nargs="+", default=CONTESTANTS, choices=CONTESTANTS)
    parser.add_argument("--at-once", type=int, default=0, help="worker processes on the device")
    parser.add_argument("--full", action="store_true", help="measure 45 rounds x 2 epochs")
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here: a small size runs with --device cpu")
    if options.images < 2 * options.clients:
        parser.error(f"--images {options.images} leaves a client without images to train on")
    return options


def setting_of(options: argparse.Namespace) -> Setting:
    """Random images on the host, dealt out evenly."""
    drawn = torch.Generator().manual_seed(0)
    each, more = divmod(options.images, options.clients)
    clients = []
    for client in range(options.clients):
        count = each + (client < more)
        images = torch.randint(256, (count, *SHAPE), generator=drawn, dtype=torch.uint8)
        labels = torch.randint(CLASSES, (count,), generator=drawn)
        clients.append(ClientData(client, images, labels))
    described = PERTURBATIONS[options.perturbation]
    return Setting(
        clients,
        models.build(options.model, SHAPE[0], CLASSES, seed=0),
        Schedule(1, 1, options.batch, 0.05, 0.9, 5e-4, flip=True, crop=4),
        None if described is None else perturbation_from(described),
        torch.device(options.device),
    )


def main() -> None:
    options = options_of()
    setting = setting_of(options)
    cuda = setting.device.type == "cuda"
    where = torch.cuda.get_device_name(setting.device) if cuda else platform.machine()
    print(
        f"# {where}, torch {torch.__version__}, {options.model}, {options.clients} clients, "
        f"{options.images} images, batch {options.batch}, {options.perturbation}, "
        f"{options.loader_workers} loader workers per client, {os.cpu_count()} cores, "
        f"{options.pairs} pairs"
    )
    contestants: dict[str, Callable[[], None]] = {
        "loader": LoaderLoop(setting, options.loader_workers),
        "float32": Engine(setting, "float32"),
        "bfloat16": Engine(setting, "bfloat16"),
    }
    compare(setting, {name: contestants[name] for name in options.only}, options.pairs)
    if options.at_once:
        at_once(setting, options.at_once, options.pairs)
    if options.full:
        full(setting, "float32")
        full(setting, "bfloat16")
    if cuda:
        print(f"peak memory: {torch.cuda.max_memory_allocated(setting.device) / 2**30:.1f} GiB")


if __name__ == "__main__":
    main()
