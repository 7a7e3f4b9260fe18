"""The image explorer's place on the page: pictures to pick, what moves them, what is voted.

The page's script fills it from `explorer_payload`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from certifl.errors import StoreError
from certifl.perturbations import trait
from certifl.report.page.context import ReportContext, named
from certifl.report.page.html import Markup, el
from certifl.report.results import RunResults
from certifl.report.units import RadiusScale
from certifl.report.wording import listed
from certifl.runs.atomic import read_json
from certifl.safe_io import MALFORMED
from certifl.smoothing.bounds import two_sided_sign_test

_LEFT_OUT = (
    "Test images are left out of this page: what was voted on them is here, what they look like "
    "is not."
)


def explorer_section(story: ReportContext, found: Mapping[str, Any] | None) -> Markup:
    """Where the script shows the explorer; why there is none where a run says so."""
    if found is None:
        reasons = {str(r["skipped"]) for _, r in explored_records(story) if r.get("skipped")}
        if not reasons:
            return Markup()
        body: list[str] = [el("p", None, f"No images to explore. {r}") for r in sorted(reasons)]
        return el("section", {"id": "explorer"}, el("h2", None, "Images"), *body)
    rows = [_row(story, place) for place in range(len(story.runs)) if place in _shown(found)]
    needs = "The explorer needs JavaScript, which this file brings along; it is switched off here."
    shown = el("div", {"class": "walkers", "id": "walkers"}, *rows)
    live = (_picker(found), _stage(found), shown, _legend(found))
    return el(
        "section",
        {"id": "explorer"},
        el("h2", None, "See for yourself"),
        el("p", None, _what(story, found)),
        Markup() if found["pictures"] else el("p", {"class": "notice", "role": "note"}, _LEFT_OUT),
        el("noscript", None, el("p", {"class": "notice"}, needs)),
        el("div", {"class": "js-only", "hidden": True}, *live),
        el("p", {"class": "note"}, _honest(story, found)),
    )


def _shown(found: Mapping[str, Any]) -> set[int]:
    """The runs under which every image is shown."""
    return {run["run"] for run in found["images"][0]["runs"]}


def _what(story: ReportContext, found: Mapping[str, Any]) -> str:
    shown = _shown(found)
    which = "every regime" if len(shown) == len(story.runs) else "each regime named below"
    several = f" under {which}" if len(shown) > 1 else ""
    missing = [run.label for place, run in enumerate(story.runs) if place not in shown]
    left_out = (
        f" Not shown: {listed(missing)}, which explored other images or none; `certifl explore` "
        "takes them."
        if missing
        else ""
    )
    pictured = "the picture is deformed, and " if found["pictures"] else ""
    return (
        f"Pick a test image and move the slider: {pictured}the smoothed classifier votes on the "
        f"deformed image{several}. The thick bar is the certified range.{left_out}"
    )


def _picker(found: Mapping[str, Any]) -> Markup:
    legend = el("legend", None, "Test image")
    kind = "pictures" if found["pictures"] else "pictures bare"
    return el("fieldset", {"class": f"toggles {kind}", "id": "pictures"}, legend)


def _stage(found: Mapping[str, Any]) -> Markup:
    """The picture, what is known of it, the slider."""
    canvas = {"id": "picture", "width": "224", "height": "224", "role": "img"}
    picture = el("canvas", {**canvas, "aria-label": "The deformed image"})
    facts = el(
        "div",
        {"class": "picture-facts"},
        el("p", {"id": "picture-words"}),
        _ways(found),
        _slider(),
    )
    kind = "picture-stage" if found["pictures"] else "picture-stage bare"
    return el("div", {"class": kind}, picture if found["pictures"] else Markup(), facts)


def _ways(found: Mapping[str, Any]) -> Markup:
    """What happens to the image: one walk or the other."""
    words = [str(walk["words"]) for walk in found["walks"]]
    if len(words) < 2:
        return Markup()
    options = [
        el(
            "label",
            {"class": "toggle"},
            el("input", {"type": "radio", "name": "walk", "value": str(i), "checked": i == 0}),
            el("span", None, text),
        )
        for i, text in enumerate(words)
    ]
    return el("fieldset", {"class": "toggles"}, el("legend", None, "The image is"), *options)


def _slider() -> Markup:
    slider = {"type": "range", "id": "step", "min": "0", "max": "1", "step": "1", "value": "0"}
    return el(
        "div",
        None,
        el(
            "label",
            {"for": "step", "class": "step-label"},
            "Deformation ",
            el("output", {"id": "step-text", "for": "step"}),
        ),
        el("div", {"class": "rail"}, el("input", slider)),
        el("div", {"class": "rail-ends", "id": "rail-ends", "aria-hidden": "true"}),
    )


def _row(story: ReportContext, place: int) -> Markup:
    """One regime: what it says now, and the strip of all steps."""
    return el(
        "div",
        {"class": "walker", "data-walker": str(place)},
        el("div", {"class": "walker-name"}, named(story, place), el("small")),
        el("p", {"class": "walker-says"}),
        el("div", {"class": "strip"}),
    )


def _legend(found: Mapping[str, Any]) -> Markup:
    kinds = [
        ("certified", "certified range"),
        ("same", "same class"),
        ("close", "too close to call"),
        ("other", "another class"),
    ]
    items = [
        el("span", None, el("i", {"class": f"key key-{kind}", "aria-hidden": "true"}), words)
        for kind, words in kinds
    ]
    return el("p", {"class": "legend keys"}, *items)


def _honest(story: ReportContext, found: Mapping[str, Any]) -> str:
    votes = sorted(set(found["votes"].values()))
    many = f"{votes[0]:,}" if len(votes) == 1 else f"{votes[0]:,} to {votes[-1]:,}"
    note = (
        f"At every step, {many} votes on the same noise; the prediction is the class with most of "
        "them, too close to call where a sign test at 0.001 cannot tell the first two apart. "
        "These votes take no part in any certificate. "
    )
    if found["walks"][0]["name"] == "drawn":
        note += (
            "A certificate speaks of all directions up to its radius; this one was drawn at "
            "random for each image, and is hardly the worst. "
        )
    family = story.runs[0].conditions["family"]
    note += trait(family, "sweep_note", "")
    if trait(family, "additive", False):
        return note
    return note + (
        "Every vote is ONE interpolation of the stored image with the summed parameter, your step "
        "plus noise: that is what certificates cover. A picture that arrives already deformed is "
        "interpolated twice, which they do not."
    )


# What runs saw of a few test images on their way through the deformations, as the page draws it.
#
# Reads `explorer.json` of the runs (see `certifl explore`) and holds it against their
# certificates.
# Planes of shifts in both directions, which format 3 of 0.1.0 also held, are left out.


MOST_PICTURES = 2_500_000
"""Pictures on one page, in characters: the page stays well below 5 MB."""

_FILE, _FORMATS = "explorer.json", (3, 4)
_TOO_CLOSE = 0.001
_WAY = ("name", "words", "forward", "backward")

Key = tuple[int, int]
Record = Mapping[str, Any]


def explorer_payload(
    story: ReportContext, pictures: bool = True, most: int = MOST_PICTURES
) -> dict[str, Any] | None:
    """What the page's script draws; None where no run was explored.

    Args:
        story: of the page.
        pictures: whether the images themselves are shown; without them no pixel is in the answer.
        most: characters that pictures may take.

    Raises:
        StoreError: a run's record is damaged.
    """
    try:
        records = {place: record for place, record in explored_records(story) if record["images"]}
        if not records:
            return None
        found = _images(story, records, most)
        # One perturbation has the same walks in every run; a run that took others is left out.
        walks = [{name: walk[name] for name in _WAY} for walk in found[0]["walks"]]
        alike = _seen_by_all(
            [_without_words(i) for i in found if _words_of(i) == _words_of(found[0])]
        )
        shown = {run["run"] for run in alike[0]["runs"]}
        return {
            "walks": walks,
            "names": _class_names(story.runs[0].runs[0]),
            "pictures": pictures,
            "votes": {str(p): record["votes"] for p, record in records.items() if p in shown},
            "images": alike if pictures else [_without_pixels(image) for image in alike],
        }
    except MALFORMED as error:
        raise StoreError(
            f"The {_FILE} of one of the runs is damaged ({type(error).__name__}: {error}). "
            "Remove it, or repeat `certifl explore`."
        ) from error


def explored_runs(story: ReportContext) -> list[RunResults]:
    """Of each row the run whose images are shown: all of one seed, as far as they have it.

    Each seed deals images and trains networks anew, so only runs of one seed see the same image.
    """
    counts: dict[int | None, int] = {}
    for run in story.trained:
        counts[run.seed] = counts.get(run.seed, 0) + 1
    return [max(row.runs, key=lambda run: counts[run.seed]) for row in story.runs]


def explored_records(story: ReportContext) -> list[tuple[int, Record]]:
    """Records that belong to the runs they lie in, by place, with the images of their clients."""
    found: list[tuple[int, Record]] = []
    for place, run in enumerate(explored_runs(story)):
        path = run.folder / _FILE
        record = read_json(path) if path.is_file() else None
        if not isinstance(record, dict) or record.get("format") not in _FORMATS:
            continue
        if record.get("spec_hash") == run.manifest.get("spec_hash"):
            own = set(run.clients.tolist())  # the others' perturbations are shown elsewhere
            seen = [image for image in record["images"] if image["client"] in own]
            found.append((place, {**record, "images": seen}))
    return found


def _words_of(image: Record) -> list[list[str]]:
    return [[walk[name] for name in _WAY] for walk in image["walks"]]


def _seen_by_all(images: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The images that the same runs explored, as many runs as there is an image for.

    What stands beside one picture must not be missing beside the next.
    """
    sets = [frozenset(run["run"] for run in image["runs"]) for image in images]
    candidates = [*sets, frozenset.intersection(*sets)]
    shared = max(candidates, key=lambda runs: (len(runs), sum(runs <= seen for seen in sets)))
    return [
        _under(shared, image) for image, seen in zip(images, sets, strict=True) if shared <= seen
    ]


