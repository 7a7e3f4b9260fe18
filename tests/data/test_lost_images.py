"""Nothing of an image set is lost, relabelled or reduced in depth without a word."""

import json
import logging
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import tiny_study as tiny
from certifl.data import changes_of, load, read_image
from certifl.data.decode import decode_all
from certifl.errors import CertiflError, DataUnavailable, InputError
from certifl.experiments.run import Options, run
from certifl.study.opened_run import OpenRun
from image_sets import cannot_load, encoded, pixels_for, png, write_set, write_table

RGB = Image.fromarray(pixels_for(1, (9, 12, 3))[0])
OTHER = Image.fromarray(pixels_for(1, (9, 12, 3), 5)[0])


def decoded(content: bytes) -> np.ndarray:
    return decode_all([(lambda: "photo", content)])[0]


def png16(channels: int) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 1024, (8, 8, channels)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)

    def chunk(kind: bytes, body: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + check

    color = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", 8, 8, 16, color, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def tiff(bits: int, channels: int, photometric: int, extra: int | None = None) -> bytes:
    """An uncompressed TIFF of 8 x 8 pixels, all of level 51."""
    data = np.full(64 * channels, 51, "<u2" if bits == 16 else np.uint8).tobytes()
    tags = [(256, 8), (257, 8), (259, 1), (262, photometric), (277, channels), (278, 8)]
    tags += [(279, len(data)), *([] if extra is None else [(338, extra)])]
    start = 8 + 2 + 12 * (len(tags) + 2) + 4
    entries = {tag: struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags}
    entries[258] = struct.pack("<HHI", 258, 3, channels)
    packed = struct.pack(f"<{channels}H", *[bits] * channels)
    entries[258] += packed.ljust(4, b"\0") if channels <= 2 else struct.pack("<I", start)
    entries[273] = struct.pack("<HHII", 273, 4, 1, start + len(packed))
    ifd = struct.pack("<H", len(entries)) + b"".join(entries[tag] for tag in sorted(entries))
    return b"II*\0" + struct.pack("<I", 8) + ifd + b"\0\0\0\0" + packed + data


DEEP = {
    **{f"png {channels}": png16(channels) for channels in (1, 2, 3, 4)},
    "tiff gray": tiff(16, 1, 1),
    "tiff rgb": tiff(16, 3, 2),
    "tiff rgba": tiff(16, 4, 2, extra=2),
    "tiff cmyk": tiff(16, 4, 5),
    "tiff float": encoded(Image.new("F", (8, 8)), "TIFF"),
    "ppm": b"P6\n8 8\n65535\n" + bytes(8 * 8 * 6),
    "ppm of 10 bits": b"P6\n8 8\n1023\n" + bytes(8 * 8 * 6),
    "ppm as text": b"P3\n8 8\n1023\n" + b"512 " * (8 * 8 * 3),
    "pgm": b"P5\n8 8\n1023\n" + bytes(8 * 8 * 2),
}


@pytest.mark.parametrize("kind", DEEP)
def test_more_than_8_bits_are_refused_in_every_number_of_channels(kind, tmp_path):
    with pytest.raises(InputError, match=r"photo has more than 8 bits per channel.*[Cc]onvert"):
        decoded(DEEP[kind])
    (tmp_path / "one.png").write_bytes(DEEP[kind])
    for channels in (1, 3):
        with pytest.raises(InputError, match=r"one\.png has more than 8 bits"):
            read_image(tmp_path / "one.png", channels, (8, 8))


def test_deep_colour_is_refused_in_folders_and_tables(tmp_path):
    picture(tmp_path / "bugs/train/ant/1.png", png16(3))
    for part in ("train/bee", "test/ant"):
        picture(tmp_path / "bugs" / part / "1.png")
    cannot_load(r"train/ant/1\.png has more than 8 bits", "bugs", tmp_path)
    write_set(tmp_path / "table")
    rows = {"image": [{"bytes": png16(4), "path": None}] * 2, "label": [0, 1]}
    pq.write_table(pa.table(rows), tmp_path / "table/test-00000-of-00001.parquet")
    cannot_load(r"row 0 of .*more than 8 bits", "table", tmp_path)


@pytest.mark.parametrize(("bits", "channels", "extra"), [(8, 3, None), (8, 4, 2)])
def test_tiff_of_8_bits_is_read(bits, channels, extra):
    assert (decoded(tiff(bits, channels, 2, extra)) == 51).all()


def test_further_channels_are_not_dropped():
    with pytest.raises(InputError, match="photo has 4 channels, of which 3"):
        decoded(tiff(8, 4, 2, extra=0))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_several_frames_or_pages_are_refused(kind):
    with pytest.raises(InputError, match="photo holds several frames or pages"):
        decoded(encoded(RGB, kind, save_all=True, append_images=[OTHER]))
    assert decoded(encoded(RGB, kind)).shape == (3, 9, 12)


def test_the_preview_in_a_photograph_is_not_a_second_image():
    both = encoded(RGB, "MPO", save_all=True, append_images=[OTHER])
    assert np.array_equal(decoded(both), decoded(encoded(RGB, "JPEG")))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_orientation_is_applied_once_in_every_format(kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"lossless": True} if kind == "WEBP" else {}
    turned = decoded(encoded(RGB, kind, exif=exif, **options))
    plain = decoded(encoded(RGB, kind, **options))
    assert (
        np.abs(turned.astype(int) - np.rot90(plain, -1, (1, 2))).max() < (kind == "JPEG") * 99 + 1
    )


def test_transparency_that_is_dropped_is_said(tmp_path, caplog):
    half = RGB.convert("RGBA")
    half.putalpha(7)
    half.save(tmp_path / "half.png")
    RGB.convert("RGBA").save(tmp_path / "full.png")
    assert "transparency dropped" in changes_of(tmp_path / "half.png", 3, (9, 12))
    assert changes_of(tmp_path / "full.png", 3, (9, 12)) == ""
    decode_all([(lambda: "full", (tmp_path / "full.png").read_bytes())])
    assert not caplog.records
    decode_all([(lambda: "half", (tmp_path / "half.png").read_bytes())])
    assert "half has transparent pixels" in caplog.text


def picture(path: Path, content: bytes | None = None, level: int = 9) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if content is not None:
        path.write_bytes(content)
        return
    kinds = {".jfif": "JPEG", ".jpe": "JPEG", ".dib": "BMP", ".pnm": "PPM"}
    gray = Image.fromarray(np.full((8, 8), level, np.uint8))
    gray.save(path, kinds.get(path.suffix.lower()))


def folder(root: Path) -> Path:
    for split in ("train", "test"):
        for name in ("ant", "bee"):
            picture(root / "bugs" / split / name / "1.png")
    return root / "bugs"


@pytest.mark.parametrize(
    "name",
    [
        *("2.tif", "2.tiff", "2.TIF", "2.ppm", "2.pgm", "2.gif", "2.jfif", "2.jpe", "2.JPEG"),
        *("2.PNG", "2.bmp", "2.dib", "2.webp", "2021/2.png", "2021/may/2.png"),
    ],
)
def test_every_image_of_a_class_is_read(name, tmp_path):
    bugs = folder(tmp_path)
    for split in ("train", "test"):
        picture(bugs / split / "bee" / name, level=200)
        picture(bugs / split / "cat" / name, level=200)
    found = load("bugs", tmp_path)
    assert found.class_names == ("ant", "bee", "cat")
    for split in (found.train, found.test):
        assert sorted(split.labels.tolist()) == [0, 1, 1, 2]
        bright = split.images[:, 0, 0, 0] > 100
        assert split.labels[bright].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("name", "split"),
    [*((name, "train") for name in ("2.jp2", "2", "2.png.zip", "deep/2.heic")), ("2.npy", "test")],
)
def test_a_file_that_is_not_read_is_named(name, split, tmp_path):
    bugs = folder(tmp_path)
    picture(bugs / split / "bee" / name, b"\0")
    cannot_load(f"{split}/bee/{name} is not read: images end in", "bugs", tmp_path)


