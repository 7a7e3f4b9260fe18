"""Several runs in one folder: trainings that they share once, side by side, each resumable.

```
<out>/runs/<spec hash>/       one run folder per distinct spec
```
Several processes may work in one folder at the same time, on several GPUs for instance: each takes
a free run, and waits for a training that another one computes. Helper processes of one command do
the same. They write run folders only: the main process writes whatever is made of them, repeats a
run that failed in a helper, and reports the error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from certifl.errors import CertiflError, InputError, StoreMismatch, WorkError
from certifl.experiments.run import Options, run, shares_training
from certifl.models import adopt_code, allowed_code
from certifl.models.state import NamedCode
from certifl.runs.folder import RunFolder
from certifl.runs.published import is_published
from certifl.spec import Spec, with_settings
from certifl.torch_env import follow_parent

_POLL_SECONDS = 2.0

Failed = Callable[["Job", WorkError], None]


@dataclass(frozen=True)
class Job:
    """One distinct run.

    Attributes:
        spec, path: of the run and its folder. title: what progress calls it.
        support: whether it exists only so that others continue its training.
    """

    spec: Spec
    path: Path
    title: str
    support: bool = False

    def done(self) -> bool:
        """Whether everything was computed and can still be read."""
        return RunFolder(self.path).complete()

    def trainings(self) -> set[str]:
        """Hashes of the finished trainings that this run can reuse."""
        if not shares_training(self.spec):
            return set()
        return {self.spec.training_hash(), self.spec.training_hash(of_base=True)}


def jobs_of(
    specs: Sequence[Spec], out: Path, title: Callable[[Spec], str] = lambda spec: spec.name
) -> tuple[Job, ...]:
    """The distinct runs of some specs, in an order in which shared training is done once.

    A base that several runs continue and that is none of them has a run of its own, with next to
    no certification.

    Args:
        specs: in their order; equal ones are one run.
        out: the folder; trainings that are finished in it are not repeated.
        title: what progress calls a run.

    Raises:
        StoreError: a run in it is damaged.
    """
    shown = list({spec.hash(): spec for spec in specs}.values())
    trained = {spec.training_hash() for spec in shown}
    for folder in (RunFolder(mark.parent) for mark in out.glob("runs/*/run.json")):
        if folder.finished() and not is_published(manifest := folder.manifest()):  # with a model
            trained.add(str(manifest.get("training_hash")))
    support: dict[str, Spec] = {}
    for spec in shown:
        start = spec.training_hash(of_base=True)
        if start not in trained and shares_training(spec):
            support.setdefault(start, base_spec(spec))
    own = {spec.hash() for spec in shown}
    return tuple(
        Job(spec, out / "runs" / spec.hash(), title(spec), support=spec.hash() not in own)
        for spec in _bases_first(shown, support)
    )


def base_spec(spec: Spec) -> Spec:
    """The training that a personalized spec continues, with next to no certification."""
    values = spec.model_dump(exclude_none=True)
    values["name"] = f"{spec.name}: its start"
    values["algorithm"] = values["algorithm"]["base"]
    values["augmentation"]["personalized"] = "same"
    few = {"images": 1, "estimator": "top-class", "n0": 10, "n": 100, "keep": "certificates"}
    values["certification"].update(few)
    return with_settings(values)


def _bases_first(shown: Sequence[Spec], support: Mapping[str, Spec]) -> list[Spec]:
    """The order of the specs, with each training before its continuations."""
    first: dict[str, Spec] = dict(support)
    for spec in shown:
        first.setdefault(spec.training_hash(), spec)
    ordered: dict[str, Spec] = {}
    for spec in shown:
        start = spec.training_hash(of_base=True)
        if start != spec.training_hash() and start in first:
            ordered.setdefault(first[start].hash(), first[start])
        ordered.setdefault(spec.hash(), spec)
    return list(ordered.values())


def compute(
    jobs: Sequence[Job],
    options: Options,
    renewed: list[Path],
    stage: Callable[[str], None] | None = None,
    failed: Failed | None = None,
) -> None:
    """Compute runs, and wait for those that another process computes.

    Args:
        jobs: unfinished ones, in the order of `jobs_of`.
        options: as for one run; `out` and `siblings` are set for each.
        renewed: runs that this call has computed; with `overwrite` only their trainings are
            reused. Each run is added when it is finished.
        stage: called with the name of the run in progress.
        failed: called with a run whose work failed; the others go on. None = the error is raised.

    Raises:
        RequestError: a spec does not fit the data. WorkError: a run failed; the others are saved.
    """
    pending = list(jobs)
    while pending:
        before = len(pending)
        for job in list(pending):
            if _waits(job, pending):
                continue
            if stage is not None:
                number = len(jobs) - len(pending) + 1
                stage(f"[{number}/{len(jobs)}] {job.title}")
            if _ended(job, options, renewed, failed):
                pending.remove(job)
        if len(pending) == before:
            if stage is not None:
                stage(f"waiting for {len(pending)} runs of another process")
            time.sleep(_POLL_SECONDS)
            pending = [job for job in pending if options.overwrite or not job.done()]


def _waits(job: Job, pending: Sequence[Job]) -> bool:
    """Whether an earlier, unfinished run will have a training that this one can reuse."""
    reusable = job.trainings()
    earlier = pending[: pending.index(job)]
    return any(other.spec.training_hash() in reusable for other in earlier)


def _ended(job: Job, options: Options, renewed: list[Path], failed: Failed | None) -> bool:
    """Compute one run, unless another process does; whether it is finished or has failed.

    With `overwrite`, only trainings of this call are reused: older ones are replaced.
    """
    beside = sorted(mark.parent for mark in job.path.parent.glob("*/run.json"))
    siblings = tuple(renewed) if options.overwrite else tuple(beside)
    try:
        run(job.spec, dataclasses.replace(options, out=job.path, siblings=siblings))
    except StoreMismatch:
        try:
            with RunFolder(job.path).locked():
                pass
        except StoreMismatch:
            return False  # another process is using it
        raise
    except WorkError as error:
        if failed is None:
            raise
        failed(job, error)
    else:
        renewed.append(job.path)
    return True


# Helper processes that take free runs, as other terminals would.


def processes_here(requested: int | None, most: int, device: str, overwrite: bool) -> int:
    """Number of runs that are computed at a time.

    Args:
        requested: by the user; None = one for each core, up to `most`, on a CPU.
        most: by default. device: as in `Options`.
        overwrite: replace finished runs; then one after the other, since a helper cannot know
            what was replaced already.

    Raises:
        InputError: more than one with `overwrite`.
    """
    if overwrite:
        if requested is not None and requested > 1:
            raise InputError(
                "--overwrite replaces runs one after the other. Leave --jobs out, or choose a new "
                "folder with --out."
            )
        return 1
    if requested is not None:
        return requested
    on_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    return min(cores(), most) if on_cpu else 1


def cores() -> int:
    """Cores that this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed is not None else os.cpu_count() or 1


