"""What a party spends of its images' privacy: allowed, refused and written down by itself.

The server's ledger counts the rounds that it committed. A party need not believe it: whatever a
server asks for, however often and from whatever model, each answer that depends on the party's
images in another way stands in the party's own ledger (`book`) before it leaves.

| asked for | then |
|---|---|
| something new | refused where its steps would exceed the limit, before an image is looked at |
| the same again (a server or client was stopped in between) | the same bits again, counted once |
| the same round from another model | another answer: counted once more |
| the same sample with another question | refused: equal sums would have equal noise |
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

from certifl.deploy.client.rejected import Rejected
from certifl.deploy.client.settings import Settings
from certifl.errors import InputError, StoreError
from certifl.federated.privacy import (
    ExampleLedger,
    ExampleLevel,
    Pass,
    PrivatePasses,
    Release,
    composed,
    conflict,
    finetuning_epochs,
    released_epsilon,
    released_steps,
    sends_nothing,
)
from certifl.runs.atomic import write_text
from certifl.safe_io import parse_json, read_text
from certifl.spec import Spec

_log = logging.getLogger(__name__)
_ROUNDING = 1 + 1e-9
_UNTRUSTED = (
    "its own ledger of privacy is lost or damaged; it trains with privacy again when that has "
    "been seen to"
)


@dataclass(frozen=True)
class Question:
    """One round asked for: its number, and the name of all that the answer follows from."""

    round: int
    asked: str


class PrivacyBudget:
    """The ledger at work for one study.

    Args:
        book: the party's ledger.
        study: the study's id. name: its name, for people. delta: of the study.
        images: name of the images that are trained on.
        plan: what the study asks for. limit: what may be spent.
        states: the study's folder, whose kept states tell what the ledger must know.
    """

    def __init__(
        self,
        book: PrivacyLedger,
        study: str,
        name: str,
        delta: float,
        images: str,
        plan: Planned,
        limit: Limit,
        states: Path,
    ) -> None:
        self._book, self._id, self._name, self._delta = book, study, name, delta
        self._images, self._plan, self._limit, self._states = images, plan, limit, states
        self._known: list[Release] = []
        self._question: Question | None = None
        self._passes: list[tuple[str, float, PrivatePasses]] = []

    def watched(self, level: ExampleLevel) -> ExampleLevel:
        """The same mechanism, which tells of its passes."""
        return replace(level, watch=self._begins)

    def begin(self, round: int, *parts: str) -> None:
        """Before training: the ledger is whole, and the answer is allowed.

        Args:
            round: that is asked for.
            parts: names of all that the answer follows from, besides the images.

        Raises:
            Rejected: the ledger cannot be trusted, or too little is left.
        """
        text = json.dumps([self._id, self._images, round, *parts])
        self._question = Question(round, hashlib.sha256(text.encode()).hexdigest())
        self._passes = []
        entries = self._entries()
        self._known = [entry.release for entry in entries if entry.study == self._id]
        if any(known.asked == self._question.asked and known.output for known in self._known):
            return
        made, sent = self._plan.of(round)
        release = Release(self._question.asked, "", sent, (made,))
        self._check([entry for entry in entries if not self._is_same(entry)], release)

    def answered(self, output: str, sent: bool) -> str:
        """After training, before anything is kept or sent: the answer is in the ledger.

        Args:
            output: name of the answer and of what is kept; "" = it failed underway.
            sent: whether the answer leaves.

        Returns:
            What was spent by now, for people.

        Raises:
            Rejected: too little is left, or these bits are others than those given before.
            StoreError: the ledger cannot be written.
        """
        assert self._question is not None
        release = Release(self._question.asked, output, sent, self._taken())
        with self._book.alone():
            entries = self._entries()
            before = [entry.release for entry in entries if self._is_same(entry)]
            given = [known.output for known in before if known.output]
            if given and output and given != [output]:
                raise Rejected(
                    "the same order gave another answer than before, as arithmetic that does not "
                    "repeat does; with privacy a second one is not given"
                )
            if not given and (output or _steps([release]) > _steps(before)):
                # A failure takes the same steps as the answer after it, as far as it goes.
                entries = [entry for entry in entries if not self._is_same(entry)]
                self._check(entries, release)
                self._warn(entries)
                entries.append(self._entry(release))
                self._book.write(entries)
        return _spent(entries, self._limit.delta)

    def _is_same(self, entry: Entry) -> bool:
        assert self._question is not None
        return entry.study == self._id and entry.release.asked == self._question.asked

    def _begins(self, sample: str, multiplier: float, passes: PrivatePasses) -> None:
        """Passes are about to begin."""
        assert self._question is not None
        if conflict(self._known, self._question.asked, self._named(sample)):
            raise Rejected(
                "it has answered this round from this model before, with other states or images; "
                "with privacy one sample answers one question"
            )
        self._passes.append((self._named(sample), multiplier, passes))

    def _named(self, sample: str) -> str:
        """Of this study alone: with a public key, another one has the same draws."""
        return hashlib.sha256(f"{self._id} {sample}".encode()).hexdigest()

    def _taken(self) -> tuple[Pass, ...]:
        return tuple(
            Pass(sample, multiplier, passes.steps, passes.sums)
            for sample, multiplier, passes in self._passes
            if passes.sums
        )

    def _entries(self) -> list[Entry]:
        try:
            entries = self._book.entries()
        except StoreError as error:
            _log.error("%s", error)
            raise Rejected(_UNTRUSTED) from error
        told = {entry.round for entry in entries if entry.study == self._id}
        kept = {int(path.stem[6:]) for path in self._states.glob("state-*.safetensors")}
        if kept - told:
            _log.error(
                "%s does not know of round %d of study %s, whose state is kept in %s: it is lost, "
                "or a copy that is too old. Put the newest back, or begin with a new run.",
                self._book.path,
                min(kept - told),
                self._id,
                self._states,
            )
            raise Rejected(_UNTRUSTED)
        return entries

    def _check(self, entries: Iterable[Entry], release: Release) -> None:
        limit = self._limit
        counted = [e.release for e in entries if limit.everywhere or e.study == self._id]
        checked = [(limit.total, [*counted, release])]
        if release.sent:
            checked.append((limit.sent, [one for one in (*counted, release) if one.sent]))
        for most, releases in checked:
            would = released_epsilon(releases, limit.delta)
            if would > most * _ROUNDING:
                _log.error(
                    "A further answer would spend epsilon = %.4g at delta = %g over %s; the "
                    "limit is %.4g.",
                    would,
                    limit.delta,
                    "all studies" if limit.everywhere else "this study",
                    most,
                )
                raise Rejected(
                    "a further answer would spend more privacy of its images than "
                    + ("this party allows" if limit.everywhere else "the study planned")
                )

    def _warn(self, entries: Iterable[Entry]) -> None:
        assert self._question is not None
        number = self._question.round
        if any(e.study == self._id and e.round == number and e.release.output for e in entries):
            _log.warning(
                "The server asked for round %d again with another beginning: both answers count.",
                number,
            )

    def _entry(self, release: Release) -> Entry:
        assert self._question is not None
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return Entry(self._id, self._name, self._question.round, self._delta, now, release)


def spending_lines(folder: Path, limit: float | None, delta: float | None) -> list[str]:
    """What a party's ledger says, for people; nothing where it has never answered with privacy.

    Args:
        folder: of the party.
        limit, delta: the party's own, where it has set them.

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
        again = sorted({e.round for e in own if [x.round for x in own].count(e.round) > 1})
        if again:
            rounds = ", ".join(map(str, again))
            lines.append(f"    asked more than once, from other models: rounds {rounds}")
    if limit is not None:
        lines.append(f"It answers up to ε = {limit:g}, all studies together.")
    return lines