def test_an_image_in_no_class_folder_is_named(tmp_path):
    picture(folder(tmp_path) / "train/7.png")
    cannot_load(r"train/7\.png lies in no class folder", "bugs", tmp_path)


def test_an_empty_class_folder_would_renumber_the_classes(tmp_path, caplog):
    bugs = folder(tmp_path)
    (bugs / "test/aphid").mkdir()
    assert len(load("bugs", tmp_path).test) == 2
    assert "test/aphid holds no image" in caplog.text
    (bugs / "train/aphid/.cache").mkdir(parents=True)
    cannot_load(r"train/aphid holds no image\. Remove", "bugs", tmp_path)


def test_what_lies_beside_images_is_passed_over(tmp_path, caplog):
    bugs = folder(tmp_path)
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._1.png", ".ipynb_checkpoints/1.png"):
        picture(bugs / "train/bee" / name, b"\0")
    assert len(load("bugs", tmp_path).train) == 2
    assert not caplog.records
    for name in ("notes.txt", "bee/1.xml", "README"):
        picture(bugs / "train" / name, b"by hand")
    assert len(load("bugs", tmp_path).train) == 2
    assert "Text files beside images are passed over: " in caplog.text
    assert "and 2 more" in caplog.text


def test_links_are_followed_but_not_in_a_circle(tmp_path):
    bugs = folder(tmp_path)
    picture(tmp_path / "elsewhere/2.png", level=200)
    (bugs / "train/bee/more").symlink_to(tmp_path / "elsewhere")
    assert len(load("bugs", tmp_path).train) == 3
    (bugs / "train/bee/again").symlink_to(bugs / "train/bee")
    cannot_load("bee/again is a link to a folder that it lies in", "bugs", tmp_path)
    (bugs / "train/bee/again").unlink()
    (bugs / "train/bee/3.png").symlink_to(tmp_path / "nowhere.png")
    cannot_load(r"bee/3\.png cannot be read", "bugs", tmp_path)
    (bugs / "train/bee/3.png").unlink()
    os.mkfifo(bugs / "train/bee/3.png")
    cannot_load(r"bee/3\.png cannot be read", "bugs", tmp_path)


