"""Studies in Python: `Study` computes what `certifl run` computes, `load` reads a run folder."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from certifl.errors import InputError, SpecError
from certifl.experiments.run import Options, compute
from certifl.models import allow_code
from certifl.path_checks import check_data_folder, check_run, read_spec_file
from certifl.perturbations import describe
from certifl.progress import StageCallback, stages
from certifl.report import RunResults, load_run, load_runs, write_report
from certifl.runs.folder import RunFolder
from certifl.spec import Spec, with_settings

Section = Mapping[str, Any]

# Sections that are replaced as a whole: their other keys belong to the name in them.
_NAMED = ("algorithm", "objective")


class Study:
    """One study: data, clients, an algorithm and what is certified.

    It is the spec of `certifl run`, and its keys are those of docs/reference/spec.md:

        study = certifl.Study(
            data={"name": "digits", "train_images": 400},
            clients={"count": 4},
            algorithm="fedavg",
            training={"rounds": 5},
            augmentation={"federated": certifl.Rotation("18deg")},
            certification={"perturbation": certifl.Rotation("18deg"), "images": 20},
        )
        result = study.run("runs/digits")

    Perturbations are given as objects or as in a spec. `data`, `model`, `algorithm` and
    `objective` are sections, or names alone.
    """

    def __init__(
        self,
        spec: str | PathLike[str] | Section | Spec | None = None,
        *,
        name: str | None = None,
        seed: int | None = None,
        data: str | Section | None = None,
        clients: Section | None = None,
        model: str | Section | None = None,
        algorithm: str | Section | None = None,
        objective: str | Section | None = None,
        training: Section | None = None,
        aggregation: Section | None = None,
        privacy: Section | None = None,
        augmentation: Section | None = None,
        certification: Section | None = None,
    ) -> None:
        """Check a study; nothing is computed or written.

        Args:
            spec: a TOML file, the values of one, or nothing.
            name, seed: as in a spec.
            data, clients, model, algorithm, objective, training, aggregation, privacy,
                augmentation, certification: sections of the spec. Beside `spec` their keys
                replace those of the same name, as `--set` does; an algorithm or objective is
                replaced as a whole.

        Raises:
            SpecError: a key, type, range or combination is wrong; the message names the key.
        """
        given = {
            "name": name,
            "seed": seed,
            "data": data,
            "clients": clients,
            "model": model,
            "algorithm": algorithm,
            "objective": objective,
            "training": training,
            "aggregation": aggregation,
            "privacy": privacy,
            "augmentation": augmentation,
            "certification": certification,
        }
        values, self._folder = _values_of(spec)
        for key, value in given.items():
            if value is not None:
                values[key] = _merged(key, values.get(key), _plain(value))
        self.spec = with_settings(values)

    def __repr__(self) -> str:
        algorithm, data = self.spec.algorithm["name"], self.spec.data.name
        return f"Study({self.spec.name!r}, {algorithm}, {data}, {self.spec.clients.count} clients)"

    def run(
        self,
        folder: str | PathLike[str],
        *,
        data_dir: str | PathLike[str] | None = None,
        device: str = "auto",
        overwrite: bool = False,
        workers: int = 0,
        track: Sequence[str] = (),
        report: bool = True,
        progress: bool | StageCallback = True,
    ) -> RunResults:
        """Train, certify and report the study.

        The folder is that of `certifl run` with the same spec, and a call that was interrupted is
        resumed by the same call or by that command. A finished study is returned as it is.
        Training that a run in a folder beside this one has finished is taken over where it is
        bit for bit the same.

        Args:
            folder: for the results.
            data_dir: folder of data sets; None = the environment variable CERTIFL_DATA.
            device: "auto", a torch device, or several GPUs, "cuda:0,cuda:1".
            overwrite: replace another study in the folder.
            workers: processes that train clients, one thread each.
            track: names of experiment trackers.
            report: write the page and the figures; `certifl report` does so later.
            progress: True for a bar with the time left, also in a notebook; or a function of
                (what is under way, done, total, unit).

        Returns:
            The results, as `certifl.load(folder)` reads them.

        Raises:
            RequestError: the study does not fit the data, or the folder holds something else.
            WorkError: training or writing failed; finished work is saved.
        """
        path, data = Path(folder), None if data_dir is None else Path(data_dir)
        check_data_folder(data)
        allow_code(self.spec.model.name, *dict.fromkeys((self._folder, Path.cwd())))
        reporting = stages() if progress is True else contextlib.nullcontext(progress or None)
        with reporting as shown:
            options = Options(
                out=path,
                data_dir=data,
                device=device,
                overwrite=overwrite,
                siblings=siblings_of(path),
                report=shown,
                command=_command(path),
                track=tuple(track),
                workers=workers,
            )
            return run_and_report(self.spec, options, report)


def run_and_report(spec: Spec, options: Options, report: bool = True) -> RunResults:
    """Compute a study and write its page; a finished one stays. Raises as `experiments.run`."""
    folder = RunFolder(options.out)
    complete = not options.overwrite and folder.finished()
    results = load_runs([compute(spec, options)])
    if report and not (complete and folder.report.is_file()):
        with folder.locked():
            write_report(results, folder.report, title=spec.name)
    elif folder.temporary_files():
        with folder.locked():
            folder.clean()
    return results[0]


def _command(folder: Path) -> str:
    """A command that does what was done here, for the record."""
    code = f'import certifl; certifl.Study("spec.toml").run({str(folder)!r})'
    return f"python -c {shlex.quote(code)}"


def siblings_of(folder: Path) -> tuple[Path, ...]:
    """The run folders beside one, whose finished training may be taken over."""
    return tuple(sorted(path.parent for path in folder.parent.glob("*/run.json")))


def load(folder: str | PathLike[str]) -> RunResults:
    """Read the results of a finished run.

    Args:
        folder: that `Study.run` or `certifl run` wrote.

    Returns:
        Its `certificates` (see `Certificates`), `history`, `manifest` and `spec`, with `curves()`,
        `table()` and `plot()`.

    Raises:
        InputError: a file. StoreMismatch: no run, or one that is not finished.
        StoreError: a file of the run is missing or damaged.
    """
    path = Path(folder)
    if path.is_file():
        raise InputError(
            f"{path} is a file, and load reads run folders. Certificates in a file are read with "
            f"certifl.Certificates.load({str(path)!r}), a spec with certifl.Study({str(path)!r})."
        )
    inside = sorted(found.parent.name for found in path.glob("*/run.json"))
    if inside and not RunFolder(path).exists():
        raise InputError(
            f"{path} holds several runs ({', '.join(inside)}): load them one by one, for instance "
            f"certifl.load({str(path / inside[0])!r})."
        )
    check_run(path)
    return load_run(path)


def _values_of(spec: str | PathLike[str] | Section | Spec | None) -> tuple[dict[str, Any], Path]:
    """Plain values of a spec, and the folder in which its own network is looked for first."""
    if spec is None:
        return {}, Path.cwd()
    if isinstance(spec, Spec):
        return spec.model_dump(exclude_defaults=True), Path.cwd()
    if isinstance(spec, (str, PathLike)):
        return read_spec_file(Path(spec)), Path(spec).parent
    if isinstance(spec, Mapping):
        values = {str(key): _section(str(key), _plain(value)) for key, value in spec.items()}
        return values, Path.cwd()
    raise SpecError(f"A study is a TOML file or the values of one; got {spec!r:.80}.")


def _plain(value: Any) -> Any:
    """A value as a TOML file holds it: perturbations are described, tuples are lists."""
    if hasattr(value, "family") and hasattr(value, "sample"):  # a protocol has no instances
        return describe(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, PathLike) else value


def _section(key: str, value: Any) -> Any:
    """A section, also where its name alone was given."""
    named = key in ("data", "model", *_NAMED)
    return {"name": value} if named and isinstance(value, str) else value


def _merged(key: str, before: Any, value: Any) -> Any:
    value = _section(key, value)
    both = isinstance(before, Mapping) and isinstance(value, Mapping)
    return {**before, **value} if both and key not in _NAMED else value
