"""Data sets by name: what is found where, what a set must be, and what the cache may do."""

import hashlib
import io
import json
import logging
import os
import struct
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from certifl.data import Dataset, ImageSplit, fingerprint, load, random_part, to_float
from certifl.data.readers import ReadOptions, read_parquet
from certifl.errors import DataUnavailable, InputError
from image_sets import cannot_load, pixels_for, png, write_idx, write_set, write_table

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
# MD5 of the unpacked files of test images and labels as published
OFFICIAL_MNIST = ("2646ac647ad5339dbf082846283269ea", "27ae3e4e09519cfbb04c329615203637")


def needs_shared(name):
    if not (SHARED / name).is_dir():
        pytest.skip("the shared data folder is not beside the checkout")


class TestDigits:
    def test_is_split_once_and_for_all(self):
        digits = load("digits")
        assert digits.train.images.shape == (1397, 1, 8, 8)
        assert digits.test.images.shape == (400, 1, 8, 8)
        assert (digits.in_channels, digits.image_size, digits.num_classes) == (1, (8, 8), 10)
        assert digits.fingerprint.startswith("42f819eb5207")

    def test_holds_every_image_of_the_original_with_the_documented_intensities(self):
        from sklearn.datasets import load_digits

        values, labels = load_digits(return_X_y=True)
        digits = load("digits")
        scale = [round(v * 255 / 16 + 1e-9) for v in range(17)]  # halves up
        expected = sorted(
            (*(scale[int(v)] for v in row), int(label))
            for row, label in zip(values, labels, strict=True)
        )
        found = sorted(
            (*image.flatten().tolist(), int(label))
            for split in (digits.train, digits.test)
            for image, label in zip(split.images, split.labels, strict=True)
        )
        assert found == expected

    def test_is_stratified(self):
        digits = load("digits")
        train, test = (torch.bincount(s.labels) for s in (digits.train, digits.test))
        share = test / (train + test)
        assert (share - 400 / 1797).abs().max() < 1 / 174  # less than one image of a class

    def test_has_no_columns(self):
        cannot_load("no columns", "digits[label]")


