"""One contender does one job in a process of its own and prints what it took, as JSON.

    python benchmarks/peers/contenders.py certify art --model resnet18
    python benchmarks/peers/contenders.py train flower

`seconds` is the job alone, imports and building the model apart. Whoever starts the process
measures the whole of it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

import certifl
from certifl.data import load
from certifl.data.dataset import ImageSplit
from certifl.federated import ClientData, FedAvg, LocalTraining, Schedule, train
from certifl.runs.checkpoints import Checkpoints

SIGMA, ALPHA, N0 = 0.25, 1e-3, 100
JOBS = {"resnet18": (3, 32, 4, 1000), "small_cnn": (1, 28, 20, 2000)}  # channels, side, images, n
CLIENTS, BATCH, LR, ROUNDS = 10, 32, 0.05, 3


# --- certification: the same model, images and numbers of votes, pixel noise


def model_and_images(name: str) -> tuple[nn.Module, torch.Tensor, int]:
    channels, side, count, votes = JOBS[name]
    model = certifl.models.build(name, channels, 10, seed=0).eval()
    generator = torch.Generator().manual_seed(0)
    return model, torch.rand((count, channels, side, side), generator=generator), votes


def certify_loop(model: nn.Module, images: torch.Tensor, n: int) -> None:
    """What one writes first: batches of 400, counting on the host, Clopper-Pearson."""
    for image in images:
        counted = []
        for votes in (N0, n):
            counts = np.zeros(10, dtype=np.int64)
            with torch.no_grad():
                for start in range(0, votes, 400):
                    batch = image.repeat(min(400, votes - start), 1, 1, 1)
                    for answer in model(batch + SIGMA * torch.randn_like(batch)).argmax(1).numpy():
                        counts[answer] += 1
            counted.append(counts)
        chosen = int(counted[0].argmax())
        certifl_free_bound(int(counted[1][chosen]), n)


def certifl_free_bound(k: int, n: int) -> float:
    from scipy.stats import beta

    return float(beta.ppf(ALPHA, k, n - k + 1)) if k else 0.0


def certify_art(model: nn.Module, images: torch.Tensor, n: int) -> None:
    from art.estimators.certification.randomized_smoothing import PyTorchRandomizedSmoothing

    smoothed = PyTorchRandomizedSmoothing(
        model=model,
        loss=nn.CrossEntropyLoss(),
        input_shape=tuple(images.shape[1:]),
        nb_classes=10,
        device_type="cpu",
        sample_size=N0,
        scale=SIGMA,
        alpha=ALPHA,
    )
    smoothed.certify(images.numpy(), n=n, batch_size=400)


def certify_float32(model: nn.Module, images: torch.Tensor, n: int) -> None:
    _certify(model, images, n, precision="float32")


def certify_default(model: nn.Module, images: torch.Tensor, n: int) -> None:
    _certify(model, images, n, precision="auto")


def _certify(model: nn.Module, images: torch.Tensor, n: int, precision: str) -> None:
    noise = certifl.PixelNoise(SIGMA)
    certifl.certify(
        model, images, noise, n0=N0, n=n, alpha=ALPHA, estimator="top-class", precision=precision
    )


# --- training: federated averaging of the embedded digits, the same data and numbers of steps


def digits_of(client: int) -> ImageSplit:
    return load("digits").train.take(np.arange(client, 1300, CLIENTS))


def network() -> nn.Module:
    return certifl.models.build("small_cnn", 1, 10, seed=0)


def epoch(net: nn.Module, data: ImageSplit) -> None:
    """One local epoch of plain SGD."""
    optimizer = torch.optim.SGD(net.parameters(), LR)
    net.train()
    for rows in torch.randperm(len(data)).split(BATCH):
        optimizer.zero_grad()
        images = data.images[rows].float() / 255
        functional.cross_entropy(net(images), data.labels[rows]).backward()
        optimizer.step()


def train_loop(rounds: int) -> None:
    net, data = network(), [digits_of(client) for client in range(CLIENTS)]
    for _ in range(rounds):
        start, states = {k: v.clone() for k, v in net.state_dict().items()}, []
        for part in data:
            net.load_state_dict(start)
            epoch(net, part)
            states.append({k: v.clone() for k, v in net.state_dict().items()})
        mean = {
            k: torch.stack([s[k].double() for s in states]).mean(0).to(v.dtype)
            for k, v in start.items()
        }
        net.load_state_dict(mean)


def train_certifl(rounds: int) -> None:
    schedule = Schedule(rounds=rounds, local_epochs=1, batch_size=BATCH, lr=LR)
    clients = [
        ClientData(client, part.images, part.labels)
        for client, part in enumerate(digits_of(client) for client in range(CLIENTS))
    ]
    model = network()
    with tempfile.TemporaryDirectory() as folder:
        training = LocalTraining(model, schedule, seed=0)
        train(FedAvg(), model, clients, training, Checkpoints(Path(folder)))


def train_flower(rounds: int) -> None:
    """Flower's simulation with its own FedAvg, two processes of one thread each."""
    from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
    from flwr.simulation import run_simulation

    client, server = ClientApp(), ServerApp()

    @client.train()
    def one_round(message: Message, context: Context) -> Message:
        torch.set_num_threads(1)
        net, part = network(), digits_of(int(context.node_config["partition-id"]))
        net.load_state_dict(message.content["arrays"].to_torch_state_dict())  # type: ignore[union-attr]
        epoch(net, part)
        metrics = MetricRecord({"num-examples": len(part)})
        content = RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics})
        return Message(content=content, reply_to=message)

    @server.main()
    def rounds_of(grid: Grid, context: Context) -> None:
        strategy = FlowerFedAvg(fraction_train=1.0, fraction_evaluate=0.0)
        initial = ArrayRecord(network().state_dict())
        strategy.start(grid=grid, initial_arrays=initial, num_rounds=rounds)

    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server, client, num_supernodes=CLIENTS, backend_config=resources)


CERTIFY: dict[str, Callable[[nn.Module, torch.Tensor, int], None]] = {
    "loop": certify_loop,
    "art": certify_art,
    "certifl float32": certify_float32,
    "certifl": certify_default,
}
TRAIN: dict[str, Callable[[int], None]] = {
    "loop": train_loop,
    "flower": train_flower,
    "certifl": train_certifl,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("task", choices=["certify", "train"])
    parser.add_argument("contender", choices=sorted(CERTIFY | TRAIN))
    parser.add_argument("--model", choices=sorted(JOBS), default="small_cnn")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.task == "certify":
        model, images, votes = model_and_images(options.model)
        started = time.perf_counter()
        CERTIFY[options.contender](model, images, votes)
    else:
        load("digits")
        started = time.perf_counter()
        TRAIN[options.contender](options.rounds)
    print("\n" + json.dumps({"seconds": time.perf_counter() - started}))


if __name__ == "__main__":
    main()
