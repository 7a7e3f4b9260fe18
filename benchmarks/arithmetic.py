"""Votes per second by arithmetic, in turn, in one run: what "auto" takes, and what int8 gains.

First "auto" against the better of float32 and bfloat16, on every built-in network; then int8
against the plain loop of `certification.py` in float32; then the whole of certification in int8
against the bare network at the same batch. Rounds alternate, so other work on the machine slows
all alike; ratios are medians over rounds with their range.

    python benchmarks/arithmetic.py [--rounds 5] [--threads 1] [--networks small_cnn resnet18]
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

import certifl
from certification import ours, straightforward
from certifl.certification.arithmetic import Trial, choose_arithmetic, in_arithmetic
from certifl.certification.network import Network, prepare
from certifl.certification.quantization import Calibration
from certifl.certification.sampling import VoteCounter
from certifl.perturbations.base import Perturbation

_TOLD = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
ROTATION, PIXEL = certifl.Rotation(0.1 * math.pi), certifl.PixelNoise(0.25)


def instruction_sets() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.is_file() else set()
    return ", ".join(flag for flag in _TOLD if flag in flags) or platform.machine()


def alternating(work: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Votes per second of each kind of work, as often as there are rounds, in turn."""
    seen: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, speed in work.items():
            seen[name].append(speed())
    return seen


def ratio(seen: Mapping[str, list[float]], first: str, second: str) -> str:
    ratios = sorted(a / b for a, b in zip(seen[first], seen[second], strict=True))
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"


def bare(network: Network, batches: int) -> float:
    noisy = torch.rand((network.batch_size, 3, 32, 32))
    started = time.perf_counter()
    with torch.inference_mode():
        for _ in range(batches):
            network.call(noisy)
    return batches * network.batch_size / (time.perf_counter() - started)


def whole(network: Network, noise: Perturbation, image: torch.Tensor, votes: int) -> float:
    return votes / ours(VoteCounter(network, noise, 0), image, votes)


def compare(name: str, rounds: int, seconds: float) -> None:
    model = certifl.models.build(name, 3, 10, seed=0)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand((32, 3, 32, 32), generator=generator)
    with torch.no_grad():
        model(images)  # statistics of BatchNorm
    model.eval()
    image, trial = images[:1], Trial(ROTATION, 0, 100, 1_000_000)
    choice = choose_arithmetic(model, images, trial, "cpu")
    networks = {kind: prepare(model, image, "cpu", kind) for kind in ("float32", "bfloat16")}
    networks["auto"] = in_arithmetic(model, image, choice, "cpu")
    quantized = {
        noise: prepare(model, image, "cpu", "int8", calibration=Calibration.of(images, noise, 0))
        for noise in (ROTATION, PIXEL)
    }
    networks["int8"] = quantized[ROTATION]
    votes = {kind: _votes(network, seconds) for kind, network in networks.items()}
    loop = max(400, int(votes["float32"] / 400) * 400)
    work: dict[str, Callable[[], float]] = {
        kind: (lambda n=network, v=votes[kind]: whole(n, ROTATION, image, v))
        for kind, network in networks.items()
    }
    work["loop"] = lambda: loop / straightforward(model, image, ROTATION.sigma, loop)
    seen = alternating(work, rounds)
    better = max(("float32", "bfloat16"), key=lambda kind: statistics.median(seen[kind]))
    speeds = ", ".join(f"{kind} {statistics.median(v):.0f}" for kind, v in seen.items())
    print(f"{name}: votes/s {speeds}")
    taken = f"{choice.precision}, batches of {choice.batch_size}"
    print(f"  auto took {taken}; against {better}: {ratio(seen, 'auto', better)}")
    print(f"  int8 / plain loop: {ratio(seen, 'int8', 'loop')}", flush=True)
    for noise, network in quantized.items():
        batches = max(4, votes["int8"] // network.batch_size)
        shares = alternating(
            {
                "bare": lambda n=network, b=batches: bare(n, b),
                "whole": lambda n=network, w=noise: whole(n, w, image, votes["int8"]),
            },
            rounds,
        )
        print(f"  int8, {noise.family}: whole / bare {ratio(shares, 'whole', 'bare')}", flush=True)


def _votes(network: Network, seconds: float) -> int:
    """As many votes as take about so long."""
    bare(network, 1)
    size = network.batch_size
    return max(200, int(bare(network, 2) * seconds / size) * size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each piece of work")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--networks", nargs="+", default=list(certifl.models.MODELS))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"# {instruction_sets()}; {options.threads} threads, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CERTIFL_CACHE"] = folder  # measured anew
        for name in options.networks:
            compare(name, options.rounds, options.seconds)


if __name__ == "__main__":
    main()
