"""From image files to pixels: color, depth, window, crop and size; what is recorded or refused."""

import io
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from pydicom import FileDataset, FileMetaDataset
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, generate_uid

from certifl.data import load, read_image
from certifl.data.dataset import cache_path, read_cached
from certifl.data.decode import changes_of, decode_all
from certifl.data.preparation import Preparation, preparation_of
from certifl.deploy.client.settings import Settings, check_study
from certifl.deploy.schemas import Rejected
from certifl.errors import InputError, SpecError
from certifl.experiments.plan import data_size
from image_sets import cannot_load, decoded, encoded, png
from tiny_study import spec

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


DEEP = np.linspace(0, 65535, 9 * 12).round().astype(np.uint16).reshape(9, 12)


def prepared(content: bytes, prepare: Preparation) -> np.ndarray:
    return decode_all([(lambda: "photo", content)], prepare)[0]


def dicom(
    values: np.ndarray,
    kind: str = "MONOCHROME2",
    slope: float = 2.0,
    syntax: str = ExplicitVRLittleEndian,
) -> bytes:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = syntax
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = (
        "1.2.840.10008.5.1.4.1.1.2",
        generate_uid(),
    )
    file = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    file.Rows, file.Columns = values.shape
    file.SamplesPerPixel, file.PhotometricInterpretation = 1, kind
    file.BitsAllocated, file.BitsStored, file.HighBit, file.PixelRepresentation = 16, 16, 15, 0
    file.RescaleSlope, file.RescaleIntercept = slope, -1000
    file.PixelData = values.tobytes()
    out = io.BytesIO()
    file.save_as(out, enforce_file_format=True)
    return out.getvalue()


def test_crop_and_pad_keep_the_middle():
    image = np.arange(9 * 12, dtype=np.uint8).reshape(9, 12)
    assert np.array_equal(prepared(png(image), Preparation(crop="center"))[0], image[:, 1:10])
    padded = prepared(png(image), Preparation(crop="pad"))[0]
    assert padded.shape == (12, 12)
    assert np.array_equal(padded[1:10], image)
    assert padded.sum() == image.sum()
    wide = prepared(png(image), Preparation((8, 16), "center"))[0]
    assert wide.shape == (8, 16)
    expected = Image.fromarray(image[1:7]).resize((16, 8), Image.Resampling.BILINEAR)
    assert np.array_equal(wide, np.asarray(expected))


def test_images_of_different_sizes_get_one_and_are_else_refused(tmp_path):
    sizes = [(9, 12), (20, 9), (31, 33)]
    for split in ("train", "test"):
        for number, size in enumerate(sizes * 2):
            file = tmp_path / "photos" / split / "ab"[number % 2] / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full(size, 40 * number, np.uint8)).save(file)
    cannot_load(r"must have one size: give data\.resize", "photos", tmp_path, tmp_path)
    found = load("photos", tmp_path, tmp_path, resize=16, crop="center")
    assert found.image_size == (16, 16)
    assert found.prepared == {"resize": [16, 16], "crop": "center"}
    again = load("photos", tmp_path, tmp_path, resize=16, crop="center")
    assert again.fingerprint == found.fingerprint
    assert again.prepared == found.prepared
    # gray areas look alike however they are cropped: the fingerprint still says what was done
    padded = load("photos", tmp_path, tmp_path, resize=16)
    assert (padded.train.images == found.train.images).all()
    assert padded.fingerprint != found.fingerprint


def test_an_embedded_set_is_resized_and_planned(tmp_path):
    found = load("digits", cache_dir=tmp_path, resize=[12, 10])
    assert found.image_size == (12, 10)
    plain = load("digits", cache_dir=tmp_path)
    assert plain.prepared == {}
    assert plain.fingerprint != found.fingerprint
    assert data_size(spec("data.resize=16"), None)[0].shape == (1, 16, 16)
    said = r"8 bits\. data\.window is for images of more"
    cannot_load(said, "digits", cache_dir=tmp_path, window=[0, 16])


def test_a_window_maps_deep_gray_images():
    whole = prepared(png(DEEP), Preparation(window=(0, 65535)))[0]
    assert np.array_equal(whole, np.floor(DEEP / 257 + 0.5))
    part = prepared(png(DEEP), Preparation(window=(1000, 2000)))[0]
    assert part.min() == 0
    assert part.max() == 255
    assert part[DEEP <= 1000].max() == 0
    with pytest.raises(InputError, match=r"mode I;16.*data\.window = \[low, high\]"):
        prepared(png(DEEP), Preparation())
    with pytest.raises(InputError, match=r"photo has 8 bits.*leave it out"):
        prepared(png(DEEP.astype(np.uint8)), Preparation(window=(0, 255)))
    nan = io.BytesIO()
    Image.fromarray(np.full((9, 9), np.nan, np.float32)).save(nan, "TIFF")
    with pytest.raises(InputError, match="not numbers"):
        prepared(nan.getvalue(), Preparation(window=(0, 1)))


def tiff(values: np.ndarray, photometric: int = 1) -> bytes:
    """An uncompressed gray TIFF of these intensities, in whatever format they are."""
    height, width = values.shape
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    data, bits = values.tobytes(), 8 * values.dtype.itemsize
    entries = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric)]
    entries += [(273, 8 + 2 + 12 * 10 + 4), (277, 1), (278, height), (279, len(data)), (339, kind)]
    short = (258, 259, 262, 277, 339)
    packed = b"".join(
        struct.pack("<HHIHH", tag, 3, 1, value, 0)
        if tag in short
        else struct.pack("<HHII", tag, 4, 1, value)
        for tag, value in entries
    )
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + packed + b"\0\0\0\0" + data