def _under(places: frozenset[int], image: dict[str, Any]) -> dict[str, Any]:
    """An image under some runs alone."""
    return {**image, "runs": [run for run in image["runs"] if run["run"] in places]}


def _without_words(image: dict[str, Any]) -> dict[str, Any]:
    walks = [{k: v for k, v in walk.items() if k not in _WAY} for walk in image["walks"]]
    return {**image, "walks": walks}


def _without_pixels(image: dict[str, Any]) -> dict[str, Any]:
    """All that was voted, and nothing of what the image looks like."""
    walks = [{k: v for k, v in walk.items() if k != "strip"} for walk in image["walks"]]
    bare = {k: v for k, v in image.items() if k != "tile"}
    return {**bare, "walks": walks}


def _images(
    story: ReportContext, records: Mapping[int, Record], most: int
) -> list[dict[str, Any]]:
    """Images, those that most runs explored first, as many as the page may hold; by client."""
    by_image: dict[Key, dict[int, Record]] = {}
    for place, record in records.items():
        for image in record["images"]:
            by_image.setdefault((image["client"], image["index"]), {})[place] = image
    chosen: dict[Key, dict[int, Record]] = {}
    taken = 0
    for key, seen in sorted(by_image.items(), key=lambda item: -len(item[1])):
        size = _size(seen)
        if not chosen or taken + size <= most:
            taken += size
            chosen[key] = seen
    return [_image(story, key, chosen[key]) for key in sorted(chosen)]


