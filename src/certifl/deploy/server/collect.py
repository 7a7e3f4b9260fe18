"""Certificates of remote clients: which have finished, and what each of them shares."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord

from certifl.certification import Certificates
from certifl.deploy.client.curves import CertificateChecks, curve_of
from certifl.deploy.client.settings import lower_level
from certifl.deploy.messages import Content, NoReply, encode, fingerprint_of
from certifl.deploy.schemas import Certified, MalformedMessage, Reply, checked
from certifl.deploy.server.remote_runner import (
    FAILED,
    POLL,
    ClientRegistry,
    Pending,
    fault_of,
    request_fields,
)
from certifl.deploy.server.start import Options, record
from certifl.errors import WorkError, one_line
from certifl.federated.algorithms.base import needed_by_clients
from certifl.federated.faults import required_clients
from certifl.federated.states import ClientState, ServerState
from certifl.models import fingerprint
from certifl.runs.atomic import read_json, write_json
from certifl.runs.checkpoints import StoredRound
from certifl.runs.folder import RunFolder
from certifl.spec import Spec

_log = logging.getLogger(__name__)
_ATTEMPTS = 3
_MOST_IDLE = 2_000
"""Answers in a row without progress after which a client fails. Clients report votes in tenths of
all, and a tenth may take a tenth of `_MOST_PIECES`."""
_MOST_PIECES = 20_000
"""A client whose votes arrive so slowly that more pieces would be needed fails."""
_SOON = 5.0
"""Seconds that an unfinished piece takes at least, if it was to take longer."""


def collect_certificates(
    folder: RunFolder,
    spec: Spec,
    registry: ClientRegistry,
    last: StoredRound,
    options: Options,
    tests: Mapping[int, int],
) -> None:
    """Let every client certify its own test images, and store what it shares.

    A client whose answers are impossible is left out, with its reason; so is one that does not
    match the study. `tests` has the numbers of test images that clients reported.

    Raises:
        WorkError: a client did not finish, or too few are left; what others shared is saved, and
            the same command resumes.
    """
    left_out = _Collector(folder, spec, registry, last, options, tests).run()
    record(folder, {"left_out": {str(client): why for client, why in left_out.items()}})
    store_shared(folder, spec)


def _rows(folder: RunFolder, client: int) -> Path:
    return folder.votes(client).with_name(f"rows-{client:05d}.parquet")


@dataclass
class _ClientProgress:
    """Progress of a client's certification, as its answers report.

    Attributes:
        cast, at_most: votes, as the client reports them. pieces: answers so far.
        idle: answers in a row that reported no progress.
    """

    cast: int = -1
    at_most: int = 0
    pieces: int = 0
    idle: int = 0

    def advance(self, answer: Certified, took: float, piece: float) -> None:
        """Take an answer that is not the last one; MalformedMessage if at this pace it never ends.

        `took` are seconds since the request, `piece` those asked for.
        """
        if took < min(piece / 2, _SOON):
            raise MalformedMessage(
                f"it stopped after {took:.1f} of {piece:g} seconds with votes left to cast"
            )
        self.pieces += 1
        if self.pieces > _MOST_PIECES:
            raise MalformedMessage(f"its certification did not end within {_MOST_PIECES} pieces")
        if answer.share != "none":
            self._count(answer)

    def _count(self, answer: Certified) -> None:
        """Compare votes with those of the answer before; a client that shares none has none."""
        if answer.cast is None or answer.at_most is None or answer.cast > answer.at_most:
            raise MalformedMessage("it does not say how many votes it has cast, or more than all")
        self.idle = 0 if answer.cast > self.cast else self.idle + 1
        self.cast, self.at_most = max(self.cast, answer.cast), answer.at_most
        if self.idle >= _MOST_IDLE:
            raise MalformedMessage(f"its certification makes no progress at {self.cast} votes")
        slowest = (self.cast + answer.at_most // 10 + 1) * _MOST_PIECES  # it reports whole tenths
        if slowest < answer.at_most * self.pieces:
            raise MalformedMessage(f"its certification would not end within {_MOST_PIECES} pieces")


@dataclass
class _Collector:
    folder: RunFolder
    spec: Spec
    registry: ClientRegistry
    last: StoredRound
    options: Options
    tests: Mapping[int, int]
    _progress_of: dict[int, _ClientProgress] = field(default_factory=dict)
    _failed: dict[int, list[str]] = field(default_factory=dict)
    _wrong: set[int] = field(default_factory=set)
    _pending: dict[int, Pending] = field(default_factory=dict)
    _common: str | None = None
    _broadcast: tuple[str, Mapping[str, ArrayRecord]] = ("", {})

    def run(self) -> dict[int, str]:
        """Ask until all have finished, or none of the others will; why clients are left out."""
        everyone = range(self.spec.clients.count)
        remaining = {c for c in everyone if not self.folder.shared(c).is_file()}
        if not remaining:
            return {}
        self._prepare()
        last_pending = time.monotonic()
        while remaining:
            self.registry.refresh()
            for client in sorted(remaining - self._pending.keys()):
                self._ask(client)
            if self._pending:
                last_pending = time.monotonic()
            elif remaining <= self._unusable(remaining):
                return self._left_out(remaining)
            elif time.monotonic() - last_pending > self.options.timeouts.absent:
                raise WorkError(self._missing(remaining))
            before = len(self._pending)
            for client, request in list(self._pending.items()):
                if self._finished_or_failed(client, request):
                    remaining.discard(client)
            if len(self._pending) == before:
                time.sleep(POLL)
        return {}

    def _prepare(self) -> None:
        """Encode what clients need of the last round, once for all of them."""
        algorithm, parts = self.spec.build_algorithm(), self.last.server()
        if not algorithm.keeps_client_state:  # every client deploys the same model
            state = ServerState(self.last.number, parts)
            self._common = fingerprint(algorithm.deployed(state, ClientState()))
        parts = needed_by_clients(algorithm, parts)
        self._broadcast = fingerprint_of(parts), encode(parts)

    def _unusable(self, clients: set[int]) -> set[int]:
        """Those whose answers are impossible, repeatedly, or that do not match the study."""
        failed = {c for c in self._wrong if len(self._failed.get(c, ())) >= _ATTEMPTS}
        unfit = {c for c, kind in self.registry.kinds.items() if kind != FAILED}
        return clients & (failed | (unfit - self.registry.connected.keys()))

    def _left_out(self, clients: set[int]) -> dict[int, str]:
        """Why clients are left out; WorkError where too few remain."""
        count = self.spec.clients.count
        if count - len(clients) < required_clients(count, None):
            raise WorkError(self._missing(clients))
        reasons = {client: self._reason(client) for client in sorted(clients)}
        for client, why in reasons.items():
            _log.warning("Client %d is left out of the certificates: %s.", client, why)
        return reasons

    def _reason(self, client: int) -> str:
        refused = self.registry.refused.get(client)
        return self._failed.get(client, [refused or "it is not connected"])[-1]

    def _ask(self, client: int) -> None:
        if len(self._failed.get(client, ())) >= _ATTEMPTS:
            return
        broadcast, encoded = self._broadcast
        fields = {
            **request_fields("certify", self.last, client, broadcast),
            "piece": self.options.piece,
            "share": self.options.share,
        }
        asked = self.registry.ask(client, fields, encoded, self.options.timeouts.answer)
        if asked is not None:
            self._pending[client] = asked

    def _finished_or_failed(self, client: int, request: Pending) -> bool:
        """Whether a client has finished; one that failed or was restarted is asked again."""
        answer = self.registry.transport.take_reply(request.name)
        if answer is not None:
            del self._pending[client]
            return self._handle(client, answer, time.monotonic() - request.since)
        if time.monotonic() > request.until:
            del self._pending[client]
            self._fail(client, "no answer came in time", wrong=False)
        elif self.registry.restarted(request):
            del self._pending[client]
        return False

    def _handle(self, client: int, answer: Content | NoReply, took: float) -> bool:
        """Whether a client has finished."""
        if isinstance(answer, NoReply):
            self._fail(client, answer.reason, wrong=answer.malformed)
            return False
        try:
            reply = checked(Reply, answer.fields, "not an answer to certify")
            if reply.client != client:
                raise MalformedMessage(f"it answered as client {reply.client}")
            fault = fault_of(reply)
            if fault is None:
                return self._finished(client, answer, took)
            self._fail(client, fault.reason, wrong=False)
        except MalformedMessage as error:
            self._fail(client, f"its answer is malformed, {error}", wrong=True)
        return False

    def _finished(self, client: int, answer: Content, took: float) -> bool:
        what = "not an answer about this client's certification"
        certified = checked(Certified, answer.fields.get("certified"), what)
        if self._common is not None and certified.model != self._common:
            raise MalformedMessage(
                "it certified another model than the one it was sent (fingerprint)"
            )
        if lower_level(certified.share, self.options.share) != certified.share:
            raise MalformedMessage(
                f"it shares {certified.share}, and {self.options.share} was asked for"
            )
        if not certified.done:
            progress = self._progress_of.setdefault(client, _ClientProgress())
            progress.advance(certified, took, self.options.piece)
            self._progress()
            return False
        self._store(client, certified, answer)
        most = certified.at_most or 0
        self._progress_of[client] = _ClientProgress(min(certified.cast or 0, most), most)
        self._progress()
        return True

    def _store(self, client: int, certified: Certified, answer: Content) -> None:
        """Store what a client shares at the end, once it has been checked."""
        checks = self._checks(client)
        shared: dict[str, Any] = {"share": certified.share, "client": client}
        uncertified = self.spec.perturbations()[client] is None
        if uncertified and (certified.plain is not None or not checks.own):
            if certified.plain is not None:
                if certified.plain.correct > certified.plain.images:
                    raise MalformedMessage("its accuracy is impossible")
                checks.check_count(certified.plain.images)
                shared["plain"] = certified.plain.model_dump()
        elif certified.share == "curve":
            if certified.curve is None:
                raise MalformedMessage("its curve is missing")
            shared["curve"] = checks.curve(certified.curve)
        elif certified.share == "rows":
            rows = checks.rows(answer.parts.get("rows", {}), certified.model)
            path = _rows(self.folder, client)
            path.parent.mkdir(parents=True, exist_ok=True)
            rows.save(path)
        write_json(self.folder.shared(client), shared)

    def _checks(self, client: int) -> CertificateChecks:
        """What a client's certificates are checked against."""
        reported = self.tests.get(client)
        requested = self.spec.certification.images
        images = min((n for n in (reported, requested) if n is not None), default=None)
        own = self.registry.study.get("own_perturbation") is True
        classes = self.folder.manifest()["data"]["num_classes"]
        return CertificateChecks(
            self.spec, client, images, classes, own, exact=reported is not None
        )

    def _progress(self) -> None:
        if self.options.report is not None:
            reported = [one for one in self._progress_of.values() if one.at_most]
            if reported:
                factor = self.spec.clients.count / len(reported)
                at_most = int(sum(one.at_most for one in reported) * factor)
                cast = sum(max(one.cast, 0) for one in reported)
                self.options.report("certifying", cast, at_most, "votes at most")

    def _fail(self, client: int, why: str, wrong: bool) -> None:
        self._failed.setdefault(client, []).append(one_line(why, 500))
        if wrong:
            self._wrong.add(client)

    def _missing(self, open_: set[int]) -> str:
        reasons = [f"client {client} ({self._reason(client)})" for client in sorted(open_)]
        return (
            f"{len(open_)} of {self.spec.clients.count} clients have not certified: "
            f"{'; '.join(reasons)}. Training is finished, and what the others sent is stored. "
            "Check these clients, then repeat the command."
        )


