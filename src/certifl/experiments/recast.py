"""Votes of a finished run cast again: the only way to see votes that were invented.

Votes depend on seed, image, network and arithmetic alone. On the same kind of machine they come
out the same to the last one. Elsewhere a network rounds otherwise, and a vote whose two best
classes are nearly equal may flip; or the noise itself is another, on another kind of device. What
is compared then, and how sure a finding is, stands at `_compared`.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from certifl._version import __version__
from certifl.certification import Certificates
from certifl.certification.counts import Request, Votes, fresh
from certifl.certification.estimators import Estimator
from certifl.certification.network import Network, choose_device, prepare, tf32_state
from certifl.certification.quantization import Calibration, recorded
from certifl.certification.recompute import read_record
from certifl.certification.sampling import VoteCounter
from certifl.certification.settings import REMOVED_PRECISIONS
from certifl.data import to_float
from certifl.errors import DataUnavailable, InputError, StoreMismatch, first_line
from certifl.rng import image_key
from certifl.study.certify import calibration_images
from certifl.study.environment import machine_metadata
from certifl.study.opened_run import OpenRun

EXACT, ROUNDING, FRESH = "exact", "rounding", "fresh"
LEVEL = 1e-6  # of a finding in an honest run, where votes need not be the same

# Share of votes that rounding may flip: over all images, and of one. Arithmetic with 8 to 11 bits
# flips more. benchmarks: docs/certificates.md says what was measured.
_FLIPS = {"float32": (0.001, 0.01), "reduced": (0.01, 0.05)}
_LARGEST_BATCH = 8192
_MOST_THREADS = 1024
_WORDS = {
    EXACT: "on the same kind of machine",
    ROUNDING: "on another kind of machine, where rounding may flip some",
    FRESH: "with other noise, as another device or version draws it",
}


@dataclass(frozen=True)
class Options:
    """Which votes are cast again, and where.

    Attributes:
        images: of each client. seed: of their choice; None draws a secure one.
        code: as `OpenRun`. device: "auto" takes the recorded kind where there is one.
    """

    images: int
    seed: int | None = None
    code: Path | None = None
    device: str = "auto"


@dataclass(frozen=True)
class Recast:
    """What came of it.

    Attributes:
        images, votes: cast again. differing: votes that are not as recorded, at least.
        how: EXACT, ROUNDING or FRESH. seed: of the choice of images.
        problems: one sentence each.
        scales: whether the scales of int8 were computed again, in words; "" = no int8.
    """

    images: int
    votes: int
    differing: int
    how: str
    seed: int
    problems: tuple[str, ...]
    scales: str = ""

    def __str__(self) -> str:
        same = "all as recorded" if not self.differing else f"{self.differing:,} differ"
        return (
            f"{self.images} images, {self.votes:,} votes cast again {_WORDS[self.how]}: {same} "
            f"(--recast-seed {self.seed} repeats the choice){self.scales}"
        )


def recast_votes(run: OpenRun, options: Options) -> Recast:
    """Cast the votes of some random images of each client again, and compare them.

    Raises:
        InputError: no image is requested. ModelError: the run's network has its own code and
            `code` is not given. StoreMismatch: not a finished run, one whose images are with its
            clients, or other data. DataUnavailable: the data set is not available.
    """
    _check_request(run, options)
    seed = secrets.randbits(63) if options.seed is None else options.seed
    chosen = _chosen(run.certificates, options.images, seed)
    again = [_cast_again(run, part, options.device) for part in chosen]
    return _compared(chosen, again, seed)


def _check_request(run: OpenRun, options: Options) -> None:
    if options.images < 1:
        raise InputError(f"--recast must be at least 1 image per client, got {options.images}.")
    run.require_finished()
    if "deployment" in run.manifest:
        raise StoreMismatch(
            f"The votes of {run.path} cannot be cast again here: its images are with its clients, "
            "where `certifl verify studies/ID/certificates.parquet` checks what follows from them."
        )
    precision = run.certificates.conditions.get("precision")
    if precision in REMOVED_PRECISIONS:
        raise StoreMismatch(
            f"The votes of {run.path} were cast in the precision {precision!r}, which was removed "
            "in 0.2.0, so they cannot be cast again. `certifl verify` without --recast checks "
            "what follows from them; certifl 0.1.0 can still cast them."
        )
    try:
        _ = run.dataset
    except DataUnavailable as error:
        raise DataUnavailable(
            f"--recast needs the images of {run.spec.data.name!r}: {first_line(error)}. Give "
            "--data-dir."
        ) from error


def _chosen(certificates: Certificates, images: int, seed: int) -> list[Certificates]:
    """So many random images of each client, which nobody could know before."""
    rng = np.random.default_rng(seed)
    parts = []
    for client in np.unique(certificates.client):
        rows = np.flatnonzero(certificates.client == client)
        picked = rng.choice(rows, size=min(images, len(rows)), replace=False)
        parts.append(certificates.select(np.sort(picked)))
    return parts


@dataclass(frozen=True)
class _Cast:
    """The votes of one client's images, recorded and cast again.

    Attributes:
        how: how they may be compared. stored, again: the recorded votes, and those cast now.
        flips: shares of votes that rounding may flip, over all images and of one.
        quantized: whether the network computes in integers.
        scales_problem: what is wrong with its scales; None = nothing, or they are not compared.
    """

    how: str
    stored: Votes
    again: Votes
    flips: tuple[float, float]
    quantized: bool = False
    scales_problem: str | None = None


def _cast_again(run: OpenRun, part: Certificates, device: str) -> _Cast:
    """The votes of one client's images again, in the recorded arithmetic."""
    record, client = read_record(part.conditions), int(part.client[0])
    perturbation, estimator, metadata = (
        run.perturbations[client],
        record.estimator,
        record.metadata,
    )
    assert perturbation is not None, "rows of clients that certify nothing are a problem"
    assert estimator is not None, "metadata that cannot be read are a problem"
    size: Any = metadata.get("batch_size")
    if type(size) is not int or not 1 <= size <= _LARGEST_BATCH:
        size = "auto"
    images = to_float(run.dataset.test.take(part.index).images)
    stored, _ = estimator.recorded_votes(part, _unreadable)
    with _threads(metadata.get("threads")):
        network = run.network(client, str(_device(device, metadata)), size)
        counter = VoteCounter(network, perturbation, run.spec.seed)
        again = _votes_again(counter, images.to(network.device), stored, estimator)
        how = _comparison(run.manifest, metadata, network)
        quantized = network.quantized is not None
        problem = _scales_problem(run, client) if quantized and how == EXACT else None
    reduced = network.precision != "float32" or any(_table(metadata, "tf32").values())
    flips = _FLIPS["reduced" if reduced else "float32"]
    return _Cast(how, stored, again, flips, quantized, problem)


