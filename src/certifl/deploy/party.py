"""A client's half of a federation: answers to the server's orders, whatever carries them.

The server names a study (its spec as text, an id) and asks for one thing at a time:

| order | answer |
|---|---|
| join | who this is, shapes and class names of its images, a fingerprint of the initial model |
| round | the update of one round; what the client keeps goes to its own disk |
| certify | a piece of certification; at the end what the client lets go of its certificates |

Whatever goes wrong is told to the server in general words; details stay in the client's own log.
"""

from __future__ import annotations

import json
import logging
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from certifl._version import __version__
from certifl.certification.network import choose_device
from certifl.deploy.allowance import check_own_limit, limit_of, planned
from certifl.deploy.book import Book
from certifl.deploy.certifying import Certifier
from certifl.deploy.holdings import Holdings, open_holdings
from certifl.deploy.keeping import Kept
from certifl.deploy.messages import Content, fingerprint_of, update_to
from certifl.deploy.refusing import Refusal
from certifl.deploy.settings import Settings
from certifl.deploy.spending import Spender
from certifl.errors import CertiflError, StoreError
from certifl.federated import (
    Algorithm,
    ClientState,
    LocalTraining,
    ModelState,
    ServerState,
    Update,
)
from certifl.federated.faults import Fault, attempt
from certifl.federated.privacy import ExampleLedger
from certifl.federated.states import Parts
from certifl.models import build, fingerprint
from certifl.spec import Spec, with_settings
from certifl.threads import threads_asked
from certifl.work.private import Protection, protection, training_key
from certifl.work.training import local_training

