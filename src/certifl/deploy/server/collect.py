"""Certificates of clients elsewhere: who has finished, and what each of them lets go."""

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
from certifl.deploy.client.curves import Asking, curve_of
from certifl.deploy.client.settings import check_share, less
from certifl.deploy.server.clients import POLL, ClientRegistry
from certifl.deploy.server.remote_runner import Timeouts, fault_of, last_counted
from certifl.deploy.transport.messages import Content, encode, fingerprint_of
from certifl.deploy.transport.schemas import Certified, MalformedMessage, Reply, checked
from certifl.deploy.transport.transport import Node, NoReply
from certifl.errors import WorkError, one_line
from certifl.federated.algorithms.base import needed_by_clients
from certifl.federated.faults import required_clients
from certifl.federated.states import ClientState, ServerState
from certifl.models import fingerprint
from certifl.progress import StageCallback
from certifl.runs.atomic import read_json, write_json
from certifl.runs.checkpoints import StoredRound
from certifl.runs.folder import RunFolder
from certifl.spec import Spec

_log = logging.getLogger(__name__)
_ATTEMPTS = 3
_STANDSTILLS = 2_000
"""So many answers in a row without progress, and a client is not waited for any longer. Clients
report votes in tenths of all, and a tenth may take a tenth of `_MOST_PIECES`."""
_MOST_PIECES = 20_000
"""A client whose votes come so slowly that more pieces would be needed is not waited for."""
_SOON = 5.0
"""Seconds; an unfinished piece that was to take longer comes back no sooner than this."""


@dataclass(frozen=True)
class Asked:
    """What clients are asked for.

    Attributes:
        share: the most they are asked to tell. piece: seconds of certification per order.
        patience: how long is waited. report: told about progress.
    """

    share: str
    piece: float
    patience: Timeouts
    report: StageCallback | None = None

    def __post_init__(self) -> None:
        check_share(self.share)


def gather(
    folder: RunFolder, spec: Spec, crowd: ClientRegistry, last: StoredRound, asked: Asked
) -> None:
    """Let every client certify its own test images, and store what it shares.

    A client whose answers cannot be is left out, by name and reason; so is one that does not fit
    the study.

    Raises:
        WorkError: a client did not finish, or too few are left; what others shared is kept, and
            the same command resumes.
    """
    left_out = _Gathering(folder, spec, crowd, last, asked).run()
    deployment = folder.manifest()["deployment"]
    told = {str(client): why for client, why in left_out.items()}
    folder.update({"deployment": {**deployment, "left_out": told}})
    store_told(folder, spec)


def _told(folder: RunFolder, client: int) -> Path:
    return folder.votes(client).with_name(f"told-{client:05d}.json")


def _rows(folder: RunFolder, client: int) -> Path:
    return folder.votes(client).with_name(f"rows-{client:05d}.parquet")


@dataclass(frozen=True)
class _Order:
    """An order under way.

    Attributes:
        name: of its answer. until: when it is given up. node: whom it went to. since: when.
    """

    name: str
    until: float
    node: Node
    since: float


