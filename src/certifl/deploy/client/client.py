"""A client's half of a federation: answers to the server's requests, over any transport.

The server names a study (its spec as text, an id) and requests one thing at a time:

| request | answer |
|---|---|
| join | shapes and class names of the client's images, a fingerprint of the initial model |
| round | the update of one round; the client's state goes to its own disk |
| certify | a piece of certification; at the end what the client shares of its certificates |

Errors are reported to the server in general words; details stay in the client's own log.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from certifl._version import __version__
from certifl.certification import Certificates
from certifl.certification import counts as engine
from certifl.certification.arithmetic import Trial
from certifl.certification.network import choose_device
from certifl.certification.sampling import check_random_source_once
from certifl.deploy.client.curves import curve_of, rows_of
from certifl.deploy.client.privacy_budget import PrivacyBudget, check_own_limit, open_budget
from certifl.deploy.client.settings import (
    LocalData,
    Settings,
    check_network_size,
    check_study,
    lower_level,
    open_local_data,
)
from certifl.deploy.client.state import AnsweredRounds, ClientStateStore, SentLog
from certifl.deploy.messages import Content, fingerprint_of, parse_request, update_to
from certifl.deploy.schemas import (
    CertifyRequest,
    JoinRequest,
    MalformedMessage,
    Rejected,
    RoundRequest,
    StudyReference,
)
from certifl.errors import CertiflError, InputError, ModelError, SpecError, StoreError, one_line
from certifl.federated.algorithms.base import Algorithm
from certifl.federated.faults import Fault, try_client
from certifl.federated.local_training import LocalTraining
from certifl.federated.privacy import ExampleLedger
from certifl.federated.states import ClientState, ModelState, Parts, ServerState, Update
from certifl.models import fingerprint
from certifl.runs.atomic import private_files, save_tensors
from certifl.spec import Spec, received, with_settings
from certifl.study.certify import Job, Paused, VoteSource, certify_job, job_network, predicted
from certifl.study.opened_run import ClientStudy
from certifl.study.setup import (
    built,
    check_training,
    local_training,
    participation,
    protection,
    training_key,
)
from certifl.torch_env import requested_threads

_log = logging.getLogger(__name__)
_SHORTEST, _LONGEST = 1.0, 3600.0
"""Limits of a piece of certification in seconds, whatever the server asks for."""
_STEPS = 10


@dataclass(frozen=True)
class Study:
    """A study as a client works on it.

    Attributes:
        spec: with the client's own perturbation, where it has one. local_data: its images.
        model: the initial network. training: its half of a round. algorithm: of the study.
        store: its folder. answered: which rounds it answered, and which model it certified.
        budget: its privacy budget, where clients add the noise.
    """

    spec: Spec
    local_data: LocalData
    model: nn.Module
    training: LocalTraining
    algorithm: Algorithm
    store: ClientStateStore
    answered: AnsweredRounds
    budget: PrivacyBudget | None = None

    @property
    def rounds(self) -> int:
        """Number of rounds, fine-tuning included."""
        return self.spec.training.rounds + self.algorithm.extra_rounds


class Client:
    """One client, with the study it is working on.

    Args:
        settings: its own.
        folder: of its states, models and certificates.
        report: called with a line about every request.
    """

    def __init__(
        self, settings: Settings, folder: Path, report: Callable[[str], None] | None = None
    ) -> None:
        self.settings = settings
        self._folder = folder
        self._report = report or _log.info
        self.sent = SentLog(folder)
        self._current: tuple[tuple[str, str], Study] | None = None

    def answer(self, content: Content) -> Content:
        """The answer to a request; a fault where it cannot be fulfilled."""
        started = time.perf_counter()
        try:
            with private_files(), requested_threads(self.settings.threads):
                answer = self._answer(content)
        except Rejected as refusal:
            answer = self._fault("wrong", f"it refuses: {refusal}", str(refusal))
        except (OSError, StoreError) as error:
            answer = self._fault("raised", "its disk failed", str(error))
        except CertiflError as error:
            kind = type(error).__name__
            answer = self._fault("raised", f"{kind}; see its own log", str(error))
        answer.fields["client"] = self.settings.client
        answer.fields["seconds"] = time.perf_counter() - started
        return answer

    def _fault(self, kind: str, reason: str, detail: str) -> Content:
        _log.error("Reported a failure to the server: %s", one_line(detail, 500))
        return Content({"fault": {"kind": kind, "reason": one_line(reason, 500)}})

    def _answer(self, content: Content) -> Content:
        try:
            request = parse_request(content)
        except MalformedMessage as error:
            raise Rejected(
                f"{error}; the server needs certifl {__version__}, as this client has"
            ) from error
        if not isinstance(request, JoinRequest) and request.client != self.settings.client:
            raise Rejected("the request is for another client")
        study = self._study(request.study)
        if isinstance(request, JoinRequest):
            return self._join(study)
        if isinstance(request, RoundRequest):
            return self._round(content.parts, request, study)
        return self._certify(content.parts, request, study)

    def _study(self, request: StudyReference) -> Study:
        name = (request.id, request.hash)
        if self._current is None or self._current[0] != name:
            spec = _parse_spec(request.spec, request.hash)
            self._current = name, self._open(request.id, spec, request.own_perturbation)
        return self._current[1]

    def _open(self, id: str, spec: Spec, own_perturbation: bool) -> Study:
        settings, spec_hash = self.settings, spec.hash()  # without its own perturbation
        if settings.client >= spec.clients.count:
            raise Rejected(f"the study has only {spec.clients.count} clients, counted from 0")
        check_study(spec, settings)
        if ":" in spec.model.name and spec.model.name not in settings.networks:
            raise Rejected(
                f"the study's network {spec.model.name!r} is code that this client has not "
                "allowed: add it to networks in client.toml if it is trusted"
            )
        privacy = spec.privacy
        if privacy.kind != "none" and privacy.noise_key != "secret" and not settings.dealt:
            raise Rejected(
                "the noise of the study's privacy follows from its seed, which every client "
                'knows: it would protect nothing. The study needs privacy.noise_key = "secret"'
            )
        if settings.perturbation is not None:
            if not own_perturbation:
                raise Rejected(
                    "this client certifies its own perturbation, which the study does not allow"
                )
            spec = _with_own_perturbation(spec, settings)
        try:
            store = ClientStateStore(self._folder / "studies", id)
        except StoreError as error:
            raise Rejected("the study's id is not valid") from error
        return self._prepare(spec, store, spec_hash)

    def _prepare(self, spec: Spec, store: ClientStateStore, spec_hash: str) -> Study:
        settings, local_data = self.settings, open_local_data(spec, self.settings)
        data = local_data.dataset
        check_network_size(spec, data.in_channels, data.num_classes)
        model = built(spec, data).eval()
        store.begin()
        answered = AnsweredRounds(store.folder, spec_hash)
        answered.begin()
        shapes = {
            "in_channels": data.in_channels,
            "image_size": list(data.image_size),
            "class_names": list(data.class_names),
        }
        ClientStudy(store.folder).describe(spec, settings.client, shapes)
        # Only its own size matters here: a client's noise depends on its own images.
        sizes = [len(local_data.train)] * spec.clients.count
        private = protection(spec, model, sizes, training_key(spec, store.folder))
        shape = (data.in_channels, *data.image_size)
        try:
            check_training(spec, model, {settings.client: len(local_data.train)}, shape)
        except SpecError as error:  # it tells the size of the images, which is reported anyway
            raise Rejected(str(error)) from error
        check_own_limit(settings, spec, len(local_data.train))
        budget = None
        if isinstance(private.ledger, ExampleLedger):  # this client adds the noise
            images = local_data.fingerprint
            budget = open_budget(
                settings, spec, private.ledger, images, self._folder, store.folder
            )
        if budget is not None and private.example is not None:
            private = replace(private, example=budget.observed(private.example))
        device = str(choose_device(settings.device))
        training = local_training(spec, model, device, private)
        algorithm = spec.build_algorithm()
        return Study(spec, local_data, model, training, algorithm, store, answered, budget)

    def _join(self, study: Study) -> Content:
        self._report(f"joins the study {one_line(study.spec.name)!r} of {study.rounds} rounds")
        joined = {
            **study.local_data.described(),
            "client": self.settings.client,
            "initial_model": fingerprint(study.model),
            "versions": {"certifl": __version__, "torch": torch.__version__},
        }
        if self.settings.share != "none":
            joined["test_images"] = len(study.local_data.tests(study.spec))
        return Content({"joined": joined})

    def _round(self, parts: Parts, request: RoundRequest, study: Study) -> Content:
        round, counted = request.round, request.counted
        started_from = _check_broadcast(parts, request, study)
        client_state = _load_state(study, counted)
        state_fingerprint = fingerprint_of(client_state.parts)
        if study.budget is not None:
            study.budget.authorize(round, study.spec.hash(), started_from, state_fingerprint)
        self._check_planned(study, request)
        if study.budget is None:
            study.answered.round(
                round, started_from, state_fingerprint, study.local_data.fingerprint
            )
        else:  # the budget refuses other states and images, by the samples drawn from them
            study.answered.round(round, started_from)
        result = self._train(study, ServerState(round, parts), client_state)
        if isinstance(result, Fault):
            reason = result.reason
            if result.kind == "raised" and result.error is not None:
                # The exception's text may name data or folders.
                reason = f"it raised {type(result.error).__name__}; see its own log"
            return self._fault(result.kind, reason, result.reason)
        update, state = result
        answer = update_to(update)
        spent = ""
        if study.budget is not None:
            spent = "; " + study.budget.record(_output(answer, state), bool(answer.parts))
        study.store.save(state, round, counted)
        metrics = ", ".join(f"{name} {value:.4g}" for name, value in update.metrics.items())
        self._report(f"round {round + 1}: {metrics or 'done'}{spent}")
        answer.fields.update(started_from=started_from, round=round)
        return answer

    def _check_planned(self, study: Study, request: RoundRequest) -> None:
        """Refuse a round that is not in the schedule, or for which this client was not drawn."""
        spec, round = study.spec, request.round
        if round >= study.rounds:
            raise Rejected(f"the study has {study.rounds} rounds, counted from 0")
        drawn = participation(spec)
        if drawn is None or round >= spec.training.rounds:
            return
        if self.settings.client not in set(drawn(round)):
            raise Rejected(f"it is not drawn for round {round}")

    def _train(
        self, study: Study, broadcast: ServerState, client_state: ClientState
    ) -> tuple[Update, ClientState] | Fault:
        """The client's half of a round; a failure is in the ledger before it is reported."""
        failed = True

        def trained() -> tuple[Update, ClientState]:
            data = study.local_data.train
            return study.algorithm.client_round(broadcast, client_state, data, study.training)

        try:
            result = try_client(self.settings.client, trained)
            failed = isinstance(result, Fault)
        finally:
            if failed and study.budget is not None:
                study.budget.record("", sent=True)
        if isinstance(result, Fault) and isinstance(result.error, Rejected):
            raise result.error
        return result

    def _certify(self, parts: Parts, request: CertifyRequest, study: Study) -> Content:
        if request.round != study.rounds:
            raise Rejected(f"it certifies only after the last of {study.rounds} rounds")
        _check_broadcast(parts, request, study)
        state = _load_state(study, request.counted)
        model = study.algorithm.deployed(ServerState(request.round, parts), state)
        study.answered.deployed(fingerprint(model))
        network = study.model
        before = {name: value.clone() for name, value in network.state_dict().items()}
        try:
            network.load_state_dict(model)
            return self._piece(study, model, request)
        except RuntimeError as error:
            raise ModelError("The deployed model does not fit the study's network.") from error
        finally:
            network.load_state_dict(before)

    def _piece(self, study: Study, model: ModelState, request: CertifyRequest) -> Content:
        """Certify for some seconds; at the end, what the client shares.

        The server may ask for more than this client shares.
        """
        if not study.store.deployed.is_file():
            save_tensors(study.store.deployed, model)
        if study.budget is not None:  # stands in the card of the model where it is published
            ClientStudy(study.store.folder).record_epsilon(study.budget.spent())
        client, spec, job = self.settings.client, study.spec, self._job(study)
        perturbation, settings = spec.perturbations()[client], spec.certification.settings(client)
        trial = None
        if perturbation is not None:
            trial = Trial.of(perturbation, settings, spec.seed, len(job.index))
        precision = spec.certification.precision
        ready = job_network(job, study.model, trial, self.settings.device, precision)
        shared = lower_level(request.share, self.settings.share)
        fields: dict[str, Any] = {"share": shared, "done": True}
        if shared == "rows" or not spec.build_algorithm().keeps_client_state:
            fields["model"] = fingerprint(model)  # otherwise the server does not have it
        data = study.local_data.dataset.fingerprint
        if perturbation is None:
            plain = predicted(job, ready, fingerprint(study.model), data)
            if shared != "none":
                correct = int(plain.correct.sum())
                fields["plain"] = {"images": len(plain), "correct": correct}
            return Content({"certified": fields})
        check_random_source_once(perturbation, tuple(job.images.shape[1:]), ready.device)
        source = VoteSource(perturbation, settings, spec.seed, data)
        ends = time.monotonic() + min(max(request.piece, _SHORTEST), _LONGEST)
        cast = 0

        def progress(done: int, _all: int) -> None:
            nonlocal cast
            cast = done

        certificates: Certificates | None = None
        with contextlib.suppress(Paused):
            certificates = certify_job(
                job, study.model, ready, source, progress, lambda: time.monotonic() > ends
            )
        at_most = engine.expected_votes(len(job.index), settings)
        if shared != "none":
            # Exact progress would disclose the votes of each image.
            step = max(1, at_most // _STEPS)
            shown = at_most if certificates is not None else cast // step * step
            fields |= {"at_most": at_most, "cast": shown}
        if certificates is None:
            self._report(f"certifying: {cast:,} of at most {at_most:,} votes")
            return Content({"certified": {**fields, "done": False}})
        return self._finish(study, certificates, fields)

    def _finish(self, study: Study, certificates: Certificates, fields: dict[str, Any]) -> Content:
        """Save the certificates; the answer has what this client shares of them."""
        client, spec, shared = self.settings.client, study.spec, fields["share"]
        certificates.save(study.store.certificates)
        self._report(
            f"certified {len(certificates)} images; certificates in {study.store.certificates}; "
            f"the server gets: {shared}"
        )
        content = Content({"certified": fields})
        perturbation = spec.perturbations()[client]
        if shared == "curve" and perturbation is not None:
            settings = spec.certification.settings(client)
            fields["curve"] = curve_of(certificates, perturbation, settings)
        elif shared == "rows":
            content.parts["rows"] = rows_of(certificates)
        return content

    def _job(self, study: Study) -> Job:
        index = study.local_data.tests(study.spec)
        if not len(index):
            raise InputError("This client has no test images to certify.")
        part = study.local_data.dataset.test.take(index)
        client, votes = self.settings.client, study.store.votes
        return Job(client, index, part.images, part.labels.numpy(), votes)


def _check_broadcast(parts: Parts, request: RoundRequest | CertifyRequest, study: Study) -> str:
    """Fingerprint of a request's model, which must be complete and fit the study's network."""
    arrived = fingerprint_of(parts)
    if arrived != request.broadcast:
        raise Rejected("the model that arrived is not the one that was sent")
    check_parts(parts, study.model.state_dict(), study.spec.clients.count)
    return arrived


def _load_state(study: Study, counted: int) -> ClientState:
    """The client's state after the round that it was last counted in."""
    try:
        return study.store.state(counted)
    except StoreError as error:
        _log.error("%s", error)
        raise Rejected(
            f"its state after round {counted} is lost; it can take part in a new run"
        ) from error


def _parse_spec(text: str, hash: str) -> Spec:
    """The server's spec, checked like a local file."""
    try:
        spec = received(text)
    except CertiflError as error:
        raise Rejected(f"the study's spec is not valid here: {one_line(error, 400)}") from error
    if spec.hash() != hash:
        raise Rejected(
            "the study's spec has another hash here: install the same version of certifl"
        )
    return spec


def _with_own_perturbation(spec: Spec, settings: Settings) -> Spec:
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


def _output(answer: Content, state: ClientState) -> str:
    """A fingerprint of an answer and the state that stays here."""
    fields = json.dumps(answer.fields, sort_keys=True).encode()
    kept = {f"kept:{part}": tensors for part, tensors in state.parts.items()}
    text = {"json": torch.frombuffer(bytearray(fields), dtype=torch.uint8)}
    return fingerprint_of({**answer.parts, **kept, "facts": text})


# Whether tensors from the server fit a study.


def check_parts(parts: Parts, network: ModelState, clients: int) -> None:
    """Refuse tensors that do not fit a study's network and number of clients (Rejected)."""
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
