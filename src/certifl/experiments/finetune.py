"""Noise-augmented fine-tuning of a user's own weights: a spec with one client, run twice.

```
<out>/before/                the given weights, certified
<out>/after/                 the same after fine-tuning
<out>/finetuned.safetensors  the weights after fine-tuning
<out>/report.html            both on one page, written by the command line
```
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from certifl.errors import InputError, SpecError
from certifl.runs.atomic import save_tensors
from certifl.safe_io import parse_toml
from certifl.spec import Spec, with_settings
from certifl.study.opened_run import OpenRun

BEFORE, AFTER = "Before fine-tuning", "After fine-tuning"
WEIGHTS = "finetuned.safetensors"


def finetune_specs(
    model: str,
    weights: Path,
    data: str,
    perturbation: Mapping[str, Any],
    *,
    epochs: int,
    lr: float,
    batch_size: int,
    images: int | None,
    n: int,
    seed: int,
    settings: Sequence[str] = (),
) -> dict[str, Spec]:
    """The two studies by the names of their folders, "before" and "after".

    Args:
        model: a network's name, or the user's own as module:function. weights: its file.
        data: the data set: training images tune, test images are certified.
        perturbation: as in a spec; see `read_perturbation`.
        epochs, lr, batch_size: of fine-tuning. images: test images certified; None = all.
        n: votes of each. seed: of all random streams.
        settings: `key=value` for any other key of the spec.

    Raises:
        SpecError: something that was asked for is not possible; the message names the key.
    """
    values: dict[str, Any] = {
        "name": f"{weights.stem}, fine-tuned",
        "seed": seed,
        "data": {"name": data},
        "clients": {"count": 1},
        "model": {"name": model, "weights": str(weights)},
        "algorithm": {"name": "local"},
        "training": {
            "rounds": epochs,
            "local_epochs": 1,
            "batch_size": batch_size,
            "lr": lr,
            "decay_every": 0,
            "momentum_between_rounds": "keep",
        },
        "augmentation": {"federated": perturbation},
        "certification": {"perturbation": perturbation, "n": n},
    }
    if images is not None:
        values["certification"]["images"] = images
    after = with_settings(values, settings)
    before = with_settings(values, [*settings, "training.rounds=0"])
    return {"before": before, "after": after}


def read_perturbation(text: str, sigma: str | None) -> dict[str, Any]:
    """A perturbation as a spec takes it.

    Args:
        text: FAMILY, FAMILY:SIGMA such as rotation:18deg, or a table as in a spec.
        sigma: of a family that is named alone.

    Raises:
        SpecError: it is none of these, or sigma is missing or given twice.
    """
    if text.lstrip().startswith("{"):
        try:
            table = parse_toml(f"value = {text}")["value"]
        except InputError as error:
            raise SpecError(
                f"--perturbation {text}: this is not a TOML table: {error}."
            ) from error
        return table if sigma is None else {**table, "sigma": sigma}
    family, colon, amount = text.partition(":")
    if bool(colon) == (sigma is not None):
        raise SpecError(
            f"--perturbation {text}: give sigma once, as --perturbation {family.strip()}:SIGMA, "
            f"or --perturbation {family.strip()} --sigma SIGMA."
        )
    given: float | str = amount.strip() if colon else str(sigma)
    with contextlib.suppress(ValueError):  # an angle stays text
        given = float(given)
    return {"family": family.strip(), "sigma": given}


def save_finetuned(run: OpenRun, out: Path) -> Path:
    """Write the weights of the fine-tuned model.

    Raises:
        StoreError: they cannot be read or written.
    """
    path = out / WEIGHTS
    save_tensors(path, run.state(0))
    return path
