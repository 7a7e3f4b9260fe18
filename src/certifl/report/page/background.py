"""What the results mean, how they were computed, and how to verify and repeat them."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from certifl.perturbations import covers_received, received_words, trait
from certifl.progress import clock
from certifl.report.page.context import ReportContext, damage_named, named_run, stored_record
from certifl.report.page.html import (
    Markup,
    details,
    el,
    join,
    note,
    notice,
    paragraph,
    section,
    stacked,
    table,
)
from certifl.report.results import RunResults
from certifl.report.summary import noise_words, vote_cost
from certifl.report.wording import family_words, percent

_PROMISE = "for every {family} whose parameters have {norm} norm at most the radius, in {unit}"


def overview_list(context: ReportContext) -> Markup:
    """The study at a glance."""
    runs = context.trained
    costs = [vote_cost(run) for run in runs]
    spent = sum(votes.spent for votes in costs)
    data, images = runs[0].data, "image size not recorded"
    size = data.get("image_size")
    if isinstance(size, list) and len(size) == 2:
        channels = {1: "gray", 3: "color"}.get(data.get("in_channels", 0), "")
        images = f"{channels} {size[0]}\u00a0×\u00a0{size[1]}".strip()
    items = [
        ("Data", f"{data.get('name', 'not recorded')}, {images}"),
        ("Clients", _distinct(str(len(run.clients)) for run in runs)),
        ("Test images", _distinct(f"{len(run.certificates):,}" for run in runs)),
        ("Perturbation", noise_words(*context.runs).replace("σ = ", "σ\u00a0=\u00a0")),
        ("Risk per image", f"α = {_distinct(_plain(run.conditions['alpha']) for run in runs)}"),
        ("Votes", "not shared" if any(run.curves_only for run in runs) else count_text(spent)),
    ]
    if any(votes.saved is not None and votes.saved > 0.005 for votes in costs):
        share = 1.0 - spent / sum(votes.fixed or 0 for votes in costs)
        items.append(("Saved by stopping early", f"{100 * share:.0f} % of the votes"))
    if context.of_model:
        items = [(name, text) for name, text in items if name not in ("Data", "Clients")]
    pairs = [el("div", None, el("dt", None, k), el("dd", None, v)) for k, v in items]
    return el("dl", {"class": "key-figures"}, *pairs)


def meaning_section(context: ReportContext) -> Markup:
    """What a certificate promises, under which threat model, and what it does not promise."""
    metadata = context.runs[0].conditions
    alpha = max(float(run.conditions["alpha"]) for run in context.trained)
    reach = trait(metadata["family"], "promise", _PROMISE)
    words = {k: str(metadata[k]) for k in ("norm", "unit")} | {"family": family_words(metadata)}
    unit = "" if context.scale.factor == 1.0 else f"; this page shows {context.scale.name} first"
    promise = (
        f"For each single image, with probability at least {_confidence(alpha)} % over the "
        "votes that were cast, the smoothed classifier gives the certified class "
        f"{reach.format(**words)}. Radii are measured in {metadata['unit']}, norm "
        f"{metadata['norm']}{unit}."
    )
    limits = [el("li", None, el("b", None, k), " ", v) for k, v in _limits(context, alpha)]
    return section(
        "meaning",
        "What a certificate means, and what it does not",
        paragraph(promise),
        el("h3", None, "Threat model"),
        paragraph(str(metadata.get("threat", "Not recorded."))),
        el("h3", None, "Images that arrive changed"),
        paragraph(received_words(metadata["family"])),
        el("h3", None, "What it does not say"),
        el("ul", {"class": "limits"}, *limits),
    )


def _limits(context: ReportContext, alpha: float) -> list[tuple[str, str]]:
    metadata = context.runs[0].conditions
    images = max(len(run.certificates) for run in context.trained)
    precision = _distinct(
        str(run.conditions.get("precision", "not recorded")) for run in context.trained
    )
    interpolated_once = (
        "The original image is deformed once.",
        "The promise is about parameters: noise and the attacker's deformation are added, and "
        "the original image is interpolated once. An image that arrives already deformed is "
        "interpolated a second time, which is not covered. Measure the accuracy under such an "
        "attack before you rely on it.",
    )
    return [
        (
            "It is about the smoothed classifier.",
            "It returns the class with the most votes over noisy copies of the image. A single "
            "prediction of the network is not certified.",
        ),
        (
            "Stable does not mean correct.",
            "A certificate says that the prediction does not change. Whether it is correct is "
            "known here only because the test images have labels.",
        ),
        *([] if covers_received(metadata["family"]) else [interpolated_once]),
        (
            "The risk is per image.",
            f"Among the {images:,} images of a run, on average up to "
            f"{_plain(alpha * images)} certificates are wrong.",
        ),
        (
            "Only this perturbation.",
            f"Nothing is promised for perturbations other than {family_words(metadata)}, nor for "
            "several at once.",
        ),
        ("The network is certified as it was run.", f"Arithmetic of the network: {precision}."),
    ]


def cost_section(context: ReportContext) -> Markup:
    """Votes, time, hardware and versions of every run."""
    head = ["Property", *(run.label for run in context.trained)]
    columns = [_properties(run) for run in context.trained]
    names = list(dict.fromkeys(name for column in columns for name in column))
    caption = "Training, certification, time and machine of every run"
    heading = "How the runs were computed"
    if context.of_model:  # a file of certificates records no training and no machine
        names = [n for n in names if columns[0][n] not in ("–", "–, – GB")]
        caption, heading = "Votes and settings", "How the model was certified"
    rows = [[name, *(column.get(name, "–") for column in columns)] for name in names]
    return section("cost", heading, table(caption, head, rows))


def _properties(run: RunResults) -> dict[str, str]:
    metadata, votes, manifest = run.conditions, vote_cost(run), run.manifest
    machine, versions = (_mapping(manifest, name) for name in ("machine", "versions"))
    properties = {
        "Deployed model": str(manifest.get("deploys", "–")),
        "Network": str(manifest.get("model", "–")),
        "Seed": str(manifest.get("seed", "–")),
        "Estimator": str(metadata.get("estimator", "–")),
        "Votes that select the class (n0)": _number(metadata.get("n0")),
        "Votes that bound its probability, at most (n)": _number(metadata.get("n")),
        "Votes per image, on average": f"{votes.per_image:,.0f}",
        "Votes cast": f"{votes.spent:,}",
        "Votes without early stopping": _number(votes.fixed),
        "Saved": "–" if votes.saved is None else f"{100 * votes.saved:.1f} %",
        "Training took": seconds_text(manifest.get("training_seconds")),
        "Certification took": seconds_text(manifest.get("certification_seconds")),
        "Device": str(metadata.get("device", machine.get("device", "–"))),
        "Processor": str(machine.get("processor", "–")),
        "Cores, memory": f"{machine.get('cores', '–')}, {machine.get('memory_gb', '–')} GB",
        "Versions": ", ".join(f"{k} {v}" for k, v in sorted(versions.items())) or "–",
        "Started": str(manifest.get("created", "–")),
        "Spec": str(manifest.get("spec_hash", "–")),
    }
    if run.curves_only:
        properties |= dict.fromkeys(("Votes per image, on average", "Votes cast"), "not shared")
    model = metadata.get("model_fingerprint")
    return properties | ({"Model fingerprint": model} if isinstance(model, str) else {})


_RECOMPUTE = "Recompute every radius from the stored votes:"
_OWN_VOTES = (
    "Clients that share curves only keep their votes: each of them verifies its certificates on "
    "its own machine with certifl verify."
)


def reproduce_section(context: ReportContext, page: Path) -> Markup:
    """Commands that verify and repeat the runs, and the spec of every run, word for word."""
    runs = context.trained
    if context.of_model:
        file = runs[0].folder
        if file.suffix.lower() != ".parquet":  # it has no votes
            return Markup()
        code = _code(f"certifl verify {_quoted(file, page)}", "Command to verify the certificates")
        return section("reproduce", "Verify", paragraph(_RECOMPUTE), code)
    verify = [f"certifl verify {_quoted(r.folder, page)}" for r in runs if not r.curves_only]
    commands = dict.fromkeys(str(run.manifest.get("command") or "certifl run") for run in runs)
    parts: list[Markup] = []
    if verify:
        parts = [paragraph(_RECOMPUTE), _code("\n".join(verify), "Commands to verify the runs")]
    if len(verify) < len(runs):
        parts.append(paragraph(_OWN_VOTES))
    specs = []
    for run in runs:
        code = _code(run.spec, f"Spec of {run.label}")
        specs.append(details(join(["Spec of ", named_run(context, run)]), code))
    return section(
        "reproduce",
        "Verify and repeat",
        *parts,
        paragraph("Repeat the runs with the same spec and seed:"),
        _code("\n".join(commands), "Commands to repeat the runs"),
        *specs,
    )


def _code(text: str, name: str) -> Markup:
    around = {"class": "scroll", "tabindex": "0", "role": "region", "aria-label": name}
    return el("pre", around, el("code", None, text))


def _quoted(path: Path, page: Path) -> str:
    """A relative path as it was given; an absolute one as seen from the page's folder."""
    shown = os.path.relpath(path, page.resolve().parent) if path.is_absolute() else str(path)
    return shlex.quote(shown)


