"""Images that come in blocks: the same certificates as of all of them at once."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

import certifl
from certifl.errors import InputError
from known_models import HalfSpace

NOISE = certifl.PixelNoise(0.5)


@pytest.fixture
def model() -> HalfSpace:
    weight = torch.randn(64, generator=torch.Generator().manual_seed(2))
    return HalfSpace(weight, -float(weight.sum() / 2)).eval()


@pytest.fixture
def images() -> Tensor:
    return torch.rand((7, 1, 8, 8), generator=torch.Generator().manual_seed(1))


LABELS = np.array([0, 1, 0, 1, 0, 1, 0])


def test_blocks_are_certified_like_the_whole(model: HalfSpace, images: Tensor) -> None:
    whole = certifl.certify(model, images, NOISE, labels=LABELS, n=500)
    cuts = [slice(0, 3), slice(3, 4), slice(4, 7)]
    parts = certifl.certify(
        model, (images[cut] for cut in cuts), NOISE, labels=(LABELS[cut] for cut in cuts), n=500
    )
    assert parts.same_results(whole)
    assert parts.index.tolist() == list(range(7))
    assert parts.conditions == whole.conditions  # the data fingerprint too


def test_blocks_need_no_labels_and_may_be_arrays(model: HalfSpace, images: Tensor) -> None:
    whole = certifl.certify(model, images, NOISE, n=500)
    parts = certifl.certify(model, [images[:4].numpy(), images[4:].numpy()], NOISE, n=500)
    assert parts.same_results(whole)
    assert (parts.label == -1).all()


def test_no_more_than_two_blocks_are_held(model: HalfSpace) -> None:
    alive: list[weakref.ref] = []
    most = 0

    def blocks() -> Iterator[Tensor]:
        nonlocal most
        for number in range(4):
            gc.collect()
            most = max(most, sum(ref() is not None for ref in alive))
            block = torch.full((2, 1, 8, 8), number / 6)
            alive.append(weakref.ref(block))
            yield block

    assert len(certifl.certify(model, blocks(), NOISE, n=100)) == 8
    assert most <= 2


def test_progress_never_goes_back(model: HalfSpace, images: Tensor) -> None:
    seen: list[tuple[int, int]] = []
    certifl.certify(
        model,
        [images[:3], images[3:]],
        NOISE,
        n=300,
        progress=lambda done, most: seen.append((done, most)),
    )
    assert seen == sorted(seen)
    assert seen[-1] == (7 * 400, 7 * 400)


@pytest.mark.parametrize(
    ("blocks", "labels", "says"),
    [
        ([], None, "no block"),
        ([torch.rand(2, 1, 8, 8), torch.rand(2, 1, 8, 7)], None, r"one shape; block 1"),
        ([torch.rand(1, 8, 8)], None, "four axes"),
        ([torch.rand(1, 1, 8, 8), torch.rand(0, 1, 8, 8)], None, "nothing to certify"),
        ([torch.rand(2, 1, 8, 8)] * 2, [[0, 1]], "only one of both for block 1"),
        ([torch.rand(2, 1, 8, 8)], [[0, 1], [0, 1]], "only one of both for block 1"),
        ([torch.rand(2, 1, 8, 8)], [[0]], "one number per image"),
    ],
)
def test_blocks_that_do_not_fit(model: HalfSpace, blocks: list, labels: list, says: str) -> None:
    with pytest.raises(InputError, match=says):
        certifl.certify(model, blocks, NOISE, labels=labels, n=100)
