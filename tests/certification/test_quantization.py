"""Votes in int8: of one fixed network, whatever the batch and the threads."""

import logging

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import certifl
from certifl.certification.network import Network, prepare
from certifl.certification.quantization import Calibration, Scales, fingerprint_problems, recorded
from certifl.errors import InputError, ModelError

NOISE = certifl.PixelNoise(0.25)


def pictures(count: int, seed: int = 0) -> Tensor:
    return torch.rand((count, 3, 16, 16), generator=torch.Generator().manual_seed(seed))


TRAINING = pictures(24, seed=1)


def model(name: str) -> nn.Module:
    made = certifl.models.build(name, 3, 5, seed=0)
    made(pictures(32, seed=2))  # statistics of BatchNorm
    return made.eval()


def int8(net: nn.Module, batch_size: int | str = "auto") -> Network:
    calibration = Calibration.of(TRAINING, NOISE, 0)
    return prepare(net, TRAINING, "cpu", "int8", batch_size, calibration)


class Pooled(nn.Module):
    """Layers that residual networks of certifl do not have, and one that stays in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 5, stride=2, padding=2)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.odd = nn.Conv2d(8, 6, 3, padding=1, padding_mode="reflect")
        self.pool = nn.MaxPool2d(3, 2, padding=1)
        self.hidden, self.head = nn.Linear(96, 20), nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.first(x)))
        x = x + self.odd(self.deep(x))[:, :1]
        return self.head(torch.relu(self.hidden(x.flatten(1)[:, :96])))


@pytest.mark.parametrize("name", ["small_cnn", "small_resnet"])
def test_logits_depend_neither_on_batch_size_nor_on_threads(name):
    network, images = int8(model(name)), pictures(19, seed=3)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = network.call(images)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for size in (1, 16):
                parts = torch.cat([network.call(part) for part in images.split(size)])
                assert torch.equal(parts, whole), (threads, size)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["small_cnn", "small_resnet"])
def test_logits_are_those_of_float32_up_to_eight_bits(name):
    net, images = model(name), pictures(64, seed=3)
    plain, network = prepare(net, images, "cpu", "float32"), int8(net)
    with torch.inference_mode():
        wanted, made = plain.call(images), network.call(images)
    assert float((wanted - made).abs().max()) < 0.1 * float(wanted.abs().max())
    assert network.quantized.layers[0] == network.quantized.layers[1]
    assert (network.quantized.agreement or 0) > 0.8


def test_other_layers_run_in_float32_and_that_is_said(caplog):
    torch.manual_seed(0)
    net, images = Pooled().eval(), pictures(64, seed=3)
    with caplog.at_level(logging.INFO, "certifl"):
        network = int8(net)
    assert "4 of 5 layers compute in int8" in caplog.text
    wanted = prepare(net, images, "cpu", "float32").call(images)
    assert float((wanted - network.call(images)).abs().max()) < 0.1 * float(wanted.abs().max())


def test_scales_are_a_function_of_weights_images_and_seed():
    net = model("small_resnet")
    first, again = (int8(net).quantized for _ in range(2))
    assert first.scales == again.scales
    other = prepare(net, TRAINING, "cpu", "int8", "auto", Calibration.of(TRAINING, NOISE, 1))
    assert other.quantized.scales != first.scales
    assert other.quantized.scales.fingerprint("a") != first.scales.fingerprint("a")


def test_predict_with_the_scales_of_a_record_is_the_network_of_the_record():
    net, images = model("small_cnn"), pictures(3)
    options = {"precision": "int8", "device": "cpu"}
    made = certifl.certify(net, images, NOISE, n=500, calibration=TRAINING, **options)
    metadata = made.conditions
    assert metadata["precision"] == "int8"
    assert 0 <= metadata["agreement_with_float32"] <= 1
    scales = recorded(metadata)
    assert scales == Scales.read(metadata["quantization"]["scales"])
    with_images = certifl.predict(net, images, NOISE, calibration=TRAINING, **options)
    with_scales = certifl.predict(
        net, images, NOISE, calibration=metadata["quantization"], **options
    )
    assert np.array_equal(with_images, with_scales)
    assert certifl.certification.verify(made) == []


def test_what_cannot_be_quantized_is_refused_in_words():
    images = pictures(2)
    with pytest.raises(InputError, match="needs calibration"):
        certifl.certify(model("small_cnn"), images, NOISE, n=500, precision="int8", device="cpu")
    with pytest.raises(ModelError, match="can be quantized"):
        int8(nn.Sequential(nn.Flatten(), nn.Softmax(1)).eval())
    with pytest.raises(ModelError, match="can be quantized"):
        prepare(lambda x: x.flatten(1), images, "cpu", "int8")
    made = int8(model("small_cnn")).quantized
    with pytest.raises(InputError, match="another network"):
        prepare(model("small_resnet"), images, "cpu", "int8", "auto", made.scales)


class OverwritesLater(nn.Module):
    """Its ReLU changes a value that the graph reads from before it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x.relu_()
        return self.head(x.mean((2, 3)))


