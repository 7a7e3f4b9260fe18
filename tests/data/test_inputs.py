"""Images and labels in the forms people hold them: used as they are, or the message says how."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import certifl
from certifl.errors import InputError

NOISE = certifl.PixelNoise(0.25)
X, Y = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(4)
NET = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()


def certify(images: Any, labels: Any = None) -> certifl.Certificates:
    return certifl.certify(NET, images, NOISE, n=100, n0=20, labels=labels)


def resampled(level: float) -> Tensor:
    images = X.clone()
    images[0, 0, 0, 0] = level
    return images


PAIRS = DataLoader(TensorDataset(X, Y), batch_size=2)


@pytest.mark.parametrize(
    ("images", "labels", "says"),
    [
        (PAIRS, Y.split(2), r"labels= must be left out"),
        (DataLoader(TensorDataset(X, Y), shuffle=True), None, "shuffle=False"),
        ([(X, Y, Y)], None, r"pair or a longer tuple.*\(x for x, _ in loader\)"),
        ([{"pixel_values": X, "label": Y}], None, r"b\['pixel_values'\] for b in loader"),
        ({"image": X}, None, "iterable of such"),
        ((X, Y), None, "four axes.*labels="),
        ([X[0], X[1]], None, "four axes"),
        ([[X[0], X[1]]], None, r"torch\.stack"),
        (3, None, "iterable of such"),
        ([X[:2], X[2:]], Y, "images come in blocks.*labels=y.split"),
        ([X[:2], X[2:]], [0, 1, 2, 3], "images come in blocks"),
        ([X[:2], X[2:]], Y.numpy(), "images come in blocks"),
        ([X[:2], X[2:]], 3, "labels must be numbers of classes"),
        (X, [Y[:2], Y[2:]], r"labels of one tensor.*torch\.cat"),
        (X, iter([Y]), r"labels of one tensor.*torch\.cat"),
        (X, ["ash", "oak", "ash", "oak"], r"names\.index\(y\)"),
        (X, np.array(["ash", "oak", "ash", "oak"]), r"names\.index\(y\)"),
        (X, torch.eye(10)[:4], r"one number per image.*labels\.argmax\(1\)"),
        (X, Y[:, None], r"one number per image.*labels\[:, 0\]"),
        (X, Y.float(), r"whole numbers; got float32.*labels\.long\(\)"),
        (X, Y > 0, "whole numbers; got bool"),
        (X, Y[:3], r"one number per image, \(4,\); got \(3,\)"),
        (X, Y - 1, "found -1 to 2. A label of -1 usually marks"),
        (resampled(1 + 1e-7), None, r"found .* to 1\.00000012: .*clamp\(0, 1\)"),
        (resampled(-0.03), None, r"found -0\.0299.*clamp\(0, 1\)"),
        (resampled(2.6), None, r"to 2\.5\d+: .*Put normalization inside"),
    ],
)
def test_what_cannot_be_used_says_what_can(images: Any, labels: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        certify(images, labels)


def test_the_advice_works() -> None:
    whole = certify(X, Y)
    blocks = [X[:2], X[2:]]
    for images, labels in (
        ((x for x, _ in PAIRS), (y for _, y in PAIRS)),
        (PAIRS, None),
        (TensorDataset(X, Y), None),
        (blocks, Y.split([len(x) for x in blocks])),
        (blocks, [[0, 1], [2, 3]]),
        (resampled(float(X[0, 0, 0, 0])).clamp(0, 1), [0, 1, 2, 3]),
        (X.permute(0, 2, 3, 1).permute(0, 3, 1, 2), Y.int()),
        (X.numpy(), Y.numpy().astype(np.uint8)),
    ):
        assert certify(images, labels).same_results(whole)


def test_predict_takes_and_says_the_same() -> None:
    whole = certifl.predict(NET, X, NOISE, n=100).tolist()
    held: tuple[Any, ...] = (PAIRS, (x for x, _ in PAIRS), [X[:2], X[2:]], TensorDataset(X, Y))
    for images in held:
        assert certifl.predict(NET, images, NOISE, n=100).tolist() == whole
    with pytest.raises(InputError, match="channels last"):
        certifl.predict(NET, X.permute(0, 2, 3, 1), NOISE, n=100)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("make", [torch.rand, lambda *shape: np.full(shape, 0.5)])
@pytest.mark.parametrize("noise", [NOISE, certifl.Rotation(0.3), certifl.Translation(0.2)])
def test_channels_last_is_refused(channels: int, make: Any, noise: Any) -> None:
    with pytest.raises(InputError, match=r"channels last.*permute\(0, 3, 1, 2\)"):
        certifl.certify(NET, make(4, 8, 9, channels), noise, n=100)


@pytest.mark.parametrize("shape", [(2, 3, 8, 4), (2, 4, 16, 3), (2, 1, 64, 1)])
def test_narrow_images_are_not_taken_for_channels_last(shape: tuple[int, ...]) -> None:
    flat = nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(shape[1:])), 3)).eval()
    assert len(certifl.certify(flat, torch.rand(shape), NOISE, n=100)) == 2
