"""Splits of images among clients: what each promises, natural ones, and how they are kept."""

import json
from collections.abc import Sequence
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import tiny_study as tiny
from certifl.data import Column, assign_images, load
from certifl.data.partition import check, choose
from certifl.data.splitters import (
    SPLITS,
    Balanced,
    ClientIndices,
    Dirichlet,
    Partition,
    Quantity,
    Shards,
    Uniform,
    allocate,
    label_checksum,
    quotas,
    shares,
)
from certifl.errors import InputError
from certifl.experiments.plan import data_size
from certifl.experiments.run import Options, run
from certifl.report import load_run
from certifl.spec import Spec, with_settings
from certifl.study.setup import open_data
from image_sets import cannot_load, png

CLASSES = 10
TRAIN = np.random.default_rng(0).integers(0, CLASSES, 3000)
TEST = np.random.default_rng(1).integers(0, CLASSES, 600)


def sizes(partition, which):
    return np.array([getattr(client, which).size for client in partition.clients])


def counts(partition, which, labels):
    """Images of each class at each client, (clients, classes)."""
    parts = [getattr(client, which) for client in partition.clients]
    return np.stack([np.bincount(labels[part], minlength=CLASSES) for part in parts])


def same(first, second):
    return json.dumps(first.to_manifest()) == json.dumps(second.to_manifest())


@pytest.mark.parametrize("name", [name for name in SPLITS if name != "column"])
class TestEveryPartition:
    @pytest.mark.parametrize("clients", [1, 2, 7, 20])
    def test_gives_every_image_to_exactly_one_client(self, name, clients):
        made = SPLITS[name]().split(TRAIN, TEST, clients, seed=5)
        assert len(made.clients) == clients
        for which, labels in (("train", TRAIN), ("test", TEST)):
            held = np.concatenate([getattr(client, which) for client in made.clients])
            assert np.array_equal(np.sort(held), np.arange(labels.size))
            assert sizes(made, which).min() >= 1
        check(made, TRAIN, TEST)

    def test_depends_on_the_seed_and_on_nothing_hidden(self, name):
        splitter = SPLITS[name]()
        first = splitter.split(TRAIN, TEST, 6, seed=1)
        np.random.seed(0)  # noqa: NPY002  # the global state must not matter
        torch.manual_seed(0)
        again = splitter.split(torch.from_numpy(TRAIN), TEST.tolist(), 6, seed=1)
        assert same(first, again)
        other = splitter.split(TRAIN, TEST, 6, seed=2)
        for which in ("train", "test"):
            assert not all(
                np.array_equal(getattr(a, which), getattr(b, which))
                for a, b in zip(first.clients, other.clients, strict=True)
            )

    def test_leaves_the_global_generators_alone(self, name):
        before = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
        SPLITS[name]().split(TRAIN, TEST, 6, seed=1)
        assert np.array_equal(before[0], np.random.get_state()[1])  # noqa: NPY002
        assert torch.equal(before[1], torch.get_rng_state())

    def test_test_images_follow_the_training_images(self, name):
        made = SPLITS[name]().split(TRAIN, TEST, 6, seed=3)
        of_train, of_test = counts(made, "train", TRAIN), counts(made, "test", TEST)
        expected = of_train / np.bincount(TRAIN) * np.bincount(TEST)
        # uniform draws labels freely: a hypergeometric count of mean 10 and standard deviation
        # below 3, in either split; the others round shares to the nearest image
        tolerance = 16 if name == "uniform" else 2
        assert np.abs(of_test - expected).max() < tolerance

    def test_manifest_round_trip(self, name):
        made = SPLITS[name]().split(TRAIN, TEST, 6, seed=1)
        text = json.dumps(made.to_manifest())
        back = Partition.from_manifest(json.loads(text))
        assert json.dumps(back.to_manifest()) == text
        assert (back.split, back.seed) == (name, 1)
        assert all(client.train.dtype == np.int64 for client in back.clients)
        check(back, TRAIN, TEST)
        remade = SPLITS[back.split](**back.options).split(TRAIN, TEST, 6, back.seed)
        assert same(remade, back)

    def test_too_many_clients_is_a_clear_error(self, name):
        with pytest.raises(InputError, match="fewer clients"):
            SPLITS[name]().split(TRAIN, TEST[:5], 6, seed=1)

    @pytest.mark.parametrize("clients", [0, -1, 2.0, True])
    def test_the_number_of_clients_is_checked(self, name, clients):
        with pytest.raises(InputError, match="number of clients"):
            SPLITS[name]().split(TRAIN, TEST, clients, seed=1)

    def test_labels_are_checked(self, name):
        for wrong in (TRAIN - 1, TRAIN / 2, TRAIN[:, None]):
            with pytest.raises(InputError, match="Labels must be integers"):
                SPLITS[name]().split(wrong, TEST, 3, seed=1)

    def test_is_a_frozen_printable_record(self, name):
        splitter = SPLITS[name]()
        assert splitter.name == name
        assert splitter == SPLITS[name]()
        assert hash(splitter) == hash(SPLITS[name]())
        assert type(splitter).__name__ in repr(splitter)
        for field in fields(splitter):
            with pytest.raises(FrozenInstanceError):
                setattr(splitter, field.name, 1)