def test_names_that_are_not_text(tmp_path):
    bugs = folder(tmp_path)
    picture(bugs / "train/bee" / os.fsdecode(b"\xff.png"), level=200)
    assert len(load("bugs", tmp_path).train) == 3
    for split in ("train", "test"):
        picture(bugs / split / os.fsdecode(b"\xff") / "1.png")
    cannot_load("The name of the class folder .* is not UTF-8 text", "bugs", tmp_path)


@pytest.mark.parametrize("text", ["[" * 100_000, "{", '{"info": 1}', '{"info": {"features": []}}'])
def test_metadata_of_the_hub_that_say_nothing_are_passed_over(text, tmp_path):
    write_set(tmp_path / "bugs")
    for file in (tmp_path / "bugs").glob("*.parquet"):
        table = pq.read_table(file).replace_schema_metadata({"huggingface": text})
        pq.write_table(table, file)
    assert load("bugs", tmp_path).class_names == ("0", "1", "2")


def test_labels_of_another_column_in_the_test_split_are_refused(tmp_path):
    for split, column in (("train", "fine"), ("test", "coarse")):
        write_table(tmp_path / f"bugs/{split}.parquet", pixels_for(2, (8, 8)), {column: [0, 1]})
    cannot_load("'fine' of the training split but in 'coarse' of the test", "bugs", tmp_path)


def test_files_of_a_split_in_two_places_are_named(tmp_path):
    write_set(tmp_path / "bugs")
    write_table(tmp_path / "bugs/train/more.parquet", pixels_for(2, (9, 12)), {"label": [0, 1]})
    cannot_load(r"'train' in two places.*train/more\.parquet", "bugs", tmp_path)


def names(*classes: str) -> dict[str, object]:
    return {"label": {"_type": "ClassLabel", "names": list(classes)}}


def shards(root: Path, first: dict | None, second: dict | None) -> None:
    for file, features in (
        ("train-00000-of-00002", first),
        ("train-00001-of-00002", second),
        ("test-00000-of-00001", first),
    ):
        label = {"label": [0, 1, 0, 1]}
        write_table(root / f"bugs/{file}.parquet", pixels_for(4, (8, 8)), label, features)


@pytest.mark.parametrize(
    ("second", "says"),
    [
        (names("bee", "ant"), r"number 0 stands for 'bee', but for 'ant' in train-00000"),
        (names("ant", "cat", "bee"), "number 1 stands for 'cat', but for 'bee'"),
        (names("ant", "bee", "cat"), "number 2 stands for 'cat', but for no name"),
        (None, "number 0 stands for no name, but for 'ant'"),
    ],
)
def test_shards_that_name_classes_otherwise_are_refused(second, says, tmp_path):
    shards(tmp_path, names("ant", "bee"), second)
    cannot_load(says, "bugs", tmp_path)
    shards(tmp_path, names("ant", "bee"), names("ant", "bee"))
    assert load("bugs", tmp_path).class_names == ("ant", "bee")