def _size(seen: Mapping[int, Record]) -> int:
    """Characters of an image's pictures, which are on the page once."""
    return sum(len(walk["strip"]) for walk in next(iter(seen.values()))["walks"])


def _image(story: ReportContext, key: Key, seen: Mapping[int, Record]) -> dict[str, Any]:
    """One image, as all runs saw it that took the same steps as the first."""
    first = next(iter(seen.values()))
    alike = {place: image for place, image in seen.items() if _steps(image) == _steps(first)}
    return {
        "client": key[0],
        "index": key[1],
        "label": first["label"],
        "tile": first["tile"],
        "walks": [
            {
                **{name: str(walk[name]) for name in _WAY},
                "values": walk["values"],
                "texts": [_step(value, story.scale) for value in walk["values"]],
                "strip": walk["strip"],
            }
            for walk in first["walks"]
        ],
        "runs": [_explored(story, place, image) for place, image in alike.items()],
    }


def _steps(image: Record) -> list[Any]:
    return [walk["values"] for walk in image["walks"]]


def _step(value: float, scale: RadiusScale) -> str:
    """A step's length without its sign, to the nearest: a position, not a promise."""
    return f"{abs(value) * scale.factor:.3g}{scale.suffix}"


def _explored(story: ReportContext, place: int, image: Record) -> dict[str, Any]:
    """What one run says of an image: its certificate, and its votes on the way."""
    certificates = explored_runs(story)[place].certificates
    row = np.flatnonzero(
        (certificates.client == image["client"]) & (certificates.index == image["index"])
    )
    one = certificates.select(row[:1])
    if len(one) == 0:
        raise ValueError(f"image {image['index']} was explored, but not certified")
    radius = float(one.radius[0])
    low, high = -radius, radius
    if one.interval is not None and np.isfinite(one.interval[0]).all():
        low, high = map(float, one.interval[0])
    ends = None if bool(one.abstained[0]) else (low, high)
    return {
        "run": place,
        "predicted": int(one.predicted[0]),
        "ends": ends,
        "walks": [_walk(walk, radius, ends) for walk in image["walks"]],
        "certified": "" if ends is None else _certified(ends, story.scale),
    }


