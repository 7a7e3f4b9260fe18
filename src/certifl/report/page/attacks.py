"""Attacks on certificates: what they promise, tried; what they do not cover, measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from certifl.errors import StoreError
from certifl.perturbations import covers_received
from certifl.report.page.background import count_text
from certifl.report.page.context import ReportContext, named_run
from certifl.report.page.html import Markup, note, notice, paragraph, section, stacked, table
from certifl.report.results import RunResults
from certifl.report.wording import percent
from certifl.runs.atomic import read_json
from certifl.safe_io import MALFORMED

_FILE = "attack.json"
_FORMAT = 1
_MOST_NAMED = 10

Record = Mapping[str, Any]


def attacks_section(context: ReportContext) -> Markup:
    """Attacks on the certificates; nothing where none were tried (`certifl attack`).

    Raises:
        StoreError: a run's record of attacks is damaged.
    """
    try:
        records = [(run, _record(run)) for run in context.trained]
        return _section(context, [(run, record) for run, record in records if record is not None])
    except MALFORMED as error:
        raise StoreError(
            f"The {_FILE} of one of the runs is damaged ({type(error).__name__}: {error}). "
            "Remove it, or repeat `certifl attack`."
        ) from error


def _section(context: ReportContext, attacked: Sequence[tuple[RunResults, Record]]) -> Markup:
    if not attacked:
        return Markup()
    head = ["Algorithm", "Class changed inside", "Certified correct", "Predicted correct"]
    head += ["Deformed first, at random", "Deformed first, worst", "Changed by it"]
    rows = [_row(context, run, record) for run, record in attacked]
    return section(
        "attacks",
        "Under attack",
        *(_warning(run, record) for run, record in attacked if record["parameters"]["violations"]),
        paragraph(_explanation(context, [record for _, record in attacked])),
        table("Attacks on certified images, and accuracy on deformed ones", head, rows),
        note(_method(attacked[0][1])),
    )


def _record(run: RunResults) -> Record | None:
    """The run's attack.json; None where it is missing, of another spec or of another format."""
    path = run.folder / _FILE
    if not path.is_file():
        return None
    record = read_json(path)
    same = isinstance(record, dict) and record.get("format") == _FORMAT
    if not same or record.get("spec_hash") != run.manifest.get("spec_hash"):
        return None
    # Where clients certify different perturbations, only the part about those shown here.
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
    return (
        "All shares refer to the attacked images, a fixed random sample of each client's "
        "certified test images; images without a certificate are not deformed. Suspicious "
        f"parameters are tested with {inside['confirm']:,} fresh votes, ten times those of a "
        "certificate; with probability at most "
        f"{_power(inside['level'])} in total, a change is reported where there is none. "
        f"Predictions on deformed images take {deformed['votes']:,} votes, and the worst of "
        "several deformations is chosen by someone who knows the label. “Changed” are certified "
        "images that some deformation gives another class (sign test at 0.001 per image). A "
        "search that finds nothing proves nothing."
    )


def _power(level: float) -> str:
    return f"{level:.0e}".replace("e-0", "e-")
