"""Networks: sizes, seeds, states, pooling, convolutions, and a person's own model."""

import contextlib
import copy
import importlib
import pickle
import sys
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

import certifl
from certifl import models
from certifl.errors import InputError, ModelError
from certifl.federated.steps import isolated_rng
from certifl.models import architectures as networks
from certifl.models.architectures import QuarterMeans
from certifl.torch_env import exact_convolutions

each = pytest.mark.parametrize("name", models.MODELS)


def own(name):
    return f"{__name__}:{name}"


def linear(in_channels, num_classes, size=8):
    return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * size * size, num_classes))


def broken(in_channels, num_classes):
    raise RuntimeError("no such luck")


def no_module(in_channels, num_classes):
    return lambda images: images


def ten_logits(in_channels, num_classes):
    return linear(in_channels, 10)


def two_results(in_channels, num_classes):
    class Two(nn.Module):
        def forward(self, images):
            return images, images

    return Two()


not_a_function = 3


@each
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (1, 28, 28), (2, 9, 13)])
def test_images_in_logits_out(name, shape):
    model = models.build(name, shape[0], 7, seed=0, image_size=shape[1:]).eval()
    images = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    logits = model(images)
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()


def test_networks_have_their_known_sizes():
    # ResNet-18 with a 3 x 3 stem and ten classes: 11 173 962 weights
    assert sum(p.numel() for p in models.resnet18(3, 10).parameters()) == 11_173_962
    for name, most in [("small_resnet", 200_000), ("small_cnn", 30_000)]:
        count = sum(p.numel() for p in models.MODELS[name](3, 10).parameters())
        assert 5_000 < count <= most


def test_resnet_halves_the_size_at_every_stage_but_the_first():
    net = models.resnet18(3, 10).eval()
    seen = []
    for block in net.blocks:
        block.register_forward_hook(lambda _, __, out: seen.append(tuple(out.shape[1:])))
    net(torch.rand(1, 3, 32, 32))
    assert seen == [(64, 32, 32)] * 2 + [(128, 16, 16)] * 2 + [(256, 8, 8)] * 2 + [(512, 4, 4)] * 2


@each
def test_normalization_is_inside_and_not_in_the_state(name):
    model = models.MODELS[name](in_channels=3, num_classes=10)
    assert isinstance(model.normalize, models.Normalize)
    assert not [key for key in model.state_dict() if "normalize" in key]
    assert model.normalize(torch.full((1, 3, 2, 2), 0.75)).unique().item() == 1.0
    other = models.build(name, 3, 10, seed=0, options={"mean": 0.0, "std": 1.0})
    assert other.normalize(torch.full((1, 3, 2, 2), 0.75)).unique().item() == 0.75


