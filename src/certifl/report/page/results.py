"""The parts of the page that speak of results: charts and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from certifl.certification.metadata import below_sigma
from certifl.report.compare import Difference, own_interval
from certifl.report.page.context import ReportContext, named
from certifl.report.page.html import Markup, el, join, table
from certifl.report.summary import (
    Share,
    abstained_share,
    accuracy_share,
    client_acr,
    client_curves,
    left_out_words,
    mean_acr,
    measures_of,
    selected_radii,
    spread,
)
from certifl.report.wording import (
    NO_DIFFERENCE,
    NOT_PAIRED,
    by_margin,
    listed,
    percent,
    range_of,
    tenths,
)

DIFFERENCES_SHOWN = ("sigma", "law", "alpha", "n0", "n", "estimator", "precision", "seed")


def notices(story: ReportContext) -> Markup:
    """Say plainly where the runs differ in more than the regime, and what was not told."""
    said = [_differences(story)]
    if any(run.told for run in story.runs):
        said.append(_kept(story))
    return join(el("p", {"class": "notice", "role": "note"}, text) for text in said if text)


def _differences(story: ReportContext) -> str:
    differing = [
        name
        for name in DIFFERENCES_SHOWN
        if len({str(run.conditions.get(name)) for run in story.trained}) > 1
        and not (name == "seed" and len(story.trained) > len(story.runs))
    ]
    if not differing:
        return ""
    named = ", ".join(
        f"{name} ({', '.join(str(run.conditions.get(name)) for run in story.trained)})"
        for name in differing
    )
    return f"The runs differ in more than the regime: {named}. Compare them with care."


def _kept(story: ReportContext) -> str:
    """That single images are not known here, and of which runs."""
    kept = [run.label for run in story.trained if run.told]
    of = "" if len(kept) == len(story.trained) else f" of {listed(kept)}"
    return (
        f"The clients{of} certified on their own machines and told, for each radius of a fixed "
        "grid, how many of their test images are certified correct, and their average radius. "
        "Radii, votes and abstentions of single images stayed with them; intervals over images "
        "take each radius to be where it lies in its step of the grid on average."
    )


def results_section(story: ReportContext) -> Markup:
    """Average certified radius and certified accuracies per regime, with intervals."""
    radii = selected_radii(story.runs, story.scale)
    head = ["Regime", "Average certified radius", "Best and worst client"]
    head += [f"At {text}" for text, _ in radii] + ["Abstained"]
    rows = [_result_row(story, place, [r for _, r in radii]) for place in range(len(story.runs))]
    return join(
        [
            table("Average certified radius and certified accuracy", head, rows),
            el("p", {"class": "note"}, _result_note(story)),
        ]
    )


def _result_row(story: ReportContext, place: int, radii: Sequence[float]) -> list[str]:
    run, scale = story.runs[place], story.scale
    best, worst, gap = spread(run)
    abstained = abstained_share(run)
    shares = [accuracy_share(run, radius) for radius in radii]
    ends = own_interval(run)
    under = scale.interval(*ends) if ends else "too few images for an interval"
    who = f"client {best} and client {worst}" if len(run.runs) == 1 else "mean over seeds"
    apart = _two(f"{scale.text(gap)} apart", who)
    return [
        _named_with_seeds(story, place),
        _two(scale.text(mean_acr(run)), under),
        apart if len(run.clients) > 1 else "–",
        *(_with_limits(s) for s in shares),
        "not told" if run.told else _with_limits(abstained),
    ]


def _named_with_seeds(story: ReportContext, place: int) -> Markup:
    """A regime's name, and its seeds where some row has several."""
    name = named(story, place)
    if len(story.trained) == len(story.runs):
        return name
    seeds = story.runs[place].runs
    words = f"seed{'s' if len(seeds) > 1 else ''} {', '.join(str(run.seed) for run in seeds)}"
    return join([name, el("small", None, words)])


def _with_limits(part: Share) -> Markup:
    return _two(percent(part.value), f"{tenths(part.low)} to {tenths(part.high)}")


def _two(first: str, second: str) -> Markup:
    return join([el("b", None, first), el("small", None, second)])


