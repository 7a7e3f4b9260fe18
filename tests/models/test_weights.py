"""Files of weights as people have them: what is found in them, and what is refused."""

import argparse
import logging
import pickle
import shutil
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from certifl.errors import InputError, ModelError
from certifl.models.state import load_weights, read_checkpoint, weights_in

State = Mapping[str, Tensor]


class Centered(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x - 0.5) / 0.25


def make(parallel: bool = False) -> nn.Module:
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 3))
    return nn.Sequential(Centered(), nn.DataParallel(net) if parallel else net)


@pytest.fixture(scope="module")
def own() -> State:
    torch.manual_seed(3)
    model = make().train()
    model(torch.rand(8, 1, 8, 8))
    return model.state_dict()


def prefixed(state: State, prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


def without(state: State, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items()}


FILES: dict[str, Callable[[State], object]] = {
    "plain": dict,
    "with versions": lambda s: s,
    "module.": lambda s: prefixed(s, "module."),
    "1.module.": lambda s: {n.replace("1.", "1.module.", 1): v for n, v in s.items()},
    "_orig_mod.": lambda s: prefixed(s, "_orig_mod."),
    "module._orig_mod.": lambda s: prefixed(s, "module._orig_mod."),
    "_orig_mod.1.module.": lambda s: {
        n.replace("1.", "_orig_mod.1.module.", 1): v for n, v in s.items()
    },
    "state_dict": lambda s: {"state_dict": s, "epoch": 90, "arch": "r50"},
    "net": lambda s: {"net": s, "acc": 93.2, "epoch": 200},
    "model": lambda s: {"model": s},
    "model_state_dict": lambda s: {"model_state_dict": s, "loss": None},
    "weights": lambda s: {"weights": s},
    "a key of one's own": lambda s: {"classifier": s, "epoch": 3},
    "nested": lambda s: {"checkpoint": {"model": prefixed(s, "module.")}, "epoch": 3},
    "beside an optimizer": lambda s: {
        "model": s,
        "optimizer": torch.optim.SGD(make().parameters(), 0.1, momentum=0.9).state_dict(),
        "ema": s,
    },
    "beside a tensor of one number": lambda s: {"state_dict": s, "best_acc1": torch.tensor(93.2)},
    "beside a number of NumPy": lambda s: {"state_dict": s, "best_acc1": np.float64(93.2)},
    "beside an array of NumPy": lambda s: {"net": s, "confusion": np.eye(3)},
    "beside arguments": lambda s: {"net": s, "args": argparse.Namespace(lr=0.1, out=Path("x"))},
    "beside a date": lambda s: {"net": s, "numbers": (np.int64(3), np.float32(0.5))},
    "numbers among the weights": lambda s: {**s, "epoch": 3, "acc": 0.5, "name": "r50"},
    "no counters": lambda s: {n: v for n, v in s.items() if "num_batches" not in n},
    "no counters, with versions": lambda s: _dropped(s),
    "no counters, module.": lambda s: {
        f"module.{n}": v for n, v in s.items() if "num_batches" not in n
    },
    "half precision": lambda s: {
        n: v.double() if v.is_floating_point() else v for n, v in s.items()
    },
}


def _dropped(state: State) -> State:
    kept = OrderedDict((n, v) for n, v in state.items() if "num_batches" not in n)
    kept._metadata = state._metadata
    return kept


def saved(content: object, folder: Path, **options: Any) -> Path:
    path = folder / "weights.pth"
    torch.save(content, path, **options)
    return path


def loaded(path: Path, model: nn.Module) -> str:
    state = weights_in(read_checkpoint(path), path.name)
    return load_weights(model, state, f"{path.name} does not fit net:make")


def assert_equal(model: nn.Module, own: State) -> None:
    for name, value in model.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(value, own[name.replace("module.", "")]), name


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("parallel", [False, True])
def test_layouts_that_are_read(name, parallel, own, tmp_path):
    model = make(parallel)
    assert loaded(saved(FILES[name](own), tmp_path), model) == ""
    assert_equal(model, own)


def test_files_written_before_torch_1_6(own, tmp_path):
    content = {"state_dict": prefixed(own, "module."), "best": np.float64(93.2)}
    path = saved(content, tmp_path, _use_new_zipfile_serialization=False)
    model = make()
    loaded(path, model)
    assert_equal(model, own)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: prefixed(s, "backbone."), "prefix 'backbone.' of all its names was left out"),
        (lambda s: prefixed(s, "module.model."), "prefix 'model.' of all"),
        (lambda s: without(s, "1."), "prefix '1.' was put before all its names"),
        (
            lambda s: prefixed(without(s, "1."), "net.body."),
            "'net.body.' of all its names was tak",
        ),
    ],
)
def test_one_prefix_is_named_and_understood(change, says, own, tmp_path):
    model = make()
    assert says in loaded(saved(change(own), tmp_path), model)
    assert_equal(model, own)


def _two_prefixes(own: State) -> State:
    return {("a." if "weight" in n else "b.") + n: v for n, v in own.items()}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda s: {**prefixed(s, "backbone."), "criterion.weight": torch.ones(3)},
            "backbone.1.0",
        ),
        (_two_prefixes, r"file has 'a.1.0.weight', the network has '1.0.weight'.*saved from"),
        (lambda s: {n: v for n, v in s.items() if n != "1.3.bias"}, "network has '1.3.bias'"),
        (lambda s: {**s, "1.4.bias": torch.ones(3)}, "file has '1.4.bias'"),
        (lambda s: {**s, "1.3.bias": torch.ones(4)}, r"1.3.bias is \(4,\) where the network"),
    ],
)
def test_names_and_shapes_that_do_not_fit(change, says, own, tmp_path):
    with pytest.raises(ModelError, match=f"does not fit net:make: .*{says}"):
        loaded(saved(change(own), tmp_path), make())


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (lambda s: [1, 2], "holds no weights by name"),
        (lambda s: {"epoch": 3}, "holds no weights by name"),
        (lambda s: {"net": s, "model": s}, r"several places \(model, net\)"),
        (lambda s: {**s, "ema": s}, r"several places \(the file itself, ema\)"),
        (lambda s: {"old": s, "new": s}, r"several places \(new, old\)"),
        (lambda s: make(), "whole pickled object"),
    ],
)
def test_files_without_weights_that_are_meant(content, says, own, tmp_path):
    with pytest.raises(InputError, match=says):
        loaded(saved(content(own), tmp_path), make())


class Harmful:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return shutil.copyfile, (__file__, str(self.path))


def test_nothing_in_a_file_is_run(own, tmp_path):
    trap = tmp_path / "run"
    path = saved({"state_dict": own, "hidden": Harmful(trap)}, tmp_path)
    loaded(path, make())
    assert not trap.exists()
    pickle.loads(pickle.dumps(Harmful(trap)))
    assert trap.exists()  # as it would have, had it been run


def test_the_command_names_the_prefix(tmp_path, caplog):
    import tiny_study as tiny
    from certifl.models import build, state_of

    state = state_of(build("small_cnn", 1, 10, seed=3))
    path = saved({"net": prefixed(state, "backbone.")}, tmp_path)
    given = ("--model", "small_cnn", "--weights", path, "--data", "digits", "--images", "2")
    with caplog.at_level(logging.WARNING):
        out = ("--n", "100", "--out", tmp_path / "c.parquet")
        tiny.cli("certify", *given, *out).fine()
    assert "'backbone.' of all its names was left out" in caplog.text