@contextlib.contextmanager
def helper_processes(
    jobs: Sequence[Job], options: Options, processes: int, tolerant: bool = False
) -> Iterator[None]:
    """Compute runs in `processes` - 1 helpers; torch's threads are shared among all processes.

    They end with the block, also after an error; if this process is killed, they end themselves.
    Their unfinished runs are resumed like any other.

    Args:
        jobs: in the order of `jobs_of`. options: as for one run.
        processes: with this one.
        tolerant: whether a helper goes on after a run whose work failed.
    """
    before = torch.get_num_threads()
    threads = max(1, before // processes) if processes > 1 else before
    context = multiprocessing.get_context("spawn")
    quiet = dataclasses.replace(options, report=None)
    work = (tuple(jobs), quiet, threads, tolerant, allowed_code())
    helpers = [context.Process(target=_help, args=work) for _ in range(processes - 1)]
    try:
        torch.set_num_threads(threads)
        for helper in helpers:
            helper.start()
        yield
    finally:
        for helper in helpers:
            if helper.is_alive():
                helper.terminate()
        for helper in helpers:
            if helper.pid is not None:
                helper.join()
        torch.set_num_threads(before)


def _help(
    jobs: Sequence[Job], options: Options, threads: int, tolerant: bool, code: NamedCode
) -> None:
    follow_parent()
    torch.set_num_threads(threads)
    adopt_code(code)
    with contextlib.suppress(CertiflError):  # the main process repeats the run, and reports it
        pending = [job for job in jobs if not job.done()]
        compute(pending, options, [], failed=(lambda *_: None) if tolerant else None)