def _scales_problem(run: OpenRun, client: int) -> str | None:
    """Where the scales of a client's network in int8 are not those of its training images."""
    perturbation, spec = run.perturbations[client], run.spec
    assert perturbation is not None, "the client certifies something"
    own = run.partition.clients[client].train
    images = to_float(calibration_images(run.dataset, own, spec.seed, client))
    calibration = Calibration.of(images, perturbation, spec.seed)
    network = prepare(run.model(client), images, "cpu", "int8", calibration=calibration)
    metadata, again = run.certificates.conditions, network.quantized
    assert again is not None, "the network is prepared in int8"
    if again.scales != recorded(metadata, client):
        return f"client {client}: the scales of int8 differ when computed again"
    agreement = metadata.get("agreement_with_float32")
    if not isinstance(agreement, Mapping) or agreement.get(str(client)) != again.agreement:
        return (
            f"client {client}: its agreement with float32 is {again.agreement} when counted again"
        )
    return None


def _votes_again(
    counter: VoteCounter, images: Tensor, stored: Votes, estimator: Estimator
) -> Votes:
    """As many votes of every image and purpose as were recorded."""
    keys = [image_key(image) for image in images]
    totals = {"selection": stored.selection, "estimation": stored.estimation}
    requests = [
        Request(row, row, keys[row], purpose, 0, int(counts[row].sum()))
        for purpose, counts in totals.items()
        for row in range(len(images))
    ]
    again = fresh(len(images), counter.network.classes)
    estimator.cast(counter, images, requests, again)
    return again


def _unreadable(rows: np.ndarray, problem: str) -> None:
    if rows.any():
        raise InputError(f"These certificates cannot be compared: {problem}.")


@contextlib.contextmanager
def _threads(recorded: Any) -> Iterator[None]:
    """Compute with as many threads as were recorded: sums may round differently otherwise."""
    before = torch.get_num_threads()
    if type(recorded) is int and 1 <= recorded <= _MOST_THREADS:
        torch.set_num_threads(recorded)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _kind(device: Any) -> str:
    """cpu, mps or xpu as they are recorded; GPUs are recorded by their names."""
    known = str(device).partition(":")[0]
    return known if known in ("cpu", "mps", "xpu") else "cuda"


def _device(requested: str, metadata: Mapping[str, Any]) -> torch.device:
    if requested != "auto":
        return choose_device(requested)
    try:
        return choose_device(_kind(metadata.get("device")))
    except InputError:
        return choose_device("auto")


