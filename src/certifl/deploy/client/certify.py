"""A client's certification of its own test images, a piece at a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch import nn

from certifl.certification import Certificates
from certifl.certification import adaptive as engine
from certifl.certification.arithmetic import Trial
from certifl.certification.rng_check import check_random_source_once
from certifl.deploy.client.curves import curve_of, rows_of
from certifl.deploy.client.data import LocalData
from certifl.deploy.client.settings import Settings, less
from certifl.deploy.client.state import ClientStateStore
from certifl.deploy.transport.messages import Content
from certifl.errors import InputError, ModelError
from certifl.federated.states import ModelState
from certifl.models import fingerprint
from certifl.perturbations import Perturbation
from certifl.spec import Spec
from certifl.study.certify import Job, NetworkCache, Question, certify_piece, predicted

_SHORTEST, _LONGEST = 1.0, 3600.0
"""Seconds of a piece, whatever the server asks for."""
_STEPS = 10


class Certifier:
    """Certifies the images of one client with the model it deploys.

    Args:
        settings: the party's own. spec: the study. holdings: the images.
        kept: where votes, model and certificates go.
        told: called with a line for people.
    """

    def __init__(
        self,
        settings: Settings,
        spec: Spec,
        holdings: LocalData,
        kept: ClientStateStore,
        told: Callable[[str], None],
    ) -> None:
        self._settings, self._spec, self._holdings = settings, spec, holdings
        self._kept, self._told = kept, told

    def piece(self, network: nn.Module, model: ModelState, seconds: float, share: str) -> Content:
        """Go on for some seconds; at the end, what the party lets go.

        Args:
            network: the architecture; its weights are as they were afterwards.
            model: what the client deploys.
            seconds: within a second and an hour, after which votes are saved and the piece ends.
            share: how much the server asks for; the party's own setting may be less.
        """
        before = {name: value.clone() for name, value in network.state_dict().items()}
        try:
            network.load_state_dict(model)
            return self._piece(network, model, min(max(seconds, _SHORTEST), _LONGEST), share)
        except RuntimeError as error:
            raise ModelError("The deployed model does not fit the study's network.") from error
        finally:
            network.load_state_dict(before)

    def _piece(self, network: nn.Module, model: ModelState, seconds: float, share: str) -> Content:
        if not self._kept.deployed.is_file():
            self._kept.deploy(model)
        client, spec = self._settings.client, self._spec
        job = self._job()
        perturbation = spec.perturbations()[client]
        settings = spec.certification.settings(client)
        bench = NetworkCache(self._settings.device, spec.certification.precision)
        trial = None
        if perturbation is not None:
            trial = Trial.of(perturbation, settings, spec.seed, len(job.index))
        ready = bench.network(network, job, trial)
        shared = less(share, self._settings.share)
        facts: dict[str, Any] = {"share": shared, "done": True}
        if shared == "rows" or not spec.build_algorithm().keeps_client_state:
            facts["model"] = fingerprint(model)  # else it is one that the server does not have
        if perturbation is None:
            found = predicted(job, ready, bench.name, self._holdings.dataset.fingerprint)
            if shared != "none":
                facts["plain"] = {"images": len(found), "correct": int(found.correct.sum())}
            return Content({"certified": facts})
        check_random_source_once(perturbation, tuple(job.images.shape[1:]), ready.device)
        question = Question(perturbation, settings, spec.seed, self._holdings.dataset.fingerprint)
        at_most, ends = engine.expected_votes(len(job.index), settings), time.monotonic() + seconds
        standing = [0]

        def progress(done: int, _all: int) -> None:
            standing[0] = done

        made = certify_piece(
            job, network, ready, question, progress, lambda: time.monotonic() > ends
        )
        if shared != "none":
            cast = at_most if made is not None else _coarse(standing[0], at_most)
            facts |= {"at_most": at_most, "cast": cast}
        if made is None:
            self._told(f"certifying: {standing[0]:,} of at most {at_most:,} votes")
            return Content({"certified": {**facts, "done": False}})
        return self._let_go(made, facts, perturbation)

    def _let_go(
        self, made: Certificates, facts: dict[str, Any], perturbation: Perturbation
    ) -> Content:
        made.save(self._kept.certificates)
        self._told(
            f"certified {len(made)} images; certificates in {self._kept.certificates}; "
            f"the server gets: {facts['share']}"
        )
        content = Content({"certified": facts})
        if facts["share"] == "curve":
            settings = self._spec.certification.settings(self._settings.client)
            facts["curve"] = curve_of(made, perturbation, settings)
        elif facts["share"] == "rows":
            content.parts["rows"] = rows_of(made)
        return content

    def _job(self) -> Job:
        index = self._holdings.tests(self._spec)
        if not len(index):
            raise InputError("This client has no test images to certify.")
        part = self._holdings.dataset.test.take(index)
        client = self._settings.client
        return Job(client, index, part.images, part.labels.numpy(), self._kept.votes)


def _coarse(cast: int, at_most: int) -> int:
    """Progress in steps of a tenth: exact numbers would tell how many votes each image took."""
    step = max(1, at_most // _STEPS)
    return cast // step * step
