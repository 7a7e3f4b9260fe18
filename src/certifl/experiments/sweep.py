"""Sweeps: one study with several algorithms, settings and seeds.

```
<out>/runs/<spec hash>/       one run folder per distinct spec
<out>/report.html, table.*    what they come to, written by the command line
```
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from certifl.errors import SpecError
from certifl.experiments.parallel import Job, jobs_of
from certifl.experiments.plan import plan as plan_study
from certifl.experiments.run import Options, check
from certifl.federated.algorithms import ALGORITHMS
from certifl.registry import choices
from certifl.spec import Spec, merged, with_settings
from certifl.study.setup import label_of

MOST_PROCESSES = 16  # by default, one per core: each run needs memory of its own

_NAME, _TABLE = "algorithm.name", "algorithm"
_BRACKETS = {"[": "]", "{": "}", "(": ")"}
# Runs that differ in these have no common radius or no common image.
_ONE_VALUE = ("data.name", "data.label_column", "data.test_split")


@dataclass(frozen=True)
class Axis:
    """One key of the spec and its values.

    Attributes:
        key: such as "training.lr". values: as they were written.
        algorithm: the only algorithm that it applies to; None = all that have the key.
    """

    key: str
    values: tuple[str, ...]
    algorithm: str | None = None

    def __str__(self) -> str:
        prefix = "" if self.algorithm is None else f"{self.algorithm}:"
        return f"--grid {prefix}{self.key}"


@dataclass(frozen=True)
class Variant:
    """One row of the table: one algorithm with its settings, trained with every seed.

    Attributes:
        label: for people, unique in a sweep. specs: one for each seed.
    """

    label: str
    specs: tuple[Spec, ...]


@dataclass(frozen=True)
class Sweep:
    """A sweep.

    Attributes:
        name: of the study. out: the folder.
        variants: in the order in which they were asked for.
        jobs: distinct runs; a training comes before those that continue it.
    """

    name: str
    out: Path
    variants: tuple[Variant, ...]
    jobs: tuple[Job, ...]

    def folders(self, variant: Variant) -> list[Path]:
        """Run folders of a variant, finished or not."""
        return [self.out / "runs" / spec.hash() for spec in variant.specs]


def read_axis(text: str) -> Axis:
    """An axis as it is written: `KEY=VALUE,VALUE,...`, or `ALGORITHM:KEY=VALUE,...`.

    Raises:
        SpecError: it is none, or restricts itself to an unknown algorithm.
    """
    left, equals, right = text.partition("=")
    algorithm, colon, key = (part.strip() for part in left.rpartition(":"))
    values = tuple(value.strip() for value in _split(right))
    if not equals or not key or not all(values):
        raise SpecError(
            f"--grid takes KEY=VALUE,VALUE,..., for instance training.lr=0.05,0.1; got {text!r}."
        )
    if colon and algorithm not in ALGORITHMS.rows:
        raise SpecError(
            f"--grid {text}: what stands before the colon restricts the axis to one algorithm: "
            f"{choices(algorithm, ALGORITHMS)}"
        )
    if key in ("seed", "name"):
        advice = "Give seeds with --seeds." if key == "seed" else "Remove it."
        raise SpecError(f"--grid {text}: {key!r} is not an axis of a sweep. {advice}")
    return Axis(key, values, algorithm or None)


def _split(text: str) -> list[str]:
    """Values between commas; commas in brackets and quotes belong to a value."""
    parts, open_, quote = [""], list[str](), ""
    for character in text:
        if character == "," and not open_ and not quote:
            parts.append("")
            continue
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character in _BRACKETS:
            open_.append(_BRACKETS[character])
        elif open_ and character == open_[-1]:
            open_.pop()
        parts[-1] += character
    return parts


def read_seeds(text: str | None) -> tuple[int, ...] | None:
    """Seeds as they are written: `0,1,2`; None where none are given.

    Raises:
        SpecError: one is not a whole number from 0.
    """
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise SpecError(f"--seeds takes whole numbers from 0, such as 0,1,2; got {text!r}.")
    return tuple(dict.fromkeys(map(int, parts)))


def make_sweep(
    values: Mapping[str, Any],
    settings: Sequence[str],
    axes: Sequence[Axis],
    seeds: Sequence[int] | None,
    out: Path,
) -> Sweep:
    """The runs of a sweep, every spec of which is checked.

    Args:
        values: of the spec file. settings: `key=value`, applied before the axes.
        axes: keys that the algorithm of a run lacks are left out of its spec.
        seeds: None = that of the spec. out: the folder.

    Raises:
        SpecError: a wrong key or value, an axis that no run has, or runs that cannot be compared.
    """
    base = merged(values, settings)
    _check_axes(base, axes)
    chosen = list(_chosen(base, axes))
    seeds = seeds or (base.get("seed", 0),)
    name = str(base.get("name", "sweep"))
    specs: dict[str, tuple[tuple[Spec, ...], Mapping[str, str]]] = {}
    for variant, shown in chosen:
        words = ", ".join([name, *_words(shown, [key for key in shown if key != _NAME])])
        own = tuple(with_settings({**variant, "name": words, "seed": seed}) for seed in seeds)
        specs.setdefault(own[0].hash(), (own, shown))
    rows = list(specs.values())
    _check_comparable([own[0] for own, _ in rows])
    variants = tuple(
        Variant(label, own) for label, (own, _) in zip(_labels(rows), rows, strict=True)
    )
    in_order = [own[at] for at in range(len(seeds)) for own, _ in rows]  # a whole seed first
    return Sweep(name, out, variants, jobs_of(in_order, out, _title))


def _title(spec: Spec) -> str:
    return f"{spec.name}: {label_of(spec)}, seed {spec.seed}"


def _words(shown: Mapping[str, str], keys: Sequence[str]) -> list[str]:
    """Settings in words, by the last part of their keys where that is enough."""
    last = [key.rpartition(".")[2] for key in keys]
    return [
        f"{short if last.count(short) == 1 else key} = {shown[key]}"
        for key, short in zip(keys, last, strict=True)
    ]


def default_folder(spec: Path, values: Mapping[str, Any], settings: Sequence[str]) -> Path:
    """Where the sweeps of a study go: the same folder for every grid, so that runs are shared."""
    text = json.dumps(merged(values, settings), sort_keys=True, default=str)
    return Path("runs") / f"{spec.stem}-sweep-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _names(base: Mapping[str, Any], axes: Sequence[Axis]) -> list[str]:
    tables = [axis for axis in axes if axis.key == _TABLE]
    if tables:
        found = [merged({}, [f"{_TABLE}={value}"])[_TABLE] for value in tables[0].values]
        return [str(one.get("name")) if isinstance(one, dict) else str(one) for one in found]
    named = [axis for axis in axes if axis.key == _NAME]
    if named:
        return list(named[0].values)
    own = base.get(_TABLE, {})
    return [str(own.get("name", "fedavg")) if isinstance(own, dict) else str(own)]


def _check_axes(base: Mapping[str, Any], axes: Sequence[Axis]) -> None:
    """Refuse axes that are named twice, or that no run has."""
    keys = [(axis.key, axis.algorithm) for axis in axes]
    for axis in axes:
        if keys.count((axis.key, axis.algorithm)) > 1:
            raise SpecError(f"{axis} is given twice: name all values in one, between commas.")
        if axis.key in (_NAME, _TABLE) and axis.algorithm is not None:
            raise SpecError(f"{axis} cannot be restricted to one algorithm: it chooses them.")
    names = _names(base, axes)
    for axis in axes:
        if axis.algorithm is not None and axis.algorithm not in names:
            raise SpecError(
                f"{axis}: no run has that algorithm. The sweep has {', '.join(names)}; add it "
                f"with --grid {_NAME}=..."
            )
        key = axis.key.removeprefix(f"{_TABLE}.")
        if axis.algorithm is None and key not in (axis.key, "name"):
            known, first = [n for n in names if n in ALGORITHMS.rows], key.partition(".")[0]
            rows = [ALGORITHMS.rows[name].parameters.model_fields for name in known]
            if known and not any(first in fields for fields in rows):
                raise SpecError(f"{axis}: no algorithm of the sweep has it ({', '.join(known)}).")


def _chosen(
    base: Mapping[str, Any], axes: Sequence[Axis]
) -> Iterator[tuple[dict[str, Any], dict[str, str]]]:
    """Values of every variant, and what the axes set in it."""
    first = [axis for axis in axes if axis.key in (_TABLE, _NAME)]
    others = [axis for axis in axes if axis not in first]
    names = {*_names(base, axes), *_names(base, ())}
    for start, shown in _product(base, first):
        name = start.setdefault(_TABLE, {"name": "fedavg"}).get("name", "fedavg")
        start = _with_base(_without_foreign(start, name, names), base)
        own = {axis.key for axis in others if axis.algorithm == name}  # replace common axes
        common = [a for a in others if a.algorithm is None and a.key not in own]
        fitting = [axis for axis in common if not _foreign(axis.key, name, names)]
        applying = [a for a in others if a.algorithm == name or a in fitting]
        for values, more in _product(start, applying):
            yield values, {**shown, **more}


def _product(
    base: Mapping[str, Any], axes: Sequence[Axis]
) -> Iterator[tuple[dict[str, Any], dict[str, str]]]:
    for values in itertools.product(*(axis.values for axis in axes)):
        shown = {axis.key: value for axis, value in zip(axes, values, strict=True)}
        yield merged(base, [f"{key}={value}" for key, value in shown.items()]), shown


def _foreign(key: str, name: str, names: set[str]) -> bool:
    """Whether an algorithm lacks a key that another one of the sweep has."""
    if key == "augmentation.personalized":
        return name != "personalized" and "personalized" in names
    if key == "clients.unseen":
        return not _can_give(name) and any(map(_can_give, names))
    section, _, parameter = key.partition(".")
    rows, parameter = ALGORITHMS.rows, parameter.partition(".")[0]
    if section != _TABLE or name not in rows or parameter in ("", "name"):
        return False
    having = {
        one for one in names if one in rows and parameter in rows[one].parameters.model_fields
    }
    return bool(having) and name not in having


def _without_foreign(values: dict[str, Any], name: str, names: set[str]) -> dict[str, Any]:
    """The values without keys of the spec file that belong to other algorithms of the sweep."""
    table = {k: v for k, v in values[_TABLE].items() if not _foreign(f"{_TABLE}.{k}", name, names)}
    result = {**values, _TABLE: table}
    for section in ("augmentation", "clients"):
        own = values.get(section)
        if isinstance(own, dict):
            left = {k: v for k, v in own.items() if not _foreign(f"{section}.{k}", name, names)}
            result[section] = left
    return result


def _can_give(name: str) -> bool:
    """Whether an algorithm has a model for clients that took no part in training."""
    return name in ALGORITHMS.rows and ALGORITHMS.rows[name].no_unseen is None


def _with_base(values: dict[str, Any], file: Mapping[str, Any]) -> dict[str, Any]:
    """`personalized` without a base starts from FedAvg, as the spec file has it."""
    table = values[_TABLE]
    if table.get("name") != "personalized" or "base" in table:
        return values
    own = file.get(_TABLE, {})
    base = own if own.get("name") == "fedavg" else {"name": "fedavg"}
    return {**values, _TABLE: {**table, "base": base}}


def _labels(rows: Sequence[tuple[tuple[Spec, ...], Mapping[str, str]]]) -> list[str]:
    """Labels as on every page, with the settings that tell equal ones apart."""
    labels = [label_of(specs[0]) for specs, _ in rows]
    short: list[str] = []
    for label, (_, shown) in zip(labels, rows, strict=True):
        alike = [other for own, (_, other) in zip(labels, rows, strict=True) if own == label]
        varied = [key for key in shown if len({other.get(key) for other in alike}) > 1]
        words = ", ".join(_words(shown, varied))
        short.append(f"{label} ({words})" if words else label)
    if len(set(short)) == len(short):
        return short
    return [f"{label}, {number}" for number, label in enumerate(short, start=1)]


def _check_comparable(specs: Sequence[Spec]) -> None:
    """Refuse runs that one table cannot hold: other images, or radii of another meaning."""
    first = _meaning(specs[0])
    for spec in specs[1:]:
        differing = [key for key, value in _meaning(spec).items() if value != first[key]]
        if differing:
            key = differing[0]
            raise SpecError(
                f"A sweep ends in one table, and its runs differ in {key} ({first[key]} and "
                f"{_meaning(spec)[key]}), so their radii or images cannot be compared. Start one "
                "sweep for each, with --set."
            )


def _meaning(spec: Spec) -> dict[str, Any]:
    values = spec.model_dump()
    keys = {key: values[key.partition(".")[0]][key.partition(".")[2]] for key in _ONE_VALUE}
    noise = spec.perturbation()
    own = values["certification"]["own"]
    return {
        **keys,
        "certification.perturbation": f"{noise.family}, {noise.norm}, {noise.unit}",
        "certification.own": json.dumps(own, sort_keys=True),
    }


def check_sweep(sweep: Sweep, options: Options) -> None:
    """Refuse, before anything is computed, runs that do not fit the data, network or device.

    Raises:
        RequestError: one does not.
    """
    seen: set[str] = set()
    for job in sweep.jobs:
        values = job.spec.model_dump(exclude={"name", "seed", "algorithm", "certification"})
        key = json.dumps(values, sort_keys=True)
        if key not in seen and not job.done():
            check(job.spec, options)
        seen.add(key)


@dataclass(frozen=True)
class Cost:
    """Remaining work of one variant, or of trainings that several continue.

    Attributes:
        label: of the variant. runs: number of them. done: number of finished ones.
        votes: expected of the others.
        seconds: of the others, one after the other; a training that several share counts in the
            first.
    """

    label: str
    runs: int
    done: int
    votes: int
    seconds: float


def costs(sweep: Sweep, data_dir: Path | None, device: str) -> list[Cost]:
    """Remaining work of every variant, from a few measured seconds of each.

    Raises:
        RequestError: a spec does not fit the data, or its data set is not available.
    """
    jobs = {job.spec.hash(): job for job in sweep.jobs}
    done = {name for name, job in jobs.items() if job.done()}
    trained = {jobs[name].spec.training_hash() for name in done}
    groups = [(variant.label, [s.hash() for s in variant.specs]) for variant in sweep.variants]
    shown = {name for _, names in groups for name in names}
    support = [name for name in jobs if name not in shown]
    if support:
        groups.insert(0, ("trainings that others continue", support))
    return [
        _cost(label, [jobs[name] for name in names], done, trained, (data_dir, device))
        for label, names in groups
    ]


def _cost(
    label: str,
    jobs: Sequence[Job],
    done: set[str],
    trained: set[str],
    where: tuple[Path | None, str],
) -> Cost:
    """The cost of some runs that differ in their seed; `trained` gets their trainings."""
    left = [job for job in jobs if job.spec.hash() not in done]
    if not left:
        return Cost(label, len(jobs), len(jobs), 0, 0.0)
    planned = plan_study(left[0].spec, *where)
    seconds = 0.0
    for job in left:
        seconds += planned.certification_seconds
        whole, start = job.spec.training_hash(), job.spec.training_hash(of_base=True)
        if whole not in trained or not job.trainings():
            continued = start != whole and start in trained and job.trainings()
            seconds += planned.tuning_seconds if continued else planned.training_seconds
        trained.update((whole, start))
    votes = len(left) * planned.votes_expected
    return Cost(label, len(jobs), len(jobs) - len(left), votes, seconds)
