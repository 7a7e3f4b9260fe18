"""Charts and tables of results: accuracy, radii, differences, clients, training."""

from __future__ import annotations

from collections.abc import Sequence

from certifl.certification.metadata import below_sigma
from certifl.report import summary
from certifl.report.compare import Difference
from certifl.report.page.context import ReportContext, acr_cell, named, share_cell, spread_cell
from certifl.report.page.html import (
    Markup,
    choice,
    details,
    el,
    fieldset,
    join,
    note,
    notice,
    paragraph,
    section,
    stacked,
    table,
    toggle,
)
from certifl.report.page.recommendation import NO_DIFFERENCE, NOT_PAIRED, by_margin
from certifl.report.results import Row
from certifl.report.table import Group, by_class
from certifl.report.wording import listed, percent, range_of

_COMPARED = ("sigma", "law", "alpha", "n0", "n", "estimator", "precision", "seed")


def notices(context: ReportContext) -> Markup:
    """Warnings: runs that differ in more than the algorithm, clients that share curves only."""
    texts: list[str] = []
    values = {
        name: [str(run.conditions.get(name)) for run in context.trained]
        for name in _COMPARED
        if not (name == "seed" and context.several_seeds)
    }
    differing = [f"{name} ({', '.join(v)})" for name, v in values.items() if len(set(v)) > 1]
    if differing:
        texts.append(
            f"The runs differ in more than the algorithm: {', '.join(differing)}. Compare them "
            "with care."
        )
    labels = [run.label for run in context.trained if run.curves_only]
    if labels:
        of = "" if len(labels) == len(context.trained) else f" of {listed(labels)}"
        texts.append(
            f"The clients{of} certified on their own machines and shared curves only: for each "
            "radius of a fixed grid, how many of their test images are certified correct, and "
            "their average certified radius. Radii, votes and abstentions of single images stayed "
            "with the clients. Intervals over images place each radius within its step of the "
            "grid."
        )
    return join(map(notice, texts))


def results_section(context: ReportContext) -> Markup:
    """Average certified radius and certified accuracies per algorithm, with intervals."""
    radii, scale = summary.selected_radii(context.runs, context.scale), context.scale
    what, over = ("Model", []) if context.of_model else ("Algorithm", ["Best and worst client"])
    head = [what, "Average certified radius", *over]
    head += [f"At {text}" for text, _ in radii] + ["Abstained"]
    rows = [
        [
            _named_with_seeds(context, row),
            acr_cell(run, scale),
            *(spread_cell(run, scale) for _ in over),
            *(share_cell(summary.accuracy_share(run, radius)) for _, radius in radii),
            "not shared" if run.curves_only else share_cell(summary.abstained_share(run)),
        ]
        for row, run in enumerate(context.runs)
    ]
    caption = "Average certified radius and certified accuracy"
    return join([table(caption, head, rows), note(_result_note(context))])


def _named_with_seeds(context: ReportContext, row: int) -> Markup:
    """The name of a row, and its seeds where some row has several."""
    name = named(context, row)
    if not context.several_seeds:
        return name
    seeds = [str(run.seed) for run in context.runs[row].runs]
    words = f"seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)}"
    return join([name, el("small", None, words)])


def _result_note(context: ReportContext) -> str:
    over = "images" if context.of_model else "clients"
    text = (
        "Certified accuracy at a radius: share of all certified test images that are classified "
        "correctly with at least that radius, with exact (Clopper-Pearson) 95 % limits over "
        f"images. Average certified radius: mean over {over} of radius × correct, with a 95 % "
        f"interval over images. {_seeds_note(context)} Radii are rounded down."
    )
    sizes = {int((r.certificates.client == c).sum()) for r in context.trained for c in r.clients}
    if len(sizes) > 1:
        text += (
            " The clients have different numbers of test images: certified accuracies in this "
            "table count every image once, the curves and average radii every client once."
        )
    if any(below_sigma(run.conditions) for run in context.trained):
        text += (
            " Radii of this uniform distribution stay below σ (Corollary 1); a scan has no such "
            "limit."
        )
    looks = [run.conditions.get("look_votes") or () for run in context.trained]
    wrong = [bool(run.conditions.get("label_aware")) for run in context.trained]
    if any(w and isinstance(v, list) and len(v) > 1 for w, v in zip(wrong, looks, strict=True)):
        text += (
            " Voting may have stopped early on images that were clearly classified wrongly; some "
            "of those count as abstained."
        )
    return text


