"""The sampler against index arithmetic, against torch's own sampler and at its limits."""

import math

import pytest
import torch
import torch.nn.functional as F

from certifl.errors import InputError
from certifl.perturbations import Affine, Rotation, Scaling, Translation
from certifl.perturbations.warp import grid_of, warp

SIZES = [(8, 8), (9, 13), (28, 28), (32, 32), (33, 17), (64, 48)]
PADDINGS = ("zeros", "border", "reflection")


def pictures(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def positions(images, seed=1, spread=0.7):
    m, _, h, w = images.shape
    made = torch.Generator().manual_seed(seed)
    grid = grid_of(images, "centre")
    x = grid.columns + spread * w * torch.randn(m, h, w, generator=made)
    y = grid.rows + spread * h * torch.randn(m, h, w, generator=made)
    return x, y


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("size", SIZES)
def test_equals_grid_sample_at_pixel_centres(size, padding):
    h, w = size
    images = pictures(3, 2, h, w)
    x, y = positions(images)
    normalized = torch.stack([(2 * x + 1) / w - 1, (2 * y + 1) / h - 1], -1)
    expected = F.grid_sample(images, normalized, padding_mode=padding, align_corners=False)
    # grid_sample's own round trip costs about size * 2**-24 pixels, times a slope of at most 1
    torch.testing.assert_close(warp(images, x, y, padding), expected, atol=3e-5, rtol=0)


@pytest.mark.parametrize("padding", PADDINGS)
def test_equals_grid_sample_in_double_precision(padding):
    images = pictures(3, 2, 9, 13).double()
    x, y = positions(images.double())
    normalized = torch.stack([(2 * x + 1) / 13 - 1, (2 * y + 1) / 9 - 1], -1)
    expected = F.grid_sample(images, normalized, padding_mode=padding, align_corners=False)
    torch.testing.assert_close(warp(images, x, y, padding), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("right", [-40, -13, -3, 12])
@pytest.mark.parametrize("down", [-9, 0, 5])
def test_whole_shifts_are_index_shifts_with_zero_fill(right, down):
    images = pictures(2, 3, 9, 13)
    grid = grid_of(images, "centre")
    moved = warp(images, (grid.columns + right)[None, None], (grid.rows + down)[None])
    expected = torch.zeros_like(images)
    for row in range(9):
        for column in range(13):
            if 0 <= row + down < 9 and 0 <= column + right < 13:
                expected[..., row, column] = images[..., row + down, column + right]
    assert torch.equal(moved, expected)


def test_border_and_reflection_by_hand():
    image = torch.tensor([1.0, 2.0, 3.0, 4.0])[None, None, None]
    x = torch.tensor([-3.0, -2.0, -1.0, -0.5, 0.0, 0.25, 3.0, 3.5, 4.0, 5.0, 7.0, 8.0])
    three_rows_of_four = x.view(3, 1, 4)

    def read(padding):
        found = warp(image, three_rows_of_four, torch.zeros(1, 1, 1), padding)
        return found.flatten().tolist()

    assert read("zeros") == [0, 0, 0, 0.5, 1, 1.25, 4, 2, 0, 0, 0, 0]
    assert read("border") == [1, 1, 1, 1, 1, 1.25, 4, 4, 4, 4, 4, 4]
    assert read("reflection") == [3, 2, 1, 1, 1, 1.25, 4, 4, 4, 3, 1, 1]


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("huge", [1e6, 3e9, 1e20, 3e38])
def test_positions_of_any_magnitude_are_safe(padding, huge):
    images = 0.5 + pictures(2, 1, 8, 11) / 2
    for x, y in [(huge, 0.0), (-huge, 0.0), (0.0, huge), (huge, -huge)]:
        at = torch.full((2, 8, 11), x), torch.full((2, 8, 11), y)
        moved = warp(images, *at, padding)
        if padding == "zeros":
            assert not moved.any()
        else:
            assert moved.min() >= 0.5
            assert moved.max() <= 1.0


def test_infinite_and_undefined_positions_do_not_read_other_memory():
    images = pictures(2, 1, 8, 8)
    grid = grid_of(images, "centre")
    y = grid.rows.expand(1, 8, 8)
    away = torch.full((1, 8, 8), math.inf)
    assert not warp(images, away, y).any()
    assert warp(images, torch.full((1, 8, 8), math.nan), y).isnan().all()


def test_broadcasting_equals_explicit_copies():
    images = pictures(5, 3, 9, 13)
    x, y = positions(images)
    one = warp(images[:1].expand(5, -1, -1, -1).contiguous(), x, y)
    assert torch.equal(warp(images[:1], x, y), one)
    same = warp(images, x[:1].expand(5, -1, -1).contiguous(), y[:1].expand(5, -1, -1).contiguous())
    assert torch.equal(warp(images, x[:1], y[:1]), same)
    flat = warp(images, x[:, :1], y[..., :1])
    full = warp(
        images, x[:, :1].expand(-1, 9, -1).contiguous(), y[..., :1].expand(-1, -1, 13).contiguous()
    )
    assert torch.equal(flat, full)


def test_one_image_does_not_depend_on_its_batch(monkeypatch):
    images = pictures(7, 3, 9, 13)
    x, y = positions(images)
    together = warp(images, x, y)
    for k in range(7):
        assert torch.equal(warp(images[k : k + 1], x[k : k + 1], y[k : k + 1])[0], together[k])
    monkeypatch.setattr("certifl.perturbations.warp._SLICE", 3 * 9 * 13 * 2)  # two images a slice
    assert torch.equal(warp(images, x, y), together)
    assert torch.equal(warp(images[:1], x, y), warp(images[:1].expand(7, -1, -1, -1), x, y))


def test_any_memory_layout_goes_in():
    images = pictures(4, 3, 9, 13)
    x, y = positions(images)
    expected = warp(images, x, y)
    assert torch.equal(warp(images.contiguous(memory_format=torch.channels_last), x, y), expected)
    turned = images.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert torch.equal(warp(turned, x, y), expected)
    assert expected.is_contiguous()


def test_gradients_reach_the_images():
    images = pictures(2, 1, 8, 8).requires_grad_()
    x, y = positions(images.detach())
    warp(images, x, y).sum().backward()
    step = 1e-2
    bumped = images.detach().clone()
    bumped[1, 0, 3, 4] += step
    slope = (warp(bumped, x, y).double().sum() - warp(images.detach(), x, y).double().sum()) / step
    # float32 sums of 64 intensities: 64 * 2**-24 / step
    assert images.grad[1, 0, 3, 4].item() == pytest.approx(slope.item(), abs=1e-3)


def test_too_large_an_image_is_refused():
    image = torch.empty(1, 1, 1, 1).expand(1, 1, 5000, 5000)
    with pytest.raises(InputError, match="resize"):
        warp(image, torch.zeros(1, 1, 1), torch.zeros(1, 1, 1))


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("n", [8, 28, 32, 33])
def test_quarter_turns_equal_rot90(n, k):
    images = pictures(2, 3, n, n)
    turned = Rotation(1.0).apply(images, torch.tensor([k * math.pi / 2]))
    # sine and cosine of the float32 angle are off by 1e-7: n * 1e-7 pixels at the edge
    torch.testing.assert_close(turned, torch.rot90(images, k, (-2, -1)), atol=2e-5, rtol=0)


def displacement_of(perturbation, params, h, w):
    grid = grid_of(torch.zeros(1, 1, h, w, dtype=torch.float64), "centre")
    x, y = perturbation.sources(params.double(), grid)
    shape = (params.shape[0], h, w)
    return x.expand(shape), y.expand(shape), grid


@pytest.mark.parametrize("size", [(16, 16), (8, 40), (45, 9)])
def test_rotation_keeps_all_distances_whatever_the_shape(size):
    h, w = size
    x, y, _ = displacement_of(Rotation(1.0), torch.tensor([[0.7]]), h, w)
    after = torch.stack([x, y], -1).reshape(-1, 2)
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    before = torch.stack([columns, rows], -1).reshape(-1, 2).double()
    torch.testing.assert_close(
        torch.cdist(after, after), torch.cdist(before, before), atol=1e-5, rtol=0
    )
    # the center of the image stays: the mean of all positions is kept
    torch.testing.assert_close(after.mean(0), before.mean(0), atol=1e-10, rtol=0)


def test_rotation_formula_of_the_paper():
    beta = 0.3
    x, y, grid = displacement_of(
        Rotation(1.0), torch.tensor([[beta]], dtype=torch.float64), 10, 14
    )
    n, m = grid.x, grid.y
    u = n * (math.cos(beta) - 1) - m * math.sin(beta)
    v = n * math.sin(beta) + m * (math.cos(beta) - 1)
    torch.testing.assert_close(x[0], grid.columns + u, atol=1e-12, rtol=0)
    torch.testing.assert_close(y[0], grid.rows + v, atol=1e-12, rtol=0)


def test_one_unit_of_translation_is_half_the_image():
    images = pictures(1, 1, 10, 24)
    moved = Translation(1.0).apply(images, torch.tensor([[1.0, 1.0]]))
    assert torch.equal(moved[..., :5, :12], images[..., 5:, 12:])
    assert not moved[..., 5:, :].any()
    assert not moved[..., :, 12:].any()


@pytest.mark.parametrize(("right", "down"), [(-3, 2), (0, -5), (7, 0)])
@pytest.mark.parametrize("size", [(8, 8), (20, 30)])
def test_whole_pixel_translation_is_an_index_shift(size, right, down):
    h, w = size
    images = pictures(2, 1, h, w)
    params = torch.tensor([[2 * right / w, 2 * down / h]], dtype=torch.float64)
    moved = Translation(1.0).apply(images.double(), params).float()
    canvas = F.pad(images, (8, 8, 8, 8))
    expected = canvas[..., 8 + down : 8 + down + h, 8 + right : 8 + right + w]
    torch.testing.assert_close(moved, expected, atol=1e-6, rtol=0)
    if math.log2(w).is_integer() and math.log2(h).is_integer():  # 2 k / w is then exact
        assert torch.equal(Translation(1.0).apply(images, params.float()), expected)


def test_scaling_by_one_half_reads_every_second_pixel():
    images = pictures(1, 1, 9, 9)
    shrunk = Scaling(1.0).apply(images, torch.tensor([1.0]))  # factor 2 about the middle pixel
    assert torch.equal(shrunk[..., 2:7, 2:7], images[..., ::2, ::2])
    assert not shrunk[..., 0, :].any()


def test_scaling_multiplies_the_grid():
    x, y, grid = displacement_of(Scaling(1.0), torch.tensor([[0.25]]), 12, 20)
    torch.testing.assert_close(x[0] - grid.columns, (0.25 * grid.x).expand(12, 20))
    torch.testing.assert_close(y[0] - grid.rows, (0.25 * grid.y).expand(12, 20))


def test_affine_is_the_matrix_in_half_widths():
    phi = torch.tensor([[0.1, -0.2, 0.3, 0.05, -0.15, 0.25]], dtype=torch.float64)
    h, w = 10, 16
    x, y, _ = displacement_of(Affine(1.0), phi, h, w)
    theta = torch.tensor([[[1.0, 0, 0], [0, 1.0, 0]]], dtype=torch.float64) + phi.view(1, 2, 3)
    normalized = F.affine_grid(theta, [1, 1, h, w], align_corners=False)
    torch.testing.assert_close(x, (normalized[..., 0] + 1) * w / 2 - 0.5)
    torch.testing.assert_close(y, (normalized[..., 1] + 1) * h / 2 - 0.5)


def test_affine_contains_translation_and_scaling():
    images = pictures(2, 1, 12, 20)
    shift = torch.tensor([[0.0, 0, 0.2, 0, 0, -0.3]])
    grow = torch.tensor([[0.1, 0, 0, 0, 0.1, 0]])
    exact = {"atol": 2e-6, "rtol": 0}
    torch.testing.assert_close(
        Affine(1.0).apply(images, shift),
        Translation(1.0).apply(images, torch.tensor([[0.2, -0.3]])),
        **exact,
    )
    torch.testing.assert_close(
        Affine(1.0).apply(images, grow), Scaling(1.0).apply(images, torch.tensor([0.1])), **exact
    )


def published_grid(h, w):
    rows, columns = torch.meshgrid(
        torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij"
    )
    return torch.stack([columns, rows], -1)[None]


@pytest.mark.parametrize("size", SIZES)
def test_published_identity_blurs_as_published(size):
    images = pictures(2, 3, *size)
    expected = F.grid_sample(
        images, published_grid(*size).expand(2, -1, -1, -1), align_corners=False
    )
    for family in (Translation(0.1, geometry="deformrs"), Rotation(0.1, geometry="deformrs")):
        found = family.apply(images, torch.zeros(1, *family.params_shape((3, *size))))
        torch.testing.assert_close(found, expected, atol=3e-5, rtol=0)
        assert (found - images).abs().mean() > 0.05
        # the corner pixel is read half a pixel outside in both directions: a quarter remains
        torch.testing.assert_close(found[..., 0, 0], images[..., 0, 0] / 4)


def test_published_geometry_under_translation_rotation_and_scaling():
    n, images = 32, pictures(4, 1, 32, 32)
    base = published_grid(n, n)
    t = torch.tensor([[0.1, -0.2]])
    found = Translation(1.0, geometry="deformrs").apply(images, t)
    expected = F.grid_sample(images, (base + t[0]).expand(4, -1, -1, -1), align_corners=False)
    torch.testing.assert_close(found, expected, atol=3e-5, rtol=0)

    beta = 0.4
    u = base[..., 0] * (math.cos(beta) - 1) - base[..., 1] * math.sin(beta)
    v = base[..., 0] * math.sin(beta) + base[..., 1] * (math.cos(beta) - 1)
    turned = (base + torch.stack([u, v], -1)).expand(4, -1, -1, -1)
    found = Rotation(1.0, geometry="deformrs").apply(images, torch.tensor([beta]))
    expected = F.grid_sample(images, turned, align_corners=False)
    torch.testing.assert_close(found, expected, atol=3e-5, rtol=0)

    found = Scaling(1.0, geometry="deformrs").apply(images, torch.tensor([-0.3]))
    expected = F.grid_sample(images, (0.7 * base).expand(4, -1, -1, -1), align_corners=False)
    torch.testing.assert_close(found, expected, atol=3e-5, rtol=0)
