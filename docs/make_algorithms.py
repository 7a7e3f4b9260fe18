"""Write the table of docs/algorithms.md from the code, with sizes counted in real rounds.

python docs/make_algorithms.py          # rewrites what stands between the two marks
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from certifl.federated import (
    ALGORITHMS,
    Algorithm,
    ClientData,
    ClientState,
    LocalTraining,
    Schedule,
    from_description,
    state_of,
)
from certifl.federated.batches import Batch
from certifl.models import build

__all__ = ["BEGIN", "END", "PAGE", "table"]

PAGE = Path(__file__).resolve().parent / "algorithms.md"
BEGIN = "<!-- the table: python docs/make_algorithms.py -->"
END = "<!-- end of the table -->"
# Hyper-parameters without a default, for the rounds in which sizes are counted.
_GIVEN: dict[str, dict[str, Any]] = {
    "personalized": {"base": "fedavg"},
    "mixture": {"personalization": 0.5},
    "fedprox": {"mu": 0.1},
    "l2gd": {"personalization": 0.5},
    "ditto": {"mu": 1.0},
    "flix": {"personalization": 0.5},
}
_WORDS = {
    "model": "model",
    "control_step": "change of its control variate",
    "control": "control variate",
    "own": "own weights",
    "statistics": "BatchNorm statistics",
    "mix": "alpha",
    "layers": "BatchNorm layers",
    "head": "head",
    "adapted": "adapted model",
    "personalized": "fine-tuned model",
    "velocity": "momentum",
    "first": "first moment",
    "second": "second moment",
    "known": "who has one",
}


@dataclass(frozen=True)
class Counted:
    """Cross entropy that counts the images it is asked for."""

    seen: list[int]

    name: ClassVar[str] = "counted"

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of the images as they are."""
        self.seen.append(len(batch))
        logits = model(batch.draw())
        return nn.functional.cross_entropy(logits, batch.labels), logits


def table() -> str:
    """Every algorithm in a row."""
    head = "algorithm", "deployed model", "hyper-parameters", "sends", "keeps", "server", "work"
    rows = [_row(name) for name in ALGORITHMS]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def sources() -> str:
    """Where every algorithm comes from, as its docstring says."""
    return "\n".join(f"- `{name}`: {_source(kind)}" for name, kind in ALGORITHMS.items())


def _row(name: str) -> tuple[str, ...]:
    algorithm = from_description({"name": name, **_GIVEN.get(name, {})})
    return (f"`{name}`", algorithm.deploys, _options(name), *_sizes(algorithm))


def _options(name: str) -> str:
    told = []
    for option in fields(ALGORITHMS[name]):
        given = option.default
        missing = given is MISSING
        shown = "" if missing else " = absent" if given is None else f" = {_toml(given)}"
        told.append(f"`{option.name}{shown}`" + (" (must be given)" if missing else ""))
    return ", ".join(told) or "none"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else f"{value:g}"


def _source(kind: type) -> str:
    text = re.search(r"Source:(.*?)(?:\n\s*\n|\Z)", kind.__doc__ or "", re.DOTALL)
    assert text is not None, kind
    return " ".join(text[1].split())


def _sizes(algorithm: Algorithm) -> tuple[str, str, str, str]:
    """What is sent, kept and held in a second round, in models; images seen, in local passes."""
    counted = Counted([])
    network, data = build("small_resnet", 1, 10, 0), _images()
    schedule = Schedule(rounds=2, local_epochs=2, batch_size=8, lr=0.01)
    training = LocalTraining(network, schedule, seed=0, objective=counted)
    unit = _count(state_of(network))
    server, state = algorithm.init(state_of(network)), ClientState()
    sent, kept, held, work = "", "", "", ""
    for round in range(schedule.rounds + algorithm.extra_rounds):
        counted.seen.clear()
        before = server.parts
        update, state = algorithm.client_round(server, state, data, training)
        server = algorithm.aggregate(server, [update])
        if round < schedule.rounds:
            whole = {} if update.model is None else {"model": update.model}
            sent = _parts(_learned({**whole, **update.extra}, before), unit)
            held = _parts(server.parts, unit)
            work = _plain(sum(counted.seen) / (len(data) * schedule.local_epochs))
        kept = _parts(state.parts, unit)
    drawn = algorithm.name == "l2gd"
    return sent, kept, held, "drawn" if drawn else work


def _images() -> ClientData:
    drawn = torch.Generator().manual_seed(0)
    images = torch.randint(256, (24, 1, 8, 8), generator=drawn, dtype=torch.uint8)
    return ClientData(0, images, torch.arange(24) % 10)


def _learned(
    parts: Mapping[str, dict[str, torch.Tensor]], before: Mapping[str, dict[str, torch.Tensor]]
) -> dict[str, dict[str, torch.Tensor]]:
    """The parts without the tensors that come back as they were broadcast."""
    return {
        part: {
            name: value
            for name, value in held.items()
            if name not in before.get(part, {}) or not torch.equal(value, before[part][name])
        }
        for part, held in parts.items()
    }


def _count(tensors: Mapping[str, torch.Tensor]) -> int:
    return sum(value.numel() for value in tensors.values())


def _parts(parts: Mapping[str, Mapping[str, torch.Tensor]], unit: int) -> str:
    told = [f"{_plain(_count(held) / unit)} {_WORDS[part]}" for part, held in parts.items()]
    return " + ".join(told) or "nothing"


def _plain(amount: float) -> str:
    if amount < 0.005:
        return "0.00"
    return (
        f"{amount:.2f}".rstrip("0").rstrip(".")
        if abs(amount - round(amount)) > 0.004
        else (f"{amount:.0f}")
    )


def page(text: str, made: Iterable[str]) -> str:
    """The page with what is made in place of what stood between the marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return "\n\n".join([before + BEGIN, *made, END + after])


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(), [table(), "Sources:", sources()]))
