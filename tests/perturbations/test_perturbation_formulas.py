"""What single families do, by their formulas."""

from __future__ import annotations

import math

import pytest
import torch

from certifl.perturbations import DenseFlow, PixelNoise, Rotation, SmoothFlow, Translation
from pictures import IMAGE, pictures, rng


@pytest.mark.parametrize("size", [(8, 8), (12, 31)])
def test_parameters_add_up(size):
    """Where two deformations in a row stay on whole pixels they equal the one of the sum."""
    images = torch.zeros(1, 1, *size)
    images[..., 3:5, 3:5] = pictures(1, 1, 2, 2)
    h, w = size
    a = torch.tensor([[2 / w, -2 / h]], dtype=torch.float64)
    b = torch.tensor([[-4 / w, 4 / h]], dtype=torch.float64)
    shift = Translation(1.0)
    twice = shift.apply(shift.apply(images.double(), a), b)
    torch.testing.assert_close(twice, shift.apply(images.double(), a + b), atol=1e-12, rtol=0)

    noise = PixelNoise(0.5, exact=True)
    first, second = noise.sample(2, (1, *size), rng()).split(1)
    in_a_row = (noise.apply(noise.apply(images, first), second) * 255).round()
    assert torch.equal(in_a_row, (noise.apply(images, first + second) * 255).round())


def test_quarter_turns_add_up():
    images, turn = pictures(2, 1, 9, 9), Rotation("180deg")
    quarter = torch.tensor([math.pi / 2])
    twice = turn.apply(turn.apply(images, quarter), quarter)
    torch.testing.assert_close(twice, turn.apply(images, 2 * quarter), atol=2e-5, rtol=0)
    back = turn.apply(turn.apply(images, quarter), -quarter)
    torch.testing.assert_close(back, images, atol=2e-5, rtol=0)


def test_pixel_noise_is_a_sum_and_is_not_clipped():
    images = pictures(3, *IMAGE)
    params = PixelNoise(1.0).sample(3, IMAGE, rng())
    changed = PixelNoise(1.0).apply(images, params)
    assert torch.equal(changed, images + params)
    assert changed.min() < 0
    assert changed.max() > 1


def test_exact_noise_depends_on_the_integer_sum_alone():
    """Every pair of an 8-bit level and a noise level with the same sum gives the same float."""
    p = PixelNoise(0.5, exact=True)
    levels = torch.arange(256.0)
    images = (levels / 255).view(1, 1, 1, 256)
    for total in (-300, -1, 0, 17, 254, 255, 600):
        params = ((total - levels) / 255).view(1, 1, 1, 256)
        changed = p.apply(images, params)
        assert changed.unique().numel() == 1
        assert changed.flatten()[0] == torch.tensor(float(total)) / 255
    plain = PixelNoise(0.5).apply(images, (17 - levels.view(1, 1, 1, 256)) / 255)
    assert plain.unique().numel() > 1  # the gap that the exact mode closes


def test_smooth_flow_formula():
    h, w, k = 6, 9, 3
    p = SmoothFlow(1.0, bases=k)
    phi = torch.randn(1, 2, k, k, generator=rng(), dtype=torch.float64)
    i = (torch.arange(h, dtype=torch.float64) + 0.5) * math.pi / h
    j = (torch.arange(w, dtype=torch.float64) + 0.5) * math.pi / w
    order = torch.arange(k, dtype=torch.float64)
    field = torch.einsum(
        "cab,ai,bj->cij", phi[0], torch.cos(order[:, None] * i), torch.cos(order[:, None] * j)
    )
    images = pictures(1, 2, h, w).double()
    torch.testing.assert_close(p.apply(images, phi), DenseFlow(1.0).apply(images, field[None]))


def test_smooth_flow_with_one_cosine_is_translation():
    images, params = pictures(4, *IMAGE), Translation(0.3).sample(4, IMAGE, rng())
    flow = SmoothFlow(0.3, bases=1).apply(images, params.view(4, 2, 1, 1))
    torch.testing.assert_close(flow, Translation(0.3).apply(images, params), atol=1e-6, rtol=0)


def test_dense_flow_moves_each_pixel_by_its_own_amount():
    images = pictures(1, 1, 8, 8)
    params = torch.zeros(1, 2, 8, 8)
    params[0, 0, 2, 3] = 2 * 2 / 8  # two pixels to the right
    params[0, 1, 5, 6] = -1 * 2 / 8  # one pixel up
    changed = DenseFlow(1.0).apply(images, params)
    expected = images.clone()
    expected[..., 2, 3] = images[..., 2, 5]
    expected[..., 5, 6] = images[..., 4, 6]
    assert torch.equal(changed, expected)
