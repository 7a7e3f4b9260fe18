"""Window, crop and resize: what they do, that they are recorded, and what is refused."""

from __future__ import annotations

import io

import numpy as np
import pytest
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
from image_sets import png
from tiny_study import spec

DEEP = np.linspace(0, 65535, 9 * 12).round().astype(np.uint16).reshape(9, 12)


def decoded(content: bytes, prepare: Preparation) -> np.ndarray:
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
    assert np.array_equal(decoded(png(image), Preparation(crop="center"))[0], image[:, 1:10])
    padded = decoded(png(image), Preparation(crop="pad"))[0]
    assert padded.shape == (12, 12)
    assert np.array_equal(padded[1:10], image)
    assert padded.sum() == image.sum()
    wide = decoded(png(image), Preparation((8, 16), "center"))[0]
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
    with pytest.raises(InputError, match=r"must have one size: give data\.resize"):
        load("photos", tmp_path, tmp_path)
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
    with pytest.raises(InputError, match=r"8 bits\. data\.window is for images of more"):
        load("digits", cache_dir=tmp_path, window=[0, 16])


def test_a_window_maps_deep_gray_images():
    whole = decoded(png(DEEP), Preparation(window=(0, 65535)))[0]
    assert np.array_equal(whole, np.floor(DEEP / 257 + 0.5))
    part = decoded(png(DEEP), Preparation(window=(1000, 2000)))[0]
    assert part.min() == 0
    assert part.max() == 255
    assert part[DEEP <= 1000].max() == 0
    with pytest.raises(InputError, match=r"mode I;16.*data\.window = \[low, high\]"):
        decoded(png(DEEP), Preparation())
    with pytest.raises(InputError, match=r"photo has 8 bits.*leave it out"):
        decoded(png(DEEP.astype(np.uint8)), Preparation(window=(0, 255)))
    nan = io.BytesIO()
    Image.fromarray(np.full((9, 9), np.nan, np.float32)).save(nan, "TIFF")
    with pytest.raises(InputError, match="not numbers"):
        decoded(nan.getvalue(), Preparation(window=(0, 1)))


def test_dicom_is_read_in_the_units_of_its_modality():
    values = np.arange(9 * 12, dtype=np.uint16).reshape(9, 12) * 10
    prepare = Preparation(window=(-1000, 400), crop="center")
    expected = np.floor((2.0 * values / 1400).clip(0, 1) * 255 + 0.5)[:, 1:10]
    assert np.array_equal(decoded(dicom(values), prepare)[0], expected)
    inverted = decoded(dicom(values, "MONOCHROME1"), prepare)[0]
    assert np.array_equal(inverted, 255 - expected)
    with pytest.raises(InputError, match=r"DICOM image, of no fixed range.*data\.window"):
        decoded(dicom(values), Preparation())
    with pytest.raises(InputError, match="colors of kind RGB"):
        decoded(dicom(values, "RGB"), prepare)
    with pytest.raises(InputError, match="Cannot decode photo"):
        decoded(dicom(values)[:-50], prepare)


def test_small_files_that_would_fill_the_memory_are_refused():
    thin = png(np.zeros((8, 30_000), np.uint8))
    with pytest.raises(InputError, match=r"photo: crop = pad would make it 30000 x 30000.*large"):
        decoded(thin, Preparation((16, 16), "pad"))
    assert decoded(thin, Preparation((16, 16), "center")).shape == (1, 16, 16)
    values = np.zeros((9, 12), np.uint16)
    packed = dicom(values, syntax=DeflatedExplicitVRLittleEndian)
    with pytest.raises(InputError, match="photo: it is compressed as a whole"):
        decoded(packed, Preparation(window=(0, 1)))


def test_the_extra_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pydicom", None)
    with pytest.raises(InputError, match=r"certifl\[dicom\]"):
        decoded(b"\0" * 128 + b"DICM", Preparation(window=(0, 1)))


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
