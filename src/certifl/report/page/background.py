"""The parts of the page behind the results: what they mean, what they cost, how to check them."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from certifl.perturbations import trait
from certifl.report.page.context import ReportContext, named_run
from certifl.report.page.html import Markup, el, table
from certifl.report.results import RunResults
from certifl.report.summary import vote_cost
from certifl.report.units import family_words, sigma_text

_PROMISE = "for every {family} whose parameters have {norm} norm at most the radius, in {unit}"
_RECOMPUTE = "Recompute every radius from the stored votes:"
_ONLY_THERE = (
    "Clients that told curves kept their votes: each verifies its own certificates where they "
    "are, with certifl verify."
)


def facts_list(story: ReportContext) -> Markup:
    """The study at a glance."""
    run = story.runs[0]
    facts, data = run.conditions, _mapping(run.manifest, "data")
    spent = [vote_cost(r) for r in story.trained]
    saved = [votes.saved for votes in spent if votes.saved is not None]
    items = [
        ("Data", f"{data.get('name', 'not recorded')}, {_image_words(data)}"),
        ("Clients", _each(str(len(r.clients)) for r in story.trained)),
        ("Test images", _each(f"{len(r.certificates):,}" for r in story.trained)),
        ("Perturbation", f"{family_words(facts)}, σ\u00a0=\u00a0{sigma_text(facts)}"),
        ("Risk per image", f"α = {_each(_plain(r.conditions['alpha']) for r in story.trained)}"),
        ("Votes spent", _votes_words(story, sum(votes.spent for votes in spent))),
    ]
    if saved and max(saved) > 0.005:
        all_fixed = sum(votes.fixed or 0 for votes in spent)
        share = 1.0 - sum(votes.spent for votes in spent) / all_fixed
        items.append(("Saved against a fixed n", f"{100 * share:.0f} %"))
    pairs = [el("div", None, el("dt", None, k), el("dd", None, v)) for k, v in items]
    return el("dl", {"class": "facts"}, *pairs)


def _votes_words(story: ReportContext, votes: int) -> str:
    return "not told" if any(run.told for run in story.trained) else count_text(votes)


def _image_words(data: Mapping[str, Any]) -> str:
    size = data.get("image_size")
    if not isinstance(size, list) or len(size) != 2:
        return "image size not recorded"
    channels = {1: "grey", 3: "colour"}.get(data.get("in_channels", 0), "")
    return f"{channels} {size[0]}\u00a0×\u00a0{size[1]}".strip()


def meaning_section(story: ReportContext) -> Markup:
    """What a certificate promises, under which threat model, and what it does not promise."""
    facts = story.runs[0].conditions
    alpha = max(float(run.conditions["alpha"]) for run in story.trained)
    sure = f"{100 * (1 - alpha):.6g} %"
    reach = trait(facts["family"], "promise", _PROMISE)
    words = {k: str(facts[k]) for k in ("norm", "unit")} | {"family": family_words(facts)}
    shown = f"; this page shows them in {story.scale.name} first"
    promise = (
        f"For each image by itself, with probability at least {sure} over the votes that were "
        f"cast, the smoothed classifier gives the certified class {reach.format(**words)}. "
        f"Radii are measured in {facts['unit']}, norm {facts['norm']}"
        + (f"{shown}." if story.scale.factor != 1.0 else ".")
    )
    denials = [el("li", None, el("b", None, k), " ", v) for k, v in _limits(story, alpha)]
    return el(
        "section",
        {"id": "meaning"},
        el("h2", None, "What a certificate means, and what it does not"),
        el("p", None, promise),
        el("h3", None, "Threat model"),
        el("p", None, str(facts.get("threat", "Not recorded."))),
        el("h3", None, "What it does not say"),
        el("ul", {"class": "limits"}, *denials),
    )


def _limits(story: ReportContext, alpha: float) -> list[tuple[str, str]]:
    facts = story.runs[0].conditions
    images = max(len(run.certificates) for run in story.trained)
    limits = [
        (
            "It is about the smoothed classifier.",
            "That is the class most votes go to, over noisy copies of the image; a single answer "
            "of the network carries no promise.",
        ),
        (
            "Stable is not right.",
            "A certificate says the answer does not change. Whether it is correct is known here "
            "only because the test images have labels.",
        ),
        (
            "The risk is per image.",
            f"Among the {images:,} images of a run, up to {_plain(alpha * images)} certificates "
            "may be expected to promise too much.",
        ),
        (
            "Only this perturbation.",
            f"Nothing is promised for perturbations other than {family_words(facts)}, nor for "
            "several at once.",
        ),
    ]
    if not trait(facts["family"], "additive", False):
        limits.insert(
            2,
            (
                "The original image is deformed once.",
                "The promise holds in the space of parameters: the noise and the adversary's "
                "deformation are added and the original image is interpolated once. An image that "
                "arrives already deformed is interpolated a second time, which is not covered; "
                "measure the accuracy under such an attack before relying on it.",
            ),
        )
    precision = _each(
        str(run.conditions.get("precision", "not recorded")) for run in story.trained
    )
    limits.append(
        ("The network is certified as it was run.", f"Arithmetic of the network: {precision}.")
    )
    return limits


def cost_section(story: ReportContext) -> Markup:
    """Votes, time, hardware and versions of every run."""
    head = ["Property", *(run.label for run in story.trained)]
    lines = [_cost_facts(run) for run in story.trained]
    names = list(dict.fromkeys(name for facts in lines for name in facts))
    rows = [[name, *(facts.get(name, "–") for facts in lines)] for name in names]
    return el(
        "section",
        {"id": "cost"},
        el("h2", None, "How it was made"),
        table("Training, certification, time and machine of every run", head, rows),
    )


def _cost_facts(run: RunResults) -> dict[str, str]:
    facts, votes, known = run.conditions, vote_cost(run), run.manifest
    saved = "–" if votes.saved is None else f"{100 * votes.saved:.1f} %"
    machine, versions = _mapping(known, "machine"), _mapping(known, "versions")
    lines = {
        "Deploys": str(known.get("deploys", "–")),
        "Model": str(known.get("model", "–")),
        "Seed": str(known.get("seed", "–")),
        "Estimator": str(facts.get("estimator", "–")),
        "Votes that choose the class (n0)": _number(facts.get("n0")),
        "Votes that bound it, at most (n)": _number(facts.get("n")),
        "Votes that bound it, per image": _unless_kept(run, f"{votes.per_image:,.0f}"),
        "Votes spent": _unless_kept(run, f"{votes.spent:,}"),
        "Votes of a fixed n": "–" if votes.fixed is None else f"{votes.fixed:,}",
        "Saved": saved,
        "Training took": seconds_text(known.get("training_seconds")),
        "Certification took": seconds_text(known.get("certification_seconds")),
        "Device": str(facts.get("device", machine.get("device", "–"))),
        "Processor": str(machine.get("processor", "–")),
        "Cores, memory": f"{machine.get('cores', '–')}, {machine.get('memory_gb', '–')} GB",
        "Versions": ", ".join(f"{k} {v}" for k, v in sorted(versions.items())) or "–",
        "Begun": str(known.get("created", "–")),
        "Spec": str(known.get("spec_hash", "–")),
    }
    model = facts.get("model_fingerprint")
    return lines | ({"Model fingerprint": str(model)} if isinstance(model, str) else {})


def _unless_kept(run: RunResults, text: str) -> str:
    return "not told" if run.told else text


def reproduce_section(story: ReportContext, page: Path) -> Markup:
    """Commands that check and repeat the runs, and every run's spec, word for word."""
    shown = [(run, _shown_path(run.folder, page)) for run in story.trained]
    held = [path for run, path in shown if not run.told]
    verify = "\n".join(f"certifl verify {shlex.quote(path)}" for path in held)
    repeat = "\n".join(
        dict.fromkeys(str(run.manifest.get("command") or "certifl run") for run in story.trained)
    )
    specs = [
        el(
            "details",
            None,
            el("summary", None, "Spec of ", named_run(story, run)),
            _code(run.spec, f"Spec of {run.label}"),
        )
        for run in story.trained
    ]
    return el(
        "section",
        {"id": "reproduce"},
        el("h2", None, "Check it, repeat it"),
        *(
            [el("p", None, _RECOMPUTE), _code(verify, "Commands to verify the runs")]
            if held
            else []
        ),
        el("p", None, _ONLY_THERE) if len(held) < len(shown) else Markup(),
        el("p", None, "Repeat the runs with the same spec and seed:"),
        _code(repeat, "Commands to repeat the runs"),
        *specs,
    )


def _code(text: str, name: str) -> Markup:
    around = {"class": "scroll", "tabindex": "0", "role": "region", "aria-label": name}
    return el("pre", around, el("code", None, text))


def _shown_path(folder: Path, page: Path) -> str:
    """A relative path as it was given; an absolute one as seen from the page's folder."""
    if not folder.is_absolute():
        return str(folder)
    return os.path.relpath(folder, page.resolve().parent)


def _mapping(manifest: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = manifest.get(name)
    return value if isinstance(value, Mapping) else {}


def _each(values: Any) -> str:
    """The values of all runs, each once."""
    return ", ".join(dict.fromkeys(values))


def _plain(value: float) -> str:
    return f"{float(value):.4g}"


def _number(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else "–"


def count_text(count: int) -> str:
    """A large count in words of people: 12,345 or 3.4 million."""
    return f"{count / 1e6:.1f} million" if count >= 1_000_000 else f"{count:,}"


def seconds_text(value: object) -> str:
    """A time in the largest units that help: 12.3 s, 4 min 5 s, 2 h 3 min."""
    if not isinstance(value, (int, float)):
        return "–"
    if value < 60:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {seconds} s"
    return f"{minutes // 60} h {minutes % 60} min"
