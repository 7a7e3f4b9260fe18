"""Whatever is altered in a finished run is found by `verify`, or stands in a list of what is not.

Every case begins with an honest run, alters one thing consistently with all that nobody can
recompute, and expects exit status 1 with words.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import own_study
import tiny_study as tiny
from certifl.certification import Certificates, verify
from certifl.certification.scan import unpacked
from certifl.errors import InputError, WorkError
from certifl.experiments.run import Options, run
from certifl.experiments.verify import verify_run
from certifl.runs.folder import RunFolder
from certifl.spec import Spec

STUDIES: dict[str, Callable[[], Spec]] = {
    "sequential": lambda: tiny.spec("clients.count=3", "certification.n=800"),
    "runner-up": lambda: tiny.spec("certification.estimator=runner-up"),
    "top-class": lambda: tiny.spec("certification.estimator=top-class"),
    "scan": lambda: tiny.spec("certification.estimator=scan", "certification.n=3000"),
    "own": lambda: own_study.spec(),
}
"""`label_aware` is on in all of them, as by default."""

NOT_CHECKED = ("batch_size", "device", "threads", "batch_norm_folded", "tf32")
"""Conditions that follow from nothing; docs/certificates.md names them."""
OLDER = ("keep", "reach")
"""Conditions that records of 0.1.0 leave out."""
BEYOND_64_BITS = 10**30
"""No record holds such an integer, so a file that does cannot be read, wherever it is."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("honest")
    options = {name: Options(place / name, explore=False) for name in STUDIES}
    return {name: run(study(), options[name]).path for name, study in STUDIES.items()}


