"""MLflow: a database in the run folder, or the server that MLFLOW_TRACKING_URI names.

Usage statistics, which MLflow sends by default, are switched off unless the user switched them on
(MLFLOW_DISABLE_TELEMETRY=false).
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from certifl.runs.folder import flat
from certifl.tracking.base import (
    PROJECT,
    certified_numbers,
    importable,
    links_text,
    round_numbers,
)

_T = TypeVar("_T")
_MOST_METRICS, _MOST_PARAMS = 1000, 100  # of one call, as MLflow demands
_SERVER = "MLFLOW_TRACKING_URI"
_NO_STATISTICS = "MLFLOW_DISABLE_TELEMETRY"


class MLflow:
    """Metrics per round, the spec as parameters, links and metadata as tags."""

    def __init__(self, folder: Path) -> None:
        os.environ.setdefault(_NO_STATISTICS, "true")  # read when mlflow is imported
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
        from mlflow import entities  # pyright: ignore[reportMissingImports]
        from mlflow.tracking import MlflowClient  # pyright: ignore[reportMissingImports]

        self._server = os.environ.get(_SERVER)
        self._folder = folder.resolve()
        self._connect = MlflowClient
        self._entities = entities
        self._client: Any = None
        self._run = ""
        self._rounds = 0

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
        self._rounds = rounds
        database = self._folder / "mlflow.db"
        if run_id is None and self._server is None:
            database.unlink(missing_ok=True)  # an interrupted start leaves an incomplete file
        self._client = self._connect(tracking_uri=self._server or f"sqlite:///{database}")
        if run_id is not None:
            self._run = run_id
            self._client.update_run(run_id, status="RUNNING")
            return run_id
        self._run = self._client.create_run(
            self._experiment(), run_name=str(metadata["name"])
        ).info.run_id
        plain = {
            key: value for key, value in flat(metadata).items() if not key.startswith("links.")
        }
        tags = {f"certifl.{key}": str(value) for key, value in plain.items()}
        tags["mlflow.note.content"] = links_text(metadata)  # the description on its pages
        self._batches(params=flat(spec), tags=tags)
        return self._run

    def _experiment(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        if experiment is not None:
            return experiment.experiment_id
        artimetadata = None if self._server else (self._folder / "artimetadata").as_uri()
        return self._client.create_experiment(name, artifact_location=artimetadata)

    def _batches(self, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        parameters = [self._entities.Param(key, str(value)) for key, value in params.items()]
        labels = [self._entities.RunTag(key, value) for key, value in tags.items()]
        for part in _parts(parameters, _MOST_PARAMS):
            self._client.log_batch(self._run, params=part)
        for part in _parts(labels, _MOST_PARAMS):
            self._client.log_batch(self._run, tags=part)

    def round(self, entry: Mapping[str, Any]) -> None:
        """Metrics at the round's number."""
        self._rounds = entry["round"] + 1
        self._metrics(round_numbers(entry), entry["round"])

    def certified(self, summary: Mapping[str, Any]) -> None:
        """Metrics at the number of finished rounds."""
        self._metrics(certified_numbers(summary), self._rounds)

    def _metrics(self, numbers: Mapping[str, float], step: int) -> None:
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


# TensorBoard: event files in the run folder; no network at all.
#
# `tensorboard --logdir runs` shows all runs below a folder, with their parameters under HPARAMS.


class TensorBoard:
    """Scalars per round, the spec as hyper-parameters and as text."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._folder = folder
        self._open = SummaryWriter
        self._writer: Any = None
        self._rounds = 0

    @staticmethod
    def installed() -> bool:
        """Whether its library is installed."""
        return importable("tensorboard")

    def begin(
        self, spec: Mapping[str, Any], metadata: Mapping[str, Any], run_id: str | None, rounds: int
    ) -> str:
        """Open a further event file; readers hide what a killed process logged beyond `rounds`."""
        self._rounds = rounds
        self._writer = self._open(
            str(self._folder), purge_step=rounds if run_id is not None else None
        )
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
        self._writer.add_text("files", links_text(metadata), 0)
        self._writer.flush()

    def round(self, entry: Mapping[str, Any]) -> None:
        """Scalars at the round's number."""
        self._rounds = entry["round"] + 1
        self._scalars(round_numbers(entry), entry["round"])

    def certified(self, summary: Mapping[str, Any]) -> None:
        """Scalars at the number of finished rounds."""
        self._scalars(certified_numbers(summary), self._rounds)

    def _scalars(self, numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def finish(self, complete: bool) -> None:
        """Close the event file."""
        self._writer.close()


# Weights & Biases: offline files in the run folder, unless WANDB_MODE says otherwise.
#
# `wandb sync RUN/tracking/wandb/wandb/offline-run-*` uploads them later.
# Crash reports, which the library sends by default, are off unless WANDB_ERROR_REPORTING is set.


# Its process buffers what is logged for 15 s by default; a kill would lose that.
_SECONDS_UNTIL_WRITTEN = 0.05


class WeightsAndBiases:
    """A run with the spec as its configuration; every start adds to the same run."""

    def __init__(self, folder: Path) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # for the process it starts
        import wandb  # pyright: ignore[reportMissingImports]

        self._wandb = wandb
        self._folder = folder
        self._run: Any = None
        self._rounds = 0

    @staticmethod
    def installed() -> bool:
        """Whether its library is installed."""
        return importable("wandb")

    def begin(
        self, spec: Mapping[str, Any], metadata: Mapping[str, Any], run_id: str | None, rounds: int
    ) -> str:
        """Open a new run, or a further part of the run that was logged before."""
        self._rounds = rounds
        shown = {key: value for key, value in metadata.items() if key != "links"}
        self._run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=run_id or secrets.token_hex(8),
            resume="allow",
            name=str(metadata["name"]),
            notes=links_text(metadata),
            dir=str(self._folder),
            mode=os.environ.get("WANDB_MODE", "offline"),
            config={**spec, "run": shown},
            settings=self._quiet(),
        )
        return str(self._run.id)

    def _quiet(self) -> Any:
        """Record only what is logged (no console, code or machine), and write it soon."""
        return self._wandb.Settings(
            console="off",
            silent=True,
            disable_git=True,
            disable_code=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_disable_machine_info=True,
            x_transaction_log_flush_interval=_SECONDS_UNTIL_WRITTEN,
        )

    def round(self, entry: Mapping[str, Any]) -> None:
        """Numbers at the round's number."""
        self._rounds = entry["round"] + 1
        self._run.log(round_numbers(entry), step=entry["round"], commit=True)

    def certified(self, summary: Mapping[str, Any]) -> None:
        """Numbers at the number of finished rounds."""
        self._run.log(certified_numbers(summary), step=self._rounds, commit=True)

    def finish(self, complete: bool) -> None:
        """Write everything out and close this part of the run."""
        self._run.finish(exit_code=0 if complete else 1)
