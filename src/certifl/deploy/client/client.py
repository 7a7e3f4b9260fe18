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
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from certifl._version import __version__
from certifl.certification.network import choose_device
from certifl.data import Dataset
from certifl.deploy.client.answered_rounds import Answered
from certifl.deploy.client.certify import Certifier
from certifl.deploy.client.data import LocalData, open_holdings
from certifl.deploy.client.privacy_budget import (
    PrivacyBudget,
    PrivacyLedger,
    check_own_limit,
    limit_of,
    planned,
)
from certifl.deploy.client.rejected import Rejected, plain
from certifl.deploy.client.sent_log import Sent
from certifl.deploy.client.settings import Settings
from certifl.deploy.client.spec_policy import check_network_size, check_study
from certifl.deploy.client.state import ClientStateStore, owner_only
from certifl.deploy.transport.messages import Content, fingerprint_of, order_from, update_to
from certifl.deploy.transport.schemas import (
    CertifyOrder,
    JoinOrder,
    MalformedMessage,
    RoundOrder,
    Told,
)
from certifl.errors import CertiflError, StoreError
from certifl.federated.algorithms.base import Algorithm
from certifl.federated.faults import Fault, try_client
from certifl.federated.privacy import ExampleLedger
from certifl.federated.states import ClientState, ModelState, Parts, ServerState, Update
from certifl.federated.training.local_training import LocalTraining, check_images
from certifl.models import build, fingerprint
from certifl.safe_io import parse_toml
from certifl.spec import Spec, with_settings
from certifl.study.opened_run import ClientStudy
from certifl.study.privacy import Protection, protection, training_key
from certifl.study.setup import local_training, participation
from certifl.torch_env import threads_asked

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Study:
    """A study as a client works on it.

    Attributes:
        spec: with the client's own perturbation, where it has one. holdings: its images.
        model: the initial network. training: its half of a round. algorithm: of the study.
        kept: its folder. answered: which rounds it answered, and which model it certified.
        spender: its ledger of privacy, where clients add the noise.
    """

    spec: Spec
    holdings: LocalData
    model: nn.Module
    training: LocalTraining
    algorithm: Algorithm
    kept: ClientStateStore
    answered: Answered
    spender: PrivacyBudget | None = None

    @property
    def rounds(self) -> int:
        """How many rounds its plan has."""
        return self.spec.training.rounds + self.algorithm.extra_rounds