def _spent(entries: Sequence[Entry], delta: float) -> str:
    releases = [entry.release for entry in entries]
    total = released_epsilon(releases, delta)
    answers = "1 answer" if len(releases) == 1 else f"{len(releases)} answers"
    return f"ε = {total:.4g} at δ = {delta:g} ({_steps(releases)} private steps in {answers})"


def _steps(releases: Iterable[Release]) -> int:
    return sum(released_steps(releases).values())


# How much of its images' privacy a party may spend: its own limit, or what a study planned.


@dataclass(frozen=True)
class Limit:
    """How much epsilon may be spent.

    Attributes:
        sent: by answers that leave. total: also by models that stay with the party.
        delta: at which it is counted.
        everywhere: over all studies (the party's own limit), or in this one (what it planned).
    """

    sent: float
    total: float
    delta: float
    everywhere: bool


@dataclass(frozen=True)
class Planned:
    """What a study planned to ask of this party.

    Attributes:
        multiplier: z. batches: of an epoch; images are drawn with probability 1 / batches.
        rounds: of the schedule. steps: private ones in each of these rounds.
        tuning: private steps after them, for a model that stays with the party.
        sends: whether what the rounds give is sent.
    """

    multiplier: float
    batches: int
    rounds: int
    steps: int
    tuning: int
    sends: bool

    def of(self, round: int) -> tuple[Pass, bool]:
        """What a round costs, and whether its answer is sent."""
        late = round >= self.rounds and self.tuning > 0
        steps = self.tuning if late else self.steps
        return Pass("", self.multiplier, self.batches, steps), self.sends and not late

    def limit(self, delta: float) -> Limit:
        """What all of it spends."""

        def spent(steps: int) -> float:
            return composed({(self.multiplier, 1 / self.batches): steps}, delta)

        sent = self.rounds * self.steps
        return Limit(spent(sent), spent(sent + self.tuning), delta, everywhere=False)


