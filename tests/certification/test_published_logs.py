"""Logs of certificates from published code: what is not certified there is not certified here."""

from __future__ import annotations

from pathlib import Path

import pytest

from certifl import Certificates
from certifl.errors import InputError

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
def test_a_row_that_is_not_certified_is_an_abstention(row: str, tmp_path: Path) -> None:
    made = Certificates.load(log(tmp_path, row + GOOD))
    assert made.predicted.tolist() == [-1, 4]
    assert made.radius.tolist() == [0.0, 0.077]
    assert made.certified_accuracy([0.0]).tolist() == [0.5]
    assert made.average_certified_radius() == pytest.approx(0.0385)


def test_a_wrong_class_stays_a_certificate_of_that_class(tmp_path: Path) -> None:
    made = Certificates.load(log(tmp_path, "20\t7\t2\t0.3\tFalse\t15.2\n"))
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
def test_a_damaged_row_is_refused_by_file_and_line(row: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"log\.tsv holds no .*{says}"):
        Certificates.load(log(tmp_path, GOOD + row))


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("15.4", 15.4),
        ("0:01:02.5", 62.5),
        ("1 day, 0:00:15.2", 86_415.2),
        ("2 days, 3:04:05", 183_845.0),
    ],
)
def test_times(time: str, seconds: float, tmp_path: Path) -> None:
    made = Certificates.load(log(tmp_path, f"0\t3\t3\t0.378\t1\t{time}\n"))
    assert made.seconds.tolist() == [pytest.approx(seconds)]


@pytest.mark.parametrize("name", ["sigma_0.25", "sigma_0.5.log", "noise"])
def test_published_names_need_no_ending(name: str, tmp_path: Path) -> None:
    assert len(Certificates.load(log(tmp_path, GOOD, name))) == 1


def test_another_file_without_an_ending_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sigma_0.25").write_bytes(b"\xff\x00")
    with pytest.raises(InputError, match=r"\.parquet or \.tsv.*rename"):
        Certificates.load(tmp_path / "sigma_0.25")