def _result_note(story: ReportContext) -> str:
    note = (
        "Certified accuracy at a radius: share of all certified test images that are classified "
        "correctly with at least that radius, with exact (Clopper-Pearson) 95 % limits over "
        "images. Average certified radius: mean over clients of radius × correct, with a 95 % "
        f"interval over images. {_seeds_note(story)} Radii are rounded down."
    )
    sizes = {int((r.certificates.client == c).sum()) for r in story.trained for c in r.clients}
    if len(sizes) > 1:
        note += (
            " The clients hold different numbers of test images: certified accuracies in this "
            "table count every image once, the curves and average radii every client once."
        )
    if any(below_sigma(run.conditions) for run in story.trained):
        note += " Radii of this uniform law stay below σ (Corollary 1); a scan has no such limit."
    if any(_stops_early_on_wrong(run.conditions) for run in story.trained):
        note += (
            " Votes may have stopped early on images that were already seen to be classified "
            "wrongly; some of those count as abstained."
        )
    return note


def _seeds_note(story: ReportContext) -> str:
    """What the intervals say of training again."""
    if len(story.trained) == len(story.runs):
        return (
            "The intervals speak of the choice of test images, not of training again with another "
            "seed."
        )
    return (
        "A row of several seeds has their means, and its intervals contain the scatter between "
        "seeds as well as that of images (Student's t with one degree of freedom less than "
        "seeds, wide where these are few; then its accuracies have no exact limits). A row of one "
        "seed has intervals over images alone."
    )


def _stops_early_on_wrong(facts: Mapping[str, Any]) -> bool:
    looks = facts.get("look_votes")
    return bool(facts.get("label_aware")) and isinstance(looks, list) and len(looks) > 1


def comparison_section(story: ReportContext) -> Markup:
    """All differences between regimes, image by image; nothing for a single run."""
    if len(story.runs) < 2:
        return Markup()
    paired = story.comparison.paired
    rows = [_difference_row(story, pair) for pair in story.comparison.pairs.values()]
    head = ["Difference", "Average certified radius (95 % interval)", "What the images show"]
    if not paired:
        head = ["Difference", "Average certified radius"]
        rows = [row[:2] for row in rows]
    kind = "Paired differences" if paired else "Differences"
    return join(
        [
            el("h3", None, "Differences between regimes"),
            table(f"{kind} of the average certified radius", head, rows),
            el("p", {"class": "note"}, _paired_note(story) if paired else _unpaired_note(story)),
        ]
    )


def _difference_row(story: ReportContext, pair: Difference) -> list[str]:
    ahead = pair.seen_from(pair.second) if pair.estimate < 0 else pair
    names = f"{story.runs[ahead.first].label} minus {story.runs[ahead.second].label}"
    if not story.comparison.paired and ahead.stated:
        return [names, story.scale.down(ahead.estimate) + story.scale.suffix, ""]
    verdict = f"{story.runs[ahead.first].label} is ahead" if pair.shown else NO_DIFFERENCE
    return [names, by_margin(ahead, story.scale), verdict if pair.stated else "nothing"]


def _paired_note(story: ReportContext) -> str:
    stated = [pair for pair in story.comparison.pairs.values() if pair.stated]
    if not stated:
        return (
            "Regimes are compared within a seed, on the images that both runs of it certified; a "
            "handful of images supports no statement."
        )
    seeds = range_of([pair.seeds for pair in stated])
    within = f" within each seed ({seeds} seeds)" if len(story.trained) > len(story.runs) else ""
    note = (
        f"Compared image by image{within} on {range_of([pair.images for pair in stated])} test "
        "images; the 95 % intervals hold for all rows together."
    )
    if not story.comparison.whole:
        note += " Only images and seeds that both of two regimes have are compared."
    return note


def _unpaired_note(story: ReportContext) -> str:
    own = "The interval of every regime by itself is in the table above."
    return f"{NOT_PAIRED} {own}" + (
        "" if story.comparison.whole else " Only clients that all runs have are compared."
    )


def clients_section(story: ReportContext) -> Markup:
    """Every client under every regime: average certified radius and accuracy at radius 0."""
    clients = sorted({int(c) for run in story.runs for c in run.clients})
    cells: dict[tuple[int, int], Markup] = {}
    for place, run in enumerate(story.runs):
        accuracies = client_curves(run, [0.0])[:, 0]
        for client, radius, accuracy in zip(run.clients, client_acr(run), accuracies, strict=True):
            at_zero = f"{percent(float(accuracy))} at 0"
            cells[int(client), place] = _two(story.scale.text(float(radius)), at_zero)
    places = range(len(story.runs))
    rows = [
        [_name_of(story, c), *(cells.get((c, place), Markup("–")) for place in places)]
        for c in clients
    ]
    head = ["Client", *(run.label for run in story.runs)]
    caption = "Average certified radius and certified accuracy at radius 0, per client"
    return el(
        "details",
        None,
        el("summary", None, "Every client's average certified radius"),
        table(caption, head, rows),
    )