def test_shards_that_name_clients_otherwise_are_refused(tmp_path):
    for number, order in enumerate((["a", "b"], ["b", "a"])):
        features = {**names("x", "y"), "site": {"_type": "ClassLabel", "names": order}}
        columns = {"label": [0, 1], "site": [0, 1]}
        file = tmp_path / f"bugs/train-0000{number}-of-00002.parquet"
        write_table(file, pixels_for(2, (8, 8)), columns, features)
        write_table(tmp_path / "bugs/test.parquet", pixels_for(2, (8, 8)), columns, features)
    cannot_load("column 'site' has other names", "bugs", tmp_path, keep_column="site")


def test_shards_of_integers_and_texts_are_refused(tmp_path):
    for number, labels in enumerate(([0, 1], ["0", "1"])):
        file = tmp_path / f"bugs/train-0000{number}-of-00002.parquet"
        write_table(file, pixels_for(2, (8, 8)), {"label": labels})
    write_table(tmp_path / "bugs/test.parquet", pixels_for(2, (8, 8)), {"label": [0, 1]})
    cannot_load("integers in one file and strings in another", "bugs", tmp_path)


@pytest.mark.parametrize("split", ["train", "test"])
def test_one_split_without_names_is_refused(split, tmp_path):
    write_set(tmp_path / "bugs", features=names("ant", "bee", "cat"))
    file = tmp_path / f"bugs/{split}-00000-of-00001.parquet"
    write_table(file, pixels_for(3, (9, 12)), {"label": [0, 1, 2]})
    cannot_load(r"name their classes differently \(one of them not", "bugs", tmp_path)


CATEGORIES = pa.array(["bee", "ant", "cat"] * 4).dictionary_encode()


@pytest.mark.parametrize(
    ("labels", "classes", "numbers"),
    [
        (CATEGORIES, ("ant", "bee", "cat"), [1, 0, 2]),
        (pa.array([5, 3, 9] * 4).dictionary_encode(), ("3", "5", "9"), [1, 0, 2]),
        (pa.array(["bee", "ant", "cat"] * 4, pa.large_string()), ("ant", "bee", "cat"), [1, 0, 2]),
        (pa.array([True, False, True] * 4), ("False", "True"), [1, 0, 1]),
    ],
)
def test_labels_of_other_types_are_read(labels, classes, numbers, tmp_path):
    write_set(tmp_path / "bugs", columns={"id": np.arange(12), "label": labels})
    found = load("bugs", tmp_path)
    assert found.class_names == classes
    assert found.test.labels.tolist() == numbers * 4


def test_a_categorical_column_of_pandas_is_read_wherever_it_is_called(tmp_path):
    write_set(tmp_path / "bugs", columns={"species": CATEGORIES})
    assert load("bugs", tmp_path).class_names == ("ant", "bee", "cat")


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (pa.array([0.0, 1.0, 2.0] * 4), "'label' of .* holds double, .*integers or strings"),
        (pa.array([[1, 0], [0, 1], [1, 0]] * 4), r"'label' of .* holds list.*integers or strings"),
        (pa.array(["bee", None, "ant"] * 4).dictionary_encode(), "missing labels"),
        (pa.array(["bee", "", "ant"] * 4), "missing labels"),
        (pa.nulls(12), "'label' of .* holds null"),
    ],
)
def test_labels_that_cannot_be_read_are_not_replaced_by_another_column(labels, says, tmp_path):
    write_set(tmp_path / "bugs", columns={"id": np.arange(12), "label": labels})
    cannot_load(says, "bugs", tmp_path)


def test_a_path_is_not_replaced_by_another_column_of_bytes(tmp_path):
    rows = {"image": ["1.png"] * 2, "mask": [png(pixels_for(1, (8, 8))[0])] * 2, "label": [0, 1]}
    for split in ("train", "test"):
        (tmp_path / "bugs").mkdir(exist_ok=True)
        pq.write_table(pa.table(rows), tmp_path / f"bugs/{split}.parquet")
    cannot_load(r"'image' of .* holds string.*image_column='mask'", "bugs", tmp_path)


def hide(root: Path, features: dict | None, train: list[int]) -> None:
    splits = (("train", train), ("validation", [1, 0]), ("test", [-1, -1]))
    for split, labels in splits:
        file = root / f"bugs/{split}-00000-of-00001.parquet"
        write_table(file, pixels_for(len(labels), (8, 8)), {"label": labels}, features)