def _table(metadata: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    stored = metadata.get(name)
    return stored if isinstance(stored, Mapping) else {}


def _comparison(manifest: Mapping[str, Any], metadata: Mapping[str, Any], network: Network) -> str:
    """How votes cast here can be compared with the recorded ones."""
    versions = _table(metadata, "versions")
    if (versions.get("certifl"), versions.get("torch")) != (__version__, torch.__version__):
        return FRESH
    if _kind(metadata.get("device")) != network.device.type:
        return FRESH
    return EXACT if _same_machine(_table(manifest, "machine"), metadata, network) else ROUNDING


def _same_machine(
    machine: Mapping[str, Any], metadata: Mapping[str, Any], network: Network
) -> bool:
    recorded = (metadata.get("batch_size"), metadata.get("batch_norm_folded"))
    if not machine or recorded != (network.batch_size, network.folded):
        return False
    if network.device.type == "cuda":
        name = torch.cuda.get_device_name(network.device)
        return name == metadata.get("device") and tf32_state() == _table(metadata, "tf32")
    here = machine_metadata(network.device.type)
    same = all(machine.get(name) == here[name] for name in ("processor", "instructions"))
    return same and torch.get_num_threads() == metadata.get("threads")


def _compared(chosen: list[Certificates], again: list[_Cast], seed: int) -> Recast:
    """Recorded votes against those cast again.

    EXACT: any difference is a finding. ROUNDING: the noise is the same, and a vote differs only
    where rounding flips it. Noise is independent from vote to vote, so flips are independent too.
    With a mean chance of at most q they number t or more with a chance of at most that of a
    binomial of chance q, whatever the chances of single images (Hoeffding 1956, for t above the
    mean). Counts that differ by d show at least d flips. FRESH: both counts are independent draws
    of one distribution, and Fisher's exact test compares them, after flips were granted.
    In the last two all tests together find something in an honest run with a chance below LEVEL.
    """
    images = sum(map(len, chosen))
    differing, votes, problems = 0, 0, list[str]()
    for part, cast in zip(chosen, again, strict=True):
        level = LEVEL / (2 * len(chosen))
        flipped, total = _flipped(cast)
        differing, votes = differing + int(flipped.sum()), votes + int(total.sum())
        problems += flips_problems(part, cast, flipped, total, level)
        problems += [] if cast.scales_problem is None else [cast.scales_problem]
    hows = {cast.how for cast in again}
    how = next(how for how in (FRESH, ROUNDING, EXACT) if how in hows)
    scales = ""
    if any(cast.quantized for cast in again):
        compared = "computed again" if how == EXACT else "not checked: another machine"
        scales = f"; scales of int8 {compared}"
    return Recast(images, votes, differing, how, seed, tuple(problems), scales)


def _flipped(cast: _Cast) -> tuple[np.ndarray, np.ndarray]:
    """(votes that differ at least, votes), for each image."""
    flipped = _ordered_flips(cast)
    for stored, again in _counts(cast):
        flipped = flipped + np.abs(stored - again).sum(axis=1) // 2
    return flipped, cast.stored.cast


def _counts(cast: _Cast) -> list[tuple[np.ndarray, np.ndarray]]:
    """Recorded counts and those cast again, of votes whose order was not recorded."""
    pairs = [(cast.stored.selection, cast.again.selection)]
    if cast.stored.path is None:
        pairs.append((cast.stored.estimation, cast.again.estimation))
    return pairs


def _ordered_flips(cast: _Cast) -> np.ndarray:
    """Votes that are not those recorded, where their order was."""
    stored, again = cast.stored.path, cast.again.path
    if stored is None or again is None:
        return np.zeros(len(cast.stored.done), np.int64)
    return np.asarray((stored != again).sum(axis=1), np.int64)


def flips_problems(
    part: Certificates, cast: _Cast, flipped: np.ndarray, total: np.ndarray, level: float
) -> list[str]:
    """Differences that rounding and chance do not explain, at this level for one client.

    Args:
        part: one client's rows. cast: their votes again.
        flipped, total: votes that differ, and all votes, for each image. level: of all tests.
    """
    who, most, of_one = int(part.client[0]), *cast.flips
    if cast.how == EXACT:
        wrong = flipped > 0
    elif cast.how == ROUNDING:
        chance = stats.binom.sf(flipped - 1, total, of_one)
        wrong = chance < level / (2 * len(part))
        everything = stats.binom.sf(int(flipped.sum()) - 1, int(total.sum()), most)
        if not wrong.any() and everything < level / 2:
            return [
                f"client {who}: {int(flipped.sum())} of {int(total.sum())} votes differ when "
                f"cast again, more than the {most:.1%} that rounding may flip"
            ]
    else:
        wrong = _unlike(cast, of_one, level / len(part))
    return [
        f"client {who}, image {part.index[row]}: {flipped[row]} of its {total[row]} votes "
        "differ when cast again"
        for row in np.flatnonzero(wrong)
    ]


def _unlike(cast: _Cast, granted: float, level: float) -> np.ndarray:
    """Images whose counts are not two draws of one distribution, after granted flips."""
    # Votes in order are drawn alike on every device; where there are none, nothing is flipped.
    flips, total = _ordered_flips(cast), cast.stored.estimation.sum(axis=1)
    wrong = np.asarray(stats.binom.sf(flips - 1, total, granted) < level / 2)
    for stored, made in _counts(cast):
        for row in range(len(wrong)):
            wrong[row] |= _p_value(stored[row], made[row], granted) < level / 2
    return wrong


def _p_value(stored: np.ndarray, made: np.ndarray, granted: float) -> float:
    """Of Fisher's exact test between the most frequent class and all others."""
    top, total = int(stored.argmax()), int(stored.sum())
    flips = int(np.ceil(granted * total))
    first, second = int(stored[top]), int(made[top])
    second += int(np.clip(first - second, -flips, flips))
    found: Any = stats.fisher_exact([[first, total - first], [second, total - second]])
    return float(found.pvalue)