__all__ = ["Party", "Refusal", "Study"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Study:
    """A study as a client works on it.

    Attributes:
        spec: with the client's own perturbation, where it has one. holdings: its images.
        model: the initial network. training: its half of a round. algorithm: of the study.
        kept: its folder. spender: its ledger of privacy, where clients add the noise.
    """

    spec: Spec
    holdings: Holdings
    model: nn.Module
    training: LocalTraining
    algorithm: Algorithm
    kept: Kept
    spender: Spender | None = None


class Party:
    """One client, with the studies it has seen since it was started.

    Args:
        settings: what the party decided for itself.
        folder: where it keeps its states, models and certificates.
        told: called with a line about every order, for people.
    """

    def __init__(
        self, settings: Settings, folder: Path, told: Callable[[str], None] | None = None
    ) -> None:
        self.settings = settings
        self._folder = folder
        self._told = told or _log.info
        self._studies: dict[tuple[str, str], Study] = {}

    def answer(self, order: Content) -> Content:
        """What the server gets for an order; a fault where it cannot be done."""
        started = time.perf_counter()
        try:
            with _threads(self.settings.threads):
                answer = self._answer(order)
        except Refusal as refusal:
            answer = self._fault("wrong", f"it refuses: {refusal}", str(refusal))
        except StoreError as error:
            answer = self._fault("raised", "its disk failed it", str(error))
        except CertiflError as error:
            kind = type(error).__name__
            answer = self._fault("raised", f"{kind}; its own log says more", str(error))
        answer.facts["client"] = self.settings.client
        answer.facts["seconds"] = time.perf_counter() - started
        return answer

    def _fault(self, kind: str, told: str, known: str) -> Content:
        _log.error("The server is told that this client failed: %s", known)
        return Content({"fault": {"kind": kind, "reason": told}})

    def _answer(self, order: Content) -> Content:
        facts = order.facts
        doing = {"join": self._join, "round": self._round, "certify": self._certify}
        kind = facts.get("order")
        if kind not in doing:
            raise Refusal(f"the order {kind!r} is unknown to certifl {__version__}")
        if kind != "join" and facts.get("client") != self.settings.client:
            raise Refusal(f"the order is for client {facts.get('client')!r}")
        return doing[kind](order, self._study(facts))

    def _study(self, facts: dict[str, Any]) -> Study:
        try:
            asked = facts["study"]
            id, text, hash = str(asked["id"]), str(asked["spec"]), str(asked["hash"])
            own_allowed = asked["own_perturbation"] is True
        except (KeyError, TypeError) as error:
            raise Refusal("the order names no study") from error
        if (id, hash) not in self._studies:
            spec = _checked(text, hash)
            self._studies = {(id, hash): self._opened(id, spec, own_allowed)}
        return self._studies[id, hash]

    def _opened(self, id: str, spec: Spec, own_allowed: bool) -> Study:
        settings = self.settings
        if settings.client >= spec.clients.count:
            raise Refusal(f"the study has only {spec.clients.count} clients, counted from 0")
        if ":" in spec.model.name and spec.model.name not in settings.networks:
            raise Refusal(
                f"the study's network {spec.model.name!r} is code that this party has not "
                "allowed: write it into networks of client.toml if it trusts it"
            )
        asked = spec.privacy
        if asked.kind != "none" and asked.noise_key != "secret" and not settings.dealt:
            raise Refusal(
                "the noise of the study's privacy follows from its seed, which every party knows, "
                'and would protect nothing: the study needs privacy.noise_key = "secret"'
            )
        if settings.perturbation is not None:
            if not own_allowed:
                raise Refusal("this party certifies a perturbation of its own; the study does not")
            spec = _with_own(spec, settings)
        try:
            kept = Kept(self._folder / "studies", id)
        except StoreError as error:
            raise Refusal("the study has no usable id") from error
        return self._made(spec, kept)

    def _made(self, spec: Spec, kept: Kept) -> Study:
        settings, holdings = self.settings, open_holdings(spec, self.settings)
        data = holdings.dataset
        model = build(
            spec.model.name,
            data.in_channels,
            data.num_classes,
            spec.seed,
            spec.model.options,
            data.image_size,
        ).eval()
        kept.folder.mkdir(parents=True, exist_ok=True)
        # Of the sizes only its own counts here: the noise of a client follows from its own.
        sizes = [len(holdings.train)] * spec.clients.count
        private = protection(spec, model, sizes, training_key(spec, kept.folder))
        check_own_limit(settings, spec, len(holdings.train))
        spender = self._spender(spec, holdings, private, kept)
        if spender is not None and private.example is not None:
            private = replace(private, example=spender.watched(private.example))
        device = str(choose_device(settings.device))
        training = local_training(spec, model, device, private)
        return Study(spec, holdings, model, training, spec.build_algorithm(), kept, spender)

    def _spender(
        self, spec: Spec, holdings: Holdings, private: Protection, kept: Kept
    ) -> Spender | None:
        """The ledger of a study whose clients add the noise."""
        if not isinstance(private.ledger, ExampleLedger):
            return None
        plan, delta = planned(spec, private.ledger, self.settings.client), spec.privacy.delta
        images = {"images": holdings.train.images, "labels": holdings.train.labels}
        limit = limit_of(self.settings, plan, delta)
        book, of = Book(self._folder), fingerprint(images)
        id, name = kept.folder.name, spec.name
        return Spender(book, id, name, delta, of, plan, limit, kept.folder)

    def _join(self, order: Content, study: Study) -> Content:
        self._told(f"joins the study {study.spec.name!r}")
        joined = {
            **study.holdings.described(),
            "client": self.settings.client,
            "initial_model": fingerprint(study.model),
            "versions": {"certifl": __version__, "torch": torch.__version__},
        }
        return Content({"joined": joined})

    def _round(self, order: Content, study: Study) -> Content:
        facts = order.facts
        try:
            round, counted, named = int(facts["round"]), int(facts["counted"]), facts["broadcast"]
        except (KeyError, TypeError, ValueError) as error:
            raise Refusal("the order names no round") from error
        started_from = fingerprint_of(order.parts)
        if started_from != named:
            raise Refusal("the model that arrived is not the one that was sent")
        try:
            before = study.kept.state(counted)
        except StoreError as error:
            _log.error("%s", error)
            raise Refusal(
                f"what it kept after round {counted} is lost; it can begin again with a new run"
            ) from error
        if study.spender is not None:
            names = (study.spec.hash(), started_from, fingerprint_of(before.parts))
            study.spender.begin(round, *names)
        result = self._trained(study, ServerState(round, order.parts), before)
        if isinstance(result, Fault):
            return self._fault(result.kind, _general(result), result.reason)
        update, state = result
        answer = update_to(update)
        spent = ""
        if study.spender is not None:
            output = fingerprint_of({**answer.parts, **_kept(state), "facts": _facts(answer)})
            spent = "; " + study.spender.answered(output, bool(answer.parts))
        study.kept.keep(state, round, counted)
        self._told(f"round {round + 1}: {_metrics(update)}{spent}")
        answer.facts.update(started_from=started_from, round=round)
        return answer

    def _trained(
        self, study: Study, broadcast: ServerState, before: ClientState
    ) -> tuple[Update, ClientState] | Fault:
        """The client's half of a round; that it failed is in the ledger before it is told."""
        failed = True

        def trained() -> tuple[Update, ClientState]:
            data = study.holdings.train
            return study.algorithm.client_round(broadcast, before, data, study.training)

        try:
            result = attempt(self.settings.client, trained)
            failed = isinstance(result, Fault)
        finally:
            if failed and study.spender is not None:
                study.spender.answered("", sent=True)
        if isinstance(result, Fault) and isinstance(result.error, Refusal):
            raise result.error
        return result

    def _certify(self, order: Content, study: Study) -> Content:
        facts = order.facts
        try:
            rounds, counted = int(facts["round"]), int(facts["counted"])
            seconds, share = float(facts["piece"]), str(facts["share"])
        except (KeyError, TypeError, ValueError) as error:
            raise Refusal("the order says not what to certify") from error
        if fingerprint_of(order.parts) != facts.get("broadcast"):
            raise Refusal("the model that arrived is not the one that was sent")
        try:
            state = study.kept.state(counted)
        except StoreError as error:
            _log.error("%s", error)
            raise Refusal(f"what it kept after round {counted} is lost") from error
        model = study.algorithm.deployed(ServerState(rounds, order.parts), state)
        certifier = Certifier(self.settings, study.spec, study.holdings, study.kept, self._told)
        return certifier.piece(study.model, model, seconds, share)


def _checked(text: str, hash: str) -> Spec:
    """The study as the server wrote it, checked as a file of one's own would be."""
    try:
        spec = with_settings(tomllib.loads(text))
    except (CertiflError, tomllib.TOMLDecodeError) as error:
        raise Refusal(f"the study's spec is not accepted here: {error}") from error
    if spec.hash() != hash:
        raise Refusal(
            "the study's spec means something else here: install the same version of certifl"
        )
    return spec


def _with_own(spec: Spec, settings: Settings) -> Spec:
    values = spec.model_dump(exclude_none=True)
    certification = values["certification"]
    others = [
        {**own, "clients": [c for c in own["clients"] if c != settings.client]}
        for own in certification.get("own", [])
    ]
    mine = {"clients": [settings.client], "perturbation": settings.perturbation}
    certification["own"] = [*(own for own in others if own["clients"]), mine]
    try:
        return with_settings(values)
    except CertiflError as error:
        raise Refusal(f"its own perturbation does not fit the study: {error}") from error


def _general(fault: Fault) -> str:
    """A fault without what an exception may say of data or folders."""
    if fault.kind == "raised" and fault.error is not None:
        return f"it raised {type(fault.error).__name__}; its own log says more"
    return fault.reason


def _kept(state: ClientState) -> Parts:
    return {f"kept:{part}": held for part, held in state.parts.items()}


def _facts(answer: Content) -> ModelState:
    """What an answer says beside its tensors, as a tensor, to be named with them."""
    text = json.dumps(answer.facts, sort_keys=True).encode()
    return {"json": torch.frombuffer(bytearray(text), dtype=torch.uint8)}


def _metrics(update: Update) -> str:
    told = [f"{name} {value:.4g}" for name, value in update.metrics.items()]
    return ", ".join(told) or "done"


@contextmanager
def _threads(count: int) -> Iterator[None]:
    with threads_asked(count):
        yield
