"""The image explorer: pictures to pick, the sweeps that deform them, and the votes on the way.

The page's script fills it from `explorer_payload`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from string import Template
from typing import Any

import numpy as np
from numpy.typing import NDArray

from certifl.perturbations import covers_received, trait
from certifl.report.page.context import ReportContext, damage_named, named, stored_record
from certifl.report.page.html import (
    Markup,
    asset,
    el,
    fieldset,
    join,
    note,
    notice,
    paragraph,
    section,
    toggle,
)
from certifl.report.results import RunResults
from certifl.report.wording import listed, range_of
from certifl.smoothing.bounds import two_sided_sign_test

_NO_PICTURES = "Test images are left out of this page. It shows the votes on them, no pictures."
_NO_SCRIPT = "The explorer needs JavaScript, which is part of this file but switched off here."


def explorer_section(context: ReportContext, explored: Mapping[str, Any] | None) -> Markup:
    """Where the script shows the explorer; why there is none where a run says so."""
    if explored is None:
        reasons = {str(r["skipped"]) for _, r in _records(context) if r.get("skipped")}
        texts = [paragraph(f"No images to explore. {reason}") for reason in sorted(reasons)]
        return section("explorer", "Images", *texts) if texts else Markup()
    pictures, shown = bool(explored["pictures"]), {r["run"] for r in explored["images"][0]["runs"]}
    canvas = {"id": "picture", "width": "224", "height": "224", "role": "img"}
    picture = el("canvas", {**canvas, "aria-label": "The deformed image"})
    parts = {
        "bare": "" if pictures else " bare",
        "picture": picture if pictures else "",
        "sweeps": _sweep_choice(explored),
        "rows": join(
            el(
                "div",
                {"class": "explored-row", "data-explored": str(row)},
                el("div", {"class": "explored-name"}, named(context, row), el("small")),
                el("p", {"class": "explored-answer"}),
                el("div", {"class": "strip"}),
            )
            for row in sorted(shown)
        ),
    }
    live = Markup(Template(asset("explorer.html")).substitute(parts))
    return section(
        "explorer",
        "Explore test images",
        paragraph(_instructions(context, shown, pictures)),
        Markup() if pictures else notice(_NO_PICTURES),
        el("noscript", None, el("p", {"class": "notice"}, _NO_SCRIPT)),
        el("div", {"class": "js-only", "hidden": True}, live),
        note(_method(context, explored)),
    )


def _instructions(context: ReportContext, shown: set[int], pictures: bool) -> str:
    which = "every algorithm" if len(shown) == len(context.runs) else "each algorithm named below"
    several = f" under {which}" if len(shown) > 1 else ""
    missing = [run.label for row, run in enumerate(context.runs) if row not in shown]
    left_out = (
        f" Not shown: {listed(missing)}, which explored other images or none; run `certifl "
        "explore` on all of them."
        if missing
        else ""
    )
    picture = "the picture is deformed, and " if pictures else ""
    return (
        f"Pick a test image and move the slider: {picture}you see how the smoothed classifier "
        f"votes on the deformed image{several}. The thick bar is the certified range.{left_out}"
    )


def _sweep_choice(explored: Mapping[str, Any]) -> Markup:
    """How the image is deformed, where there are several ways."""
    words = [str(sweep["words"]) for sweep in explored["sweeps"]]
    if len(words) < 2:
        return Markup()
    options = [
        toggle({"type": "radio", "name": "sweep", "value": str(i), "checked": i == 0}, text)
        for i, text in enumerate(words)
    ]
    return fieldset("The image is", *options)


def _method(context: ReportContext, explored: Mapping[str, Any]) -> str:
    family = context.runs[0].conditions["family"]
    text = (
        f"Each step takes {range_of(list(explored['votes'].values()))} votes on the same noise. "
        "The answer is the class with the most votes; it is too close to call where a sign test "
        "at 0.001 cannot separate the first two. These votes play no part in any certificate. "
    )
    if explored["sweeps"][0]["name"] == "drawn":
        text += (
            "A certificate covers all directions up to its radius; the one shown was drawn at "
            "random for each image, and is rarely the worst. "
        )
    text += trait(family, "sweep_note", "")
    if covers_received(family):
        return text
    return text + (
        "Every vote is one interpolation of the stored image with the summed parameter, your step "
        "plus noise: this is what certificates cover. A picture that arrives already deformed is "
        "interpolated twice, which they do not cover."
    )


# Votes on a few test images along sweeps of the parameters, as the page draws them.
#
# Reads `explorer.json` of the runs (see `certifl explore`) beside their certificates. Planes of
# shifts in both directions, which format 3 of 0.1.0 also recorded, are ignored.

MOST_PICTURES = 2_500_000  # characters of pictures: the page stays well below 5 MB

_FILE, _FORMATS = "explorer.json", (3, 4)
_TOO_CLOSE = 0.001
_WORDS = ("name", "words", "forward", "backward")

Key = tuple[int, int]
Record = Mapping[str, Any]


def explorer_payload(
    context: ReportContext, pictures: bool = True, most: int = MOST_PICTURES
) -> dict[str, Any] | None:
    """What the page's script draws; None where no run was explored.

    Args:
        pictures: whether the images themselves are shown; without them the answer has no pixel.
        most: characters that pictures may take.

    Raises:
        StoreError: a run's record is damaged.
    """
    with damage_named(_FILE, "certifl explore"):
        records = {row: record for row, record in _records(context) if record["images"]}
        if not records:
            return None
        images = []
        for key, seen in _chosen(records, most):
            walks = next(iter(seen.values()))["walks"]
            sweeps = [{name: str(one[name]) for name in _WORDS} for one in walks]
            images.append((sweeps, _image(context, key, seen, pictures)))
        # One perturbation has the same sweeps in every run; a run with others is left out.
        words = images[0][0]
        shown = _seen_by_all([image for own, image in images if own == words])
        rows = {run["run"] for run in shown[0]["runs"]}
        return {
            "sweeps": words,
            "names": context.runs[0].runs[0].class_names,
            "pictures": pictures,
            "votes": {str(row): record["votes"] for row, record in records.items() if row in rows},
            "images": shown,
        }


def _explored_runs(context: ReportContext) -> list[RunResults]:
    """Of each row the run whose images are shown: all of one seed, as far as they have it.

    Each seed has its own partition and networks, so only runs of one seed see the same image.
    """
    counts: dict[int | None, int] = {}
    for run in context.trained:
        counts[run.seed] = counts.get(run.seed, 0) + 1
    return [max(row.runs, key=lambda run: counts[run.seed]) for row in context.runs]


def _records(context: ReportContext) -> list[tuple[int, Record]]:
    """Records that belong to their runs, by row, with the images of the clients shown here."""
    records: list[tuple[int, Record]] = []
    for row, run in enumerate(_explored_runs(context)):
        record = stored_record(run, _FILE, _FORMATS)
        if record is not None:
            own = set(run.clients.tolist())
            images = [image for image in record["images"] if image["client"] in own]
            records.append((row, {**record, "images": images}))
    return records


def _chosen(records: Mapping[int, Record], most: int) -> list[tuple[Key, dict[int, Record]]]:
    """Images, those that most runs explored first, as many as the page may show; by client."""
    by_image: dict[Key, dict[int, Record]] = {}
    for row, record in records.items():
        for image in record["images"]:
            by_image.setdefault((image["client"], image["index"]), {})[row] = image
    chosen: dict[Key, dict[int, Record]] = {}
    total = 0
    for key, seen in sorted(by_image.items(), key=lambda item: -len(item[1])):
        # The pictures of an image are on the page once.
        size = sum(len(sweep["strip"]) for sweep in next(iter(seen.values()))["walks"])
        if not chosen or total + size <= most:
            total += size
            chosen[key] = seen
    return sorted(chosen.items())


def _seen_by_all(images: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The images that the same runs explored, as many runs as there is an image for.

    A row that is beside one picture must not be missing beside the next.
    """
    sets = [frozenset(run["run"] for run in image["runs"]) for image in images]
    candidates = [*sets, frozenset.intersection(*sets)]
    shared = max(candidates, key=lambda rows: (len(rows), sum(rows <= seen for seen in sets)))
    return [
        {**image, "runs": [run for run in image["runs"] if run["run"] in shared]}
        for image, seen in zip(images, sets, strict=True)
        if shared <= seen
    ]


