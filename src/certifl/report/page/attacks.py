"""The part of the page about attacks: what certificates promise, tried; what not, measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from certifl.errors import StoreError
from certifl.perturbations import trait
from certifl.report.page.background import count_text
from certifl.report.page.context import ReportContext, named_run
from certifl.report.page.html import Markup, el, join, table
from certifl.report.results import RunResults
from certifl.report.wording import percent
from certifl.runs.atomic import read_json
from certifl.safe_io import MALFORMED

_FILE = "attack.json"
_FORMAT = 1
_MOST_NAMED = 10


def threats_section(story: ReportContext) -> Markup:
    """Attacks on the certificates; nothing where none were tried (`certifl attack`).

    Raises:
        StoreError: a run's record of attacks is damaged.
    """
    try:
        found = [(run, _record(run)) for run in story.trained]
        known = [(run, record) for run, record in found if record is not None]
        return _section(story, known) if known else Markup()
    except MALFORMED as error:
        raise StoreError(
            f"The {_FILE} of one of the runs is damaged ({type(error).__name__}: {error}). "
            "Remove it, or repeat `certifl attack`."
        ) from error


def _section(
    story: ReportContext, known: Sequence[tuple[RunResults, Mapping[str, Any]]]
) -> Markup:
    head = ["Regime", "Class changed inside", "Certified correct", "Predicted correct"]
    head += ["Deformed first, at random", "Deformed first, worst", "Changed by it"]
    rows = [_row(story, run, record) for run, record in known]
    return el(
        "section",
        {"id": "threats"},
        el("h2", None, "Under attack"),
        *_warnings(known),
        el("p", None, _what(story, [record for _, record in known])),
        table("Attacks on certified images, and accuracy on deformed ones", head, rows),
        el("p", {"class": "note"}, _how([record for _, record in known])),
    )


def _record(run: RunResults) -> Mapping[str, Any] | None:
    """The run's attack.json; None where it is missing, of another spec or of another format."""
    path = run.folder / _FILE
    if not path.is_file():
        return None
    record = read_json(path)
    same = isinstance(record, dict) and record.get("format") == _FORMAT
    if not same or record.get("spec_hash") != run.manifest.get("spec_hash"):
        return None
    # Where clients certify perturbations of their own, only the part about those shown here.
    own = set(run.clients.tolist())
    parts = record.get("perturbations") or [
        {"clients": [one["client"] for one in record.get("clients", [])]}
    ]
    fitting = [part for part in parts if own.issuperset(part["clients"])]
    return {**record, **fitting[0]} if fitting else None


def _row(story: ReportContext, run: RunResults, record: Mapping[str, Any]) -> list[str]:
    inside, beyond = record["parameters"], record["deformed_first"]
    changes = _two(
        f"{len(inside['violations'])} of {inside['images']}",
        f"{count_text(inside['deltas'])} parameters tried",
    )
    return [
        named_run(story, run),
        changes,
        percent(beyond["certified"]),
        percent(beyond["clean"]),
        percent(beyond["random"]),
        _two(percent(beyond["worst"]), f"of {beyond['deltas']} deformations"),
        f"{beyond['changed']} of {beyond['promised']}",
    ]


def _two(first: str, second: str) -> Markup:
    return join([el("b", None, first), el("small", None, second)])


def _warnings(known: Sequence[tuple[RunResults, Mapping[str, Any]]]) -> list[Markup]:
    """Every image whose class changed where a certificate said that it does not."""
    warnings = []
    for run, record in known:
        cases = record["parameters"]["violations"]
        if cases:
            named_ones = ", ".join(
                f"image {case['index']} of client {case['client']}" for case in cases[:_MOST_NAMED]
            )
            more = f" and {len(cases) - _MOST_NAMED} more" if len(cases) > _MOST_NAMED else ""
            text = (
                f"{run.label}: the attack found another class inside the certified "
                f"radius of {named_ones}{more}. These certificates are wrong."
            )
            warnings.append(el("p", {"class": "notice", "role": "note"}, text))
    return warnings


def _what(story: ReportContext, records: Sequence[Mapping[str, Any]]) -> str:
    images = max(record["deformed_first"]["images"] for record in records)
    promise = (
        "Inside a certificate the class of the smoothed classifier must not change; the search "
        "for a parameter that changes it is in the second column. "
    )
    if trait(story.runs[0].conditions["family"], "additive", False):
        return (
            f"{promise}Changed pixels are added before the noise either way, so an image that "
            "arrives changed is covered too, up to rounding; the columns behind it say how "
            f"{images:,} images fared."
        )
    return (
        f"{promise}Certificates are about parameters that are added before one interpolation. A "
        "system that receives a deformed image interpolates twice, which no certificate here "
        f"covers: the last three columns say how {images:,} images of a run fared when they were "
        "deformed first, by parameters inside their certificates, and smoothed second."
    )


def _how(records: Sequence[Mapping[str, Any]]) -> str:
    inside, beyond = records[0]["parameters"], records[0]["deformed_first"]
    return (
        "All shares are of the images chosen for the attack, a fixed random part of each "
        "client's certified test images; those without a certificate are left as they are. "
        f"Parameters that looked suspicious got {inside['confirm']:,} fresh votes, ten times "
        "those of a certificate; a change is only called one by tests that err with probability "
        f"at most {_power(inside['level'])} over all of them. Predictions on deformed images take "
        f"{beyond['votes']:,} votes, and the worst of several deformations is chosen with the "
        "label known. “Changed” are certified images that some deformation gives another class "
        "(sign test at 0.001 per image). That a search finds nothing proves nothing by itself."
    )


def _power(level: float) -> str:
    return f"{level:.0e}".replace("e-0", "e-")
