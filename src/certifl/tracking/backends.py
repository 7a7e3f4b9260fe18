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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from certifl.errors import RequestError
from certifl.runs.folder import flat

_PROJECT = "certifl"  # or experiment, unless the user names another


class Tracker:
    """One experiment tracker following one run, whose files go to a folder of the run.

    Calls come in this order: `begin`, then `log` for every round not logged before and once for
    the certificates, then `finish`. What was logged must survive a kill of the process as soon as
    the call returns, as far as the library allows.
    """

    packages: ClassVar[tuple[str, ...]]  # that it needs

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @classmethod
    def installed(cls) -> bool:
        """Whether its library is installed; it is not imported."""
        return importable(*cls.packages)

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
        raise NotImplementedError

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Log numbers by name; the step is a round's number, or that of finished rounds."""
        raise NotImplementedError

    def finish(self, complete: bool) -> None:
        """Close the run: complete, or to be resumed."""
        raise NotImplementedError


def importable(*packages: str) -> bool:
    """Whether packages can be imported, without importing them.

    A folder without code does not count: trackers leave folders of their own name behind.
    """
    specs = [importlib.util.find_spec(package) for package in packages]
    return all(spec is not None and spec.origin is not None for spec in specs)


def _links(metadata: Mapping[str, Any]) -> str:
    """Links to the report page, the figures and the run folder, as Markdown."""
    return "\n".join(f"- {name}: `{path}`" for name, path in metadata["links"].items())


class _TensorBoard(Tracker):
    """Scalars per round, the spec as hyper-parameters and as text.

    `tensorboard --logdir runs` shows all runs below a folder, their parameters under HPARAMS.
    """

    packages = ("tensorboard",)

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        super().__init__(folder)
        self._open = SummaryWriter
        self._writer: Any = None

    def begin(
        self, spec: Mapping[str, Any], metadata: Mapping[str, Any], run_id: str | None, rounds: int
    ) -> str:
        # Readers hide what a killed process logged beyond `rounds`.
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
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def finish(self, complete: bool) -> None:
        self._writer.close()


_MOST_METRICS, _MOST_PARAMS = 1000, 100  # of one call, as MLflow demands
_SERVER = "MLFLOW_TRACKING_URI"


class _MLflow(Tracker):
    """Metrics per round, the spec as parameters, links and metadata as tags."""

    packages = ("mlflow",)

    def __init__(self, folder: Path) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when mlflow is imported
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
        from mlflow import entities  # pyright: ignore[reportMissingImports]
        from mlflow.tracking import MlflowClient  # pyright: ignore[reportMissingImports]

        super().__init__(folder.resolve())
        self._server = os.environ.get(_SERVER)
        self._connect, self._entities = MlflowClient, entities
        self._client: Any = None
        self._run = ""

    @classmethod
    def installed(cls) -> bool:  # without a server, its database too
        return super().installed() and (
            _SERVER in os.environ or importable("sqlalchemy", "alembic")
        )

    def begin(
        self, spec: Mapping[str, Any], metadata: Mapping[str, Any], run_id: str | None, rounds: int
    ) -> str:
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
        for at in range(0, len(parameters), _MOST_PARAMS):
            self._client.log_batch(self._run, params=parameters[at : at + _MOST_PARAMS])
        labels = [self._entities.RunTag(key, value) for key, value in tags.items()]
        for at in range(0, len(labels), _MOST_PARAMS):
            self._client.log_batch(self._run, tags=labels[at : at + _MOST_PARAMS])
        return self._run

    def _experiment(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        if experiment is not None:
            return experiment.experiment_id
        artifacts = None if self._server else (self._folder / "artifacts").as_uri()
        return self._client.create_experiment(name, artifact_location=artifacts)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        points = [self._entities.Metric(key, value, now, step) for key, value in numbers.items()]
        for at in range(0, len(points), _MOST_METRICS):
            self._client.log_batch(self._run, metrics=points[at : at + _MOST_METRICS])

    def finish(self, complete: bool) -> None:
        self._client.set_terminated(self._run, "FINISHED" if complete else "KILLED")


# Its process buffers what is logged for 15 s by default; a kill would lose that.
_SECONDS_UNTIL_WRITTEN = 0.05


class _WeightsAndBiases(Tracker):
    """A run with the spec as its configuration; every start adds to the same run.

    `wandb sync RUN/tracking/wandb/wandb/offline-run-*` uploads it later.
    """

    packages = ("wandb",)

    def __init__(self, folder: Path) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # for the process it starts
        import wandb  # pyright: ignore[reportMissingImports]

        super().__init__(folder)
        self._wandb = wandb
        self._run: Any = None

    def begin(
        self, spec: Mapping[str, Any], metadata: Mapping[str, Any], run_id: str | None, rounds: int
    ) -> str:
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
        self._run.log(numbers, step=step, commit=True)

    def finish(self, complete: bool) -> None:
        self._run.finish(exit_code=0 if complete else 1)


TRACKERS: dict[str, type[Tracker]] = {
    "tensorboard": _TensorBoard,
    "mlflow": _MLflow,
    "wandb": _WeightsAndBiases,
}


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that are unknown or not installed, before anything is written.

    Raises:
        RequestError: an unknown name, or one whose library is not installed.
    """
    for name in names:
        if name not in TRACKERS:
            raise RequestError(
                f"There is no tracker {name!r}. Known are {', '.join(sorted(TRACKERS))}."
            )
        if not TRACKERS[name].installed():
            raise RequestError(
                f"The tracker {name!r} is not installed. Install it with "
                f"`pip install 'certifl[{name}]'`, or leave --track {name} out."
            )
