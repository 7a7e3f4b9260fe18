"""The split by a column of the data set: whose images, which clients, and what is refused."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import tiny_study as tiny
from certifl.data import Column, Partition, assign_images, check, load
from certifl.errors import InputError
from certifl.experiments.plan import data_size
from certifl.experiments.run import Options, run
from certifl.report import load_run
from certifl.spec import Spec, with_settings
from certifl.study.setup import open_data
from image_sets import cannot_load, png

# (hospital, training images, test images)
HELD = (("Basel", 30, 8), ("Aarau", 12, 4), ("Chur", 12, 4), ("Davos", 20, 0), ("Olten", 0, 5))


def write_split(file: Path, columns: dict[str, Any], **metadata: str) -> None:
    count = len(columns["label"])
    pixels = np.random.default_rng(len(file.name)).integers(0, 256, (count, 8, 8), np.uint8)
    table = pa.table({"image": pa.array([png(image) for image in pixels]), **columns})
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata(metadata), file)


def write_hospitals(folder: Path, values: Sequence[Any] | None = None, **metadata: str) -> None:
    """Images of five hospitals in mixed order; Davos has no test images, Olten no others."""
    names = [name for name, _, _ in HELD] if values is None else values
    for at, split in ((1, "train"), (2, "test")):
        owners = [name for name, row in zip(names, HELD, strict=True) for _ in range(row[at])]
        order = np.random.default_rng(at).permutation(len(owners))
        labels = [int(i) % 3 for i in range(len(owners))]
        columns = {"label": labels, "hospital": pa.array([owners[i] for i in order])}
        write_split(folder / f"{split}.parquet", columns, **metadata)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_hospitals(tmp_path / "data" / "scans")
    return tmp_path / "data"


def spec(*settings: str, **clients: Any) -> Spec:
    chosen = {"count": 3, "split": "column", "options": {"column": "hospital"}, **clients}
    return with_settings({**tiny.VALUES, "data": {"name": "scans"}, "clients": chosen}, settings)


def test_every_value_is_a_client_and_keeps_its_own_test_images(data):
    dataset, partition = open_data(spec(), data)
    assert partition.names == ("Aarau", "Basel", "Chur")
    for name, client in zip(partition.names, partition.clients, strict=True):
        assert set(dataset.train.column[client.train]) == {name}
        assert set(dataset.test.column[client.test]) == {name}
    sizes = {row[0]: row[1:] for row in HELD}
    held = [(len(client.train), len(client.test)) for client in partition.clients]
    assert held == [sizes[name] for name in partition.names]
    check(partition, dataset.train.labels, dataset.test.labels)
    back = Partition.from_manifest(json.loads(json.dumps(partition.to_manifest())))
    assert back.to_manifest() == partition.to_manifest()
    assert back.names == partition.names


def test_fewer_clients_are_those_with_the_most_training_images(data):
    assert open_data(spec(count=1), data)[1].names == ("Basel",)
    # Aarau and Chur have equally many: the first in order
    assert open_data(spec(count=2), data)[1].names == ("Aarau", "Basel")
    options = {"column": "hospital", "min_test": 5}
    assert open_data(spec(count=1, options=options), data)[1].names == ("Basel",)


def test_too_many_clients_are_told_what_is_there(data):
    with pytest.raises(InputError) as refused:
        open_data(spec(count=4), data)
    told = str(refused.value)
    assert "4 clients were asked for, but the column 'hospital' has 3 values" in told
    assert "Basel (30 and 8), Davos (20 and 0), Aarau (12 and 4)" in told
    assert "Set clients.count to 3" in told


def test_a_part_of_the_images_is_split_by_its_own_values(data):
    part = {"name": "scans", "train_images": 40, "test_images": 12}
    own = {"count": 2, "split": "column", "options": {"column": "hospital"}}
    small = with_settings({**tiny.VALUES, "data": part, "clients": own})
    dataset, partition = open_data(small, data)
    whole = open_data(spec(), data)[1]
    for name, client in zip(partition.names, partition.clients, strict=True):
        assert set(client.train) <= set(whole.clients[whole.names.index(name)].train)
        assert set(dataset.train.column[client.train]) == {name}


def test_numbers_are_in_the_order_of_their_size(tmp_path):
    write_hospitals(tmp_path / "scans", values=[10, 9, 2, 3, 4])
    assert open_data(spec(), tmp_path)[1].names == ("2", "9", "10")


def test_numbers_with_names_are_called_by_them(tmp_path):
    feature = {"_type": "ClassLabel", "names": ["B", "A", "C", "D", "E"]}
    features = {"hospital": feature, "label": {"_type": "ClassLabel", "names": list("xyz")}}
    about = json.dumps({"info": {"features": features}})
    write_hospitals(tmp_path / "scans", values=[0, 1, 2, 3, 4], huggingface=about)
    dataset, partition = open_data(spec(), tmp_path)
    assert partition.names == ("A", "B", "C")
    assert dataset.class_names == ("x", "y", "z")


def test_the_column_is_kept_in_the_cache_and_only_where_asked_for(data):
    plain = load("scans", data)
    first = load("scans", data, keep_column="hospital")
    cached = sorted((data.parent / "cache").iterdir())
    second = load("scans", data, keep_column="hospital")
    assert sorted((data.parent / "cache").iterdir()) == cached
    assert len(cached) == 2
    assert plain.train.column is None
    assert second.train.column.tolist() == first.train.column.tolist()
    assert second.test.column.tolist() == first.test.column.tolist()
    assert first.fingerprint == second.fingerprint
    assert first.fingerprint != plain.fingerprint
    taken = first.train.take(np.array([3, 1]))
    assert taken.column.tolist() == first.train.column[[3, 1]].tolist()


@pytest.mark.parametrize(
    ("column", "says"),
    [
        ("clinic", "no column 'clinic' to split by; its columns are image, label, hospital"),
        ("image", "holds binary; clients are named by integers or texts"),
    ],
)
def test_columns_that_cannot_be_are_refused(column, says, data):
    cannot_load(says, "scans", data, keep_column=column)


def test_images_of_nobody_are_refused(tmp_path):
    write_hospitals(tmp_path / "scans", values=["A", None, "B", "C", "D"])
    cannot_load(r"missing values.*whose", "scans", tmp_path, keep_column="hospital")


def test_what_is_no_table_has_no_column(tmp_path):
    cannot_load("digits is not a table", "digits", keep_column="writer")
    for split in ("train", "test"):
        for name in ("a", "b"):
            folder = tmp_path / "pictures" / split / name
            folder.mkdir(parents=True)
            Image.new("L", (8, 8)).save(folder / "1.png")
    cannot_load("parquet files with that column", "pictures", tmp_path, keep_column="writer")


def test_options_are_checked(data):
    with pytest.raises(InputError, match="must be the name of a column"):
        Column(3)
    with pytest.raises(InputError, match=r"min_test = 0 .* must"):
        Column("hospital", min_test=0)
    labels = (np.array([0, 1]), np.array([0, 1]))
    with pytest.raises(InputError, match="keep_column='hospital'"):
        assign_images(Column("hospital"), labels, (None, None), 2, 0)


def test_a_plan_reads_the_numbers_of_the_column(data):
    facts, told = data_size(spec(), data)
    assert (facts.train, facts.test) == (74, 21)
    assert "those of scans" in told


def test_a_run_names_its_clients_and_is_verified(data, tmp_path):
    place = tmp_path / "run"
    folder = run(spec("training.rounds=1"), Options(place, data))
    assert folder.manifest()["client_names"] == ["Aarau", "Basel", "Chur"]
    assert load_run(place).client_name(1) == "1 (Basel)"
    held = folder.load_certificates()
    assert [int((held.client == client).sum()) for client in range(3)] == [4, 6, 4]
    tiny.cli("verify", place).fine("follow from their votes")
    tiny.cli("attack", place, "--data-dir", data, "--images", "1", "--directions", "2").fine()
