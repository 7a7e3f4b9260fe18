"""What a tracker is, and the trackers TensorBoard, MLflow, Weights & Biases.

| tracker | where it logs, unless a server is named | what it would send by default |
|---|---|---|
| TensorBoard | event files in the run folder | nothing |
| MLflow | a database there (`MLFLOW_TRACKING_URI`) | usage statistics: switched off |
| Weights & Biases | offline files there (`WANDB_MODE`) | crash reports: switched off |
"""

from __future__ import annotations

import importlib.util
import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

from certifl.runs.folder import flat

_PROJECT = "certifl"  # or experiment, unless the user names another
_T = TypeVar("_T")


class Tracker(Protocol):
    """One experiment tracker following one run.

    Calls come in this order: `begin`, then `log` for every round not logged before and once for
    the certificates, then `finish`. What was logged must survive a kill of the process as soon as
    the call returns, as far as the library allows.
    """

    def begin(
        self, spec: Mapping[str, Any], metadata: Mapping[str, Any], run_id: str | None, rounds: int
    ) -> str:
        """Open the tracker's run.

        Args:
            spec: the study, every default spelled out: the run's parameters.
            metadata: name, label, spec hash, data, machine, versions, links.
            run_id: the tracker's name of this run; None at its first start.
            rounds: how many rounds were logged before.

        Returns:
            The name with which to resume after an interruption.
        """
        ...

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Log numbers by name; the step is a round's number, or that of finished rounds."""
        ...

    def finish(self, complete: bool) -> None:
        """Close the run: complete, or to be resumed."""
        ...


class TrackerFactory(Protocol):
    """A class of trackers, as a row of the table."""

    def __call__(self, folder: Path) -> Tracker:
        """A tracker that writes its files to a folder of the run."""
        ...

    def installed(self) -> bool:
        """Whether its library is installed; it is not imported."""
        ...


def importable(*packages: str) -> bool:
    """Whether packages can be imported, without importing them.

    A folder without code does not count: trackers leave folders of their own name behind.
    """
    specs = [importlib.util.find_spec(package) for package in packages]
    return all(spec is not None and spec.origin is not None for spec in specs)


def _links(metadata: Mapping[str, Any]) -> str:
    """Links to the report page, the figures and the run folder, as Markdown."""
    return "\n".join(f"- {name}: `{path}`" for name, path in metadata["links"].items())