def _image(
    context: ReportContext, key: Key, seen: Mapping[int, Record], pictures: bool
) -> dict[str, Any]:
    """One image, as all runs saw it that took the same steps as the first."""
    first, scale = next(iter(seen.values())), context.scale
    steps = {row: [sweep["values"] for sweep in image["walks"]] for row, image in seen.items()}
    alike = {row: image for row, image in seen.items() if steps[row] == next(iter(steps.values()))}
    # Texts are lengths without their sign, to the nearest: positions, not promises.
    sweeps = [
        {
            "values": sweep["values"],
            "texts": [f"{abs(v) * scale.factor:.3g}{scale.suffix}" for v in sweep["values"]],
            **({"strip": sweep["strip"]} if pictures else {}),
        }
        for sweep in first["walks"]
    ]
    return {
        "client": key[0],
        "index": key[1],
        "label": first["label"],
        **({"tile": first["tile"]} if pictures else {}),
        "sweeps": sweeps,
        "runs": [_answers(context, row, image) for row, image in alike.items()],
    }


def _answers(context: ReportContext, row: int, image: Record) -> dict[str, Any]:
    """One run's certificate of an image, and its votes along the sweeps."""
    certificates = _explored_runs(context)[row].certificates
    at = np.flatnonzero(
        (certificates.client == image["client"]) & (certificates.index == image["index"])
    )
    one = certificates.select(at[:1])
    if len(one) == 0:
        raise ValueError(f"image {image['index']} was explored, but not certified")
    radius = float(one.radius[0])
    low, high = -radius, radius
    if one.interval is not None and np.isfinite(one.interval[0]).all():
        low, high = map(float, one.interval[0])
    ends = None if bool(one.abstained[0]) else (low, high)
    # Ends of the certified range, rounded inward; one where both are the same.
    texts = [context.scale.text(end) for end in dict.fromkeys((-low, high))]
    return {
        "run": row,
        "predicted": int(one.predicted[0]),
        "ends": ends,
        "sweeps": [_sweep(sweep, radius, ends) for sweep in image["walks"]],
        "certified": "" if ends is None else texts,
    }


def _sweep(sweep: Record, radius: float, ends: tuple[float, float] | None) -> dict[str, Any]:
    """The first classes of every step, whether they are clearly ahead, and what is certified."""
    values, lengths = (np.asarray(sweep[name], float) for name in ("values", "lengths"))
    if ends is None:
        inside = np.zeros(len(values), np.bool_)
    elif ends == (-radius, radius):
        inside = lengths <= radius
    else:  # the interval of a scan
        inside = (ends[0] <= values) & (values <= ends[1])
    winners = [step[:2] for step in sweep["winners"]]
    votes = [[*(int(count) for _, count in step), 0, 0] for step in winners]
    first, second = ([counts[rank] for counts in votes] for rank in (0, 1))
    close = np.asarray(two_sided_sign_test(first, second)) > _TOO_CLOSE
    return {"winners": winners, "close": _flags(close), "inside": _flags(inside)}


def _flags(values: NDArray[np.bool_]) -> str:
    return "".join("1" if value else "0" for value in values)