class Client:
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
        self.sent = Sent(folder)
        self._studies: dict[tuple[str, str], Study] = {}

    def answer(self, order: Content) -> Content:
        """What the server gets for an order; a fault where it cannot be done."""
        started = time.perf_counter()
        try:
            with owner_only(), _threads(self.settings.threads):
                answer = self._answer(order)
        except Rejected as refusal:
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
        _log.error("The server is told that this client failed: %s", plain(known))
        return Content({"fault": {"kind": kind, "reason": plain(told)}})

    def _answer(self, order: Content) -> Content:
        try:
            asked = order_from(order)
        except MalformedMessage as error:
            raise Rejected(
                f"{error}; the server needs certifl {__version__}, as this client has"
            ) from error
        if not isinstance(asked, JoinOrder) and asked.client != self.settings.client:
            raise Rejected("the order is for another client")
        study = self._study(asked.study)
        if isinstance(asked, JoinOrder):
            return self._join(study)
        if isinstance(asked, RoundOrder):
            return self._round(order.parts, asked, study)
        return self._certify(order.parts, asked, study)

    def _study(self, asked: Told) -> Study:
        named = (asked.id, asked.hash)
        if named not in self._studies:
            spec = _checked(asked.spec, asked.hash)
            self._studies = {named: self._opened(asked.id, spec, asked.own_perturbation)}
        return self._studies[named]

    def _opened(self, id: str, spec: Spec, own_allowed: bool) -> Study:
        settings, named = self.settings, spec.hash()
        if settings.client >= spec.clients.count:
            raise Rejected(f"the study has only {spec.clients.count} clients, counted from 0")
        check_study(spec, settings)
        if ":" in spec.model.name and spec.model.name not in settings.networks:
            raise Rejected(
                f"the study's network {spec.model.name!r} is code that this party has not "
                "allowed: write it into networks of client.toml if it trusts it"
            )
        asked = spec.privacy
        if asked.kind != "none" and asked.noise_key != "secret" and not settings.dealt:
            raise Rejected(
                "the noise of the study's privacy follows from its seed, which every party knows, "
                'and would protect nothing: the study needs privacy.noise_key = "secret"'
            )
        if settings.perturbation is not None:
            if not own_allowed:
                raise Rejected(
                    "this party certifies a perturbation of its own; the study does not"
                )
            spec = _with_own(spec, settings)
        try:
            kept = ClientStateStore(self._folder / "studies", id)
        except StoreError as error:
            raise Rejected("the study has no usable id") from error
        return self._made(spec, kept, named)

    def _made(self, spec: Spec, kept: ClientStateStore, named: str) -> Study:
        settings, holdings = self.settings, open_holdings(spec, self.settings)
        data = holdings.dataset
        check_network_size(spec, data.in_channels, data.num_classes)
        model = build(
            spec.model.name,
            data.in_channels,
            data.num_classes,
            spec.seed,
            spec.model.options,
            data.image_size,
        ).eval()
        check_images(model, {settings.client: len(holdings.train)})
        kept.begin()
        answered = Answered(kept.folder, named)
        answered.begin()
        ClientStudy(kept.folder).describe(spec, settings.client, _shapes(data))
        # Of the sizes only its own counts here: the noise of a client follows from its own.
        sizes = [len(holdings.train)] * spec.clients.count
        private = protection(spec, model, sizes, training_key(spec, kept.folder))
        check_own_limit(settings, spec, len(holdings.train))
        spender = self._spender(spec, holdings, private, kept)
        if spender is not None and private.example is not None:
            private = replace(private, example=spender.watched(private.example))
        device = str(choose_device(settings.device))
        training = local_training(spec, model, device, private)
        algorithm = spec.build_algorithm()
        return Study(spec, holdings, model, training, algorithm, kept, answered, spender)

    def _spender(
        self, spec: Spec, holdings: LocalData, private: Protection, kept: ClientStateStore
    ) -> PrivacyBudget | None:
        """The ledger of a study whose clients add the noise."""
        if not isinstance(private.ledger, ExampleLedger):
            return None
        plan, delta = planned(spec, private.ledger, self.settings.client), spec.privacy.delta
        limit = limit_of(self.settings, plan, delta)
        book, of = PrivacyLedger(self._folder), holdings.fingerprint
        id, name = kept.folder.name, spec.name
        return PrivacyBudget(book, id, name, delta, of, plan, limit, kept.folder)

    def _join(self, study: Study) -> Content:
        self._told(f"joins the study {plain(study.spec.name)!r} of {study.rounds} rounds")
        joined = {
            **study.holdings.described(),
            "client": self.settings.client,
            "initial_model": fingerprint(study.model),
            "versions": {"certifl": __version__, "torch": torch.__version__},
        }
        if self.settings.share != "none":
            joined["test_images"] = len(study.holdings.tests(study.spec))
        return Content({"joined": joined})

    def _round(self, parts: Parts, asked: RoundOrder, study: Study) -> Content:
        round, counted = asked.round, asked.counted
        started_from = _arrived(parts, asked, study)
        before = _state(study, counted)
        past = fingerprint_of(before.parts)
        if study.spender is not None:
            study.spender.begin(round, study.spec.hash(), started_from, past)
        self._check_planned(study, asked)
        if study.spender is None:
            study.answered.round(round, started_from, past, study.holdings.fingerprint)
        else:  # it refuses other states and images itself, by the samples drawn from them
            study.answered.round(round, started_from)
        result = self._trained(study, ServerState(round, parts), before)
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

    def _check_planned(self, study: Study, asked: RoundOrder) -> None:
        """Refuse a round that is not in the study's plan, or in which others were drawn."""
        spec, round = study.spec, asked.round
        if round >= study.rounds:
            raise Rejected(f"the study has {study.rounds} rounds, counted from 0")
        drawn = participation(spec, spec.clients.count)
        if drawn is None or round >= spec.training.rounds:
            return
        if self.settings.client not in set(drawn(round)):
            raise Rejected(f"it is not drawn for round {round}")

    def _trained(
        self, study: Study, broadcast: ServerState, before: ClientState
    ) -> tuple[Update, ClientState] | Fault:
        """The client's half of a round; that it failed is in the ledger before it is told."""
        failed = True

        def trained() -> tuple[Update, ClientState]:
            data = study.holdings.train
            return study.algorithm.client_round(broadcast, before, data, study.training)

        try:
            result = try_client(self.settings.client, trained)
            failed = isinstance(result, Fault)
        finally:
            if failed and study.spender is not None:
                study.spender.answered("", sent=True)
        if isinstance(result, Fault) and isinstance(result.error, Rejected):
            raise result.error
        return result

    def _certify(self, parts: Parts, asked: CertifyOrder, study: Study) -> Content:
        if asked.round != study.rounds:
            raise Rejected(f"it certifies after the last of {study.rounds} rounds alone")
        _arrived(parts, asked, study)
        state = _state(study, asked.counted)
        model = study.algorithm.deployed(ServerState(asked.round, parts), state)
        study.answered.deployed(fingerprint(model))
        certifier = Certifier(self.settings, study.spec, study.holdings, study.kept, self._told)
        return certifier.piece(study.model, model, asked.piece, asked.share)