def _name_of(story: ReportContext, client: int) -> str:
    """A client's name; with several seeds its number alone, unless all seeds agree on a name."""
    names = {run.name_of(client) for run in story.trained}
    return names.pop() if len(names) == 1 else str(client)


def training_section(story: ReportContext) -> Markup:
    """Where the script draws the training history; a sentence where nothing was recorded."""
    names = measures_of(story.runs)
    if not names:
        body = [el("p", None, "No training history was recorded.")]
    else:
        legend = [named(story, place) for place in range(len(story.runs))]
        panels = [
            el(
                "figure",
                None,
                el("figcaption", None, f"{name} per round"),
                el("div", {"class": "chart", "data-measure": str(position), "role": "img"}),
            )
            for position, name in enumerate(names)
        ]
        body = [
            el(
                "p",
                None,
                "What was recorded of the clients' training in every round: mean over "
                "clients, and from the smallest to the largest client.",
            ),
            el("p", {"class": "legend"}, *legend),
            el("div", {"class": "panels"}, *panels),
        ]
    failed = [(run.label, left_out_words(run)) for run in story.trained]
    warned = [
        el("p", {"class": "notice", "role": "note"}, f"{label}: {words}")
        for label, words in failed
        if words is not None
    ]
    return el("section", {"id": "training"}, el("h2", None, "Training"), *warned, *body)


# Controls of the certified-accuracy chart: regimes, band, lines, unit and clients.


# More bands on top of each other show nothing; they can be switched on.
_MOST_BANDS = 5


def chart_controls(story: ReportContext) -> Markup:
    """Everything that can be switched; all of it native form controls, reachable by keyboard."""
    regimes = el(
        "fieldset",
        {"class": "toggles", "id": "regime-toggles"},
        el("legend", None, "Regimes"),
        *(_toggle("regime", place, named(story, place)) for place in range(len(story.runs))),
    )
    bands = len(story.runs) <= _MOST_BANDS
    show = el(
        "fieldset",
        {"class": "toggles"},
        el("legend", None, "Show"),
        _option("checkbox", "show-band", "Band: smallest to largest client", bands),
        _option("checkbox", "show-clients", "One line per client", False),
    )
    return join([regimes, show, _unit_switch(story), _accuracy_switch(), _client_toggles(story)])


def _toggle(kind: str, value: int, label: str) -> Markup:
    box = {"type": "checkbox", "checked": True, f"data-{kind}": str(value)}
    return el("label", {"class": "toggle"}, el("input", box), label)


def _option(kind: str, name: str, label: str, on: bool) -> Markup:
    box: dict[str, str | bool] = {"type": kind, "id": name, "checked": on}
    return el("label", {"class": "toggle"}, el("input", box), el("span", None, label))


def _unit_switch(story: ReportContext) -> Markup:
    if len(story.units) < 2:
        return Markup()
    return _choice("Radius in", "unit", [unit.name for unit in story.units])


def _accuracy_switch() -> Markup:
    return _choice("Accuracy in", "accuracy", ["per cent", "shares from 0 to 1"])


def _choice(legend: str, name: str, words: Sequence[str]) -> Markup:
    options = [
        el(
            "label",
            {"class": "toggle"},
            el(
                "input",
                {"type": "radio", "name": name, f"data-{name}": str(i), "checked": i == 0},
            ),
            el("span", None, text),
        )
        for i, text in enumerate(words)
    ]
    return el("fieldset", {"class": "toggles"}, el("legend", None, legend), *options)


def _client_toggles(story: ReportContext) -> Markup:
    clients = sorted({int(c) for run in story.runs for c in run.clients})
    if len(clients) < 2:
        return Markup()
    chips = [
        el(
            "label",
            {"class": "chip"},
            el("input", {"type": "checkbox", "checked": True, "data-client": str(client)}),
            el("span", None, str(client)),
        )
        for client in clients
    ]
    buttons = [
        el("button", {"type": "button", "id": f"clients-{word}"}, word) for word in ("all", "none")
    ]
    return el(
        "fieldset",
        {"class": "toggles clients"},
        el("legend", None, "Clients in mean and band"),
        el("div", {"class": "chips"}, *chips),
        *buttons,
    )