def _certified(ends: tuple[float, float], scale: RadiusScale) -> list[str]:
    """How far a certificate reaches back and forth, rounded inward; once where it is the same."""
    low, high = ends
    return [scale.text(high)] if -low == high else [scale.text(-low), scale.text(high)]


def _walk(walk: Record, radius: float, ends: tuple[float, float] | None) -> dict[str, Any]:
    """Winners of every step, whether they lead beyond doubt, and whether it is certified."""
    values, lengths = (np.asarray(walk[name], float) for name in ("values", "lengths"))
    if ends is None:
        inside = np.zeros(len(values), np.bool_)
    elif ends == (-radius, radius):
        inside = lengths <= radius
    else:  # an interval of a scan has ends of its own
        inside = (ends[0] <= values) & (values <= ends[1])
    first, second = (_votes_of(walk["winners"], rank) for rank in (0, 1))
    close = np.asarray(two_sided_sign_test(first, second)) > _TOO_CLOSE
    winners = [step[:2] for step in walk["winners"]]
    return {"winners": winners, "close": _flags(close), "inside": _flags(inside)}


def _votes_of(winners: Sequence[Sequence[Sequence[int]]], rank: int) -> list[int]:
    return [int(step[rank][1]) if rank < len(step) else 0 for step in winners]


def _flags(values: NDArray[np.bool_]) -> str:
    return "".join("1" if value else "0" for value in values)


def _class_names(run: RunResults) -> list[str] | None:
    data = run.manifest.get("data")
    names = data.get("class_names") if isinstance(data, Mapping) else None
    return [str(name) for name in names] if isinstance(names, list) and names else None
