"""Networks as people have them: whatever votes answers as the model itself does in evaluation."""

import functools
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import certifl
from certifl.certification.network import Network, prepare
from certifl.certification.sampling import predict_plain
from certifl.errors import ModelError

NOISE = certifl.PixelNoise(0.25)
# weight_norm is deprecated, torch.jit too; people have networks that were made with both.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
]


def images(count: int = 5) -> Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def body(change: Callable[[nn.Module], object] | None = None, norm: bool = True) -> nn.Module:
    """Two convolutions, the first changed, whose BatchNorm has statistics of its own."""
    torch.manual_seed(0)
    first = nn.Conv2d(1, 8, 3)
    changed = first if change is None else change(first) or first
    norms = [nn.BatchNorm2d(8), nn.BatchNorm2d(4)] if norm else [nn.Identity(), nn.Identity()]
    net = nn.Sequential(
        changed, norms[0], nn.ReLU(), nn.Conv2d(8, 4, 3), norms[1], nn.Flatten(), nn.Linear(64, 3)
    ).train()
    for _ in range(3):
        net(torch.rand(16, 1, 8, 8))
    return net.eval()


def _pruned(layer: nn.Module) -> nn.Module:
    return prune.l1_unstructured(layer, "weight", amount=0.5)


class SharedNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(1, 4, 3), nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.head = nn.Linear(144, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.norm(self.a(x)) * self.norm(self.b(x))).flatten(1))


class SharedConvolution(nn.Module):
    """One convolution under two names, each with a BatchNorm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(1, 4, 3)
        self.b = self.a
        self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)])
        self.head = nn.Linear(144, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.norms[0](self.a(x)) + self.norms[1](self.b(x))).flatten(1))


class WeightReadTwice(nn.Module):
    """A convolution whose weight also serves outside of its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.head = nn.Linear(144, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        return self.head((y + nn.functional.conv2d(x, self.conv.weight)).flatten(1))


class TiedWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 3), nn.Conv2d(1, 4, 3)
        self.b.weight = self.a.weight
        self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(144, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.norm(self.a(x)) + self.b(x)).flatten(1))


