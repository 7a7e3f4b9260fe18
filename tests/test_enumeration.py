"""Whole-pixel shifts, held against plain loops, `Translation` and known answers."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

import certifl
from certifl.errors import InputError

SIDE = 9


class Random(torch.nn.Module):
    """Three random linear scores, smooth enough that some answers survive a few pixels."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        coarse = torch.randn((3, 1, 3, 3), generator=generator)
        weight = torch.nn.functional.interpolate(coarse, (SIDE, SIDE), mode="bicubic")
        self.weight = torch.nn.Parameter(weight.flatten(1))

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.weight.T


def smooth_images(count: int = 24) -> Tensor:
    """Images whose shifts differ little, so that radii of all sizes occur."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand((count, 1, 4, 4), generator=generator)
    return torch.nn.functional.interpolate(coarse, (SIDE, SIDE), mode="bilinear")


def shifted(image: Tensor, across: int, down: int, padding: str) -> Tensor:
    """One pixel at a time."""
    out = torch.zeros_like(image)
    for row, column in itertools.product(range(SIDE), range(SIDE)):
        r, c = row - down, column - across
        if padding == "border":
            r, c = min(max(r, 0), SIDE - 1), min(max(c, 0), SIDE - 1)
        if 0 <= r < SIDE and 0 <= c < SIDE:
            out[:, row, column] = image[:, r, c]
    return out


@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_radii_are_those_of_a_plain_loop_over_all_shifts(padding: str) -> None:
    model, images, largest = Random().eval(), smooth_images(), 3
    made = certifl.certify_shifts(
        model, images, largest=largest, padding=padding, precision="float32"
    )
    box = list(itertools.product(range(-largest, largest + 1), repeat=2))
    with torch.no_grad():
        answers = {
            s: model(torch.stack([shifted(i, *s, padding) for i in images])).argmax(1).numpy()
            for s in box
        }
    assert np.array_equal(made.predicted, answers[0, 0])
    for row in range(len(images)):
        breaking = [s for s in box if answers[s][row] != answers[0, 0][row]]
        rings = [max(map(abs, s)) for s in breaking]
        squares = [a * a + b * b for a, b in breaking]
        assert made.radius[row] == min([r - 1 for r in rings], default=largest)
        limit = min([*squares, (largest + 1) ** 2])
        kept = max(a * a + b * b for a, b in box if a * a + b * b < limit)
        assert made.euclidean[row] == math.sqrt(kept)
        found = tuple(made.breaking[row])
        assert (found in breaking) if breaking else found == (0, 0)
        assert sum(f * f for f in found) == min(squares, default=0)
    assert len(set(made.radius.tolist())) >= 3  # 0, something between, and all


def test_only_a_corner_of_the_box_breaks_the_largest_radius() -> None:
    """A shift by (2, 2) is longer than 3 = largest + 1 is not: Euclidean and box radii differ."""
    image = torch.zeros((1, 1, SIDE, SIDE))
    image[..., 4, 4] = 1.0

    def model(images: Tensor) -> Tensor:
        hit = images[:, 0, 6, 6]  # the bright pixel after a shift by (2, 2)
        return torch.stack([0.5 - hit, hit - 0.5], dim=1)

    made = certifl.certify_shifts(model, image, [0], largest=2)
    assert made.radius.tolist() == [1]
    assert made.breaking.tolist() == [[2, 2]]
    assert made.euclidean[0] == math.sqrt(5)
    assert made.correct.tolist() == [True]
    assert made.certified_accuracy(1) == 1.0
    assert made.certified_accuracy(2) == 0.0


def test_shifts_are_those_of_the_translation_family() -> None:
    """A translation by t_u = -2 k / w moves the picture k pixels to the right."""
    image = smooth_images(1)
    for across, down in itertools.product((-2, 0, 3), repeat=2):
        params = torch.tensor([[-2.0 * across / SIDE, -2.0 * down / SIDE]])
        moved = certifl.Translation(0.1).apply(image, params)
        assert torch.allclose(moved[0], shifted(image[0], across, down, "zeros"), atol=1e-5)


def test_nothing_depends_on_batches() -> None:
    model, images = Random().eval(), smooth_images()
    whole = certifl.certify_shifts(model, images, largest=2)
    alone = certifl.certify_shifts(model, images[5:6], largest=2, batch_size=7)
    assert alone.radius[0] == whole.radius[5]
    assert alone.euclidean[0] == whole.euclidean[5]


def test_the_threat_model_names_its_limits() -> None:
    made = certifl.certify_shifts(Random().eval(), smooth_images(1), largest=1)
    assert "exact" in made.threat
    assert "fractions of a pixel are not" in made.threat
    assert made.label.tolist() == [-1]
    assert made.correct.tolist() == [False]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"largest": 0}, "whole number of pixels from 1 to 8"),
        ({"largest": SIDE}, "from 1 to 8"),
        ({"largest": 1.5}, "whole number"),
        ({"padding": "reflection"}, "padding must be one of"),
        ({"labels": [7]}, "labels must lie in 0 to 2"),
    ],
)
def test_options_that_cannot_be_used_are_refused(options: dict, says: str) -> None:
    with pytest.raises(InputError, match=says):
        certifl.certify_shifts(Random().eval(), smooth_images(1), **options)