def test_networks_that_tracing_would_change_are_refused():
    with pytest.raises(ModelError, match="relu_ writes over a value"):
        int8(OverwritesLater().eval())
    hooked = nn.Sequential(nn.Conv2d(3, 5, 16), nn.Sequential(nn.Flatten())).eval()
    hooked[1].register_forward_hook(lambda _module, _inputs, logits: -logits)
    with pytest.raises(ModelError, match="leaves out hooks"):
        int8(hooked)


@pytest.mark.parametrize(
    "stored",
    [
        *(None, {"a": 1}, {"a": [0, 0]}, {"a": [1.0, 256]}),
        *({"a": [1.0, float("inf")]}, {"a": [10**400, 0]}),
    ],
)
def test_scales_that_are_none_are_refused(stored):
    with pytest.raises(InputError, match="scales of a quantized network"):
        Scales.read(stored)


def test_networks_of_no_client_are_a_finding():
    for name in ("abc", "1" * 5000):
        metadata = {"precision": "int8", "model_fingerprint": {name: "1"}, "quantization": {}}
        ((client, problem),) = fingerprint_problems(metadata)
        assert client is None
        assert "which is not a client" in problem


class Shared(nn.Module):
    """A value that a sum takes the memory of is read otherwise, too.

    Args:
        how: "late", by a convolution whose ReLU comes after the sum; "alias", under another name,
            as the convolution's own input and afterwards; "changed", after the convolution has
            read its own input, that is written over.
    """

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how, self.drop, self.head = how, nn.Dropout(), nn.Linear(16, 5)
        self.first, self.second, self.third, self.fourth = (
            nn.Conv2d(channels, 8, 3, padding=1) for channels in (3, 8, 8, 8)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x))
        if self.how == "late":
            other, inner = self.third(y), self.fourth(y)
            total = self.second(inner) + y
            parts = total, torch.relu(other)
        elif self.how == "alias":
            z = self.drop(y)
            parts = torch.relu(self.second(z) + y), torch.relu(self.third(z))
        else:
            inner = torch.tanh(self.third(y))
            out = self.second(inner)
            changed = inner.mul_(-1)
            parts = torch.relu(out + y), changed
        return self.head(torch.cat([part.amax((2, 3)) for part in parts], 1))


@pytest.mark.parametrize("how", ["late", "alias", "changed"])
def test_a_value_that_is_read_otherwise_too_is_not_written_over(how):
    net, images = Shared(how).eval(), pictures(64, seed=3)
    wanted = prepare(net, images, "cpu", "float32").call(images)
    made = int8(net).call(images)
    assert float((wanted - made).abs().max()) < 0.15 * float(wanted.std())  # 8 bits: .07
