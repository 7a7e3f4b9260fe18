"""What runs saw of a few test images on their way through the deformations, as the page draws it.

Reads `explorer.json` of the runs (see `certifl explore`) and holds it against their certificates.
Format 2, which knew no planes, is read as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from certifl.errors import StoreError
from certifl.outside import MALFORMED
from certifl.report.results import RunResults
from certifl.report.scale import RadiusScale
from certifl.report.story import Story
from certifl.smoothing.bounds import two_sided_sign_test
from certifl.store.atomic import read_json

__all__ = ["MOST_PICTURES", "explored_records", "explorer_payload"]

MOST_PICTURES = 2_500_000
"""Pictures and votes on one page, in characters: the page stays well below 5 MB."""

_FILE, _FORMATS = "explorer.json", (2, 3)
_TOO_CLOSE = 0.001
_WAY = ("name", "words", "forward", "backward")
_ON_THE_PLANE = 20  # characters of one point, about

Key = tuple[int, int]
Record = Mapping[str, Any]


def explorer_payload(
    story: Story, pictures: bool = True, most: int = MOST_PICTURES
) -> dict[str, Any] | None:
    """What the page's script draws; None where no run was explored.

    Args:
        story: of the page.
        pictures: whether the images themselves are shown; without them no pixel is in the answer.
        most: characters that pictures and votes may take.

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
            "planeVotes": {
                str(place): record["plane_votes"]
                for place, record in records.items()
                if record.get("plane_votes") and place in shown
            },
            "images": alike if pictures else [_without_pixels(image) for image in alike],
        }
    except MALFORMED as error:
        raise StoreError(
            f"The {_FILE} of one of the runs is damaged ({type(error).__name__}: {error}). "
            "Remove it, or repeat `certifl explore`."
        ) from error


def explored_runs(story: Story) -> list[RunResults]:
    """Of each row the run whose images are shown: all of one seed, as far as they have it.

    Each seed deals images and trains networks anew, so only runs of one seed see the same image.
    """
    counts: dict[int | None, int] = {}
    for run in story.trained:
        counts[run.seed] = counts.get(run.seed, 0) + 1
    return [max(row.runs, key=lambda run: counts[run.seed]) for row in story.runs]


def explored_records(story: Story) -> list[tuple[int, Record]]:
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
    plane = image["plane"]
    if plane is not None:
        plane = {k: v for k, v in plane.items() if k != "picture"}
    return {**bare, "walks": walks, "plane": plane}


def _images(story: Story, records: Mapping[int, Record], most: int) -> list[dict[str, Any]]:
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
    """Characters of an image on the page: its pictures once, votes on its plane for every run."""
    first = next(iter(seen.values()))
    size = sum(len(walk["strip"]) for walk in first["walks"])
    if first.get("plane"):
        size += len(first["plane"]["picture"])
        size += _ON_THE_PLANE * len(first["plane"]["lengths"]) * (1 + len(seen))
    return size


def _image(story: Story, key: Key, seen: Mapping[int, Record]) -> dict[str, Any]:
    """One image, as all runs saw it that took the same steps as the first."""
    first = next(iter(seen.values()))
    alike = {place: image for place, image in seen.items() if _steps(image) == _steps(first)}
    planes = [image["plane"] for image in alike.values() if image.get("plane")]
    plane = planes[0] if planes else None
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
        "plane": None if plane is None else _plane(plane, story.scale),
        "runs": [_explored(story, place, image, plane) for place, image in alike.items()],
    }


def _steps(image: Record) -> list[Any]:
    return [walk["values"] for walk in image["walks"]]


def _plane(plane: Record, scale: RadiusScale) -> dict[str, Any]:
    """Where shifts were sampled, in words too, and how the picture is shifted."""
    return {
        "values": plane["values"],
        "texts": [_number(value, scale) for value in plane["values"]],
        "lengths": [_number(length, scale) for length in plane["lengths"]],
        "unit": scale.suffix,
        "picture": plane["picture"],
        "padding": str(plane["padding"]),
        "geometry": str(plane["geometry"]),
    }


def _step(value: float, scale: RadiusScale) -> str:
    """A step's length without its sign, with its unit."""
    return _number(value, scale) + scale.suffix


def _number(value: float, scale: RadiusScale) -> str:
    """A step's length without its sign; a place to look at, so rounded to the nearest."""
    return f"{abs(value) * scale.factor:.3g}"


def _explored(story: Story, place: int, image: Record, plane: Record | None) -> dict[str, Any]:
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
    own: Record = image.get("plane") or {}
    same = plane is not None and own.get("values") == plane["values"]
    return {
        "run": place,
        "predicted": int(one.predicted[0]),
        "ends": ends,
        "walks": [_walk(walk, radius, ends) for walk in image["walks"]],
        "plane": _points(own, radius, ends) if same else None,
        "certified": "" if ends is None else _certified(ends, story.scale),
    }


def _certified(ends: tuple[float, float], scale: RadiusScale) -> list[str]:
    """How far a certificate reaches back and forth, rounded inward; once where it is the same."""
    low, high = ends
    return [scale.text(high)] if -low == high else [scale.text(-low), scale.text(high)]


def _walk(walk: Record, radius: float, ends: tuple[float, float] | None) -> dict[str, Any]:
    """Winners of every step, whether they lead beyond doubt, and whether it is certified."""
    values = np.asarray(walk["values"], float)
    if ends is None or ends == (-radius, radius):
        return _points(walk, radius, ends)
    # Gaussian families reach equally far in all directions; an interval has its own ends.
    inside = (ends[0] <= values) & (values <= ends[1])
    return {**_votes(walk["winners"]), "inside": _flags(inside)}


def _points(seen: Record, radius: float, ends: tuple[float, float] | None) -> dict[str, Any]:
    """The same for parameters in any direction, which are inside up to the radius."""
    inside = np.asarray(seen["lengths"], float) <= (-1.0 if ends is None else radius)
    return {**_votes(seen["winners"]), "inside": _flags(inside)}


def _votes(winners: Sequence[Sequence[Sequence[int]]]) -> dict[str, Any]:
    first, second = (_votes_of(winners, rank) for rank in (0, 1))
    close = np.asarray(two_sided_sign_test(first, second)) > _TOO_CLOSE
    return {"winners": [step[:2] for step in winners], "close": _flags(close)}


def _votes_of(winners: Sequence[Sequence[Sequence[int]]], rank: int) -> list[int]:
    return [int(step[rank][1]) if rank < len(step) else 0 for step in winners]


def _flags(values: NDArray[np.bool_]) -> str:
    return "".join("1" if value else "0" for value in values)


def _class_names(run: RunResults) -> list[str] | None:
    data = run.manifest.get("data")
    names = data.get("class_names") if isinstance(data, Mapping) else None
    return [str(name) for name in names] if isinstance(names, list) and names else None