# Differential privacy of training.

_PROTECTED = {"example": "image", "client": "client"}
_NOISE_ADDED_BY = {
    "example": "every client, in every step: the server learns no more either",
    "client": "the server, which sees what every client sends",
}
_PRIVACY_LIMITS = (
    "ε bounds what results reveal about one training image, or about one client, at the given δ; "
    "a smaller ε reveals less. It is an upper bound, the largest of all clients. Certified "
    "accuracies are results of the deployed models, so on this page they cost all training behind "
    "these, fine-tuning and local training included; the messages alone are what leaves clients "
    "that share no results. Privacy of clients covers the models that the server sends: a model "
    "of a client's own has no noise, and no ε covers results about it. ε does not cover the test "
    "images behind the certificates and accuracies on this page, the number of images of each "
    "client, or the choice of settings. Certificates mean the same with and without privacy."
)


@dataclass(frozen=True)
class _Spent:
    """The largest epsilon of all clients.

    Attributes:
        messages: of the messages of training.
        total: of all results; None where models without noise are certified.
    """

    messages: float
    total: float | None


def _spent(run: RunResults, privacy: Mapping[str, Any]) -> _Spent:
    """From run.json; runs of 0.1.0 recorded a total for models without noise, too."""
    old = "epsilon_sent" in privacy
    messages = max(privacy["epsilon_sent" if old else "epsilon_messages"])
    total = privacy["epsilon"]
    certified = run.conditions.get("model_fingerprint")
    several = isinstance(certified, Mapping) and len(set(certified.values())) > 1
    if total is None or (old and privacy["kind"] == "client" and several):
        return _Spent(messages, None)
    return _Spent(messages, max(total))


