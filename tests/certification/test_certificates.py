"""The record: written, read, added up, and held against its own votes."""

from pathlib import Path

import numpy as np
import pytest
import torch

import certifl
from certifl.certification import verify
from certifl.errors import InputError
from known_models import HalfSpace


@pytest.fixture(scope="module")
def made() -> certifl.Certificates:
    g = torch.Generator().manual_seed(0)
    images = torch.rand((8, 1, 8, 8), generator=g)
    model = HalfSpace(torch.randn(64, generator=g), 0.0).eval()
    labels = torch.randint(0, 2, (8,), generator=g)
    return certifl.certify(model, images, certifl.PixelNoise(0.5), labels=labels, n=2000)


def test_parquet_gives_everything_back(made, tmp_path):
    made.save(tmp_path / "c.parquet")
    back = certifl.Certificates.load(tmp_path / "c.parquet")
    assert back.same_results(made)
    assert np.array_equal(back.seconds, made.seconds)
    assert back.conditions == made.conditions
    assert not list(tmp_path.glob("*.tmp"))


def test_tsv_has_the_published_layout_and_never_a_larger_radius(made, tmp_path):
    made.save(tmp_path / "c.tsv")
    lines = (tmp_path / "c.tsv").read_text().splitlines()
    assert lines[0] == "idx\tlabel\tpredict\tradius\tcorrect\ttime"
    back = certifl.Certificates.load(tmp_path / "c.tsv")
    assert (back.radius <= made.radius).all()
    assert (back.radius >= made.radius - 1e-5).all()
    assert np.array_equal(back.predicted, made.predicted)
    assert np.array_equal(back.correct, made.correct)


@pytest.mark.parametrize("name", ["c.csv", "c.pt"])
def test_other_endings_are_refused(made, tmp_path, name):
    with pytest.raises(InputError, match=r"\.parquet or \.tsv"):
        made.save(tmp_path / name)


def test_damaged_and_missing_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="no certificate file"):
        certifl.Certificates.load(tmp_path / "none.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and nothing")
    with pytest.raises(InputError, match="no certificates this version can read"):
        certifl.Certificates.load(tmp_path / "bad.parquet")
    (tmp_path / "bad.tsv").write_text("a\tb\n1\t2\n")
    with pytest.raises(InputError, match="header"):
        certifl.Certificates.load(tmp_path / "bad.tsv")


def test_certified_accuracy_counts_all_images(made):
    for radius in (0.0, 0.1, 0.3):
        by_hand = np.mean(
            [c and r >= radius for c, r in zip(made.correct, made.radius, strict=True)]
        )
        assert made.certified_accuracy([radius])[0] == pytest.approx(by_hand)
    assert made.average_certified_radius() == pytest.approx((made.radius * made.correct).mean())


def test_rows_are_selected_and_put_together(made):
    halves = [made.select(np.arange(len(made)) % 2 == k) for k in (0, 1)]
    together = certifl.Certificates.concatenate(halves)
    order = np.argsort(together.index)
    assert together.select(order).same_results(made)
    with pytest.raises(InputError, match="no certificates"):
        certifl.Certificates.concatenate([])


def test_certificates_without_votes_cannot_be_verified(tmp_path):
    path = tmp_path / "c.tsv"
    path.write_text("idx\tlabel\tpredict\tradius\tcorrect\ttime\n0\t3\t3\t0.378\t1\t15.4\n")
    with pytest.raises(InputError, match="carry no votes"):
        verify(certifl.Certificates.load(path))


# Logs of published code: what is not certified there is not certified here.

HEAD = "idx\tlabel\tpredict\tradius\tcorrect\ttime\n"
GOOD = "40\t4\t4\t0.077\tTrue\t0:02:13.963\n"


def log(folder: Path, rows: str, name: str = "log.tsv") -> Path:
    (folder / name).write_text(HEAD + rows)
    return folder / name


@pytest.mark.parametrize(
    "row",
    [
        "20\t7\t7\t-0.000483\tFalse\t15.2\n",
        "20\t7\t7\t-0.000483\tTrue\t15.2\n",
        "20\t7\t-1\t-1.0\tFalse\t15.2\n",
        "20\t7\t-1\t0.3\t0\t15.2\n",
        "20\t7\t7\t0.3\t0\t15.2\n",
        "20\t7\t7\t0.3\tfalse\t15.2\n",
        "20\t7\t2\t-0.1\t0\t15.2\n",
    ],
)
def test_a_row_that_is_not_certified_is_an_abstention(row, tmp_path):
    made = certifl.Certificates.load(log(tmp_path, row + GOOD))
    assert made.predicted.tolist() == [-1, 4]
    assert made.radius.tolist() == [0.0, 0.077]
    assert made.certified_accuracy([0.0]).tolist() == [0.5]
    assert made.average_certified_radius() == pytest.approx(0.0385)


def test_a_wrong_class_stays_a_certificate_of_that_class(tmp_path):
    made = certifl.Certificates.load(log(tmp_path, "20\t7\t2\t0.3\tFalse\t15.2\n"))
    assert (made.predicted.tolist(), made.radius.tolist()) == ([2], [0.3])
    assert not made.correct.any()


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("20\t7\t7\tnan\t1\t15.4\n", "line 3: the radius nan is not a finite number"),
        ("20\t7\t7\tinf\t1\t15.4\n", "line 3: the radius inf"),
        ("20\t7\t7\t-inf\t0\t15.4\n", "line 3: the radius -inf"),
        ("20\t7\t2\t0.3\t1\t15.4\n", "line 3: correct is 1, but class 2 is not the label 7"),
        ("20\t7\t7\t0.3\tmaybe\t15.4\n", "line 3: correct must be"),
        ("20\t7\t-2\t0.3\t0\t15.4\n", "line 3: .*must not be negative"),
        ("20\t7\t7\t0.3\t1\n", "line 3 is not as long as the header"),
        ("20\t7\t7\t0.3\t1\t15.4\t9\n", "line 3 is not as long as the header"),
        ("20\t7\t7\t0.3\t1\tlong\n", "line 3: the time 'long'"),
        ("20\t7\t7\t0.3\t1\t1e400\n", "line 3: the time '1e400'"),
        ("9" * 30 + "\t7\t7\t0.3\t1\t1\n", "line 3: .*below 2"),
        (HEAD, "line 3: .*idx"),
    ],
)
def test_a_damaged_row_is_refused_by_file_and_line(row, says, tmp_path):
    with pytest.raises(InputError, match=rf"log\.tsv holds no .*{says}"):
        certifl.Certificates.load(log(tmp_path, GOOD + row))


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("15.4", 15.4),
        ("0:01:02.5", 62.5),
        ("1 day, 0:00:15.2", 86_415.2),
        ("2 days, 3:04:05", 183_845.0),
    ],
)
def test_times(time, seconds, tmp_path):
    made = certifl.Certificates.load(log(tmp_path, f"0\t3\t3\t0.378\t1\t{time}\n"))
    assert made.seconds.tolist() == [pytest.approx(seconds)]


@pytest.mark.parametrize("name", ["sigma_0.25", "sigma_0.5.log", "noise"])
def test_published_names_need_no_ending(name, tmp_path):
    assert len(certifl.Certificates.load(log(tmp_path, GOOD, name))) == 1


def test_another_file_without_an_ending_is_refused(tmp_path):
    (tmp_path / "sigma_0.25").write_bytes(b"\xff\x00")
    with pytest.raises(InputError, match=r"\.parquet or \.tsv.*rename"):
        certifl.Certificates.load(tmp_path / "sigma_0.25")