class TestWhatEachPromises:
    @given(images=st.tuples(st.integers(20, 300), st.integers(20, 90)), clients=st.integers(1, 20))
    @settings(max_examples=20)
    def test_uniform_sizes_differ_by_at_most_one(self, images, clients):
        made = Uniform().split(TRAIN[: images[0]], TEST[: images[1]], clients, seed=0)
        assert np.ptp(sizes(made, "train")) <= 1
        assert np.ptp(sizes(made, "test")) <= 1

    @given(images=st.tuples(st.integers(20, 300), st.integers(20, 90)), clients=st.integers(1, 20))
    @settings(max_examples=20)
    def test_balanced_differs_by_at_most_one_in_every_class_and_in_all(self, images, clients):
        train, test = TRAIN[: images[0]], TEST[: images[1]]
        made = Balanced().split(train, test, clients, seed=0)
        for which, labels in (("train", train), ("test", test)):
            assert np.ptp(sizes(made, which)) <= 1
            assert np.ptp(counts(made, which, labels), axis=0).max() <= 1

    def test_dirichlet_goes_from_one_class_to_balance(self):
        def largest_share(alpha):
            made = Dirichlet(alpha, min_train=1, min_test=1).split(TRAIN, TEST, 5, seed=0)
            held = counts(made, "train", TRAIN)
            return (held.max(axis=0) / held.sum(axis=0)).mean()

        shares_found = [largest_share(alpha) for alpha in (0.05, 0.5, 5.0, 1e6)]
        assert shares_found == sorted(shares_found, reverse=True)
        assert shares_found[0] > 0.8
        assert shares_found[-1] == pytest.approx(0.2, abs=0.01)

    def test_dirichlet_has_the_moments_of_its_law(self):
        # p ~ Beta(a, (C-1) a), mean 1/C and variance (1/C)(1-1/C)/(C a + 1), for each class and
        # client; 150 seeds x 10 classes give 1500 independent draws of client 0's share.
        alpha, clients, draws = 1.0, 4, 150
        made = (Dirichlet(alpha, 1, 1).split(TRAIN, TEST, clients, s) for s in range(draws))
        found = np.concatenate([counts(one, "train", TRAIN)[0] for one in made])
        found = found / np.tile(np.bincount(TRAIN), draws)
        variance = (1 / clients) * (1 - 1 / clients) / (clients * alpha + 1)
        assert abs(found.mean() - 1 / clients) < 5 * np.sqrt(variance / found.size)
        assert found.var() == pytest.approx(variance, rel=0.2)  # 5 standard errors at kurtosis 3

    def test_dirichlet_keeps_its_minima(self):
        for seed in range(5):
            of_train = Dirichlet(0.3, min_train=150, min_test=1).split(TRAIN, TEST, 10, seed)
            of_test = Dirichlet(0.3, min_train=1, min_test=30).split(TRAIN, TEST, 10, seed)
            assert sizes(of_train, "train").min() >= 150
            assert sizes(of_test, "test").min() >= 30

    def test_dirichlet_gives_up_and_says_what_to_change(self):
        with pytest.raises(InputError, match=r"Raise alpha, take fewer clients, or lower") as got:
            Dirichlet(1e-3, min_train=50, retries=20).split(TRAIN, TEST, 30, seed=0)
        assert "20 draws" in str(got.value)

    @pytest.mark.parametrize("alpha", [1e-300, 1e-8, 1e9])
    def test_dirichlet_is_stable_at_its_ends(self, alpha):
        made = Dirichlet(alpha, min_train=1, min_test=1).split(TRAIN, TEST, 3, seed=0)
        check(made, TRAIN, TEST)

    @pytest.mark.parametrize("per_client", [1, 2, 4])
    def test_shards_bound_the_classes_of_a_client(self, per_client):
        made = Shards(per_client).split(TRAIN, TEST, 10, seed=0)
        of_train, of_test = counts(made, "train", TRAIN), counts(made, "test", TEST)
        # two whole classes are longer than a shard, so it meets at most three, in part
        assert TRAIN.size / (10 * per_client) < 2 * np.bincount(TRAIN).min()
        assert (of_train > 0).sum(axis=1).max() <= 3 * per_client
        assert not of_test[of_train == 0].any()
        assert np.ptp(sizes(made, "train")) <= per_client

    def test_more_shards_than_images(self):
        with pytest.raises(InputError, match="shards_per_client"):
            Shards(400).split(TRAIN, TEST, 10, seed=0)

    def test_quantity_follows_the_power_law_with_the_same_labels_everywhere(self):
        made = Quantity(1.0).split(TRAIN, TEST, 4, seed=0)
        weights = 1 / np.arange(1, 5)
        for which, labels in (("train", TRAIN), ("test", TEST)):
            expected = labels.size * weights / weights.sum()
            assert np.abs(np.sort(sizes(made, which))[::-1] - expected).max() < 2
            exact = np.outer(sizes(made, which) / labels.size, np.bincount(labels))
            assert np.abs(counts(made, which, labels) - exact).max() < 2

    def test_quantity_zero_is_equal_sizes(self):
        assert np.ptp(sizes(Quantity(0.0).split(TRAIN, TEST, 7, seed=0), "train")) <= 1

    def test_many_clients_still_have_test_images(self):
        # 600 test images, 60 of a class: rounding classes apart would leave most clients without
        for splitter in (Balanced(), Shards(2)):
            assert sizes(splitter.split(TRAIN, TEST, 200, seed=0), "test").min() >= 1

    @pytest.mark.parametrize(
        ("build", "said"),
        [
            (lambda: Dirichlet(0.0), "alpha = .* must"),
            (lambda: Dirichlet(float("nan")), "alpha = .* must"),
            (lambda: Dirichlet(retries=0), "retries = .* must"),
            (lambda: Dirichlet(min_train=0), "min_train = .* must"),
            (lambda: Shards(0), "shards_per_client = .* must"),
            (lambda: Quantity(-1.0), "exponent = .* must"),
            (lambda: Quantity(float("inf")), "exponent = .* must"),
        ],
    )
    def test_options_are_checked(self, build, said):
        with pytest.raises(InputError, match=said):
            build()


