"""A client's privacy budget: what its answers spend of its images' privacy, by its own account.

The server's ledger counts the rounds that it committed. A client need not trust it: whatever a
server requests, however often and from whatever model, each answer that depends on the client's
images in another way is in the client's own ledger before it leaves.

| request | effect |
|---|---|
| something new | refused where its steps would exceed the limit, before an image is used |
| the same again (a server or client was stopped in between) | the same bits, counted once |
| the same round from another model | another answer, counted again |
| the same sample for another request | refused: equal sums would have equal noise |
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from certifl.deploy.client.settings import Settings
from certifl.deploy.schemas import Rejected
from certifl.errors import InputError, StoreError
from certifl.federated.privacy import (
    ExampleLedger,
    ExampleLevel,
    Pass,
    PrivatePasses,
    Release,
    composed,
    conflict,
    released_epsilon,
    released_steps,
    sends_nothing,
)
from certifl.runs.atomic import write_text
from certifl.safe_io import parse_json, read_text
from certifl.spec import Spec
from certifl.study.privacy import rounded_up

_log = logging.getLogger(__name__)
_ROUNDING = 1 + 1e-9
_UNTRUSTED = (
    "its own privacy ledger is lost or damaged; it trains with privacy again once that is repaired"
)


class PrivacyBudget:
    """The privacy budget of one study.

    Args:
        ledger: the client's.
        spec: of the study. states: its folder, named by its id; the ledger must have an entry for
            each of its states.
        images: fingerprint of the training images.
        plan: what the study requests. limit: what may be spent.
    """

    def __init__(
        self,
        ledger: PrivacyLedger,
        spec: Spec,
        states: Path,
        images: str,
        plan: StudyPlan,
        limit: Limit,
    ) -> None:
        self._ledger, self._id, self._states = ledger, states.name, states
        self._name, self._delta = spec.name, spec.privacy.delta
        self._images, self._plan, self._limit = images, plan, limit
        self._releases: list[Release] = []
        self._round, self._asked = -1, ""  # the request: fingerprint of all it depends on
        self._passes: list[tuple[str, float, PrivatePasses]] = []

    def observed(self, level: ExampleLevel) -> ExampleLevel:
        """The same mechanism, whose passes are recorded."""
        return replace(level, watch=self._record_pass)

    def authorize(self, round: int, *inputs: str) -> None:
        """Before training: refuse an answer beyond the limit, or a damaged ledger (Rejected).

        `inputs` are fingerprints of all that the answer depends on besides the images.
        """
        text = json.dumps([self._id, self._images, round, *inputs])
        self._round, self._asked = round, hashlib.sha256(text.encode()).hexdigest()
        self._passes = []
        entries = self._entries()
        self._releases = [entry.release for entry in entries if entry.study == self._id]
        if any(one.asked == self._asked and one.output for one in self._releases):
            return
        planned_pass, sent = self._plan.of(round)
        release = Release(self._asked, "", sent, (planned_pass,))
        self._check([entry for entry in entries if not self._is_current(entry)], release)

    def record(self, output: str, sent: bool) -> str:
        """After training, before anything is stored or sent: add the answer to the ledger.

        Args:
            output: fingerprint of the answer and the new state; "" = it failed.
            sent: whether the answer leaves, beside what is shared of the certificates.

        Returns what was spent so far, as text. StoreError where the ledger cannot be written,
        Rejected beyond the budget, or where the answer differs from an earlier one.
        """
        passes = tuple(
            Pass(sample, multiplier, taken.steps, taken.sums)
            for sample, multiplier, taken in self._passes
            if taken.sums
        )
        release = Release(self._asked, output, sent or self._plan.shares, passes)
        with self._ledger.locked():
            entries = self._entries()
            before = [entry.release for entry in entries if self._is_current(entry)]
            outputs = [release.output for release in before if release.output]
            if outputs and output and outputs != [output]:
                raise Rejected(
                    "the same request gave another answer than before (its arithmetic is not "
                    "reproducible); with privacy a second answer is refused"
                )
            if not outputs and (output or _steps([release]) > _steps(before)):
                # A failure takes the first of the steps that a later answer takes.
                entries = [entry for entry in entries if not self._is_current(entry)]
                self._check(entries, release)
                own = [entry for entry in entries if entry.study == self._id]
                if any(entry.round == self._round and entry.release.output for entry in own):
                    _log.warning(
                        "The server requested round %d again from another model: both answers "
                        "count.",
                        self._round,
                    )
                now = datetime.now(UTC).isoformat(timespec="seconds")
                entry = Entry(self._id, self._name, self._round, self._delta, now, release)
                entries.append(entry)
                self._ledger.write(entries)
        return _spent(entries, self._limit.delta)

    def spent(self) -> float:
        """Epsilon of all answers in this study so far, at the study's delta.

        Raises:
            StoreError: the ledger is damaged.
        """
        entries = [entry for entry in self._ledger.entries() if entry.study == self._id]
        return released_epsilon([entry.release for entry in entries], self._delta)

    def _is_current(self, entry: Entry) -> bool:
        return entry.study == self._id and entry.release.asked == self._asked

    def _record_pass(self, sample: str, multiplier: float, passes: PrivatePasses) -> None:
        """Record passes before they use an image."""
        # With a public key other studies have the same draws: the name is that in this study.
        name = hashlib.sha256(f"{self._id} {sample}".encode()).hexdigest()
        if conflict(self._releases, self._asked, name):
            raise Rejected(
                "it has answered this round from this model before, with other states or images; "
                "with privacy, one sample may answer only one request"
            )
        self._passes.append((name, multiplier, passes))

    def _entries(self) -> list[Entry]:
        try:
            entries = self._ledger.entries()
        except StoreError as error:
            _log.error("%s", error)
            raise Rejected(_UNTRUSTED) from error
        recorded = {entry.round for entry in entries if entry.study == self._id}
        stored = {int(path.stem[6:]) for path in self._states.glob("state-*.safetensors")}
        if stored - recorded:
            _log.error(
                "%s lacks round %d of study %s, whose state is in %s: it is lost, or an old copy. "
                "Restore the newest copy, or start a new run.",
                self._ledger.path,
                min(stored - recorded),
                self._id,
                self._states,
            )
            raise Rejected(_UNTRUSTED)
        return entries

    def _check(self, entries: Iterable[Entry], release: Release) -> None:
        limit = self._limit
        counted = [e.release for e in entries if limit.all_studies or e.study == self._id]
        checked = [(limit.total, [*counted, release])]
        if release.sent:
            checked.append((limit.sent, [one for one in (*counted, release) if one.sent]))
        for limit_epsilon, releases in checked:
            epsilon = released_epsilon(releases, limit.delta)
            if epsilon > limit_epsilon * _ROUNDING:
                _log.error(
                    "A further answer would spend epsilon = %.4g at delta = %g over %s; the "
                    "limit is %.4g.",
                    epsilon,
                    limit.delta,
                    "all studies" if limit.all_studies else "this study",
                    limit_epsilon,
                )
                raise Rejected(
                    "a further answer would spend more privacy of its images than "
                    + ("this client allows" if limit.all_studies else "the study planned")
                )


def ledger_lines(folder: Path, limit: float | None, delta: float | None) -> list[str]:
    """A client's ledger as text; nothing where it has never answered with privacy.

    Args:
        folder: of the client. limit, delta: its own, where it has set them.

    Raises:
        StoreError: the ledger is damaged. SpecError: opacus is missing.
    """
    entries = PrivacyLedger(folder).entries()
    studies: dict[str, list[Entry]] = {}
    for entry in entries:
        studies.setdefault(entry.study, []).append(entry)
    lines = []
    if entries:
        at = delta or min(entry.delta for entry in entries)
        lines.append(f"Privacy of its images, by its own ledger: {_spent(entries, at)}")
    for id, own in studies.items():
        lines.append(f"  in {own[0].name!r} ({id[:8]}): {_spent(own, own[0].delta)}")
        repeated = sorted({e.round for e in own if [x.round for x in own].count(e.round) > 1})
        if repeated:
            rounds = ", ".join(map(str, repeated))
            lines.append(f"    requested more than once, from other models: rounds {rounds}")
    if limit is not None:
        lines.append(f"It answers up to ε = {limit:g}, all studies together.")
    return lines


def _spent(entries: Sequence[Entry], delta: float) -> str:
    releases = [entry.release for entry in entries]
    total = released_epsilon(releases, delta)
    answers = "1 answer" if len(releases) == 1 else f"{len(releases)} answers"
    return (
        f"ε = {rounded_up(total)} at δ = {delta:g} ({_steps(releases)} private steps in {answers})"
    )


def _steps(releases: Iterable[Release]) -> int:
    return sum(released_steps(releases).values())


# The limit of a privacy budget: the client's own, or what a study planned.


@dataclass(frozen=True)
class Limit:
    """How much epsilon may be spent.

    Attributes:
        sent: by what leaves. total: also by models of which nothing leaves the client.
        delta: at which it is counted.
        all_studies: over all studies (the client's own limit), or in this one (what it planned).
    """

    sent: float
    total: float
    delta: float
    all_studies: bool


@dataclass(frozen=True)
class StudyPlan:
    """What a study plans to request of this client.

    Attributes:
        ledger: the study's, with its noise and planned steps. client: its number.
        sends: whether the rounds' results are sent; a fine-tuned model stays with the client.
        shares: whether anything is sent of the certificates of the deployed model. It depends on
            all training behind that model, so then everything leaves.
    """

    ledger: ExampleLedger
    client: int
    sends: bool
    shares: bool

    def of(self, number: int) -> tuple[Pass, bool]:
        """What a round costs, and whether anything that depends on it is sent."""
        late = number >= self.ledger.rounds and self.ledger.finetuning > 0
        steps = self.ledger.steps(self.client, number if late else 0)
        batches = round(1 / self.ledger.rates[self.client])
        cost = Pass("", self.ledger.multipliers[self.client], batches, steps)
        return cost, self.shares or (self.sends and not late)

    def limit(self, delta: float) -> Limit:
        """What the whole plan spends."""
        ledger, client = self.ledger, self.client
        kind = ledger.multipliers[client], ledger.rates[client]
        messages = ledger.rounds * ledger.steps(client, 0)
        total = composed({kind: messages + ledger.steps(client, ledger.rounds)}, delta)
        sent = total if self.shares else composed({kind: messages}, delta)
        return Limit(sent, total, delta, all_studies=False)


def open_budget(
    settings: Settings, spec: Spec, ledger: ExampleLedger, images: str, folder: Path, states: Path
) -> PrivacyBudget:
    """The budget of a study whose clients add the noise: the client's own, or what it planned.

    `images` is the fingerprint of its training images, `folder` the client's, `states` a study's.
    """
    delta, shares = spec.privacy.delta, settings.share != "none"
    plan = StudyPlan(ledger, settings.client, not sends_nothing(spec.algorithm), shares)
    limit, most = plan.limit(delta), settings.max_epsilon
    if most is not None:
        limit = Limit(most, most, settings.delta or delta, all_studies=True)
    return PrivacyBudget(PrivacyLedger(folder), spec, states, images, plan, limit)


def check_own_limit(settings: Settings, spec: Spec, images: int) -> None:
    """A client with a limit takes part only where it adds the noise (else Rejected)."""
    if settings.max_epsilon is None:
        return
    if spec.privacy.kind != "example":
        raise Rejected(
            "it has set max_epsilon, and takes part only in studies whose clients add the noise: "
            'privacy.kind = "example"'
        )
    if (settings.delta or spec.privacy.delta) * images >= 1:
        raise Rejected("the delta at which it counts is as large as one of its images")


# A client's own privacy ledger: a file beside its studies, one line for every private answer.
#
# ```
# client-N/
#   privacy-ledger.jsonl   a checksum, then an answer per line
# ```
#
# It is written whole, flushed and renamed before an answer leaves, so after a kill an answer that
# was never sent may be counted, but none that was sent is missing. It covers all studies: the
# images are the same.


LEDGER = "privacy-ledger.jsonl"
_LOCK = ".privacy-ledger.lock"
_FORMAT = 1


@dataclass(frozen=True)
class Entry:
    """One answer.

    Attributes:
        study: its id. name: of the study. round: counted from 0.
        delta: of the study. time: when it was first given, UTC.
        release: what it disclosed.
    """

    study: str
    name: str
    round: int
    delta: float
    time: str
    release: Release


class PrivacyLedger:
    """The ledger in a client's folder.

    Every access reads the file. One process writes at a time.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LEDGER

    def entries(self) -> list[Entry]:
        """All answers so far; none without a file; StoreError where it was changed."""
        try:
            content = read_text(self.path)
        except FileNotFoundError:
            return []
        except (OSError, InputError) as error:
            raise self._damaged(str(error)) from error
        checksum, _, lines = content.partition("\n")
        if checksum != _checksum_line(lines):
            raise self._damaged("its checksum does not match")
        try:
            return [_entry(parse_json(line)) for line in lines.splitlines()]
        except (KeyError, TypeError, ValueError) as error:
            raise self._damaged(f"a line is not an entry ({type(error).__name__})") from error

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the ledger: no other process writes meanwhile; StoreError if that fails."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle = self.path.with_name(_LOCK).open("a")
        except OSError as error:
            raise StoreError(f"{self.path} cannot be written: {error}.") from error
        with handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def write(self, entries: list[Entry]) -> None:
        """Replace all entries, durably. StoreError: the ledger is as it was before."""
        lines = "".join(json.dumps(asdict(entry), sort_keys=True) + "\n" for entry in entries)
        write_text(self.path, f"{_checksum_line(lines)}\n{lines}")

    def _damaged(self, why: str) -> StoreError:
        return StoreError(
            f"{self.path} cannot be trusted: {why}. It records how much privacy of its images "
            "this client has spent: restore its newest copy before any study trains."
        )


def _checksum_line(lines: str) -> str:
    digest = hashlib.sha256(lines.encode()).hexdigest()
    return json.dumps({"format": _FORMAT, "sha256": digest})


def _entry(stored: dict[str, Any]) -> Entry:
    recorded = stored.pop("release")
    passes = tuple(Pass(**one) for one in recorded.pop("passes"))
    return Entry(**stored, release=Release(**recorded, passes=passes))
