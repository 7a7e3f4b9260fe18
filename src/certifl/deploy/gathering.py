"""Certificates of clients elsewhere: who has finished, and what each of them lets go."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord

from certifl.certification import Certificates
from certifl.deploy.crowd import POLL, Crowd
from certifl.deploy.curves import curve_of, rows_from
from certifl.deploy.line import Lost, Node
from certifl.deploy.messages import Content, Garbled, encode, fingerprint_of
from certifl.deploy.remote import Patience, fault_of, last_counted
from certifl.deploy.settings import check_share
from certifl.errors import WorkError
from certifl.federated import ServerState
from certifl.federated.base import needed_by_clients
from certifl.federated.states import ClientState
from certifl.models import fingerprint
from certifl.perturbations import describe
from certifl.spec import Spec
from certifl.store.atomic import read_json, write_json
from certifl.store.checkpoints import StoredRound
from certifl.store.runs import RunFolder

__all__ = ["Asked", "gather", "store_told"]

Report = Callable[[str, int, int, str], None]
_ATTEMPTS = 3


@dataclass(frozen=True)
class Asked:
    """What clients are asked for.

    Attributes:
        share: the most they are asked to tell. piece: seconds of certification per order.
        patience: how long is waited. report: told about progress.
    """

    share: str
    piece: float
    patience: Patience
    report: Report | None = None

    def __post_init__(self) -> None:
        check_share(self.share)


def gather(folder: RunFolder, spec: Spec, crowd: Crowd, last: StoredRound, asked: Asked) -> None:
    """Let every client certify its own test images, and store what it tells.

    Raises:
        WorkError: a client did not finish; what others told is kept, the same command goes on.
    """
    _Gathering(folder, spec, crowd, last, asked).run()
    store_told(folder, spec)


def _told(folder: RunFolder, client: int) -> Path:
    return folder.votes(client).with_name(f"told-{client:05d}.json")


def _rows(folder: RunFolder, client: int) -> Path:
    return folder.votes(client).with_name(f"rows-{client:05d}.parquet")


@dataclass(frozen=True)
class _Order:
    """An order under way: the name of its answer, until when it is waited for, on which node."""

    name: str
    until: float
    node: Node


@dataclass
class _Gathering:
    folder: RunFolder
    spec: Spec
    crowd: Crowd
    last: StoredRound
    asked: Asked
    _cast: dict[int, tuple[int, int]] = field(default_factory=dict)
    _failed: dict[int, list[str]] = field(default_factory=dict)
    _under_way: dict[int, _Order] = field(default_factory=dict)
    _common: str | None = None
    _broadcast: tuple[str, Mapping[str, ArrayRecord]] | None = None

    def run(self) -> None:
        """Ask until everybody has finished, or nobody who has not will."""
        everyone = range(self.spec.clients.count)
        remaining = {c for c in everyone if not _told(self.folder, c).is_file()}
        if not remaining:
            return
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
            elif time.monotonic() - heard > self.asked.patience.absent:
                raise WorkError(self._missing(remaining))
            before = len(self._under_way)
            for client, order in list(self._under_way.items()):
                if self._finished_or_failed(client, order):
                    remaining.discard(client)
            if len(self._under_way) == before:
                time.sleep(POLL)

    def _ask(self, client: int) -> None:
        member = self.crowd.members.get(client)
        if member is None or len(self._failed.get(client, ())) >= _ATTEMPTS:
            return
        assert self._broadcast is not None
        named, encoded = self._broadcast
        order = Content(self._order(client, named), encoded=encoded)
        patience = self.asked.patience.answer
        name = self.crowd.line.send(member.node.id, order, patience)
        self._under_way[client] = _Order(name, time.monotonic() + patience, member.node)

    def _finished_or_failed(self, client: int, order: _Order) -> bool:
        """Whether a client has finished; one that failed or was restarted is asked again."""
        answer = self.crowd.line.take(order.name)
        member = self.crowd.members.get(client)
        if answer is not None:
            del self._under_way[client]
            return self._take(client, answer)
        if time.monotonic() > order.until:
            del self._under_way[client]
            self._fail(client, "no answer came in time")
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

    def _take(self, client: int, answer: Content | Lost) -> bool:
        """Whether a client has finished."""
        if isinstance(answer, Lost):
            self._fail(client, answer.reason)
            return False
        fault = fault_of(answer)
        if fault is not None:
            self._fail(client, fault.reason)
            return False
        try:
            return self._finished(client, answer)
        except Garbled as error:
            self._fail(client, str(error))
            return False

    def _finished(self, client: int, answer: Content) -> bool:
        facts = answer.facts.get("certified")
        if not isinstance(facts, dict) or answer.facts.get("client") != client:
            raise Garbled("its answer is none of this client's certification")
        if self._common is not None and facts.get("model") != self._common:
            raise Garbled("it certified another model than the one it was sent (fingerprint)")
        self._progress(client, facts)
        if facts.get("done") is not True:
            return False
        told: dict[str, Any] = {"share": facts.get("share"), "client": client}
        if "plain" in facts:
            told["plain"] = _checked_plain(facts["plain"])
        elif facts.get("share") == "curve":
            told["curve"] = _checked_curve(facts.get("curve"), self.spec, client)
        elif facts.get("share") == "rows":
            rows = rows_from(answer.parts.get("rows", {}))
            if set(rows.client.tolist()) != {client}:
                raise Garbled("its rows are of another client")
            path = _rows(self.folder, client)
            path.parent.mkdir(parents=True, exist_ok=True)
            rows.save(path)
        write_json(_told(self.folder, client), told)
        return True

    def _progress(self, client: int, facts: Mapping[str, Any]) -> None:
        cast, at_most = facts.get("cast"), facts.get("at_most")
        if isinstance(cast, int) and isinstance(at_most, int):
            self._cast[client] = (cast, at_most)
        if self.asked.report is not None and self._cast:
            sums = [sum(part) for part in zip(*self._cast.values(), strict=True)]
            share = self.spec.clients.count / len(self._cast)
            self.asked.report("certifying", sums[0], int(sums[1] * share), "votes at most")

    def _fail(self, client: int, why: str) -> None:
        self._failed.setdefault(client, []).append(why)

    def _missing(self, open_: set[int]) -> str:
        reasons = [
            f"client {client} ({self._failed.get(client, ['it is not there'])[-1]})"
            for client in sorted(open_)
        ]
        return (
            f"{len(open_)} of {self.spec.clients.count} clients have not certified: "
            f"{'; '.join(reasons)}. Training is finished, and what the others told is kept. See "
            "to these clients, then repeat the command."
        )


def _checked_plain(told: Any) -> dict[str, int]:
    try:
        images, correct = int(told["images"]), int(told["correct"])
    except (KeyError, TypeError, ValueError) as error:
        raise Garbled("its accuracy is garbled") from error
    if not 0 <= correct <= images or images < 1:
        raise Garbled("its accuracy is impossible")
    return {"images": images, "correct": correct}


def _checked_curve(told: Any, spec: Spec, client: int) -> dict[str, Any]:
    """A curve that can be one: falling counts on the study's grid, a possible ACR."""
    try:
        radii = [float(r) for r in told["radii"]]
        counts = [int(c) for c in told["correct"]]
        images, acr = int(told["images"]), float(told["acr"])
        conditions = dict(told["conditions"])
    except (KeyError, TypeError, ValueError) as error:
        raise Garbled(f"its curve is garbled ({type(error).__name__})") from error
    perturbation = spec.perturbations()[client]
    if perturbation is not None and conditions.get("description") == describe(perturbation):
        grid = spec.certification.settings(client).grid(perturbation)
        if radii != [float(r) for r in grid]:
            raise Garbled("its curve has other radii than the study's grid")
    falling = all(a >= b for a, b in itertools.pairwise(counts))
    if not (falling and images >= 1 and counts and counts[0] <= images and counts[-1] >= 0):
        raise Garbled("its curve is impossible: counts must fall from at most all images")
    if len(counts) != len(radii) or not (math.isfinite(acr) and acr >= 0):
        raise Garbled("its curve is impossible")
    return {
        "radii": radii,
        "correct": counts,
        "images": images,
        "acr": acr,
        "conditions": conditions,
    }


def store_told(folder: RunFolder, spec: Spec) -> None:
    """Rows of everybody as certificates; or else the curves that were told."""
    told = {client: read_json(_told(folder, client)) for client in range(spec.clients.count)}
    plain = {str(c): t["plain"] for c, t in told.items() if "plain" in t}
    certifying = {c: t for c, t in told.items() if "plain" not in t}
    shares = {str(c): t["share"] for c, t in told.items()}
    known = folder.manifest()["deployment"]
    folder.update({"deployment": {**known, "shares": shares, "plain": plain}})
    if all(t["share"] == "rows" for t in certifying.values()):
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