@each
def test_one_images_logits_do_not_depend_on_the_others(name):
    model = models.build(name, 1, 10, seed=0).eval()
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    together = model(images)
    replaced = torch.cat([images[:1], 10 * images[1:]])
    # kernels may sum in another order; a batch statistic would change the logits altogether
    torch.testing.assert_close(model(replaced)[0], together[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["small_cnn", "small_resnet"])
@pytest.mark.parametrize(("lr", "momentum"), [(0.1, 0.0), (0.02, 0.9)])
def test_small_networks_learn_digits(name, lr, momentum):
    """Six passes over 1 400 digits; 0.8 is far from chance (0.1); about 0.95 is reached."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    model = models.build(name, 1, 10, seed=0)
    sgd = torch.optim.SGD(model.parameters(), lr, momentum)
    made = torch.Generator().manual_seed(0)
    for _ in range(6):
        for batch in torch.randperm(1400, generator=made).split(64):
            sgd.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            sgd.step()
    model.eval()
    assert (model(images[1400:]).argmax(1) == labels[1400:]).float().mean() > 0.8


@each
def test_weights_depend_on_the_seed_alone(name):
    torch.manual_seed(1)
    first = models.fingerprint(models.build(name, 1, 10, seed=5))
    torch.manual_seed(2)
    assert models.fingerprint(models.build(name, 1, 10, seed=5)) == first
    assert models.fingerprint(models.build(name, 1, 10, seed=6)) != first


@pytest.mark.parametrize("name", [*models.MODELS, own("linear"), own("broken"), own("ten_logits")])
def test_the_callers_generator_is_never_touched(name):
    torch.manual_seed(11)
    before = torch.get_rng_state()
    try:
        models.build(name, 1, 7, seed=5, image_size=(8, 8))
    except ModelError:
        assert name in (own("broken"), own("ten_logits"))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_generators_of_gpus_are_not_touched_either():
    before = torch.cuda.get_rng_state()
    models.build("small_cnn", 1, 10, seed=5)
    assert torch.equal(torch.cuda.get_rng_state(), before)


@each
def test_a_state_is_a_copy_that_can_be_loaded(name):
    model = models.build(name, 1, 10, seed=0)
    state = models.state_of(model)
    assert set(state) == set(model.state_dict())
    assert all(t.device.type == "cpu" and not t.requires_grad for t in state.values())
    before = models.fingerprint(state)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert models.fingerprint(state) == before
    assert models.fingerprint(model) != before
    model.load_state_dict(state)
    assert models.fingerprint(model) == before


def test_integer_buffers_stay_integers():
    state = models.state_of(models.small_resnet(1, 10))
    counters = [t for key, t in state.items() if key.endswith("num_batches_tracked")]
    assert counters
    assert all(t.dtype == torch.int64 for t in counters)


def test_a_fingerprint_tells_states_apart():
    state = {"a": torch.zeros(2, 3), "b": torch.ones((), dtype=torch.int64)}
    same = {"b": torch.ones((), dtype=torch.int64), "a": torch.zeros(3, 2).T}
    assert models.fingerprint(state) == models.fingerprint(same)
    different = [
        {"a": torch.zeros(3, 2), "b": state["b"]},
        {"a": torch.zeros(2, 3, dtype=torch.float64), "b": state["b"]},
        {"a": torch.zeros(2, 3, dtype=torch.int32), "b": state["b"]},
        {"a": state["a"], "c": state["b"]},
        {"a": state["a"]},
        {"a": -torch.zeros(2, 3), "b": state["b"]},
        {"a": torch.zeros(2, 3, dtype=torch.bfloat16), "b": state["b"]},
    ]
    prints = [models.fingerprint(s) for s in [state, *different]]
    assert len(set(prints)) == len(prints)
    assert all(len(p) == 64 for p in prints)


def test_memory_layout_does_not_change_a_fingerprint():
    model = models.build("small_resnet", 3, 10, seed=0)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    assert models.fingerprint(last) == models.fingerprint(model)


def test_a_function_of_ones_own_is_called_with_its_options():
    model = models.build(own("linear"), 2, 5, seed=0, options={"size": 9}, image_size=(9, 9))
    assert model[1].weight.shape == (5, 2 * 81)
    again = models.build(own("linear"), 2, 5, seed=0, options={"size": 9})
    assert models.fingerprint(again) == models.fingerprint(model)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet19", "choose one of resnet18"),
        (":f", "module:function"),
        ("m:", "module:function"),
        ("no_such_module_anywhere:f", "cannot be imported.*PYTHONPATH"),
        ("no.such:f", "cannot be imported"),
        (own("missing"), "does not exist"),
        (own("not_a_function"), "is not callable"),
        (own("broken"), "RuntimeError: no such luck"),
        (own("no_module"), r"returned function, not a torch\.nn\.Module"),
        (own("ten_logits"), r"shape \(1, 7\) for one image, got \(1, 10\)"),
        (own("two_results"), "got tuple"),
    ],
)
def test_a_model_that_cannot_be_used_is_refused(name, message):
    with pytest.raises(ModelError, match=message):
        models.build(name, 1, 7, seed=0, image_size=(8, 8))


def test_options_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="small_cnn has no parameter 'depth': it has mean, std"):
        models.build("small_cnn", 1, 10, seed=0, options={"depth": 3})
    with pytest.raises(ModelError, match=r"TypeError.*depth.*options"):
        models.build(own("linear"), 1, 10, seed=0, options={"depth": 3})


def test_a_module_that_fails_on_import_is_refused(tmp_path, monkeypatch):
    (tmp_path / "fails_on_import.py").write_text("raise KeyError('missing setting')\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises(ModelError, match="KeyError: 'missing setting'"):
        models.build("fails_on_import:f", 1, 10, seed=0)


def test_a_model_that_cannot_take_the_images_is_refused():
    with pytest.raises(ModelError, match=r"blank image of shape \(1, 1, 12, 12\)"):
        models.build(own("linear"), 1, 10, seed=0, image_size=(12, 12))


def test_checking_leaves_modes_and_statistics_alone():
    model = models.small_resnet(1, 10)
    model.blocks[1].eval()
    modes = [m.training for m in model.modules()]
    before = models.fingerprint(model)
    models.check_logits(model, 1, 10, (8, 8))
    assert [m.training for m in model.modules()] == modes
    assert models.fingerprint(model) == before


def _network(module: str) -> torch.nn.Module:
    importlib.invalidate_caches()
    sys.modules.pop(module, None)
    return importlib.import_module(module).make()


def test_the_code_of_a_network_is_seen_to_change(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    source = """
import torch
class Own(torch.nn.Sequential):
    def forward(self, x):
        return super().forward(x.flatten(1)) * {}
def make():
    return Own(torch.nn.Linear(64, 10, bias=False))
"""
    file = tmp_path / "certifl_own_network.py"
    prints = []
    for factor in ("+1", "-1", "+1"):
        file.write_text(source.format(factor))
        prints.append(models.code_fingerprint(_network(file.stem)))
    assert prints[0] == prints[2] != prints[1]
    assert len(prints[0]) == 64
    assert models.code_fingerprint(models.build("small_resnet", 3, 10, seed=0)) == ""
    monkeypatch.delitem(sys.modules, file.stem)


def test_a_fingerprint_takes_in_what_is_no_tensor():
    class Extra(nn.Module):
        def __init__(self, note: object) -> None:
            super().__init__()
            self.note = note

        def get_extra_state(self) -> object:
            return self.note

    notes = ({"a": (1, torch.ones(2))}, {"a": (1, torch.zeros(2))}, 3, "text")
    made = [models.fingerprint(Extra(note)) for note in notes]
    assert len(set(made)) == len(made)
    assert models.fingerprint(Extra({"a": (1, torch.ones(2))})) == made[0]
    assert models.fingerprint(Extra(object())) == models.fingerprint(Extra(object()))


SIZES = list(product((1, 2, 3, 7, 8), repeat=2))


def features(height: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    drawn = torch.Generator().manual_seed(height * 10 + width)
    return torch.randn(3, 4, height, width, generator=drawn, dtype=dtype).requires_grad_()


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_on_a_processor_it_is_torchs_own_pooling(height, width):
    x = features(height, width, torch.float32)
    pooled, expected = QuarterMeans()(x), nn.AdaptiveAvgPool2d(2)(x)
    assert torch.equal(pooled, expected)
    weight = torch.randn_like(pooled)
    gradients = (torch.autograd.grad((one * weight).sum(), x)[0] for one in (pooled, expected))
    assert torch.equal(*gradients)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_means_of_slices_are_the_same_means(height, width):
    x = features(height, width, torch.float64)
    sliced, expected = networks._means_of_slices(x), nn.AdaptiveAvgPool2d(2)(x)
    assert torch.allclose(sliced, expected, rtol=0, atol=1e-14)
    weight = torch.randn_like(expected)
    gradients = (torch.autograd.grad((one * weight).sum(), x)[0] for one in (sliced, expected))
    assert torch.allclose(*gradients, rtol=0, atol=1e-14)


class OnAGpu(torch.Tensor):
    is_cuda = True


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("size", "kind", "torchs_own"),
    [(28, OnAGpu, False), (32, OnAGpu, True), (28, torch.Tensor, True), (32, torch.Tensor, True)],
)
def test_no_gradient_of_overlapping_quarters_is_added_atomically(size, kind, torchs_own):
    network = networks.small_cnn(1, 10)
    images = torch.rand(2, 1, size, size).as_subclass(kind)
    with Operations() as operations:
        network(images).sum().backward()
    assert ("aten::_adaptive_avg_pool2d_backward" in operations.names) is torchs_own


def test_a_traced_network_still_chooses_by_size():
    network = certifl.models.build("small_cnn", 1, 10, seed=0).eval()
    traced = fx.symbolic_trace(copy.deepcopy(network))
    sent = pickle.loads(pickle.dumps(traced))
    called = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert networks._quarter_means in called
    for size in (28, 32):
        images = torch.rand(2, 1, size, size)
        assert torch.equal(traced(images), network(images))
        assert torch.equal(sent(images), network(images))


def test_names_of_weights_are_those_of_stored_models():
    names = list(certifl.models.build("small_cnn", 1, 10, seed=0).state_dict())
    layers = ["conv1", "norm1", "conv2", "norm2", "conv3", "norm3", "head"]
    assert names == [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]


CUDA = torch.device("cuda:0")


def flags() -> tuple[bool, bool]:
    return torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic


@pytest.fixture(params=[(True, False), (False, True)], ids=str)
def before(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[bool, bool]:
    benchmark, deterministic = request.param
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", benchmark)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", deterministic)
    return request.param


def test_they_are_exact_within_and_as_before_afterwards(before):
    with exact_convolutions(CUDA):
        assert flags() == (False, True)
    assert flags() == before
    with pytest.raises(KeyError), exact_convolutions(CUDA):
        raise KeyError
    assert flags() == before


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_other_devices_have_no_such_flags(before, device):
    with exact_convolutions(torch.device(device)):
        assert flags() == before


@pytest.fixture
def convolutions() -> Iterator[Any]:
    """As a program has it that chose the precision of convolutions by torch's newer names."""
    by_name: Any = getattr(torch.backends.cudnn, "conv", None)
    if not hasattr(by_name, "fp32_precision"):
        pytest.skip("this torch has no fp32_precision, so nothing that reading allow_tf32 refuses")
    chosen = by_name.fp32_precision
    by_name.fp32_precision = "ieee"
    try:
        with pytest.raises(RuntimeError, match="mix of the legacy and new APIs"):
            _ = torch.backends.cudnn.allow_tf32
        yield by_name
    finally:
        by_name.fp32_precision = chosen


def test_a_clients_passes_do_not_ask_for_tf32(convolutions, monkeypatch):
    """Asking is an error of torch once a program chose it by `fp32_precision`."""
    nothing = contextlib.nullcontext
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: nothing(devices))
    monkeypatch.setattr(torch.cuda, "device", nothing)
    monkeypatch.setattr(torch.cuda, "manual_seed", lambda seed: None)
    with torch.random.fork_rng([]), isolated_rng(CUDA, seed=3):
        assert flags() == (False, True)
    assert convolutions.fp32_precision == "ieee"