def planned(spec: Spec, ledger: ExampleLedger, client: int) -> Planned:
    """What a study asks of a client."""
    batches = round(1 / ledger.rates[client])
    return Planned(
        multiplier=ledger.multipliers[client],
        batches=batches,
        rounds=ledger.rounds,
        steps=ledger.planned[client],
        tuning=finetuning_epochs(spec.algorithm) * batches,
        sends=not sends_nothing(spec.algorithm),
    )


def limit_of(settings: Settings, plan: Planned, delta: float) -> Limit:
    """The party's own limit, or else what the study planned at its delta."""
    most = settings.max_epsilon
    if most is None:
        return plan.limit(delta)
    return Limit(most, most, settings.delta or delta, everywhere=True)


def check_own_limit(settings: Settings, spec: Spec, images: int) -> None:
    """A party with a limit takes part only where it adds the noise itself.

    Raises:
        Rejected: the study asks for none of its noise, or the limit promises nothing.
    """
    if settings.max_epsilon is None:
        return
    if spec.privacy.kind != "example":
        raise Rejected(
            "it has set max_epsilon, and answers only studies whose clients add the noise: "
            'privacy.kind = "example"'
        )
    if (settings.delta or spec.privacy.delta) * images >= 1:
        raise Rejected("the delta at which it counts is as large as one of its images")


# A party's own ledger of privacy: a file beside its studies, one line for every private answer.
#
# ```
# client-N/
#   privacy-ledger.jsonl   a checksum, then an answer per line
# ```
#
# It is written whole, flushed and renamed before an answer leaves, so a kill can leave an answer
# counted that nobody has got, and never one uncounted. It holds for all studies together: the
# images
# are the same.


LEDGER = "privacy-ledger.jsonl"
_LOCK = ".privacy-ledger.lock"
_FORMAT = 1


@dataclass(frozen=True)
class Entry:
    """One answer.

    Attributes:
        study: its id. name: of the study, for people. round: counted from 0.
        delta: of the study. time: when it was first given, UTC.
        release: what it let go of.
    """

    study: str
    name: str
    round: int
    delta: float
    time: str
    release: Release


class PrivacyLedger:
    """The ledger in a party's folder.

    Every look reads the file: nothing else is believed. One process writes at a time.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LEDGER

    def entries(self) -> list[Entry]:
        """All answers so far; none where there is no file.

        Raises:
            StoreError: it cannot be read, or is not what was written.
        """
        try:
            content = read_text(self.path)
        except FileNotFoundError:
            return []
        except (OSError, InputError) as error:
            raise self._damaged(str(error)) from error
        seal, _, lines = content.partition("\n")
        if seal != _seal(lines):
            raise self._damaged("its checksum is another")
        try:
            return [_entry(parse_json(line)) for line in lines.splitlines()]
        except (KeyError, TypeError, ValueError) as error:
            raise self._damaged(f"a line is none of ours ({type(error).__name__})") from error

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Within this context no other process writes.

        Raises:
            StoreError: the folder cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle = self.path.with_name(_LOCK).open("a")
        except OSError as error:
            raise StoreError(f"{self.path} cannot be written: {error}.") from error
        with handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def write(self, entries: list[Entry]) -> None:
        """Put these in place of what is there, durably.

        Raises:
            StoreError: it cannot be written; what was there is as it was.
        """
        lines = "".join(json.dumps(asdict(entry), sort_keys=True) + "\n" for entry in entries)
        write_text(self.path, f"{_seal(lines)}\n{lines}")

    def _damaged(self, why: str) -> StoreError:
        return StoreError(
            f"{self.path} cannot be trusted: {why}. It says how much of its images' privacy this "
            "party has spent; put back the newest copy of it, and let no study train before that."
        )


def _seal(lines: str) -> str:
    digest = hashlib.sha256(lines.encode()).hexdigest()
    return json.dumps({"format": _FORMAT, "sha256": digest})


def _entry(held: dict[str, Any]) -> Entry:
    told = held.pop("release")
    passes = tuple(Pass(**one) for one in told.pop("passes"))
    return Entry(**held, release=Release(**told, passes=passes))