@pytest.mark.parametrize("kind", [np.uint16, np.float32])
def test_tiff_in_which_0_is_white_is_read_so(kind):
    values = np.arange(9 * 12).reshape(9, 12).astype(kind)
    window = Preparation(window=(0, 255))
    black = prepared(tiff(values), window)[0]
    assert np.array_equal(black, values)
    assert np.array_equal(prepared(tiff(values, photometric=0), window)[0], 255 - values)
    shallow = values.astype(np.uint8)
    assert np.array_equal(prepared(tiff(shallow, photometric=0), Preparation())[0], 255 - shallow)


def test_signs_in_tiff_are_read_as_they_are():
    values = np.arange(9 * 12).reshape(9, 12)
    for shifted in ((values + 2**31).astype(np.uint32), (values - 50).astype(np.int32)):
        low = int(shifted.min())
        found = prepared(tiff(shifted), Preparation(window=(low, low + 255)))[0]
        assert np.array_equal(found, values)
    with pytest.raises(InputError, match="intensities below 0"):
        prepared(tiff((values - 50).astype(np.int8)), Preparation())


def test_dicom_is_read_in_the_units_of_its_modality():
    values = np.arange(9 * 12, dtype=np.uint16).reshape(9, 12) * 10
    prepare = Preparation(window=(-1000, 400), crop="center")
    expected = np.floor((2.0 * values / 1400).clip(0, 1) * 255 + 0.5)[:, 1:10]
    assert np.array_equal(prepared(dicom(values), prepare)[0], expected)
    inverted = prepared(dicom(values, "MONOCHROME1"), prepare)[0]
    assert np.array_equal(inverted, 255 - expected)
    with pytest.raises(InputError, match=r"DICOM image, of no fixed range.*data\.window"):
        prepared(dicom(values), Preparation())
    with pytest.raises(InputError, match="colors of kind RGB"):
        prepared(dicom(values, "RGB"), prepare)
    with pytest.raises(InputError, match="Cannot decode photo"):
        prepared(dicom(values)[:-50], prepare)


def test_small_files_that_would_fill_the_memory_are_refused():
    thin = png(np.zeros((8, 30_000), np.uint8))
    with pytest.raises(InputError, match=r"photo: crop = pad would make it 30000 x 30000.*large"):
        prepared(thin, Preparation((16, 16), "pad"))
    assert prepared(thin, Preparation((16, 16), "center")).shape == (1, 16, 16)
    values = np.zeros((9, 12), np.uint16)
    packed = dicom(values, syntax=DeflatedExplicitVRLittleEndian)
    with pytest.raises(InputError, match="photo: it is compressed as a whole"):
        prepared(packed, Preparation(window=(0, 1)))


def test_the_extra_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pydicom", None)
    with pytest.raises(InputError, match=r"certifl\[dicom\]"):
        prepared(b"\0" * 128 + b"DICM", Preparation(window=(0, 1)))


def test_a_single_image_is_prepared_like_the_others(tmp_path):
    file = tmp_path / "photo.png"
    file.write_bytes(png(DEEP))
    prepare = Preparation((16, 16), "center", (0.0, 65535.0))
    image = read_image(file, 1, (16, 16), prepare=prepare)
    assert (image[0] * 255 == decode_all([(lambda: "", file)], prepare)[0]).all()
    words = changes_of(file, 1, (16, 16), prepare)
    assert words == "resize = [16, 16], crop = center, window = [0.0, 65535.0]"


@pytest.mark.parametrize(
    "wrong",
    [
        "resize=4",
        "resize=[64]",
        "resize=[64, 100000]",
        'crop="middle"',
        "window=[3, 3]",
        "window=[1]",
    ],
)
def test_values_that_are_not_allowed_are_refused_with_the_spec(wrong):
    with pytest.raises(SpecError, match=wrong.partition("=")[0]):
        spec(f"data.{wrong}")


def test_a_client_joins_only_studies_that_prepare_images_as_it_does():
    own = Settings(client=0, data="photos", resize=64, crop="center")
    check_study(spec("data.resize=64", 'data.crop="center"'), own)
    check_study(spec("data.resize=64"), own)  # the study leaves the crop to each client
    check_study(spec("data.resize=[64, 64]"), own)
    for setting, words in {
        "data.resize=32": r"data\.resize of the study is \[32, 32\].*resize = \[64, 64\]",
        'data.crop="pad"': r'data\.crop of the study is "pad".*crop = "center"',
        "data.window=[0, 9]": r"data\.window of the study is \[0\.0, 9\.0\].*window = nothing",
    }.items():
        with pytest.raises(Rejected, match=words):
            check_study(spec(setting), own)
    common = Settings(client=0, data="digits", dealt=True)
    check_study(spec("data.resize=32"), common)
    with pytest.raises(Rejected, match=r"data\.crop of the study is nothing"):
        check_study(
            spec("data.resize=64"),
            Settings(client=0, data="digits", dealt=True, resize=64, crop="pad"),
        )


def test_a_cached_set_of_other_settings_is_not_taken(tmp_path):
    found = load("digits", cache_dir=tmp_path, resize=12)
    (file,) = tmp_path.glob("*.safetensors")
    assert read_cached(file, "digits").fingerprint == found.fingerprint
    assert read_cached(cache_path(tmp_path, "digits", "0" * 20), "digits") is None
    assert preparation_of(12, None, None).choices != preparation_of(16, None, None).choices
