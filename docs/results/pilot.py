"""Choose a scale by two criteria that look at no comparison of algorithms.

    python docs/results/pilot.py --scale overnight --data-dir DATA --out pilot [--set KEY=VALUE]

(a) A client that trains alone, without augmentation, fits its own training images: it is limited
by their number, not by steps. (b) FedAvg has converged: its accuracy on TRAINING images that no
client has rises by less than a point with half as many rounds again, the decay stretched alike.

Test images are never looked at. The accuracy is that of the smoothed classifier: the most
frequent answer to random perturbations of an image. Stopped trainings are resumed by the same
command. `--part` computes one of the three trainings, several processes all of them.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from certifl import rng
from certifl.certification.network import Network, prepare
from certifl.data import Dataset, Partition, to_float
from certifl.federated.rounds import deployed_model
from certifl.federated.states import ClientData
from certifl.federated.trainer import train
from certifl.paper.figures import FEDAVG, Regime, Setting
from certifl.paper.scales import SCALES, scale_named
from certifl.perturbations import Perturbation
from certifl.runs.atomic import write_json
from certifl.runs.checkpoints import Checkpoints
from certifl.spec import Spec, with_settings
from certifl.study.setup import initial_model, local_training, open_data, protection

HELD_OUT = 10_000
VOTES = 16
ALONE = Regime("Local (nominal)", "local", "nominal")


def stretched(spec: Spec) -> Spec:
    """The same study with half as many rounds again, its decay stretched alike."""
    values = spec.model_dump(exclude_none=True)
    training = values["training"]
    for key in ("rounds", "decay_every"):
        training[key] = training[key] * 3 // 2
    return with_settings(values)


def trained(
    spec: Spec, dataset: Dataset, partition: Partition, clients: int, folder: Path
) -> tuple[Network, float]:
    """The first client's model of a training, and its seconds; `folder` has the rounds."""
    torch.set_num_threads(1)
    model = initial_model(spec, dataset)
    parts = [
        (lambda part: ClientData(number, part.images, part.labels))(dataset.train.take(own.train))
        for number, own in enumerate(partition.clients[:clients])
    ]
    private = protection(spec, model, [len(part) for part in parts], b"")
    last = train(
        spec.build_algorithm(),
        model,
        parts,
        local_training(spec, model, "cpu", private),
        Checkpoints(folder),
    )
    model.load_state_dict(deployed_model(spec.build_algorithm(), last, 0))
    seconds = sum(entry["seconds"] for entry in last.history)
    return prepare(model, to_float(dataset.test.images[:1]), "cpu"), seconds


@torch.inference_mode()
def answers(network: Network, images: torch.Tensor, noise: Perturbation | None) -> np.ndarray:
    """(m,) the most frequent class over VOTES perturbed copies; of the images without noise."""
    generator = rng.generator(0, "pilot", 0)
    found = []
    for part in to_float(images).split(network.batch_size):
        shape = tuple(part.shape[1:])
        counts = torch.zeros(len(part), network.classes)
        for _ in range(1 if noise is None else VOTES):
            seen = part
            if noise is not None:
                seen = noise.apply(part, noise.sample(len(part), shape, generator))
            classes = network.call(seen).argmax(1)
            counts[torch.arange(len(part)), classes] += 1
        found.append(counts.argmax(1))
    return torch.cat(found).numpy()


def held_out(dataset: Dataset, partition: Partition) -> np.ndarray:
    """Positions of training images that no client has."""
    used = np.concatenate([own.train for own in partition.clients])
    free = np.setdiff1d(np.arange(len(dataset.train)), used)
    return np.random.default_rng(0).permutation(free)[:HELD_OUT]


def measured(part: str, spec: Spec, data_dir: Path | None, out: Path) -> dict[str, object]:
    """One training and its accuracy, written to `out`."""
    dataset, partition = open_data(spec, data_dir)
    alone = part == "alone"
    count = 1 if alone else len(partition.clients)
    name = f"{part}-{spec.training_hash()}"
    network, seconds = trained(spec, dataset, partition, count, out / name)
    chosen = partition.clients[0].train if alone else held_out(dataset, partition)
    split = dataset.train.take(chosen)
    labels = split.labels.numpy()
    noise = None if alone else spec.perturbation()
    correct = answers(network, split.images, noise) == labels
    seen = sum(len(c.train) for c in partition.clients[:count]) * spec.training.rounds
    result: dict[str, object] = {
        "part": part,
        "spec": spec.training_hash(),
        "rounds": spec.training.rounds,
        "images": len(chosen),
        "accuracy": float(correct.mean()),
        "images_per_second": seen * spec.training.local_epochs / seconds,
        "seconds": seconds,
    }
    write_json(out / f"{name}.json", {**result, "correct": correct.tolist()})
    return result


def verdicts(out: Path, specs: dict[str, Spec]) -> list[str]:
    """What the finished parts say about the two criteria."""
    paths = {part: out / f"{part}-{spec.training_hash()}.json" for part, spec in specs.items()}
    done = {part: json.loads(path.read_text()) for part, path in paths.items() if path.is_file()}
    lines = []
    if "alone" in done:
        share = done["alone"]["accuracy"]
        lines.append(f"(a) a client alone fits {share:.1%} of its own images; wanted: 95 %")
    if {"rounds", "more"} <= set(done):
        fewer, more = (np.array(done[part]["correct"], float) for part in ("rounds", "more"))
        gain, error = 100 * (more - fewer).mean(), 100 * (more - fewer).std() / len(more) ** 0.5
        lines.append(
            f"(b) {done['more']['rounds']} rounds instead of {done['rounds']['rounds']}: "
            f"{gain:+.1f} points (standard error {error:.1f}); wanted: below 1"
        )
    return lines


def main() -> None:
    """Compute the parts, and say what they mean for the criteria."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--scale", default="overnight", choices=SCALES)
    parser.add_argument("--data", default="cifar10", choices=("cifar10", "mnist"))
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--part", choices=("alone", "rounds", "more"))
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE for every spec")
    options = parser.parse_args()
    scale = scale_named(options.scale, options.set)
    setting = Setting(options.data, 10, "rotation", "0.1pi")
    specs = {"alone": scale.spec(setting, ALONE), "rounds": scale.spec(setting, FEDAVG)}
    specs["more"] = stretched(specs["rounds"])
    options.out.mkdir(parents=True, exist_ok=True)
    for part in [options.part] if options.part else specs:
        started = time.time()
        result = measured(part, specs[part], options.data_dir, options.out)
        print(json.dumps(result), f"{time.time() - started:.0f} s")
    print("\n".join(verdicts(options.out, specs)))


if __name__ == "__main__":
    main()