class Standardized(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        weight = (self.weight - self.weight.mean()) / self.weight.std()
        return nn.functional.conv2d(input, weight, self.bias)


class Viewed(nn.Module):
    """Flattened by `view`, which fails on tensors in channels-last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 8, 3), nn.Linear(288, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.head(x.view(x.size(0), -1))


class Counting(nn.Module):
    """Counts its calls in buffers that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.body = body()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen = self.seen + 0.5
        return self.body(x)


class Plainly(nn.Module):
    """A constant that is neither a weight nor a buffer: bfloat16 fails in what follows."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.body = torch.full((1, 1, 1, 1), 0.5), body(norm=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x - self.mean)


class Locked(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.lock, self.body = threading.Lock(), inner

    def forward(self, x: Tensor) -> Tensor:
        with self.lock:
            return self.body(x)


class Generating(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pages, self.body = (page for page in ()), body()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def _remembering() -> nn.Module:
    net = body()
    net.latest = net(images())  # a tensor with a gradient history
    return net


def _settled(net: nn.Module) -> nn.Module:
    """Running statistics that are not the identity."""
    torch.manual_seed(0)
    for _ in range(3):
        net.train()(torch.rand(16, 1, 8, 8))
    return net.eval()


def _hooked(where: str) -> nn.Module:
    net = body()
    layer = {"root": net, "conv": net[0], "norm": net[1], "head": net[6]}[where]
    layer.register_forward_hook(lambda _m, _i, out: out * 1.0005 + 0.0005)
    return net


def _pre_hooked() -> nn.Module:
    net = body()
    net.register_forward_pre_hook(lambda _m, given: (given[0] * 1.0005,))
    return net


def _inner_hooked() -> nn.Module:
    net = nn.Sequential(body(), nn.Identity()).eval()
    net[0].register_forward_hook(lambda _m, _i, out: out * 1.0005)
    return net


def _scripted() -> nn.Module:
    return torch.jit.script(body())


@functools.cache  # exporting takes seconds, and whoever votes with it copies it
def _exported() -> nn.Module:
    batch = torch.export.Dim("batch")
    return torch.export.export(body(), (images(),), dynamic_shapes=({0: batch},)).module()


def _lazy(called: bool) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(3))
    if called:
        return _settled(net)
    filled = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 3))
    net.load_state_dict(_settled(filled).state_dict())
    return net.eval()


def _in_parallel() -> nn.Module:
    return nn.Sequential(nn.Identity(), nn.DataParallel(body())).eval()


def _frozen() -> nn.Module:
    return body().requires_grad_(False)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "plain": body,
    "frozen weights": _frozen,
    "spectral_norm, hook": lambda: body(spectral_norm),
    "spectral_norm": lambda: body(parametrizations.spectral_norm),
    "weight_norm, hook": lambda: body(weight_norm),
    "weight_norm": lambda: body(parametrizations.weight_norm),
    "orthogonal": lambda: body(parametrizations.orthogonal),
    "pruned": lambda: body(_pruned),
    "standardized": lambda: body(lambda _: Standardized(1, 8, 3)),
    "shared BatchNorm": lambda: _settled(SharedNorm()),
    "shared convolution": lambda: _settled(SharedConvolution()),
    "weight read twice": lambda: _settled(WeightReadTwice()),
    "tied weights": lambda: _settled(TiedWeights()),
    "view": lambda: Viewed().eval(),
    "counting": lambda: Counting().eval(),
    "constant": lambda: Plainly().eval(),
    "lock": lambda: Locked(body()).eval(),
    "lock and weight_norm": lambda: Locked(body(weight_norm)).eval(),
    "generator": lambda: Generating().eval(),
    "tensor with a history": _remembering,
    "hook on the network": lambda: _hooked("root"),
    "hook on the convolution": lambda: _hooked("conv"),
    "hook on the BatchNorm": lambda: _hooked("norm"),
    "hook on the head": lambda: _hooked("head"),
    "hook before the network": _pre_hooked,
    "hook on a part": _inner_hooked,
    "scripted": _scripted,
    "traced": lambda: torch.jit.trace(body(), images()),
    "frozen script": lambda: torch.jit.freeze(_scripted()),
    "scripted part": lambda: nn.Sequential(nn.Identity(), _scripted()).eval(),
    "exported": _exported,
    "exported part": lambda: nn.ModuleList([_exported()])[0],
    "lazy, called": lambda: _lazy(called=True),
    "lazy, loaded": lambda: _lazy(called=False),
    "DataParallel": lambda: nn.DataParallel(body()),
    "DataParallel inside": _in_parallel,
    "compiled": lambda: torch.compile(body()),
    "compiled inside": lambda: nn.Sequential(nn.Identity(), torch.compile(body())).eval(),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_what_votes_answers_as_the_model_does(name):
    model = NETWORKS[name]()
    reference = model._orig_mod if name == "compiled" else model
    reference = NETWORKS["plain"]() if name == "compiled inside" else reference
    with torch.no_grad():
        want = reference(images())
    made = prepare(model, images(), device="cpu", precision="float32")
    assert made.precision == "float32"
    assert made.classes == 3
    with torch.inference_mode():
        assert torch.allclose(made.call(images()), want, atol=2e-5, rtol=1e-5)
    # Twice, and by default precision too: whatever the model keeps must not have changed it.
    automatic = prepare(model, images(), device="cpu")
    with torch.inference_mode():
        assert torch.allclose(automatic.call(images()).float(), want, atol=0.1, rtol=0.05)


FOLDED = (
    *("plain", "frozen weights", "shared BatchNorm", "tied weights", "lazy, called"),
    *("lazy, loaded", "DataParallel", "compiled", "hook on the head"),
)


@pytest.mark.parametrize("name", FOLDED)
def test_these_are_folded(name):
    assert prepare(NETWORKS[name](), images(), device="cpu", precision="float32").folded


@pytest.mark.parametrize(
    "name", ["hook on the network", "hook before the network", "hook on a part", "counting"]
)
def test_folding_would_lose_something_of_these(name):
    assert not prepare(NETWORKS[name](), images(), device="cpu", precision="float32").folded


def test_hooks_run_at_every_vote():
    net, seen = body(), list[int]()
    net.register_forward_hook(lambda _m, given, _o: seen.append(len(given[0])))
    made = prepare(net, images(), device="cpu", precision="float32")
    seen.clear()
    with torch.inference_mode():
        made.call(images())
    assert seen == [5]


def test_a_model_is_left_as_it_is():
    model = Counting().eval()
    prepare(model, images(), device="cpu")
    assert model.calls.item() == 0
    assert all(value.requires_grad for value in model.parameters())
    half = body(norm=False).half()
    prepare(half, images(), device="cpu")
    assert half[0].weight.dtype == torch.float16


class Drifting(nn.Module):
    """Statistics that go on in evaluation mode, too slowly for two calls to show it."""

    def __init__(self, reassigned: bool) -> None:
        super().__init__()
        self.body, self.reassigned = body(norm=False), reassigned
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            if self.reassigned:
                self.mean = self.mean + 1e-7 * (x.mean() - self.mean)
            else:
                self.mean.lerp_(x.mean(), 1e-7)
        return self.body(x - self.mean)


@pytest.mark.parametrize("reassigned", [False, True])
def test_a_model_that_drifts_with_its_votes_is_refused(reassigned):
    with pytest.raises(ModelError, match="changes its own mean"):
        prepare(Drifting(reassigned).eval(), images(), device="cpu")


def test_lazy_layers_without_weights_are_refused():
    lazy = nn.Sequential(nn.Flatten(), nn.LazyLinear(3)).eval()
    with pytest.raises(ModelError, match="Pass one batch of images through it"):
        prepare(lazy, images(), device="cpu")


def test_a_program_exported_for_one_size_of_batch_says_how_to_export_it():
    fixed = torch.export.export(body(), (images(),)).module()
    with pytest.raises(ModelError, match="dynamic_shapes"):
        prepare(fixed, images(), device="cpu")


def test_a_program_exported_in_training_mode_is_refused():
    net = nn.Sequential(nn.Dropout(), *body(norm=False)).train()
    batch = torch.export.Dim("batch")
    program = torch.export.export(net, (images(),), dynamic_shapes=({0: batch},)).module()
    with pytest.raises(ModelError, match="random"):
        prepare(program, images(), device="cpu")


def test_wrappers_do_not_hide_training_mode():
    with pytest.raises(ModelError, match="training mode"):
        prepare(nn.DataParallel(body().train()).eval().module.train(), images())
    with pytest.raises(ModelError, match="training mode"):
        prepare(nn.DataParallel(body().train()), images())
    with pytest.raises(ModelError, match="training mode"):
        prepare(torch.jit.script(body().train()), images())


def test_a_model_that_cannot_be_copied_votes_in_float32_alone():
    locked = Locked(body()).eval()
    assert prepare(locked, images(), device="cpu").precision == "float32"
    with pytest.raises(ModelError, match="cannot be copied, so it cannot vote in bfloat16"):
        prepare(locked, images(), device="cpu", precision="bfloat16")
    with pytest.raises(ModelError, match=r"model.float\(\)"):
        prepare(Locked(body(norm=False).half()).eval(), images(), device="cpu")


FORMATS = (torch.float16, torch.bfloat16, torch.float64)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_weights_in_other_formats_vote_in_the_precision_asked_for(dtype, precision):
    made = prepare(body(norm=False).to(dtype), images(), device="cpu", precision=precision)
    want = body(norm=False)(images())
    assert made.precision == precision
    with torch.inference_mode():
        assert torch.allclose(made.call(images()).float(), want, atol=0.05)


def test_weights_in_mixed_formats_vote_too():
    mixed = body()
    mixed[6].double()
    mixed[3].half()
    made = prepare(mixed, images(), device="cpu", precision="float32")
    with torch.inference_mode():
        assert torch.allclose(made.call(images()), body()(images()), atol=1e-3)


class Converting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = body(norm=False).half()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.half())


def test_a_model_that_converts_its_input_is_refused_with_what_to_do():
    with pytest.raises(ModelError, match=r"float16.*call model.float\(\)"):
        prepare(Converting().eval(), images(), device="cpu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_logits_may_have_another_format(dtype):
    net = body()
    made = prepare(lambda x: net(x).to(dtype), images(), device="cpu")
    assert made.classes == 3


def test_complex_weights_stay_complex():
    class Spectrum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.filter = nn.Parameter(torch.randn(8, 5, dtype=torch.complex64))
            self.head = nn.Linear(64, 3)

        def forward(self, x: Tensor) -> Tensor:
            there = torch.fft.rfft2(x) * self.filter
            return self.head(torch.fft.irfft2(there).flatten(1))

    net = Spectrum().eval()
    made = prepare(net, images(), device="cpu")
    with torch.inference_mode():
        assert torch.allclose(made.call(images()), net(images()), atol=1e-5)


class InPlace(nn.Module):
    def __init__(self, in_place: bool, lock: bool = False) -> None:
        super().__init__()
        self.body, self.in_place = body(), in_place
        if lock:
            self.lock = threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.sub_(0.5).div_(0.25) if self.in_place else (x - 0.5) / 0.25)


def _same_network(kind: str) -> Network | Callable[[Tensor], Tensor]:
    net = InPlace(True, lock=kind == "lock").eval()
    return (lambda x: net(x)) if kind == "function" else net


@pytest.mark.parametrize("kind", ["module", "function", "lock"])
@pytest.mark.parametrize("family", ["pixel", "rotation"])
def test_normalization_in_place_is_certified_like_its_copy(kind, family):
    noise = NOISE if family == "pixel" else certifl.Rotation("18deg")
    options = {"n": 200, "n0": 20, "precision": "float32", "device": "cpu"}
    given = images()
    want = certifl.certify(InPlace(False).eval(), given, noise, **options)
    got = certifl.certify(_same_network(kind), given, noise, **options)
    assert np.array_equal(got.counts, want.counts)
    assert torch.equal(given, images())


@pytest.mark.parametrize("kind", ["module", "function"])
def test_the_other_ways_to_ask_a_network_that_writes_into_its_input(kind):
    given = images()
    options = {"precision": "float32", "device": "cpu"}
    one, other = InPlace(False).eval(), _same_network(kind)
    scan = {"estimator": "scan", "n": 400, "n0": 20}
    turned = certifl.Rotation("18deg")
    made = [certifl.certify(m, given, turned, **scan, **options) for m in (one, other)]
    assert np.array_equal(made[0].counts, made[1].counts)
    answers = [certifl.predict(m, given, NOISE, n=200, **options) for m in (one, other)]
    assert np.array_equal(*answers)
    ready = [prepare(m, given, **options) for m in (one, other)]
    assert np.array_equal(*[predict_plain(network, given) for network in ready])
    assert torch.equal(given, images())


class Answering(nn.Module):
    def __init__(self, answer: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.body, self.answer = body(), answer

    def forward(self, x: Tensor) -> object:
        return self.answer(self.body(x))


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda out: (out, out), r"tuple.*model\(x\)\[0\]"),
        (lambda out: {"scores": out}, r"dict.*model\(x\)\['scores'\]"),
        (lambda out: out[:, :1], "one class only"),
        (lambda out: out[:, :0], "no class at all"),
        (lambda out: out * torch.nan, "NaN"),
        (lambda out: out > 0, "bool"),
        (lambda out: out + 0j, "complex"),
        (lambda out: out[0], "must map images"),
    ],
)
def test_answers_that_are_no_logits(answer, says):
    with pytest.raises(ModelError, match=says):
        prepare(Answering(answer).eval(), images(), device="cpu")


def test_probabilities_are_fine():
    assert prepare(Answering(lambda out: out.softmax(1)).eval(), images()).classes == 3
