"""A client's certification of its own test images, a piece at a time."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

from torch import nn

from certifl.certification import Certificates
from certifl.certification import counts as engine
from certifl.certification.arithmetic import Trial
from certifl.certification.sampling import check_random_source_once
from certifl.deploy.client.curves import curve_of, rows_of
from certifl.deploy.client.data import LocalData
from certifl.deploy.client.settings import Settings, lower_level
from certifl.deploy.client.state import ClientStateStore
from certifl.deploy.transport.messages import Content
from certifl.errors import InputError, ModelError
from certifl.federated.states import ModelState
from certifl.models import fingerprint
from certifl.perturbations import Perturbation
from certifl.spec import Spec
from certifl.study.certify import (
    Job,
    Paused,
    VoteSource,
    certify_job,
    job_network,
    predicted,
)

_SHORTEST, _LONGEST = 1.0, 3600.0
"""Limits of a piece in seconds, whatever the server asks for."""
_STEPS = 10


class Certifier:
    """Certifies the images of one client with the model it deploys.

    Args:
        settings: the client's own. spec: the study. local_data: the images.
        store: of votes, model and certificates.
        report: called with a line about progress.
    """

    def __init__(
        self,
        settings: Settings,
        spec: Spec,
        local_data: LocalData,
        store: ClientStateStore,
        report: Callable[[str], None],
    ) -> None:
        self._settings, self._spec, self._data = settings, spec, local_data
        self._store, self._report = store, report

    def piece(self, network: nn.Module, model: ModelState, seconds: float, share: str) -> Content:
        """Certify for some seconds; at the end, what the client shares.

        Args:
            network: the architecture; its weights are restored afterwards.
            model: what the client deploys.
            seconds: within a second and an hour, after which votes are saved and the piece ends.
            share: disclosure level that the server asks for; the client's own may be lower.
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
        if not self._store.deployed.is_file():
            self._store.deploy(model)
        client, spec = self._settings.client, self._spec
        job = self._job()
        perturbation = spec.perturbations()[client]
        settings = spec.certification.settings(client)
        trial = None
        if perturbation is not None:
            trial = Trial.of(perturbation, settings, spec.seed, len(job.index))
        precision = spec.certification.precision
        ready = job_network(job, network, trial, self._settings.device, precision)
        shared = lower_level(share, self._settings.share)
        fields: dict[str, Any] = {"share": shared, "done": True}
        if shared == "rows" or not spec.build_algorithm().keeps_client_state:
            fields["model"] = fingerprint(model)  # otherwise the server does not have it
        if perturbation is None:
            fingerprints = fingerprint(network), self._data.dataset.fingerprint
            predictions = predicted(job, ready, *fingerprints)
            if shared != "none":
                fields["plain"] = {
                    "images": len(predictions),
                    "correct": int(predictions.correct.sum()),
                }
            return Content({"certified": fields})
        check_random_source_once(perturbation, tuple(job.images.shape[1:]), ready.device)
        source = VoteSource(perturbation, settings, spec.seed, self._data.dataset.fingerprint)
        at_most, ends = engine.expected_votes(len(job.index), settings), time.monotonic() + seconds
        votes = [0]

        def progress(done: int, _all: int) -> None:
            votes[0] = done

        certificates: Certificates | None = None
        with contextlib.suppress(Paused):
            certificates = certify_job(
                job, network, ready, source, progress, lambda: time.monotonic() > ends
            )
        if shared != "none":
            cast = at_most if certificates is not None else _coarse(votes[0], at_most)
            fields |= {"at_most": at_most, "cast": cast}
        if certificates is None:
            self._report(f"certifying: {votes[0]:,} of at most {at_most:,} votes")
            return Content({"certified": {**fields, "done": False}})
        return self._finish(certificates, fields, perturbation)

    def _finish(
        self, certificates: Certificates, fields: dict[str, Any], perturbation: Perturbation
    ) -> Content:
        certificates.save(self._store.certificates)
        self._report(
            f"certified {len(certificates)} images; certificates in {self._store.certificates}; "
            f"the server gets: {fields['share']}"
        )
        content = Content({"certified": fields})
        if fields["share"] == "curve":
            settings = self._spec.certification.settings(self._settings.client)
            fields["curve"] = curve_of(certificates, perturbation, settings)
        elif fields["share"] == "rows":
            content.parts["rows"] = rows_of(certificates)
        return content

    def _job(self) -> Job:
        index = self._data.tests(self._spec)
        if not len(index):
            raise InputError("This client has no test images to certify.")
        part = self._data.dataset.test.take(index)
        client = self._settings.client
        return Job(client, index, part.images, part.labels.numpy(), self._store.votes)


def _coarse(cast: int, at_most: int) -> int:
    """Progress in steps of a tenth: exact numbers would disclose the votes of each image."""
    step = max(1, at_most // _STEPS)
    return cast // step * step
