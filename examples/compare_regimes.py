"""Is one algorithm better than another? Paired statistics over images and seeds.

    python examples/compare_regimes.py                          # fedavg, local; 3 seeds: minutes
    python examples/compare_regimes.py mixture fedavg --seeds 5
    python examples/compare_regimes.py --quick                  # at a size of seconds

Within a seed both algorithms share clients, test images and noise, so they are compared image by
image. Over the seeds, Student's t of the scatter between trainings is added: an interval from one
seed is about these two models only, one from several seeds about the two algorithms. Two seeds say
next to nothing (one degree of freedom); use three or more.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from certifl.experiments.run import Options, run
from certifl.paper.claims import find_runs
from certifl.paper.claims.effects import QUANTITIES, Quantity, Sampler, over_seeds
from certifl.paper.claims.runs import StudyRun
from certifl.paper.scales import REGIMES, quickstart
from certifl.spec import Spec, with_settings

ERROR = 0.05
QUICK = (
    "clients.count=3",
    "data.train_images=90",
    "training.rounds=4",
    "certification.images=12",
    "certification.n=300",
)


def study(regime: str, seed: int, quick: bool) -> Spec:
    """The study of one algorithm. Put your own data, clients and schedule here."""
    values = quickstart(seed)[regime].model_dump(exclude_none=True)
    return with_settings(values, QUICK if quick else ())


def trained(regime: str, seeds: int, out: Path, quick: bool) -> list[StudyRun]:
    """One finished run for each seed; finished ones are not repeated."""
    folders = []
    for seed in range(seeds):
        options = Options(out / f"{regime}-{seed}")
        folders.append(run(study(regime, seed, quick), options).path)
        print(f"{regime}, seed {seed}: {folders[-1]}", flush=True)
    runs, _ = find_runs(folders)
    return sorted(runs, key=lambda found: found.metadata.seed)


def line(quantity: Quantity, pairs: Sequence[tuple[StudyRun, StudyRun]], compared: int) -> str:
    """First minus second with an interval; all lines together hold with 95 %."""
    sampler = Sampler([one for pair in pairs for one in pair])
    effect = over_seeds([quantity.of(sampler, first, second) for first, second in pairs])
    low, high = effect.interval(ERROR / compared)
    if not math.isfinite(high - low):
        return f"{quantity.words:45s} {effect.estimate:+.3f}  too few images for an interval"
    verdict = "no difference shown"
    if low > 0.0 or high < 0.0:
        verdict = f"the {'first' if low > 0.0 else 'second'} is larger"
    return f"{quantity.words:45s} {effect.estimate:+.3f}  [{low:+.3f}, {high:+.3f}]  {verdict}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Compare two ways of training on digits.")
    parser.add_argument("first", nargs="?", choices=list(REGIMES), default="fedavg")
    parser.add_argument("second", nargs="?", choices=list(REGIMES), default="local")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--out", type=Path, default=Path("runs/compare_regimes"))
    given = parser.parse_args(arguments)
    out = given.out / ("quick" if given.quick else "full")
    both = [trained(name, given.seeds, out, given.quick) for name in (given.first, given.second)]
    pairs = list(zip(*both, strict=True))
    print(f"{given.first} minus {given.second}, {given.seeds} seeds; shares of the largest radius")
    quantities = [QUANTITIES[name] for name in ("acr", "accuracy", "spread")]
    for quantity in quantities:
        print(line(quantity, pairs, len(quantities)))


if __name__ == "__main__":
    main()