class TestFolders:
    def test_parquet_gives_pixels_labels_and_class_names(self, tmp_path):
        features = {"label": {"_type": "ClassLabel", "names": ["ant", "bee", "cat"]}}
        write_set(tmp_path / "bugs", (9, 12, 3), features=features)
        bugs = load("bugs", data_dir=tmp_path)
        assert bugs.class_names == ("ant", "bee", "cat")
        assert (bugs.in_channels, bugs.image_size) == (3, (9, 12))
        expected = torch.from_numpy(pixels_for(12, (9, 12, 3), 1)).permute(0, 3, 1, 2)
        assert torch.equal(bugs.test.images, expected)
        assert bugs.test.labels.tolist() == [0, 1, 2] * 4

    @pytest.mark.parametrize("below", ["", "data", "plain_text"])
    def test_parquet_is_found_in_the_hubs_folders(self, tmp_path, below, monkeypatch):
        write_set(tmp_path / "bugs" / below)
        monkeypatch.setenv("CERTIFL_DATA", str(tmp_path))
        assert len(load("bugs").train) == 12
        assert len(load("owner/bugs").train) == 12
        assert len(load(str(tmp_path / "bugs")).train) == 12

    def test_several_files_are_joined_in_order_and_none_may_be_missing(self, tmp_path):
        write_set(tmp_path / "bugs")
        (tmp_path / "bugs" / "train-00000-of-00001.parquet").unlink()
        parts = pixels_for(10, (9, 12))
        for i in (1, 0):
            write_table(
                tmp_path / "bugs" / f"train-0000{i}-of-00002.parquet",
                parts[5 * i : 5 * i + 5],
                {"label": [0, 1, 2, 1, 0]},
            )
        assert np.array_equal(load("bugs", tmp_path).train.images[:, 0].numpy(), parts)
        (tmp_path / "bugs" / "train-00001-of-00002.parquet").unlink()
        cannot_load("1 of the 2 files", "bugs", tmp_path)

    @pytest.mark.parametrize("test", ["validation", "valid"])
    def test_validation_serves_as_test(self, tmp_path, test):
        write_set(tmp_path / "bugs", test=test)
        assert np.array_equal(
            load("bugs", tmp_path).test.images[:, 0].numpy(), pixels_for(12, (9, 12), 1)
        )

    def test_train_alone_is_not_enough(self, tmp_path):
        write_set(tmp_path / "bugs")
        (tmp_path / "bugs" / "test-00000-of-00001.parquet").unlink()
        cannot_load(r"no test images.*test or validation", "bugs", tmp_path, error=DataUnavailable)

    def test_image_folder(self, tmp_path):
        pixels = pixels_for(8, (8, 10))
        for i, image in enumerate(pixels):
            split, name = ("train", "test")[i // 4], ("bee", "ant")[i % 2]
            folder = tmp_path / "bugs" / split / name
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{i}.{('png', 'bmp')[i // 2 % 2]}")
        bugs = load(f"{tmp_path}/bugs")
        assert bugs.class_names == ("ant", "bee")
        assert bugs.train.labels.tolist() == [0, 0, 1, 1]
        assert np.array_equal(bugs.train.images[:, 0].numpy(), pixels[[1, 3, 0, 2]])
        (tmp_path / "bugs" / "test" / "bee").rename(tmp_path / "bugs" / "test" / "wasp")
        cannot_load("without training images: wasp", f"{tmp_path}/bugs")

    @pytest.mark.parametrize("end", ["", ".gz"])
    def test_idx_files(self, tmp_path, end):
        folder = tmp_path / "fashion-mnist"
        write_idx(folder, "train", end, 20)
        write_idx(folder, "t10k", end, 10)
        clothes = load("fashion_mnist", tmp_path)
        assert clothes.class_names[9] == "Ankle boot"
        assert np.array_equal(clothes.train.images[:, 0].numpy(), pixels_for(20, (9, 8)))
        assert clothes.test.labels.tolist() == list(range(10))

    def test_a_cut_off_idx_file_is_named(self, tmp_path):
        for split in ("train", "t10k"):
            write_idx(tmp_path / "x", split, "", 10)
        file = tmp_path / "x" / "t10k-images-idx3-ubyte"
        file.write_bytes(file.read_bytes()[:-1])
        cannot_load("t10k-images-idx3-ubyte is not an IDX file", "x", tmp_path)


class TestColumns:
    TWO = {"fine_label": np.arange(12) % 4, "coarse_label": np.arange(12) % 2}  # noqa: RUF012

    def test_two_label_columns_are_refused_and_one_can_be_chosen(self, tmp_path):
        features = {
            "fine_label": {"_type": "ClassLabel", "names": list("abcd")},
            "coarse_label": {"_type": "ClassLabel", "names": ["A", "B"]},
        }
        write_set(tmp_path / "bugs", features=features, columns=self.TWO)
        cannot_load(r"fine_label, coarse_label.*NAME\[fine_label\]", "bugs", tmp_path)
        assert load("bugs[fine_label]", tmp_path).num_classes == 4
        assert load("bugs", tmp_path, label_column="coarse_label").class_names == ("A", "B")
        cannot_load("no column 'label'", "bugs[label]", tmp_path)

    def test_the_feature_type_decides_before_the_name(self, tmp_path):
        features = {"coarse_label": {"_type": "ClassLabel", "names": ["A", "B"]}}
        write_set(tmp_path / "bugs", features=features, columns=self.TWO)
        assert load("bugs", tmp_path).class_names == ("A", "B")

    def test_without_metadata_the_usual_name_decides(self, tmp_path):
        columns = {"id": np.arange(12), "label": np.array([3, 5, 9] * 4)}
        write_set(tmp_path / "bugs", columns=columns)
        bugs = load("bugs", tmp_path)
        assert bugs.class_names == ("3", "5", "9")
        assert bugs.train.labels.tolist() == [0, 1, 2] * 4

    def test_two_image_columns(self, tmp_path):
        for split in ("train", "test"):
            file = tmp_path / "bugs" / f"{split}.parquet"
            write_table(file, pixels_for(4, (8, 8)), {"label": [0, 1, 0, 1]})
            table = pq.read_table(file).rename_columns(["front", "label"])
            other = [png(image) for image in pixels_for(4, (9, 9))]
            table = table.append_column("back", pa.array(other, pa.binary()))
            pq.write_table(table, file)
        cannot_load(r"images: front, back.*image_column='front'", "bugs", tmp_path)
        assert load("bugs", tmp_path, image_column="back").image_size == (9, 9)
        for split in ("train", "test"):
            file = tmp_path / "bugs" / f"{split}.parquet"
            text = json.dumps({"info": {"features": {"front": {"_type": "Image"}}}})
            table = pq.read_table(file).replace_schema_metadata({"huggingface": text})
            pq.write_table(table, file)
        assert load("bugs", tmp_path).image_size == (8, 8)

    def test_texts_are_classes_in_sorted_order(self, tmp_path):
        write_set(tmp_path / "bugs", columns={"label": ["bee", "ant", "cat"] * 4})
        bugs = load("bugs", tmp_path)
        assert bugs.class_names == ("ant", "bee", "cat")
        assert bugs.test.labels.tolist() == [1, 0, 2] * 4

    @pytest.mark.parametrize(
        ("labels", "said"),
        [
            ([-1] * 12, "label -1"),
            ([0, 1, 2, 7] * 3, "label 7"),
            ([0.5] * 12, "several columns|no column that could hold the labels"),
            ([None, 1, 2] * 4, "missing labels"),
        ],
    )
    def test_unusable_labels_are_named(self, tmp_path, labels, said):
        features = {"label": {"_type": "ClassLabel", "names": list("abc")}}
        is_float = isinstance(labels[0], float)
        write_set(
            tmp_path / "bugs", features=None if is_float else features, columns={"label": labels}
        )
        cannot_load(said, "bugs", tmp_path)

    def test_one_class_is_no_classification(self, tmp_path):
        write_set(tmp_path / "bugs", classes=1)
        cannot_load("at least two", "bugs", tmp_path)


class TestUnavailable:
    def test_without_the_hubs_package_the_message_says_the_three_ways(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(DataUnavailable) as caught:
            load("mnist")
        for way in ("--data-dir", "CERTIFL_DATA", "DIR/mnist", "certifl[hub]", "digits"):
            assert way in str(caught.value)

    def test_the_embedded_set_and_folders_never_touch_the_hub(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        write_set(tmp_path / "bugs")
        assert len(load("digits").test) == 400
        assert len(load("bugs", tmp_path).test) == 12

    def test_a_folder_that_holds_nothing_usable(self, tmp_path):
        (tmp_path / "bugs").mkdir()
        cannot_load("holds no data set", "bugs", tmp_path, error=DataUnavailable)

    def test_paths_that_do_not_exist(self, tmp_path):
        cannot_load("no folder", str(tmp_path / "nowhere"), error=DataUnavailable)
        cannot_load(
            r"does not exist.*--data-dir", "mnist", tmp_path / "nowhere", error=DataUnavailable
        )

    def test_the_set_itself_given_as_data_dir(self, tmp_path):
        write_set(tmp_path / "bugs")
        cannot_load("Give the folder above", "bugs", tmp_path / "bugs", error=DataUnavailable)

    def test_a_name_that_is_none(self):
        cannot_load("not the name of a data set", "mnist[")

    def test_a_set_of_the_hub(self, tmp_path):
        pytest.importorskip("datasets", reason="the extra `hub` is not installed")
        from certifl.data.loading import assemble
        from certifl.data.readers import read_hub

        features = {"label": {"_type": "ClassLabel", "names": list("abc")}}
        write_set(tmp_path / "bugs", features=features)
        raw = read_hub(str(tmp_path / "bugs"), ReadOptions(), "")
        assert assemble("bugs", *raw).fingerprint == load("bugs", tmp_path).fingerprint


@pytest.mark.shared
class TestRealData:
    def test_mnists_test_split_is_the_official_one_to_the_byte(self):
        needs_shared("mnist")
        raw = read_parquet(tuple((SHARED / "mnist").glob("test-*.parquet")), ReadOptions())
        assert raw.class_names == tuple("0123456789")
        head = struct.pack(">IIII", 0x803, 10_000, 28, 28)
        assert hashlib.md5(head + raw.images.tobytes()).hexdigest() == OFFICIAL_MNIST[0]
        head = struct.pack(">II", 0x801, 10_000)
        labels = raw.labels.astype(np.uint8).tobytes()
        assert hashlib.md5(head + labels).hexdigest() == OFFICIAL_MNIST[1]

    def test_cifar10_rows_are_what_pillow_makes_of_them(self):
        needs_shared("cifar10")
        file = next((SHARED / "cifar10").glob("test-*.parquet"))
        raw = read_parquet((file,), ReadOptions())
        assert raw.images.shape == (10_000, 3, 32, 32)
        assert np.bincount(raw.labels).tolist() == [1000] * 10
        assert raw.class_names[:2] == ("airplane", "automobile")
        table = pq.read_table(file)
        for row in (0, 2047, 2048, 4999, 9999):  # 2048 rows are decoded at a time
            image = Image.open(io.BytesIO(table["img"][row].as_py()["bytes"]))
            assert np.array_equal(raw.images[row].transpose(1, 2, 0), np.asarray(image))
            assert raw.labels[row] == table["label"][row].as_py()


class TestCache:
    def test_images_are_decoded_once(self, tmp_path, monkeypatch):
        write_set(tmp_path / "bugs")
        first = load("bugs", tmp_path)

        def fail(*_args):
            raise RuntimeError("decoded again")

        monkeypatch.setattr("certifl.data.loading.assemble", fail)
        second = load("bugs", tmp_path)
        assert torch.equal(first.train.images, second.train.images)
        assert torch.equal(first.test.labels, second.test.labels)
        assert (first.class_names, first.fingerprint) == (second.class_names, second.fingerprint)

    def test_a_changed_file_of_the_same_size_is_read_again(self, tmp_path):
        for split in ("train", "t10k"):
            write_idx(tmp_path / "x", split, "", 10)
        first = load("x", tmp_path)
        file = tmp_path / "x" / "train-images-idx3-ubyte"
        before = file.stat()
        file.write_bytes(file.read_bytes()[:-1] + b"\x00")
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
        assert file.stat().st_size == before.st_size
        assert load("x", tmp_path).fingerprint != first.fingerprint

    def test_equal_names_sizes_and_times_elsewhere_are_not_mixed_up(self, tmp_path):
        for name, seed in (("a", 3), ("b", 4)):
            write_idx(tmp_path / name, "train", "", 10)
            write_idx(tmp_path / name, "t10k", "", 10)
            file = tmp_path / name / "train-images-idx3-ubyte"
            file.write_bytes(file.read_bytes()[:16] + pixels_for(10, (9, 8), seed).tobytes())
            for each in (tmp_path / name).iterdir():
                os.utime(each, ns=(1, 1))
        assert load("a", tmp_path).fingerprint != load("b", tmp_path).fingerprint

    @pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
    def test_a_damaged_file_is_rebuilt(self, tmp_path, caplog, damage):
        write_set(tmp_path / "bugs")
        first = load("bugs", tmp_path)
        (file,) = (tmp_path / "cache").iterdir()
        good = file.read_bytes()
        flipped = bytearray(good)
        flipped[-1] ^= 1
        file.write_bytes({"cut": good[:-9], "flip": bytes(flipped), "empty": b""}[damage])
        with caplog.at_level(logging.WARNING):
            assert load("bugs", tmp_path).fingerprint == first.fingerprint
        assert "damaged" in caplog.text
        caplog.clear()
        assert load("bugs", tmp_path).fingerprint == first.fingerprint
        assert not caplog.text

    def test_a_cache_that_cannot_be_written_is_done_without(self, tmp_path, caplog):
        (tmp_path / "cache").write_text("a file where the folder should be")
        write_set(tmp_path / "bugs")
        with caplog.at_level(logging.WARNING):
            assert len(load("bugs", tmp_path).train) == 12
        assert "Cannot keep the decoded images" in caplog.text
        assert "CERTIFL_CACHE" in caplog.text

    def test_nothing_half_written_stays(self, tmp_path):
        load("digits", cache_dir=tmp_path / "elsewhere")
        names = [file.suffix for file in (tmp_path / "elsewhere").iterdir()]
        assert names == [".safetensors"]


def small(images=None, labels=None, names=("a", "b")):
    images = pixels_for(6, (1, 8, 8)) if images is None else images
    split = ImageSplit(torch.from_numpy(images), torch.tensor(labels or [0, 1] * 3))
    return Dataset("small", split, split, names, fingerprint(split, split, names))


class TestSplits:
    def test_fingerprint_depends_on_pixels_labels_names_and_shape(self):
        images = pixels_for(6, (1, 8, 8))
        changed = images.copy()
        changed[5, 0, 7, 7] ^= 1
        prints = {
            small().fingerprint,
            small(changed).fingerprint,
            small(labels=[0, 1, 0, 1, 1, 0]).fingerprint,
            small(names=("a", "c")).fingerprint,
            small(images.reshape(6, 1, 4, 16)).fingerprint,
        }
        assert len(prints) == 5
        assert small(images.copy()).fingerprint == small().fingerprint

    def test_to_float_is_exact_at_the_ends(self):
        made = to_float(torch.tensor([[0, 51, 255]], dtype=torch.uint8))
        assert made.dtype == torch.float32
        assert made.tolist() == [[0.0, pytest.approx(0.2), 1.0]]
        with pytest.raises(InputError, match="uint8"):
            to_float(made)

    def test_splits_refuse_what_they_are_not(self):
        good = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
        with pytest.raises(InputError, match="uint8"):
            ImageSplit(good.float(), torch.zeros(2, dtype=torch.int64))
        with pytest.raises(InputError, match="one for each image"):
            ImageSplit(good, torch.zeros(3, dtype=torch.int64))

    def test_a_random_part_is_fixed_nested_and_seeded(self):
        few, more = (random_part(400, n, 3, "test") for n in (50, 120))
        assert (len(few), len(more)) == (50, 120)
        assert set(few.tolist()) < set(more.tolist()) < set(range(400))
        assert np.array_equal(random_part(400, 50, 3, "test"), few)
        assert not np.array_equal(random_part(400, 50, 4, "test"), few)
        assert not np.array_equal(random_part(400, 50, 3, "train"), few)
        assert np.array_equal(random_part(400, None, 3, "test"), np.arange(400))
        with pytest.raises(InputError, match="from 1 to 400"):
            random_part(400, 401, 3, "test")