class TestAllocation:
    @given(
        totals=st.lists(st.integers(0, 60), min_size=1, max_size=8),
        clients=st.integers(1, 12),
        alpha=st.sampled_from([0.01, 0.3, 1.0, 100.0]),
        seed=st.integers(0, 1000),
    )
    @settings(max_examples=100)
    def test_quotas_are_shares_rounded_up_or_down_with_none_lost(
        self, totals, clients, alpha, seed
    ):
        draw = np.random.default_rng(seed)
        proportions = draw.dirichlet(np.full(clients, alpha), size=len(totals))
        found = quotas(np.array(totals), proportions, draw)
        assert found.sum(axis=1).tolist() == totals
        exact = np.array(totals)[:, None] * proportions
        assert (found >= np.floor(exact - 1e-6)).all()
        assert (found <= np.ceil(exact + 1e-6)).all()
        assert not found[proportions == 0].any()

    def test_rounding_errors_do_not_add_up_over_classes(self):
        share = np.array([0.7, 0.1, 0.1, 0.1])
        found = quotas(np.ones(30, dtype=int), np.tile(share, (30, 1)), np.random.default_rng(0))
        assert np.abs(found.sum(axis=0) - 30 * share).max() <= 1

    def test_whole_shares_are_given_exactly(self):
        found = quotas(np.array([60, 30]), np.full((2, 10), 0.1), np.random.default_rng(0))
        assert found.tolist() == [[6] * 10, [3] * 10]

    def test_clients_get_the_requested_numbers_of_images(self):
        table = np.array([[2, 1], [0, 3]])
        labels = np.array([0, 1, 0, 1, 0, 1])
        parts = allocate(labels, table, np.random.default_rng(0))
        found = [np.bincount(labels[part], minlength=2).tolist() for part in parts]
        assert found == table.T.tolist()

    def test_a_class_without_images_is_shared_equally(self):
        assert shares(np.array([[3, 1], [0, 0]])).tolist() == [[0.75, 0.25], [0.5, 0.5]]


