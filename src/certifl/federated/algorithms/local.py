"""Local training: every client on its own images, without communication."""

from __future__ import annotations

from dataclasses import dataclass

from certifl.federated.algorithms.base import GlobalModel


@dataclass(frozen=True)
class Local(GlobalModel):
    """Local training: each client minimizes its own loss L_i(theta_i), Eq. (4) with lambda = 1.

    All clients begin with the same initial model. Rounds only cut the training into the same
    pieces as in the other algorithms; nothing is sent.

    Deployed by client i: its own model theta_i (the initial model where it never trained).

    Source: the paper, section 3.3, "Local Training".
    """

    name = "local"
    deploys = "its own model, trained on its own images alone"
    keeps_client_state = True
    personal_part = "model"
    sent = ()