def _seeds_note(context: ReportContext) -> str:
    if not context.several_seeds:
        return (
            "The intervals are about the choice of test images, not about training again with "
            "another seed."
        )
    return (
        "A row of several seeds shows their means, and its intervals include the variation "
        "between seeds as well as between images (Student's t with one degree of freedom fewer "
        "than seeds; wide where there are few). Its accuracies have no exact limits. A row "
        "of one seed has intervals over images alone."
    )


def comparison_section(context: ReportContext) -> Markup:
    """All differences between algorithms, image by image; nothing for a single run."""
    if len(context.runs) < 2:
        return Markup()
    paired = context.comparison.paired
    rows = [_difference_row(context, pair) for pair in context.comparison.pairs.values()]
    head = ["Difference", "Average certified radius (95 % interval)", "Result"]
    if not paired:
        head = ["Difference", "Average certified radius"]
        rows = [row[:2] for row in rows]
    kind = "Paired differences" if paired else "Differences"
    unpaired = f"{NOT_PAIRED} The table above has an interval for each algorithm."
    if not context.comparison.whole:
        unpaired += " Only clients that all runs have are compared."
    return join(
        [
            el("h3", None, "Differences between algorithms"),
            table(f"{kind} of the average certified radius", head, rows),
            note(_paired_note(context) if paired else unpaired),
        ]
    )


def _difference_row(context: ReportContext, pair: Difference) -> list[str]:
    ahead = pair.seen_from(pair.second) if pair.estimate < 0 else pair
    names = f"{context.runs[ahead.first].label} minus {context.runs[ahead.second].label}"
    if not context.comparison.paired and ahead.stated:
        return [names, context.scale.down(ahead.estimate) + context.scale.suffix, ""]
    result = f"{context.runs[ahead.first].label} is ahead" if pair.shown else NO_DIFFERENCE
    return [names, by_margin(ahead, context.scale), result if pair.stated else "none"]


def _paired_note(context: ReportContext) -> str:
    stated = [pair for pair in context.comparison.pairs.values() if pair.stated]
    if not stated:
        return (
            "Algorithms are compared within a seed, on the images that both runs of that seed "
            "certified. There are too few of these for a statement."
        )
    seeds = range_of([pair.seeds for pair in stated])
    within = f" within each seed ({seeds} seeds)" if context.several_seeds else ""
    text = (
        f"Compared image by image{within} on {range_of([pair.images for pair in stated])} test "
        "images. The 95 % intervals hold for all rows together."
    )
    if not context.comparison.whole:
        text += " Only images and seeds that both algorithms have are compared."
    return text


def clients_section(context: ReportContext) -> Markup:
    """Every client under every algorithm: average certified radius and accuracy at radius 0."""
    if context.of_model:
        return Markup()
    cells: dict[tuple[int, int], Markup] = {}
    for row, run in enumerate(context.runs):
        accuracies = summary.client_curves(run, [0.0])[:, 0]
        for client, radius, accuracy in zip(
            run.clients, summary.client_acr(run), accuracies, strict=True
        ):
            at_zero = f"{percent(float(accuracy))} at 0"
            cells[int(client), row] = stacked(context.scale.text(float(radius)), at_zero)
    rows = []
    for c in context.clients:
        # With several seeds a client's number alone, unless all seeds agree on a name.
        names = {run.client_name(c) for run in context.trained}
        name = names.pop() if len(names) == 1 else str(c)
        rows.append([name, *(cells.get((c, row), "–") for row in range(len(context.runs)))])
    head = ["Client", *(run.label for run in context.runs)]
    caption = "Average certified radius and certified accuracy at radius 0, per client"
    return details("Average certified radius of every client", table(caption, head, rows))