@pytest.mark.parametrize("features", [names("ant", "bee"), None], ids=["named", "plain"])
def test_hidden_test_labels_name_the_split_to_use(features, tmp_path):
    hide(tmp_path, features, [0, 1])
    cannot_load(r"test label -1.*not public.*data\.test_split = \"valid", "bugs", tmp_path)
    assert load("bugs", tmp_path, test_split="validation").test.labels.tolist() == [1, 0]
    said = r"no split 'val' .*it has test, validation"
    cannot_load(said, "bugs", tmp_path, test_split="val", error=DataUnavailable)
    (tmp_path / "bugs/test-00000-of-00001.parquet").unlink()
    assert load("bugs", tmp_path).test.labels.tolist() == [1, 0]


def test_minus_one_in_both_splits_is_not_a_class(tmp_path):
    hide(tmp_path, None, [-1, 0, 1])
    cannot_load(r"training label -1.*not public.*labels as strings", "bugs", tmp_path)


@pytest.mark.parametrize(
    ("split", "says"), [("validation", "digits has no split"), ("train", "must be one of test")]
)
def test_a_split_that_cannot_be_chosen(split, says):
    cannot_load(says, "digits", test_split=split)


def test_a_test_split_of_image_folders_can_be_chosen(tmp_path):
    bugs = folder(tmp_path)
    for name in ("ant", "bee"):
        picture(bugs / "val" / name / "1.png", level=200)
    assert load("bugs", tmp_path).test.images.max() == 9
    assert load("bugs", tmp_path, test_split="val").test.images.max() == 200


@pytest.mark.parametrize(
    ("classes", "line"),
    [
        ([str(k) for k in range(12)], "as strings (0, 1, 10, 11, 2 ...), so class number 2"),
        ([f"c{k}" for k in (1, 2, 10)], "ordered as strings (c1, c10, c2), so class number 1"),
        ([f"{k:02d}" for k in range(12)], ""),
        (["ant", "bee"], ""),
    ],
)
def test_classes_in_the_order_of_texts_are_said(classes, line, tmp_path, caplog):
    for split in ("train", "test"):
        for name in classes:
            picture(tmp_path / "bugs" / split / name / "1.png")
    for _ in ("decoded", "from the cache"):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert load("bugs", tmp_path).class_names == tuple(sorted(classes))
        assert [line in record.getMessage() for record in caplog.records] == [True] * bool(line)


@pytest.mark.parametrize(
    ("written", "order"),
    [
        ({"features": names("2", "10", "1")}, ("2", "10", "1")),  # as its maker named them
        ({"columns": {"label": [10, 9, 2] * 4}}, ("2", "9", "10")),
    ],
)
def test_names_keep_their_order_and_integers_are_ordered_by_size(written, order, tmp_path, caplog):
    write_set(tmp_path / "bugs", **written)
    assert load("bugs", tmp_path).class_names == order
    assert not caplog.records


def test_every_refusal_is_an_error_of_certifl(tmp_path):
    text = json.dumps({"info": {"features": {"label": {"names": "ant"}}}})
    write_set(tmp_path / "bugs")
    file = tmp_path / "bugs/train-00000-of-00001.parquet"
    table = pq.read_table(file).replace_schema_metadata({"huggingface": text})
    big = pa.array([2**63 + 1] * 12, pa.uint64())
    pq.write_table(table.set_column(1, "label", big), file)
    cannot_load("uint64", "bugs", tmp_path, error=CertiflError)


def test_a_study_can_certify_another_split_and_its_run_remembers_where_its_data_lay(
    tmp_path, monkeypatch
):
    hide(tmp_path / "data", None, [0, 1] * 4)
    monkeypatch.setenv("CERTIFL_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    own = ("data={ name = 'bugs' }", "clients.count=2", "certification.images=1")
    rest = (*own, "training.rounds=1", "certification.n=100")
    with pytest.raises(InputError, match=r"-1.*data\.test_split"):
        run(tiny.spec(*rest), Options(Path("run")))
    run(tiny.spec(*rest, "data.test_split=validation"), Options(Path("run")))
    monkeypatch.delenv("CERTIFL_DATA")
    opened = OpenRun(tmp_path / "run")
    assert opened.manifest["data_dir"] == str((tmp_path / "data").resolve())
    assert opened.dataset.test.labels.tolist() == [1, 0]
    with pytest.raises(InputError, match=r"data\.test_split"):
        tiny.spec("data.test_split=dev")


def test_the_split_is_part_of_a_studys_name_only_where_it_is_chosen():
    chosen = tiny.spec("data.test_split=test")
    assert chosen.hash() != tiny.spec().hash()
    assert "test_split" not in tiny.spec().to_toml()