def privacy_words(run: RunResults) -> str | None:
    """One sentence: epsilon, of what, at which delta; None for a run without privacy."""
    privacy = _mapping(run.manifest, "privacy")
    if not privacy:
        return None
    spent, at = _spent(run, privacy), f"at δ = {privacy['delta']:g}"
    words = f"private per {_PROTECTED[privacy['kind']]}, ε = "
    if spent.total is None:
        words += (
            f"{_up(spent.messages)} {at} for the models that the server sends; the clients' own "
            "models, which are certified, have no noise: no ε covers their results"
        )
    else:
        words += f"{_up(spent.total)} {at}"
        if spent.total > spent.messages:
            words += (
                f" for all that clients send and all results, {_up(spent.messages)} for the "
                "messages of training alone"
            )
    if privacy["noise_key"] == "seed":
        words += "; the noise follows from the seed, so anyone with the spec can remove it"
    return words


def privacy_section(context: ReportContext) -> Markup:
    """A row for each run that was trained with privacy; nothing where none was."""
    private = [(run, _mapping(run.manifest, "privacy")) for run in context.trained]
    rows = [_privacy_row(context, run, privacy) for run, privacy in private if privacy]
    if not rows:
        return Markup()
    head = ["Algorithm", "Protects one", "ε of all results", "ε of the messages alone", "δ"]
    head += ["Noise multiplier", "Clipped to", "Noise is added by", "Key of the noise"]
    caption = "Differential privacy of every private run"
    return section(
        "privacy", "Privacy of training", paragraph(_PRIVACY_LIMITS), table(caption, head, rows)
    )


def _privacy_row(context: ReportContext, run: RunResults, privacy: Mapping[str, Any]) -> list[str]:
    low, high = min(privacy["noise_multiplier"]), max(privacy["noise_multiplier"])
    spent = _spent(run, privacy)
    return [
        named_run(context, run),
        _PROTECTED[privacy["kind"]],
        "none: own models without noise" if spent.total is None else _up(spent.total),
        _up(spent.messages),
        f"{privacy['delta']:g}",
        f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}",
        f"{privacy['max_norm']:g}",
        _NOISE_ADDED_BY[privacy["kind"]],
        "the seed, known to anyone with the spec" if privacy["noise_key"] == "seed" else "secret",
    ]


def _up(epsilon: float) -> str:
    return f"{math.ceil(100 * epsilon - 1e-9) / 100:.2f}"  # rounded up: a bound remains one


# Words for numbers.


