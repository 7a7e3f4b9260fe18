"""From image files to pixels: color, depth, orientation, size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from certifl.data import read_image
from certifl.errors import InputError
from image_sets import decoded, encoded

GREY = np.random.default_rng(0).integers(0, 256, (9, 12), dtype=np.uint8)
RGB = np.random.default_rng(1).integers(0, 256, (9, 12, 3), dtype=np.uint8)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
def test_every_pixel_is_read_and_grey_stays_one_channel(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    found = decoded(encoded(Image.fromarray(RGB), kind, **options))
    assert np.array_equal(found[0].transpose(1, 2, 0), RGB)
    if kind != "WEBP":  # has no gray images
        assert np.array_equal(decoded(encoded(Image.fromarray(GREY), kind)), GREY[None, None])


def test_alpha_is_dropped():
    alpha = np.full((9, 12, 1), 7, dtype=np.uint8)
    rgba = Image.fromarray(np.concatenate([RGB, alpha], axis=2))
    assert np.array_equal(decoded(encoded(rgba))[0].transpose(1, 2, 0), RGB)
    la = Image.fromarray(np.concatenate([GREY[..., None], alpha], axis=2))
    assert np.array_equal(decoded(encoded(la)), GREY[None, None])


def test_a_palette_becomes_rgb_even_with_transparency():
    colors = [255, 0, 0, 0, 255, 0, 0, 0, 255]
    indices = np.arange(9 * 12, dtype=np.uint8).reshape(9, 12) % 3
    image = Image.fromarray(indices).convert("P")
    image.putpalette(colors)
    expected = np.array(colors, dtype=np.uint8).reshape(3, 3)[indices]
    for options in ({}, {"transparency": b"\x00\x80\xff"}):
        found = decoded(encoded(image, **options))
        assert np.array_equal(found[0].transpose(1, 2, 0), expected)


def test_black_and_white_becomes_0_and_255():
    found = decoded(encoded(Image.fromarray(GREY > 127)))
    assert np.array_equal(found[0, 0], np.where(GREY > 127, 255, 0))


def test_one_rgb_image_makes_the_set_rgb():
    gray, rgb = encoded(Image.fromarray(GREY)), encoded(Image.fromarray(RGB))
    found = decoded(gray, rgb, gray)
    assert found.shape == (3, 3, 9, 12)
    assert all(np.array_equal(found[0, c], GREY) for c in range(3))
    # the RGB image comes after the first part of images has been put together
    late = decoded(*[gray] * 2048, rgb)
    assert late.shape == (2049, 3, 9, 12)
    assert np.array_equal(late[2047, 2], GREY)
    assert np.array_equal(late[2048].transpose(1, 2, 0), RGB)


def test_order_is_kept():
    images = np.random.default_rng(2).integers(0, 256, (300, 8, 8), dtype=np.uint8)
    found = decoded(*(encoded(Image.fromarray(image)) for image in images))
    assert np.array_equal(found[:, 0], images)


def test_camera_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned by 90 degrees
    found = decoded(encoded(Image.fromarray(GREY), exif=exif))
    assert np.array_equal(found[0, 0], np.rot90(GREY, -1))


def test_two_sizes_are_named():
    with pytest.raises(InputError, match=r"image 1 is 12 x 9 .*image 0 is 9 x 12 .*resize"):
        decoded(encoded(Image.fromarray(GREY)), encoded(Image.fromarray(GREY.T.copy())))


def test_too_small_an_image_is_refused_and_8_by_8_is_not():
    with pytest.raises(InputError, match="at least 8 x 8"):
        decoded(encoded(Image.fromarray(GREY[:8, :7].copy())))
    assert decoded(encoded(Image.fromarray(GREY[:8, :8].copy()))).shape == (1, 1, 8, 8)


def test_damage_is_named():
    good = encoded(Image.fromarray(RGB))
    with pytest.raises(InputError, match="Cannot decode image 1"):
        decoded(good, good[: len(good) // 2])
    with pytest.raises(InputError, match="image 0: it is not an image"):
        decoded(b"text")
    with pytest.raises(InputError, match="no image to decode"):
        decoded()


class TestReadImage:
    @pytest.fixture
    def files(self, tmp_path):
        Image.fromarray(GREY).save(tmp_path / "gray.png")
        Image.fromarray(RGB).save(tmp_path / "rgb.png")
        return tmp_path

    def test_gives_intensities_in_0_1(self, files):
        found = read_image(files / "rgb.png", 3, (9, 12))
        assert found.shape == (1, 3, 9, 12)
        assert torch.equal(found[0].permute(1, 2, 0), torch.from_numpy(RGB) / 255)

    def test_grey_for_an_rgb_model(self, files):
        found = read_image(files / "gray.png", 3, (9, 12))
        assert all(torch.equal(found[0, c], torch.from_numpy(GREY) / 255) for c in range(3))

    def test_rgb_for_a_grey_model_by_luma(self, files):
        found = read_image(str(files / "rgb.png"), 1, (9, 12))
        luma = RGB @ np.array([0.299, 0.587, 0.114])
        assert found.shape == (1, 1, 9, 12)
        assert np.abs(found[0, 0].numpy() * 255 - luma).max() < 1

    def test_another_size_is_refused_with_both_named(self, files):
        with pytest.raises(InputError, match=r"is 9 x 12 .*of 8 x 8 .*resize"):
            read_image(files / "gray.png", 1, (8, 8))

    def test_resizing_on_request(self, tmp_path):
        Image.fromarray(np.full((9, 12), 51, dtype=np.uint8)).save(tmp_path / "flat.png")
        found = read_image(tmp_path / "flat.png", 1, (8, 10), resize=True)
        assert torch.equal(found, torch.full((1, 1, 8, 10), 51) / 255)

    def test_missing_file_and_wrong_channels(self, files):
        with pytest.raises(InputError, match="no image file"):
            read_image(files / "none.png", 1, (9, 12))
        with pytest.raises(InputError, match=r"1 \(gray\) or 3"):
            read_image(files / "gray.png", 2, (9, 12))
