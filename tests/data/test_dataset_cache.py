"""Decoded images are kept, checked and rebuilt; what a split and its fingerprint are."""

from __future__ import annotations

import logging
import os

import numpy as np
import pytest
import torch

from certifl.data import Dataset, ImageSplit, fingerprint, load, random_part, to_float
from certifl.errors import InputError
from image_sets import pixels_for, write_idx, write_set


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