def _mapping(manifest: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = manifest.get(name)
    return value if isinstance(value, Mapping) else {}


def _distinct(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def _confidence(alpha: float) -> str:
    """100 (1 - alpha) in all digits: rounded, a small alpha would become certainty."""
    return f"{(100 * (1 - Decimal(repr(alpha)))).normalize():f}"


def _plain(value: float) -> str:
    return f"{float(value):.4g}"


def _number(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else "–"


def count_text(count: int) -> str:
    """A large count for people: 12,345 or 3.4 million."""
    return f"{count / 1e6:.1f} million" if count >= 1_000_000 else f"{count:,}"


def seconds_text(value: object) -> str:
    """A time in suitable units: 12.3 s, 4 min 5 s, 2 h 3 min."""
    if not isinstance(value, (int, float)):
        return "–"
    return f"{value:.1f} s" if value < 60 else clock(round(value))


# Attacks on certificates: what they promise, tried; what they do not cover, measured.

_FILE = "attack.json"
_FORMAT = 1
_MOST_NAMED = 10

Record = Mapping[str, Any]


def attacks_section(context: ReportContext) -> Markup:
    """Attacks on the certificates; nothing where none were tried (`certifl attack`).

    Raises:
        StoreError: a run's record of attacks is damaged.
    """
    with damage_named(_FILE, "certifl attack"):
        records = [(run, _record(run)) for run in context.trained]
        attacked = [(run, record) for run, record in records if record is not None]
        if not attacked:
            return Markup()
        head = ["Algorithm", "Class changed inside", "Certified correct", "Predicted correct"]
        head += ["Deformed first, at random", "Deformed first, worst", "Changed by it"]
        return section(
            "attacks",
            "Under attack",
            *(_warning(run, one) for run, one in attacked if one["parameters"]["violations"]),
            paragraph(_explanation(context, [record for _, record in attacked])),
            table(
                "Attacks on certified images, and accuracy on deformed ones",
                head,
                [_row(context, run, record) for run, record in attacked],
            ),
            note(_method(attacked[0][1])),
        )


def _record(run: RunResults) -> Record | None:
    """The run's attack.json; where clients certify different perturbations, about those here."""
    record = stored_record(run, _FILE, (_FORMAT,))
    if record is None:
        return None
    own = set(run.clients.tolist())
    parts = record.get("perturbations") or [
        {"clients": [one["client"] for one in record.get("clients", [])]}
    ]
    fitting = [part for part in parts if own.issuperset(part["clients"])]
    return {**record, **fitting[0]} if fitting else None


def _row(context: ReportContext, run: RunResults, record: Record) -> list[str]:
    inside, deformed = record["parameters"], record["deformed_first"]
    return [
        named_run(context, run),
        stacked(
            f"{len(inside['violations'])} of {inside['images']}",
            f"{count_text(inside['deltas'])} parameters tried",
        ),
        percent(deformed["certified"]),
        percent(deformed["clean"]),
        percent(deformed["random"]),
        stacked(percent(deformed["worst"]), f"of {deformed['deltas']} deformations"),
        f"{deformed['changed']} of {deformed['promised']}",
    ]


def _warning(run: RunResults, record: Record) -> Markup:
    """The images whose class changed although a certificate said that it does not."""
    cases = record["parameters"]["violations"]
    images = ", ".join(f"image {c['index']} of client {c['client']}" for c in cases[:_MOST_NAMED])
    more = f" and {len(cases) - _MOST_NAMED} more" if len(cases) > _MOST_NAMED else ""
    return notice(
        f"{run.label}: the attack found another class inside the certified radius of "
        f"{images}{more}. These certificates are wrong."
    )


def _explanation(context: ReportContext, records: Sequence[Record]) -> str:
    images = max(record["deformed_first"]["images"] for record in records)
    promise = (
        "Within the certified radius the class of the smoothed classifier must not change. The "
        "second column is a search for parameters that change it. "
    )
    if covers_received(context.runs[0].conditions["family"]):
        return (
            f"{promise}An image that was changed before it arrives is covered too, up to rounding "
            "and clipping by its sender, since noise is added to the change either way. The last "
            f"three columns are about {images:,} images of a run that were first changed, then "
            "clipped to [0, 1] and rounded to 8 bits, and smoothed on arrival."
        )
    return (
        f"{promise}Certificates are about parameters that are added before a single "
        "interpolation. A system that receives a deformed image interpolates twice, which no "
        f"certificate here covers. The last three columns are about {images:,} images of a run "
        "that were first deformed, by parameters within their certificates, and then smoothed."
    )


def _method(record: Record) -> str:
    inside, deformed = record["parameters"], record["deformed_first"]
    level = f"{inside['level']:.0e}".replace("e-0", "e-")
    return (
        "All shares refer to the attacked images, a fixed random sample of each client's "
        "certified test images; images without a certificate are not deformed. Suspicious "
        f"parameters are tested with {inside['confirm']:,} fresh votes, ten times those of a "
        "certificate; with probability at most "
        f"{level} in total, a change is reported where there is none. "
        f"Predictions on deformed images take {deformed['votes']:,} votes, and the worst of "
        "several deformations is chosen by someone who knows the label. “Changed” are certified "
        "images that some deformation gives another class (sign test at 0.001 per image). A "
        "search that finds nothing proves nothing."
    )