def training_section(context: ReportContext) -> Markup:
    """Where the script draws the training history; a sentence where nothing was recorded."""
    if context.of_model:
        return Markup()
    failures = [(run.label, summary.left_out_words(run)) for run in context.trained]
    warnings = [notice(f"{label}: {words}") for label, words in failures if words is not None]
    names = summary.measures_of(context.runs)
    if not names:
        nothing = paragraph("No training history was recorded.")
        return section("training", "Training", *warnings, nothing)
    panels = []
    for number, name in enumerate(names):
        chart = el("div", {"class": "chart", "data-measure": str(number), "role": "img"})
        panels.append(el("figure", None, el("figcaption", None, f"{name} per round"), chart))
    explanation = (
        "Recorded during the clients' training in every round. Lines are means over clients; "
        "bands reach from the smallest to the largest client."
    )
    if "epsilon" in names:
        explanation += " epsilon is spent up to a round; what it covers: see Privacy of training."
    legend = [named(context, row) for row in range(len(context.runs))]
    return section(
        "training",
        "Training",
        *warnings,
        paragraph(explanation),
        el("p", {"class": "legend"}, *legend),
        el("div", {"class": "panels"}, *panels),
    )


# Controls of the certified-accuracy chart: algorithms, band, lines, unit and clients.


# More bands on top of each other show nothing; they can be switched on.
_MOST_BANDS = 5


def chart_controls(context: ReportContext) -> Markup:
    """All options of the charts; native form controls, reachable by keyboard."""
    rows = range(len(context.runs))
    box: dict[str, str | bool] = {"type": "checkbox", "checked": True}
    algorithms = [toggle({**box, "data-algorithm": str(r)}, named(context, r)) for r in rows]
    show = [
        toggle(
            {"type": "checkbox", "id": "show-band", "checked": len(rows) <= _MOST_BANDS},
            "Band: smallest to largest client",
        ),
        toggle({"type": "checkbox", "id": "show-clients"}, "One line per client"),
    ]
    units = [unit.name for unit in context.units]
    return join(
        [
            fieldset(
                "Curves" if context.of_model else "Algorithms",
                *algorithms,
                name="algorithm-toggles",
            ),
            Markup() if context.of_model else fieldset("Show", *show),
            choice("Radius in", "unit", units) if len(units) > 1 else Markup(),
            choice("Accuracy in", "accuracy", ["percent", "shares from 0 to 1"]),
            _client_toggles(context.clients),
        ]
    )


def _client_toggles(clients: Sequence[int]) -> Markup:
    if len(clients) < 2:
        return Markup()
    chips = []
    for client in map(str, clients):
        box = el("input", {"type": "checkbox", "checked": True, "data-client": client})
        chips.append(el("label", {"class": "chip"}, box, el("span", None, client)))
    buttons = [
        el("button", {"type": "button", "id": f"clients-{word}"}, word) for word in ("all", "none")
    ]
    chips_box = el("div", {"class": "chips"}, *chips)
    return fieldset("Clients in mean and band", chips_box, *buttons, kind="clients")


# Certified accuracy and abstentions by class: which class is not certified.

_MOST_SHOWN = 20
_MOST_NAMED = 6


def classes_section(context: ReportContext) -> Markup:
    """A table of classes for one row, or all rows side by side; nothing for curves alone."""
    rows = [row for row in context.runs if not row.curves_only]
    if not rows:
        return Markup()
    radii = summary.selected_radii(rows, context.scale)
    groups = [by_class(row, [radius for _, radius in radii]) for row in rows]
    if len(rows) == 1:
        shown = _one_row(context, groups[0], [text for text, _ in radii])
    else:
        shown = _side_by_side(rows, groups)
    sentences = [_uncertified(row, own) for row, own in zip(rows, groups, strict=True)]
    text = (
        "Classes are those of the labels, and every image counts once, whichever client has it. "
        "Each number has its own 95 % limits: among many numbers, some miss theirs."
    )
    if context.several_seeds:
        text += " Rows of several seeds show means over seeds, and count images once per seed."
    body = join([*(paragraph(one) for one in sentences if one), shown, note(text)])
    if len(rows) > 1 or len(groups[0]) > _MOST_SHOWN:
        body = details("Certified accuracy of every class", body)
    return join([el("h3", None, "By class"), body])


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