class TestCheck:
    @pytest.fixture
    def made(self):
        return Uniform().split(TRAIN, TEST, 3, seed=0)

    def test_other_labels_are_found(self, made):
        changed = TRAIN.copy()
        changed[17] = (changed[17] + 1) % CLASSES
        with pytest.raises(InputError, match="other labels"):
            check(made, changed, TEST)
        with pytest.raises(InputError, match="other labels"):
            check(made, TEST, TRAIN)

    def test_a_changed_manifest_is_found(self, made):
        for which, total in (("train", TRAIN.size), ("test", TEST.size)):
            manifest = made.to_manifest()
            first = manifest["clients"][0][which]
            first.append(total)
            with pytest.raises(InputError, match=f"there are only {total}"):
                check(Partition.from_manifest(manifest), TRAIN, TEST)
            first[-1] = manifest["clients"][1][which][0]
            first.sort()
            with pytest.raises(InputError, match=f"a {which} image to two clients"):
                check(Partition.from_manifest(manifest), TRAIN, TEST)

    def test_broken_manifests_are_refused(self, made):
        manifest = made.to_manifest()
        del manifest["seed"]
        with pytest.raises(InputError, match="not complete"):
            Partition.from_manifest(manifest)
        for wrong in ([3, 3], [4, 2], [-1, 2]):
            with pytest.raises(InputError, match="ascending"):
                ClientIndices(np.array(wrong), np.array([0]))

    def test_checksum_knows_where_the_splits_meet(self):
        assert label_checksum([0, 1], [1]) != label_checksum([0], [1, 1])
        assert label_checksum([0, 1], [1]) == label_checksum(torch.tensor([0, 1]), np.array([1]))

    def test_indices_cannot_be_changed(self, made):
        with pytest.raises(ValueError, match="read-only"):
            made.clients[0].train[0] = 5


class TestChoose:
    def test_is_a_fixed_part_of_the_clients_own_images(self):
        own = np.arange(100, 400, 3)
        found = choose(own, 20, seed=0, client=4)
        assert found.dtype == np.int64
        assert found.size == 20
        assert np.isin(found, own).all()
        assert (np.diff(found) > 0).all()
        assert np.array_equal(found, choose(own[::-1], 20, seed=0, client=4))
        assert not np.array_equal(found, choose(own, 20, seed=1, client=4))
        assert not np.array_equal(found, choose(own, 20, seed=0, client=5))

    def test_more_contains_fewer(self):
        own = np.arange(50)
        assert np.isin(choose(own, 5, 0, 0), choose(own, 30, 0, 0)).all()

    @pytest.mark.parametrize("count", [None, 50, 51])
    def test_all(self, count):
        assert np.array_equal(choose(np.arange(50), count, 0, 0), np.arange(50))

    def test_none_at_all_is_refused(self):
        with pytest.raises(InputError, match="at least 1"):
            choose(np.arange(50), 0, 0, 0)

    def test_every_image_is_chosen_equally_often(self):
        times = np.zeros(20)
        for client in range(2000):
            times[choose(np.arange(20), 5, 0, client)] += 1
        # binomial(2000, 1/4): standard deviation 19.4; 5 of them, for 20 images
        assert np.abs(times - 500).max() < 97


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
        ("image", "holds binary; clients are named by integers or strings"),
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