@pytest.fixture(scope="module")
def copies(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("copies")
    return {name: Path(shutil.copytree(path, place / name)) for name, path in runs.items()}


@pytest.fixture
def altered(runs: dict[str, Path], copies: dict[str, Path]) -> Iterator[Callable[[str], Path]]:
    """A copy to be altered; what stands in its folder itself is put back afterwards."""
    used: list[str] = []

    def copy(name: str) -> Path:
        used.append(name)
        return copies[name]

    yield copy
    for name in used:
        for file in runs[name].iterdir():
            if file.is_file():
                shutil.copy(file, copies[name] / file.name)


def found(place: Path, *words: str) -> None:
    """`verify` ends with 1, and says why in words."""
    answer = tiny.cli("verify", place)
    assert answer.code == 1, (answer.code, answer.out, answer.err)
    assert "Traceback" not in answer.err
    assert len(answer.err) > 20
    assert "follow from their votes" not in answer.out
    for word in words:
        assert word in answer.err, answer.err


def passes(place: Path) -> str:
    answer = tiny.cli("verify", place)
    assert answer.code == 0, answer.err
    return answer.out


@pytest.mark.parametrize("name", STUDIES)
def test_honest_runs_pass_and_say_what_was_not_checked(name, runs):
    out = passes(runs[name])
    assert "partition.json" in out
    assert "images and labels of digits" in out
    assert "the votes themselves" in out
    assert len(out.splitlines()) == 3
    passes(runs[name] / "certificates.parquet")


def _with(made: Certificates, **columns: Any) -> Certificates:
    return dataclasses.replace(made, **columns)


def _moved(made: Certificates, name: str, row: int, value: Any) -> Certificates:
    column = np.array(getattr(made, name))
    column[row] = value
    return _with(made, **{name: column})


def _best(made: Certificates) -> int:
    return int(made.radius.argmax())


def _taken(made: Certificates, *first: int) -> Certificates:
    return made.select(np.array([*first, *range(len(first), len(made))]))


def _dropped(made: Certificates) -> Certificates:
    return made.select(np.arange(len(made)) != 2)


def _wrong_dropped(made: Certificates) -> Certificates:
    """What a better certified accuracy needs: the wrong rows are gone."""
    rows = np.arange(len(made))
    kept = made.correct | (rows == 0)
    return made.select(rows > 0 if kept.all() else kept)


def _doubled(made: Certificates) -> Certificates:
    return made.select(np.array([*range(len(made)), 0]))


def _exchanged(made: Certificates) -> Certificates:
    client, order, last = made.client.copy(), np.arange(len(made)), len(made) - 1
    client[[0, last]], order[[0, last]] = client[[last, 0]], [last, 0]
    return _with(made, client=client).select(order)


def _all_exchanged(made: Certificates) -> Certificates:
    owners = np.unique(made.client)
    return _with(made, client=owners[::-1][np.searchsorted(owners, made.client)])


OF_RUN: dict[str, Callable[[Certificates], Certificates]] = {
    "a row dropped": _dropped,
    "wrong rows dropped": _wrong_dropped,
    "all but one row dropped": lambda made: made.select(np.array([0])),
    "a client dropped": lambda made: made.of_client(int(made.client[0])),
    "a row twice": _doubled,
    "a row again under another index": lambda made: _moved(
        _doubled(made), "index", len(made), int(made.index.max()) + 1
    ),
    "a row overwritten by a right one": lambda made: _with(_taken(made, 0, 0), index=made.index),
    "a row overwritten, index and all": lambda made: _taken(made, 0, 0),
    "an index beyond the data set": lambda made: _moved(_doubled(made), "index", len(made), 10**6),
    "a client beyond": lambda made: _moved(made, "client", 0, 99),
    "rows exchanged between clients": _exchanged,
    "clients exchanged": _all_exchanged,
    "indexes exchanged": lambda made: _with(made, index=_taken(made, 1, 0).index),
    "rows reordered": lambda made: _taken(made, 1, 0),
    "rows interleaved": lambda made: made.select(np.argsort(made.index, kind="stable")),
    "clients in another order": lambda made: made.select(np.argsort(-made.client, kind="stable")),
    "labels rolled": lambda made: _with(made, label=np.roll(made.label, 1)),
    "labels shifted": lambda made: _with(made, label=(made.label + 1) % made.counts.shape[1]),
    "labels as predicted": lambda made: _with(
        made, label=np.where(made.correct, made.label, made.selection_counts.argmax(axis=1))
    ),
    "no labels": lambda made: _with(made, label=np.full_like(made.label, -1)),
    "other seconds": lambda made: _with(made, seconds=made.seconds + 10.0),
}
"""What only the run shows: its images, their order, owners and labels, and its sums."""

OF_VOTES: dict[str, Callable[[Certificates], Certificates]] = {
    "a negative index": lambda made: _moved(made, "index", 0, -1),
    "a negative client": lambda made: _moved(made, "client", 0, -1),
    "a label beyond": lambda made: _moved(made, "label", 0, 10**6),
    "all radii doubled": lambda made: _with(made, radius=2 * made.radius),
    "all radii halved": lambda made: _with(made, radius=made.radius / 2),
    "a radius one bit larger": lambda made: _moved(
        made, "radius", _best(made), np.nextafter(made.radius.max(), 9)
    ),
    "a negative radius": lambda made: _moved(made, "radius", _best(made), -0.1),
    "a radius that is not a number": lambda made: _moved(made, "radius", 0, np.nan),
    "an infinite radius": lambda made: _moved(made, "radius", 0, np.inf),
    "p_lower raised": lambda made: _with(made, p_lower=np.where(made.p_lower > 0, 0.999, 0.5)),
    "p_lower lowered": lambda made: _with(made, p_lower=np.full_like(made.p_lower, 1e-4)),
    "p_upper lowered": lambda made: _with(made, p_upper=np.zeros_like(made.p_upper)),
    "p_upper beyond 1": lambda made: _moved(made, "p_upper", 0, 1.5),
    "another level": lambda made: _with(made, level=made.level * 2),
    "another number of looks": lambda made: _with(made, looks=made.looks + 1),
    "no looks": lambda made: _with(made, looks=np.zeros_like(made.looks)),
    "an abstention": lambda made: _moved(
        _moved(made, "predicted", _best(made), -1), "radius", _best(made), 0.0
    ),
    "another class": lambda made: _with(made, predicted=(made.predicted + 1) % 10),
    "a class beyond": lambda made: _moved(made, "predicted", 0, 10**6),
    "a vote moved": lambda made: _with(made, counts=_vote_moved(made.counts, _best(made))),
    "a selection vote moved": lambda made: _with(
        made, selection_counts=np.roll(made.selection_counts, 1, axis=1)
    ),
    "negative votes that add up": lambda made: _with(made, counts=_negative(made.counts)),
    "votes whose sum overflows": lambda made: _with(made, counts=_overflowing(made.counts)),
    "seconds that are none": lambda made: _moved(made, "seconds", 0, np.nan),
}
"""What the file alone shows."""


def _vote_moved(counts: np.ndarray, row: int) -> np.ndarray:
    moved, top = counts.copy(), int(counts[row].argmax())
    moved[row, [top, (top + 1) % counts.shape[1]]] += [-1, 1]
    return moved


def _negative(counts: np.ndarray) -> np.ndarray:
    moved, top = counts.copy(), counts.argmax(axis=1)
    rows = np.arange(len(counts))
    moved[rows, top] += 50
    moved[rows, (top + 1) % counts.shape[1]] -= 50
    return moved


def _overflowing(counts: np.ndarray) -> np.ndarray:
    moved = counts.copy()
    moved[0] = 0
    moved[0, :3] = 2**63 - 1, 2**63 - 1, counts[0].sum() + 2
    assert moved[0].sum() == counts[0].sum()
    return moved


def test_an_image_that_counts_twice_is_found_in_a_file_alone(altered):
    file = altered("sequential") / "certificates.parquet"
    made = Certificates.load(file)
    made.select([*range(len(made)), _best(made)]).save(file)
    found(file, "an image is certified twice")


@pytest.mark.parametrize("name", STUDIES)
def test_rows_that_do_not_follow_from_their_votes_are_found(name, runs, altered):
    made = Certificates.load(runs[name] / "certificates.parquet")
    assert verify(made) == []
    for change, of in OF_VOTES.items():
        assert verify(of(made)), change
    place = altered(name)
    OF_VOTES["a vote moved"](made).save(place / "certificates.parquet")
    found(place)


@pytest.mark.parametrize("change", OF_RUN)
@pytest.mark.parametrize("name", ["sequential", "own"])
def test_rows_that_are_not_the_runs_are_found(name, change, altered):
    place = altered(name)
    file = place / "certificates.parquet"
    OF_RUN[change](Certificates.load(file)).save(file)
    assert not _agrees(place)


@pytest.mark.parametrize("column", ["correct", "votes"])
def test_columns_for_other_readers_are_compared(column, altered):
    place = altered("sequential")
    file = place / "certificates.parquet"
    table = pq.ParquetFile(file).read()
    values = [not v if column == "correct" else v + 1 for v in table[column].to_pylist()]
    at = table.column_names.index(column)
    pq.write_table(table.set_column(at, column, [values]), file)
    found(place, f"the column {column}")
    found(file, f"the column {column}")


def test_a_negative_radius_is_a_finding_of_its_image(altered):
    place = altered("sequential")
    file = place / "certificates.parquet"
    made = Certificates.load(file)
    row = _best(made)
    _moved(made, "radius", row, -0.1).save(file)
    found(place, f"client {made.client[row]}, image {made.index[row]}: its radius -0.1 is smaller")


def _others(value: Any) -> list[Any]:
    strange: list[Any] = [None, "x", BEYOND_64_BITS, {"x": [1]}]
    if isinstance(value, bool):
        strange.append(not value)
    elif isinstance(value, (int, float)):
        strange += [value * 2, -value, str(value)]
    elif isinstance(value, str):
        strange += [value + "x", ""]
    elif isinstance(value, list):
        strange += [value[:-1], [*value, 1], value[::-1]]
    elif isinstance(value, Mapping):
        strange += [{k: o for k, o in value.items() if k != name} for name in value]
        strange += [{**value, k: _twice(v)} for k, v in value.items()]
    return [other for other in strange if json.dumps(other) != json.dumps(value)]


def _twice(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value * 2 + 1
    return "another" if isinstance(value, str) else [value]


def _agrees(place: Path) -> bool:
    """As `found` and `passes`, without the command line: there are hundreds of these."""
    try:
        return not verify_run(place).problems
    except WorkError:
        return False


def _contradicts(made: Certificates, place: Path) -> bool:
    """Whether the file alone shows it, or else the run."""
    try:
        if verify(made):
            return True
    except InputError:
        return True
    made.save(place / "certificates.parquet")
    return not _agrees(place)


@pytest.mark.parametrize("name", ["sequential", "scan", "own"])
def test_altered_conditions_are_found(name, altered):
    place = altered(name)
    made = Certificates.load(place / "certificates.parquet")
    for key, value in made.conditions.items():
        if name == "own" and key != "perturbations":
            continue
        for other in _others(value):
            if key == "perturbations" and other == value[::-1]:
                continue  # which of them stands first says nothing
            changed = _with(made, conditions={**made.conditions, key: other})
            honest = key in NOT_CHECKED and other != BEYOND_64_BITS
            assert _contradicts(changed, place) is not honest, (key, other)
        left = {k: v for k, v in made.conditions.items() if k != key}
        honest = key in (*NOT_CHECKED, *OLDER)
        assert _contradicts(_with(made, conditions=left), place) is not honest, key


@pytest.mark.parametrize("own", [[], [{}], [5], [{"clients": "x"}], [{"clients": [0, 1, 1]}]])
def test_garbled_perturbations_of_clients_are_found(own, altered):
    place = altered("own")
    file = place / "certificates.parquet"
    made = Certificates.load(file)
    for groups in (own, [{**g, "clients": [0, 1]} for g in made.conditions["perturbations"]]):
        _with(made, conditions={**made.conditions, "perturbations": groups}).save(file)
        found(place)


@pytest.mark.parametrize(
    "changes",
    [
        {"unit": "degrees"},
        {"norm": "l2"},
        {"threat": "everything"},
        {"family": "scaling"},
        {"law": "gaussian"},
        {"sigma": 0.4},
        {"label_aware": False},
        {"bounds": "top-class"},
        {"alpha": 0.01},
        {"description": {"family": "rotation", "sigma": 0.1 * np.pi, "padding": "border"}},
        {"description": None},
        {"description": None, "law": "gaussian", "norm": "l2"},
    ],
)
def test_a_file_alone_contradicts_itself(changes, runs, tmp_path):
    """Without the run, what the conditions say of each other and of the votes is compared."""
    made = Certificates.load(runs["sequential"] / "certificates.parquet")
    file = tmp_path / "c.parquet"
    _with(made, conditions={**made.conditions, **changes}).save(file)
    if changes.get("description"):
        passes(file)  # another padding is another question, answered by other votes
    else:
        found(file)


def _longer(made: Certificates, factor: float = 2.0) -> Certificates:
    """The scan looked twice as far: every interval and radius is twice as long."""
    metadata = dict(made.conditions)
    scan = {**metadata["scan"], "low": factor * metadata["scan"]["low"]}
    scan["high"] = factor * metadata["scan"]["high"]
    longer = {"radius": factor * made.radius, "interval": factor * made.interval}
    return _with(made, **longer, conditions={**metadata, "scan": scan})


@pytest.mark.parametrize("reach", ["as recorded", "doubled", "left out"])
@pytest.mark.parametrize("where", ["run", "file"])
def test_a_longer_scan_is_found(reach, where, altered):
    place = altered("scan")
    file = place / "certificates.parquet"
    longer = _longer(Certificates.load(file))
    metadata = dict(longer.conditions)
    assert metadata["reach"] is None
    if reach == "doubled":
        metadata["reach"] = 2 * np.pi
    elif reach == "left out":
        del metadata["reach"]
    _with(longer, conditions=metadata).save(file)
    found(place if where == "run" else file, "scan")


def test_a_scan_recorded_without_its_reach_is_still_verified(altered):
    place = altered("scan")
    file = place / "certificates.parquet"
    made = Certificates.load(file)
    _with(made, conditions={k: v for k, v in made.conditions.items() if k != "reach"}).save(file)
    assert "12 certificates follow" in passes(place)
    assert "how far the scan was asked to look" in passes(file)


def test_votes_of_a_scan_in_another_order_are_found(altered):
    place = altered("scan")
    file = place / "certificates.parquet"
    made = Certificates.load(file)
    for packed in (None, b"", made.scan_votes[0][:-4], made.scan_votes[0] + b"x" * 0):
        votes = made.scan_votes.copy()
        votes[_best(made)] = packed
        _with(made, scan_votes=votes).save(file)
        if _best(made) or packed != made.scan_votes[0]:
            found(place)
    assert len(unpacked(made.scan_votes[0], 10)) == made.votes[0]


def _json(place: Path, name: str) -> Any:
    return json.loads((place / name).read_text())


def _write(place: Path, name: str, value: Any) -> None:
    (place / name).write_text(json.dumps(value))


FREE = {
    *("code", "command", "created", "finished", "machine", "training_seconds", "data_dir"),
    *("privacy", "explorer"),
}
"""Keys of run.json that follow from nothing, and those this study does not have."""
INVENTED = {
    "unseen": [0],
    "plain": {"1": {"images": 10, "correct": 10}},
    "privacy": {"epsilon": [0.1, 0.1, 0.1]},
    "client_names": ["a", "b", "c"],
}
"""Entries that change what a report or a claim says of the rows."""


@pytest.mark.parametrize("name", ["sequential", "own"])
def test_an_altered_manifest_is_found(name, altered):
    place = altered(name)
    honest = _json(place, "run.json")
    for key, value in honest.items():
        if key in FREE or key == "status":
            continue
        for other in _others(value):
            _write(place, "run.json", {**honest, key: other})
            libraries = key == "versions" and _only_libraries(value, other)
            assert _agrees(place) is libraries, (key, other)
    for key, invented in INVENTED.items():
        if key not in honest:
            _write(place, "run.json", {**honest, key: invented})
            assert not _agrees(place), key
    _write(place, "run.json", {**honest, "status": "running"})
    assert tiny.cli("verify", place).code == 2


def _only_libraries(value: Mapping[str, Any], other: Any) -> bool:
    """numpy and scipy decide no certificate, and are recorded in one place alone."""
    named = ("certifl", "torch", "python")
    return isinstance(other, Mapping) and all(other.get(n) == value[n] for n in named)


def _first_to_second(split: Any) -> Any:
    first, second = split["clients"][:2]
    first["test"], moved = first["test"][1:], first["test"][0]
    second["test"] = sorted([*second["test"], moved])
    return split


def _exchange(split: Any) -> Any:
    split["clients"][0], split["clients"][1] = split["clients"][1], split["clients"][0]
    return split


def _drop_last(split: Any) -> Any:
    split["clients"][0]["train"].pop()
    return split


PARTITIONS: dict[str, Callable[[Any], Any]] = {
    "an image moved": _first_to_second,
    "clients exchanged": _exchange,
    "a training image dropped": _drop_last,
    "a client dropped": lambda split: {**split, "clients": split["clients"][:-1]},
    "another seed": lambda split: {**split, "seed": 7},
    "another split": lambda split: {**split, "split": "dirichlet"},
    "other options": lambda split: {**split, "options": {"alpha": 0.1}},
    "another checksum": lambda split: {**split, "label_checksum": "0" * 64},
    "names": lambda split: {**split, "names": ["a", "b", "c"]},
    "negative": lambda split: {**split, "clients": [{"train": [-1], "test": [0]}] * 3},
    "texts": lambda split: {**split, "clients": [{"train": ["a"], "test": ["b"]}] * 3},
    "nested": lambda split: {**split, "clients": [{"train": [[0]], "test": [[1]]}] * 3},
    "numbers of 400 digits": lambda split: {
        **split,
        "clients": [{"train": [10**400], "test": [1]}] * 3,
    },
    "no clients": lambda split: {**split, "clients": None},
    "a number": lambda split: 5,
    "a list": lambda split: [split],
}


@pytest.mark.parametrize("change", PARTITIONS)
def test_an_altered_partition_is_found(change, altered):
    place = altered("sequential")
    _write(place, "partition.json", PARTITIONS[change](_json(place, "partition.json")))
    found(place, "partition")


def test_a_partition_that_is_missing_or_cut_is_found(altered):
    place = altered("sequential")
    content = (place / "partition.json").read_text()
    (place / "partition.json").write_text(content[: len(content) // 2])
    found(place, "partition.json")
    (place / "partition.json").unlink()
    found(place, "partition.json")


def _other_loss(line: str) -> str:
    entry = json.loads(line)
    entry["clients"]["0"] = dict.fromkeys(entry["clients"]["0"], 0.0)
    return json.dumps(entry)


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: lines[:-1],
        lambda lines: lines[::-1],
        lambda lines: [_other_loss(lines[0]), *lines[1:]],
        lambda lines: ["{", *lines[1:]],
        lambda lines: ["[" * 100_000, *lines[1:]],
        lambda lines: [],
    ],
)
def test_an_altered_history_is_found(change, altered):
    place = altered("sequential")
    lines = change((place / "history.jsonl").read_text().splitlines())
    (place / "history.jsonl").write_text("".join(f"{line}\n" for line in lines))
    found(place, "history.jsonl")


@pytest.mark.parametrize(
    "change",
    [
        lambda made: dataclasses.replace(made, label=np.roll(made.label, 1)),
        lambda made: dataclasses.replace(made, label=made.predicted),
        lambda made: dataclasses.replace(made, index=made.index + 1),
        lambda made: dataclasses.replace(made, client=made.client - 1),
        lambda made: dataclasses.replace(
            made, conditions={**made.conditions, "data_fingerprint": "0"}
        ),
        lambda made: dataclasses.replace(made, conditions={**made.conditions, "precision": "x"}),
        lambda made: dataclasses.replace(made, conditions={}),
    ],
)
def test_altered_plain_predictions_are_found(change, altered):
    place = altered("own")
    folder = RunFolder(place)
    change(folder.load_predictions()).save(folder.predictions)
    found(place)


def test_without_the_images_labels_are_not_checked(altered, tmp_path, monkeypatch):
    from certifl.errors import DataUnavailable
    from certifl.study import opened_run

    def nowhere(*_: Any, **__: Any) -> None:
        raise DataUnavailable("digits is not on this machine. Three ways to get images.")

    monkeypatch.setattr(opened_run, "load_data", nowhere)
    place = altered("runner-up")
    assert "labels not checked: digits is not on this machine" in passes(place)
    file = place / "certificates.parquet"
    made = Certificates.load(file)
    _dropped(made).save(file)
    found(place, "missing")
    _taken(made, 1, 0).save(file)
    found(place, "another order")


def test_data_inside_the_run_folder_are_not_believed(altered):
    """A run folder may be somebody else's, with labels that suit its certificates."""
    from certifl.study.opened_run import OpenRun

    place = altered("sequential")
    (place / "data").mkdir(exist_ok=True)
    _write(place, "run.json", {**_json(place, "run.json"), "data_dir": str(place / "data")})
    assert OpenRun(place)._data_folder() is None


def test_privacy_that_was_not_spent_so_is_found(tmp_path):
    pytest.importorskip("opacus")
    private = ("privacy.kind=example", "privacy.noise_multiplier=1.0", "training.rounds=1")
    study = tiny.spec("certification.n=100", "certification.images=3", *private)
    folder = run(study, Options(tmp_path / "run", explore=False))
    passes(folder.path)
    honest = _json(folder.path, "run.json")
    privacy = honest["privacy"]
    for key, value in privacy.items():
        other = [0.5 * v for v in value] if isinstance(value, list) else _twice(value)
        _write(folder.path, "run.json", {**honest, "privacy": {**privacy, key: other}})
        assert _agrees(folder.path) is (key == "accountant"), key
    _write(folder.path, "run.json", {k: v for k, v in honest.items() if k != "privacy"})
    found(folder.path, "privacy")