class TensorBoard:
    """Scalars per round, the spec as hyper-parameters and as text.

    `tensorboard --logdir runs` shows all runs below a folder, their parameters under HPARAMS.
    """

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._folder, self._open = folder, SummaryWriter
        self._writer: Any = None

    @staticmethod
    def installed() -> bool:
        """Whether its library is installed."""
        return importable("tensorboard")

    def begin(
        self, spec: Mapping[str, Any], metadata: Mapping[str, Any], run_id: str | None, rounds: int
    ) -> str:
        """Open a further event file; readers hide what a killed process logged beyond `rounds`."""
        purge = rounds if run_id is not None else None
        self._writer = self._open(str(self._folder), purge_step=purge)
        if run_id is None:
            self._describe(spec, metadata)
        return self._folder.name

    def _describe(self, spec: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard.summary import hparams

        plain = {
            key: value if isinstance(value, bool | int | float | str) else str(value)
            for key, value in flat(spec).items()
        }
        for part in hparams(plain, {"acr/mean": 0.0, "accuracy/mean": 0.0}):
            self._writer.file_writer.add_summary(part)
        table = "\n".join(f"| {key} | {value} |" for key, value in plain.items())
        self._writer.add_text("spec", f"| key | value |\n|---|---|\n{table}", 0)
        self._writer.add_text("files", _links(metadata), 0)
        self._writer.flush()

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Scalars at a step."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def finish(self, complete: bool) -> None:
        """Close the event file."""
        self._writer.close()


_MOST_METRICS, _MOST_PARAMS = 1000, 100  # of one call, as MLflow demands
_SERVER = "MLFLOW_TRACKING_URI"


class MLflow:
    """Metrics per round, the spec as parameters, links and metadata as tags."""

    def __init__(self, folder: Path) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when mlflow is imported
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
        from mlflow import entities  # pyright: ignore[reportMissingImports]
        from mlflow.tracking import MlflowClient  # pyright: ignore[reportMissingImports]

        self._server, self._folder = os.environ.get(_SERVER), folder.resolve()
        self._connect, self._entities = MlflowClient, entities
        self._client: Any = None
        self._run = ""

    @staticmethod
    def installed() -> bool:
        """Whether its library is installed; without a server, its database too."""
        return importable("mlflow") and (
            _SERVER in os.environ or importable("sqlalchemy", "alembic")
        )

    def begin(
        self, spec: Mapping[str, Any], metadata: Mapping[str, Any], run_id: str | None, rounds: int
    ) -> str:
        """Open a new run, or the run that was logged before."""
        database = self._folder / "mlflow.db"
        if run_id is None and self._server is None:
            database.unlink(missing_ok=True)  # an interrupted start leaves an incomplete file
        self._client = self._connect(tracking_uri=self._server or f"sqlite:///{database}")
        if run_id is not None:
            self._run = run_id
            self._client.update_run(run_id, status="RUNNING")
            return run_id
        created = self._client.create_run(self._experiment(), run_name=str(metadata["name"]))
        self._run = created.info.run_id
        plain = flat({key: value for key, value in metadata.items() if key != "links"})
        tags = {f"certifl.{key}": str(value) for key, value in plain.items()}
        tags["mlflow.note.content"] = _links(metadata)  # the description on its pages
        parameters = [self._entities.Param(key, str(value)) for key, value in flat(spec).items()]
        for part in _parts(parameters, _MOST_PARAMS):
            self._client.log_batch(self._run, params=part)
        labels = [self._entities.RunTag(key, value) for key, value in tags.items()]
        for part in _parts(labels, _MOST_PARAMS):
            self._client.log_batch(self._run, tags=part)
        return self._run

    def _experiment(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        if experiment is not None:
            return experiment.experiment_id
        artifacts = None if self._server else (self._folder / "artifacts").as_uri()
        return self._client.create_experiment(name, artifact_location=artifacts)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Metrics at a step."""
        now = int(time.time() * 1000)
        points = [self._entities.Metric(key, value, now, step) for key, value in numbers.items()]
        for part in _parts(points, _MOST_METRICS):
            self._client.log_batch(self._run, metrics=part)

    def finish(self, complete: bool) -> None:
        """Mark the run as finished, or as killed: to be resumed."""
        self._client.set_terminated(self._run, "FINISHED" if complete else "KILLED")


def _parts(values: Sequence[_T], most: int) -> Iterator[list[_T]]:
    rest = iter(values)
    while part := list(islice(rest, most)):
        yield part


# Its process buffers what is logged for 15 s by default; a kill would lose that.
_SECONDS_UNTIL_WRITTEN = 0.05


class WeightsAndBiases:
    """A run with the spec as its configuration; every start adds to the same run.

    `wandb sync RUN/tracking/wandb/wandb/offline-run-*` uploads it later.
    """

    def __init__(self, folder: Path) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # for the process it starts
        import wandb  # pyright: ignore[reportMissingImports]

        self._wandb, self._folder = wandb, folder
        self._run: Any = None

    @staticmethod
    def installed() -> bool:
        """Whether its library is installed."""
        return importable("wandb")

    def begin(
        self, spec: Mapping[str, Any], metadata: Mapping[str, Any], run_id: str | None, rounds: int
    ) -> str:
        """Open a new run, or a further part of the run that was logged before."""
        shown = {key: value for key, value in metadata.items() if key != "links"}
        # Only what is logged is recorded (no console, code or machine), and written soon.
        quiet = self._wandb.Settings(
            console="off",
            silent=True,
            disable_git=True,
            disable_code=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_disable_machine_info=True,
            x_transaction_log_flush_interval=_SECONDS_UNTIL_WRITTEN,
        )
        self._run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            id=run_id or secrets.token_hex(8),
            resume="allow",
            name=str(metadata["name"]),
            notes=_links(metadata),
            dir=str(self._folder),
            mode=os.environ.get("WANDB_MODE", "offline"),
            config={**spec, "run": shown},
            settings=quiet,
        )
        return str(self._run.id)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Numbers at a step."""
        self._run.log(numbers, step=step, commit=True)

    def finish(self, complete: bool) -> None:
        """Write everything out and close this part of the run."""
        self._run.finish(exit_code=0 if complete else 1)