@dataclass
class _Standing:
    """How far a client's certification is, as its answers say.

    Attributes:
        cast, at_most: votes, as the client reports them. pieces: answers so far.
        idle: answers in a row that reported no progress.
    """

    cast: int = -1
    at_most: int = 0
    pieces: int = 0
    idle: int = 0

    def advance(self, told: Certified, took: float, piece: float) -> None:
        """Take an answer that is not the last one.

        Args:
            told: it. took: seconds from order to answer. piece: seconds that were asked for.

        Raises:
            MalformedMessage: at this pace it never ends, or it cannot be true.
        """
        if took < min(piece / 2, _SOON):
            raise MalformedMessage(
                f"it stopped after {took:.1f} of {piece:g} seconds with votes to cast"
            )
        self.pieces += 1
        if self.pieces > _MOST_PIECES:
            raise MalformedMessage(f"its certification did not end within {_MOST_PIECES} pieces")
        if told.share != "none":
            self._count(told)

    def _count(self, told: Certified) -> None:
        """Compare votes with those of the answer before; a client that shares none has none."""
        if told.cast is None or told.at_most is None or told.cast > told.at_most:
            raise MalformedMessage("it says not how many votes it has cast, or more than all")
        self.idle = 0 if told.cast > self.cast else self.idle + 1
        self.cast, self.at_most = max(self.cast, told.cast), told.at_most
        if self.idle >= _STANDSTILLS:
            raise MalformedMessage(f"its certification is at a standstill at {self.cast} votes")
        slowest = (self.cast + told.at_most // 10 + 1) * _MOST_PIECES  # it reports whole tenths
        if slowest < told.at_most * self.pieces:
            raise MalformedMessage(f"its certification would not end within {_MOST_PIECES} pieces")


@dataclass
class _Gathering:
    folder: RunFolder
    spec: Spec
    crowd: ClientRegistry
    last: StoredRound
    asked: Asked
    _standing: dict[int, _Standing] = field(default_factory=dict)
    _failed: dict[int, list[str]] = field(default_factory=dict)
    _wrong: set[int] = field(default_factory=set)
    _under_way: dict[int, _Order] = field(default_factory=dict)
    _common: str | None = None
    _broadcast: tuple[str, Mapping[str, ArrayRecord]] | None = None

    def run(self) -> dict[int, str]:
        """Ask until everybody has finished, or nobody who has not will.

        Returns:
            Why clients are left out, by number.
        """
        everyone = range(self.spec.clients.count)
        remaining = {c for c in everyone if not _told(self.folder, c).is_file()}
        if not remaining:
            return {}
        parts = self.last.server()
        self._common = self._common_model(parts)
        parts = needed_by_clients(self.spec.build_algorithm(), parts)
        self._broadcast = fingerprint_of(parts), encode(parts)
        del parts
        heard = time.monotonic()
        while remaining:
            self.crowd.look()
            for client in sorted(remaining - self._under_way.keys()):
                self._ask(client)
            if self._under_way:
                heard = time.monotonic()
            elif remaining <= self._unusable(remaining):
                return self._left_out(remaining)
            elif time.monotonic() - heard > self.asked.patience.absent:
                raise WorkError(self._missing(remaining))
            before = len(self._under_way)
            for client, order in list(self._under_way.items()):
                if self._finished_or_failed(client, order):
                    remaining.discard(client)
            if len(self._under_way) == before:
                time.sleep(POLL)
        return {}

    def _unusable(self, clients: set[int]) -> set[int]:
        """Those whose answers cannot be, again and again, or who do not fit the study."""
        given_up = {c for c in self._wrong if len(self._failed.get(c, ())) >= _ATTEMPTS}
        absent = self.crowd.unfit - self.crowd.members.keys()
        return clients & (given_up | absent)

    def _left_out(self, clients: set[int]) -> dict[int, str]:
        """Why clients are left out, if enough remain.

        Raises:
            WorkError: too few do.
        """
        count = self.spec.clients.count
        if count - len(clients) < required_clients(count, None):
            raise WorkError(self._missing(clients))
        reasons = {client: self._reason(client) for client in sorted(clients)}
        for client, why in reasons.items():
            _log.warning("Client %d is left out of the certificates: %s.", client, why)
        return reasons

    def _reason(self, client: int) -> str:
        refused = self.crowd.refused.get(client)
        return self._failed.get(client, [refused or "it is not there"])[-1]

    def _ask(self, client: int) -> None:
        member = self.crowd.members.get(client)
        if member is None or len(self._failed.get(client, ())) >= _ATTEMPTS:
            return
        assert self._broadcast is not None
        named, encoded = self._broadcast
        order = Content(self._order(client, named), encoded=encoded)
        patience = self.asked.patience.answer
        name = self.crowd.line.send(member.node.id, order, patience)
        now = time.monotonic()
        self._under_way[client] = _Order(name, now + patience, member.node, now)

    def _finished_or_failed(self, client: int, order: _Order) -> bool:
        """Whether a client has finished; one that failed or was restarted is asked again."""
        answer = self.crowd.line.take(order.name)
        member = self.crowd.members.get(client)
        if answer is not None:
            del self._under_way[client]
            return self._take(client, answer, time.monotonic() - order.since)
        if time.monotonic() > order.until:
            del self._under_way[client]
            self._fail(client, "no answer came in time", wrong=False)
        elif member is not None and member.node != order.node:
            del self._under_way[client]
        return False

    def _order(self, client: int, named: str) -> dict[str, Any]:
        return {
            "order": "certify",
            "study": dict(self.crowd.study),
            "client": client,
            "round": self.last.number,
            "counted": last_counted(self.last, client),
            "broadcast": named,
            "piece": self.asked.piece,
            "share": self.asked.share,
        }

    def _common_model(self, parts: Any) -> str | None:
        """Fingerprint of the model that every client deploys; None where each has its own."""
        algorithm = self.spec.build_algorithm()
        if algorithm.keeps_client_state:
            return None
        state = ServerState(self.last.number, parts)
        return fingerprint(algorithm.deployed(state, ClientState()))

    def _take(self, client: int, answer: Content | NoReply, took: float) -> bool:
        """Whether a client has finished."""
        if isinstance(answer, NoReply):
            self._fail(client, answer.reason, wrong=answer.garbled)
            return False
        try:
            reply = checked(Reply, answer.facts, "no answer to certify")
            if reply.client != client:
                raise MalformedMessage(f"it answered as client {reply.client}")
            fault = fault_of(reply)
            if fault is None:
                return self._finished(client, answer, took)
            self._fail(client, fault.reason, wrong=False)
        except MalformedMessage as error:
            self._fail(client, f"its answer is garbled, {error}", wrong=True)
        return False

    def _finished(self, client: int, answer: Content, took: float) -> bool:
        what = "none of this client's certification"
        told = checked(Certified, answer.facts.get("certified"), what)
        if self._common is not None and told.model != self._common:
            raise MalformedMessage(
                "it certified another model than the one it was sent (fingerprint)"
            )
        if less(told.share, self.asked.share) != told.share:
            raise MalformedMessage(f"it shares {told.share}, and {self.asked.share} was asked for")
        if not told.done:
            standing = self._standing.setdefault(client, _Standing())
            standing.advance(told, took, self.asked.piece)
            self._progress()
            return False
        self._store(client, told, answer)
        most = told.at_most or 0
        self._standing[client] = _Standing(min(told.cast or 0, most), most)
        self._progress()
        return True

    def _store(self, client: int, told: Certified, answer: Content) -> None:
        """Keep what a client shares at the end, once it is known to be possible."""
        asking = self._asking(client)
        kept: dict[str, Any] = {"share": told.share, "client": client}
        if self.spec.perturbations()[client] is None and not asking.own:
            if told.plain is not None:
                if told.plain.correct > told.plain.images:
                    raise MalformedMessage("its accuracy is impossible")
                kept["plain"] = {
                    "images": asking.images_of(told.plain.images),
                    "correct": told.plain.correct,
                }
        elif told.share == "curve":
            if told.curve is None:
                raise MalformedMessage("its curve is missing")
            kept["curve"] = asking.curve(told.curve)
        elif told.share == "rows":
            rows = asking.rows(answer.parts.get("rows", {}), told.model)
            path = _rows(self.folder, client)
            path.parent.mkdir(parents=True, exist_ok=True)
            rows.save(path)
        write_json(_told(self.folder, client), kept)

    def _asking(self, client: int) -> Asking:
        """What is known of a client's certificates: of its images, what it said as it joined."""
        manifest = self.folder.manifest()
        said = manifest["deployment"].get("test_images", {}).get(str(client))
        asked = self.spec.certification.images
        images = min((n for n in (said, asked) if n is not None), default=None)
        own = self.crowd.study.get("own_perturbation") is True
        classes = manifest["data"]["num_classes"]
        return Asking(self.spec, client, images, classes, own, exact=said is not None)

    def _progress(self) -> None:
        if self.asked.report is not None:
            known = [one for one in self._standing.values() if one.at_most]
            if known:
                share = self.spec.clients.count / len(known)
                at_most = int(sum(one.at_most for one in known) * share)
                cast = sum(max(one.cast, 0) for one in known)
                self.asked.report("certifying", cast, at_most, "votes at most")

    def _fail(self, client: int, why: str, wrong: bool) -> None:
        self._failed.setdefault(client, []).append(one_line(why, 500))
        if wrong:
            self._wrong.add(client)

    def _missing(self, open_: set[int]) -> str:
        reasons = [f"client {client} ({self._reason(client)})" for client in sorted(open_)]
        return (
            f"{len(open_)} of {self.spec.clients.count} clients have not certified: "
            f"{'; '.join(reasons)}. Training is finished, and what the others told is kept. See "
            "to these clients, then repeat the command."
        )


def store_told(folder: RunFolder, spec: Spec) -> None:
    """Rows of everybody as certificates; or else the curves that were told."""
    clients = [c for c in range(spec.clients.count) if _told(folder, c).is_file()]
    told = {client: read_json(_told(folder, client)) for client in clients}
    plain = {str(c): t["plain"] for c, t in told.items() if "plain" in t}
    certifying = {c: t for c, t in told.items() if "plain" not in t}
    shares = {str(c): t["share"] for c, t in told.items()}
    known = folder.manifest()["deployment"]
    folder.update({"deployment": {**known, "shares": shares, "plain": plain}})
    if certifying and all(t["share"] == "rows" for t in certifying.values()):
        parts = [Certificates.load(_rows(folder, c)) for c in certifying]
        together = Certificates.concatenate(parts)
        models = {str(int(p.client[0])): p.conditions["model_fingerprint"] for p in parts}
        conditions = {**together.conditions, "model_fingerprint": models}
        folder.save_certificates(dataclasses.replace(together, conditions=conditions))
        folder.update(_spent(parts))
        _count_tests(folder, {c: len(p) for c, p in zip(certifying, parts, strict=True)})
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
    _count_tests(folder, {int(c): entry["images"] for c, entry in curves.items()})


def _count_tests(folder: RunFolder, images: Mapping[int, int]) -> None:
    data = folder.manifest()["data"]
    folder.update({"data": {**data, "test_images": sum(images.values())}})


def _spent(parts: list[Certificates]) -> dict[str, Any]:
    cast = sum(int(p.votes.sum()) + int(p.selection_counts.sum()) for p in parts)
    return {
        "votes": cast,
        "certification_seconds": round(sum(float(p.seconds.sum()) for p in parts), 3),
        "precision": parts[0].conditions["precision"],
    }
