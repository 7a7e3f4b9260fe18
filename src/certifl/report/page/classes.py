"""Certified accuracy and abstentions by class: which class is not certified."""

from __future__ import annotations

from certifl.report.groups import Group, by_class
from certifl.report.page.context import ReportContext, share_cell
from certifl.report.page.html import Markup, details, el, join, note, paragraph, stacked, table
from certifl.report.results import Row
from certifl.report.summary import selected_radii
from certifl.report.wording import listed, percent

_MOST_SHOWN = 20
_MOST_NAMED = 6


def classes_section(context: ReportContext) -> Markup:
    """A table of classes for one row, or all rows side by side; nothing for curves alone."""
    rows = [row for row in context.runs if not row.curves_only]
    if not rows:
        return Markup()
    radii = selected_radii(rows, context.scale)
    groups = [by_class(row, [radius for _, radius in radii]) for row in rows]
    if len(rows) == 1:
        shown = _one_row(context, groups[0], [text for text, _ in radii])
    else:
        shown = _side_by_side(rows, groups)
    sentences = [_uncertified(row, own) for row, own in zip(rows, groups, strict=True)]
    words = [paragraph(sentence) for sentence in sentences if sentence]
    body = join([*words, shown, note(_note(context))])
    heading = el("h3", None, "By class")
    if len(rows) == 1 and len(groups[0]) <= _MOST_SHOWN:
        return join([heading, body])
    return join([heading, details("Certified accuracy of every class", body)])


def _one_row(context: ReportContext, groups: list[Group], radii: list[str]) -> Markup:
    head = ["Class", "Images", "Average certified radius", *(f"At {text}" for text in radii)]
    cells = [
        [
            group.name,
            f"{group.images:,}",
            context.scale.text(group.acr),
            *map(share_cell, group.accuracy),
            "not shared" if group.abstained is None else share_cell(group.abstained),
        ]
        for group in groups
    ]
    return table("Certified accuracy by class", [*head, "Abstained"], cells)


def _side_by_side(rows: list[Row], groups: list[list[Group]]) -> Markup:
    """A class's accuracy at radius 0 and abstentions under every algorithm."""
    found = [{group.number: group for group in own} for own in groups]
    names = {group.number: group.name for own in groups for group in own}
    cells = [
        [names[number], *(_brief(own.get(number)) for own in found)] for number in sorted(names)
    ]
    head = ["Class", *(row.label for row in rows)]
    return table("Certified accuracy at radius 0 and abstentions, by class", head, cells)


def _brief(group: Group | None) -> str:
    if group is None:
        return "–"
    abstained = "" if group.abstained is None else f", {percent(group.abstained.value)} abstained"
    return stacked(percent(group.accuracy[0].value), f"of {group.images:,} images{abstained}")


def _uncertified(row: Row, groups: list[Group]) -> str:
    """Which classes have no image that is certified correctly; "" where all have one."""
    names = [group.name for group in groups if group.accuracy[0].value == 0.0]
    if not names:
        return ""
    if len(names) > _MOST_NAMED:
        names = [*names[:_MOST_NAMED], f"{len(names) - _MOST_NAMED} more"]
    one = len(names) == 1
    return (
        f"{row.label} certifies no test image of {'class' if one else 'classes'} {listed(names)} "
        "correctly."
    )


def _note(context: ReportContext) -> str:
    text = (
        "Classes are those of the labels, and every image counts once, whichever client has it. "
        "Each number has its own 95 % limits: among many numbers, some miss theirs."
    )
    if context.several_seeds:
        text += " Rows of several seeds show means over seeds, and count images once per seed."
    return text
