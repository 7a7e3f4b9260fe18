"""The image explorer's place on the page: pictures to pick, what moves them, what is voted.

The page's script fills it from `explored.explorer_payload`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from certifl.report.explored import explored_records
from certifl.report.markup import Markup, el
from certifl.report.story import Story, named
from certifl.report.words import listed

__all__ = ["explorer_section"]

_LEFT_OUT = (
    "Test images are left out of this page: what was voted on them is here, what they look like "
    "is not."
)


def explorer_section(story: Story, found: Mapping[str, Any] | None) -> Markup:
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


def _has_plane(found: Mapping[str, Any]) -> bool:
    return any(image["plane"] for image in found["images"])


def _what(story: Story, found: Mapping[str, Any]) -> str:
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
    both = ", or shift it in both directions at once" if _has_plane(found) else ""
    pictured = "the picture is deformed, and " if found["pictures"] else ""
    return (
        f"Pick a test image and move the slider{both}: {pictured}the smoothed classifier votes on "
        f"the deformed image{several}. The thick bar is the certified range"
        f"{', the disc the same in all directions' if both else ''}.{left_out}"
    )


def _picker(found: Mapping[str, Any]) -> Markup:
    legend = el("legend", None, "Test image")
    kind = "pictures" if found["pictures"] else "pictures bare"
    return el("fieldset", {"class": f"toggles {kind}", "id": "pictures"}, legend)


def _stage(found: Mapping[str, Any]) -> Markup:
    """The picture, what is known of it, the slider or the pad."""
    canvas = {"id": "picture", "width": "224", "height": "224", "role": "img"}
    picture = el("canvas", {**canvas, "aria-label": "The deformed image"})
    facts = el(
        "div",
        {"class": "picture-facts"},
        el("p", {"id": "picture-words"}),
        _ways(found),
        _slider(),
        _pad() if _has_plane(found) else Markup(),
    )
    kind = "picture-stage" if found["pictures"] else "picture-stage bare"
    return el("div", {"class": kind}, picture if found["pictures"] else Markup(), facts)


def _ways(found: Mapping[str, Any]) -> Markup:
    """What happens to the image: one walk, the other, or both shifts at once."""
    words = [str(walk["words"]) for walk in found["walks"]]
    if _has_plane(found):
        words.append("shifted in both directions")
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
        {"id": "along"},
        el(
            "label",
            {"for": "step", "class": "step-label"},
            "Deformation ",
            el("output", {"id": "step-text", "for": "step"}),
        ),
        el("div", {"class": "rail"}, el("input", slider)),
        el("div", {"class": "rail-ends", "id": "rail-ends", "aria-hidden": "true"}),
    )


def _pad() -> Markup:
    """A slider of two directions; its value is told in words, as a slider's is."""
    pad = {
        "id": "pad",
        "class": "pad",
        "role": "slider",
        "tabindex": "0",
        "aria-roledescription": "slider in two directions",
        "aria-label": "Shift of the image",
        "aria-describedby": "pad-how",
        "aria-valuemin": "0",
        "aria-valuemax": "0",
        "aria-valuenow": "0",
    }
    how = (
        "Drag the dot, or use the arrow keys; Home puts the image back. The disc is certified as "
        "a whole. Elsewhere predictions are known at the points alone."
    )
    return el(
        "div",
        {"id": "both", "hidden": True},
        el("div", pad),
        # Below the pad: a longer text must not move it under the reader's finger.
        el("p", {"class": "step-label"}, "Shift ", el("output", {"id": "shift-text"})),
        el("p", {"class": "note", "id": "pad-how"}, how),
    )


def _row(story: Story, place: int) -> Markup:
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
        ("certified", "certified range or disc" if _has_plane(found) else "certified range"),
        ("same", "same class"),
        ("close", "too close to call"),
        ("other", "another class"),
    ]
    items = [
        el("span", None, el("i", {"class": f"key key-{kind}", "aria-hidden": "true"}), words)
        for kind, words in kinds
    ]
    return el("p", {"class": "legend keys"}, *items)


def _honest(story: Story, found: Mapping[str, Any]) -> str:
    votes = sorted(set(found["votes"].values()))
    many = f"{votes[0]:,}" if len(votes) == 1 else f"{votes[0]:,} to {votes[-1]:,}"
    note = (
        f"At every step, {many} votes on the same noise; the prediction is the class with most of "
        "them, too close to call where a sign test at 0.001 cannot tell the first two apart. "
        "These votes take no part in any certificate. "
    )
    if story.runs[0].conditions["family"] == "pixel":
        return note + (
            "A certificate speaks of every change of at most its length, the worst included; "
            "these two ways are no attacks, so classes often stay the same far beyond it. Shown "
            "clipped to black and white; the network is given unclipped intensities."
        )
    if found["walks"][0]["name"] == "drawn":
        note += (
            "A certificate speaks of all directions up to its radius; this one was drawn at "
            "random for each image, and is hardly the worst. "
        )
    if _has_plane(found):
        note += _both(found)
    return note + (
        "Every vote is ONE interpolation of the stored image with the summed parameter, your step "
        "plus noise: that is what certificates cover. A picture that arrives already deformed is "
        "interpolated twice, which they do not."
    )


def _both(found: Mapping[str, Any]) -> str:
    """What is promised of a plane, and what was only looked at."""
    image = next(image for image in found["images"] if image["plane"])
    side, votes = len(image["plane"]["values"]), max(found["planeVotes"].values())
    return (
        "Certified is the ball of the radius, on the pad a disc: EVERY shift, across and down "
        "together, of at most its l2 length, whether or not it was sampled. Everything else on "
        f"the pad is a prediction at one of {side} × {side} sampled shifts, {votes:,} votes each: "
        "it promises nothing, neither there nor between the points. "
    )