def _arrived(parts: Parts, asked: RoundOrder | CertifyOrder, study: Study) -> str:
    """Fingerprint of what an order brought: whole, and of the study's network."""
    found = fingerprint_of(parts)
    if found != asked.broadcast:
        raise Rejected("the model that arrived is not the one that was sent")
    check_parts(parts, study.model.state_dict(), study.spec.clients.count)
    return found


def _state(study: Study, counted: int) -> ClientState:
    """What the client kept after the round that it was last counted in."""
    try:
        return study.kept.state(counted)
    except StoreError as error:
        _log.error("%s", error)
        raise Rejected(
            f"what it kept after round {counted} is lost; it can begin again with a new run"
        ) from error


def _shapes(data: Dataset) -> dict[str, Any]:
    """What a model depends on of the images it is used with."""
    return {
        "in_channels": data.in_channels,
        "image_size": list(data.image_size),
        "class_names": list(data.class_names),
    }


def _checked(text: str, hash: str) -> Spec:
    """The study as the server wrote it, checked as a file of one's own would be."""
    try:
        spec = with_settings(parse_toml(text))
    except CertiflError as error:
        raise Rejected(f"the study's spec is not accepted here: {plain(str(error))}") from error
    if spec.hash() != hash:
        raise Rejected(
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
        _log.error("%s", error)
        raise Rejected("its own perturbation does not fit the study; its own log says why") from (
            error
        )


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


# Whether tensors that the server sent can belong to a study.


def check_parts(parts: Parts, network: ModelState, clients: int) -> None:
    """Refuse tensors that cannot belong to the study.

    Args:
        parts: as they were sent. network: entries of the study's network.
        clients: how many the study has.

    Raises:
        Rejected: the model has other entries, shapes or types than the network, or something that
            comes with it has another shape.
    """
    model = parts.get("model")
    if model is None or {n: _kind(v) for n, v in model.items()} != {
        n: _kind(v) for n, v in network.items()
    }:
        raise Rejected("the model that was sent does not fit the study's network")
    for part, tensors in parts.items():
        if part != "model" and not all(_fits(n, v, network, clients) for n, v in tensors.items()):
            raise Rejected("what was sent with the model does not fit the study's network")


def _kind(value: torch.Tensor) -> tuple[torch.Size, torch.dtype]:
    return value.shape, value.dtype


def _fits(name: str, value: torch.Tensor, network: ModelState, clients: int) -> bool:
    """Whether a tensor has the shape of the entry it is named after, or lists clients."""
    if name in network:
        return value.shape == network[name].shape
    return value.ndim == 1 and math.prod(value.shape) <= clients
