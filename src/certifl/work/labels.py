"""Names for people of the ways of training that a study compares."""

from __future__ import annotations

import math

from certifl.federated import ALGORITHMS
from certifl.federated.augmentations import PerClient, together
from certifl.federated.objectives import OBJECTIVES
from certifl.perturbations import Perturbation
from certifl.spec import Spec
from certifl.work.private import private_label

__all__ = ["label_of"]


def label_of(spec: Spec) -> str:
    """The regime's name for people, with what sets it apart from others of its kind.

    That is lambda, the objective where it is not the paper's, privacy, and what augmented training
    where it is not the perturbation certified: "Mixture, λ = 0.1, MACER", "FedAvg (nominal)",
    "Personalized (affine start)".
    """
    algorithm, certified = spec.algorithm, together(spec.perturbations())
    name = ALGORITHMS.rows[algorithm["name"]].label
    base = algorithm.get("base", {"name": "fedavg"})["name"]
    if base != "fedavg":
        name = f"{name} {ALGORITHMS.rows[base].label}"
    if "personalization" in algorithm:
        name = f"{name}, λ = {algorithm['personalization']:g}"
    if "mu" in algorithm:
        name = f"{name}, μ = {algorithm['mu']:g}"
    if spec.objective["name"] != "augmented":
        name = f"{name}, {OBJECTIVES.rows[spec.objective['name']].label}"
    name = ", ".join([name, *_conditions(spec)])
    if spec.privacy.kind != "none":
        name = f"{name}, {private_label(spec)}"
    trained, tuned = spec.augmentations()
    if trained == certified:
        return name
    if trained is None or isinstance(trained, PerClient):
        word = "nominal"
    else:
        alone = None if isinstance(certified, PerClient) else certified
        same = alone is not None and alone.family == trained.family
        word = f"trained with σ = {_sigma(trained)}" if same else trained.family
    return f"{name} ({word} start)" if tuned != trained else f"{name} ({word})"


def _sigma(perturbation: Perturbation) -> str:
    if perturbation.unit == "radians":
        return f"{math.degrees(perturbation.sigma):.3g}°"
    return f"{perturbation.sigma:.3g}"


def _conditions(spec: Spec) -> list[str]:
    """Robust aggregation and partial participation, where they are asked for."""
    rule, clip, share = spec.aggregation.rule, spec.aggregation.clip, spec.clients.participation
    words = [] if rule == "mean" else [rule.replace("-", " ")]
    if clip is not None:
        words.append(f"clipped at {clip:g}")
    return [*words, f"{100 * share:.3g} % a round"] if share < 1 else words