def store_shared(folder: RunFolder, spec: Spec) -> None:
    """Store the rows of all clients as certificates, or else the curves that were sent."""
    clients = [c for c in range(spec.clients.count) if folder.shared(c).is_file()]
    shared = {client: read_json(folder.shared(client)) for client in clients}
    plain = {str(c): s["plain"] for c, s in shared.items() if "plain" in s}
    certifying = {c: s for c, s in shared.items() if "plain" not in s}
    shares = {str(c): s["share"] for c, s in shared.items()}
    record(folder, {"shares": shares, "plain": plain})
    if certifying and all(s["share"] == "rows" for s in certifying.values()):
        parts = [Certificates.load(_rows(folder, c)) for c in certifying]
        together = Certificates.concatenate(parts)
        models = {str(int(p.client[0])): p.conditions["model_fingerprint"] for p in parts}
        conditions = {**together.conditions, "model_fingerprint": models}
        folder.save(dataclasses.replace(together, conditions=conditions))
        cast = sum(int(p.votes.sum()) + int(p.selection_counts.sum()) for p in parts)
        seconds = round(sum(float(p.seconds.sum()) for p in parts), 3)
        precision = parts[0].conditions["precision"]
        folder.update({"votes": cast, "certification_seconds": seconds, "precision": precision})
        _count_tests(folder, len(together))
        return
    curves: dict[str, Any] = {}
    for client, entry in certifying.items():
        if entry["share"] == "rows":
            rows = Certificates.load(_rows(folder, client))
            perturbation = spec.perturbations()[client]
            assert perturbation is not None
            curves[str(client)] = curve_of(rows, perturbation, spec.certification.settings(client))
        elif entry["share"] == "curve":
            curves[str(client)] = entry["curve"]
    write_json(folder.curves, {"format": 1, "clients": curves})
    _count_tests(folder, sum(entry["images"] for entry in curves.values()))


def _count_tests(folder: RunFolder, images: int) -> None:
    data = folder.manifest()["data"]
    folder.update({"data": {**data, "test_images": images}})
