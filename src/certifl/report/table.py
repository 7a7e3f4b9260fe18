"""The numbers of reports as rows: for the terminal, as data frames, by class and by client."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from certifl.certification.certificates import Certificates, pandas, require_rows
from certifl.errors import InputError
from certifl.perturbations.units import parse_amounts
from certifl.report import summary
from certifl.report.compare import own_interval
from certifl.report.page.background import privacy_words
from certifl.report.results import (
    Row,
    RunResults,
    by_perturbation,
    by_seed,
    load_runs,
    require_one_perturbation,
)
from certifl.report.wording import percent
from certifl.smoothing.bounds import Floats, Ints
from certifl.smoothing.curves import mean_and_band

if TYPE_CHECKING:
    from pandas import DataFrame

_MEANING = ("family", "sigma", "unit", "norm", "alpha", "estimator")


def summary_rows(runs: Sequence[str | Path | RunResults]) -> list[dict[str, Any]]:
    """One row per algorithm and setting, the same numbers as on the page.

    Runs that differ in their seed alone are one row: means over the seeds, with intervals that
    include the variation between them.

    Where clients certify different perturbations, one row per perturbation and run.

    Returns:
        Per row: `regime`, `label`, `seeds` (of its runs), `images`, `clients`; `acr` (mean over
        clients, stored unit) with `acr_low`, `acr_high` (95 % over images and seeds, None with too
        few), and all three as `..._text` in the shown unit, rounded down and the interval outward;
        `spread` between best and worst client and `spread_text`; `accuracy`, a list of {`radius`,
        `radius_text`, `value`, `text`, `low`, `high`} with 95 % limits, exact for one seed;
        `abstained` (None where not reported); `votes_per_image`; `votes_saved` relative to a fixed
        number (None if not recorded); `left_out`, which clients failed in training, in words (None
        if none did); `privacy`, the privacy spent by training, in words (None without privacy).
        Where clients certify different perturbations, `perturbation`, in words, and `of_clients`,
        the clients that certify it, else None. `plain`, one {`client`, `images`, `correct`} for
        each client of the run that certifies nothing: its plain accuracy, which no other number of
        the row includes.

    Raises:
        StoreMismatch, StoreError: as `load_runs`.
    """
    groups = by_perturbation(load_runs(runs))
    return [row for group in groups for row in _rows(by_seed(group), len(groups) > 1)]


def class_rows(runs: Sequence[str | Path | RunResults]) -> list[dict[str, Any]]:
    """One row per class of each row of `summary_rows`, the same numbers as on the page.

    Returns:
        Per row: `label`, `perturbation` (None where all clients certify one), `class` and its
        `name`, `images`, `acr_text`, `accuracy`, a list of {`radius_text`, `text`}, and
        `abstained_text`. Runs whose clients share curves only have no rows.

    Raises:
        StoreMismatch, StoreError: as `summary_rows`.
    """
    groups = [by_seed(group) for group in by_perturbation(load_runs(runs))]
    rows: list[dict[str, Any]] = []
    for group in groups:
        scale = summary.first_unit(group)
        radii = summary.selected_radii(group, scale)
        rows += [
            {
                "label": row.label,
                "perturbation": summary.group_words(row) if len(groups) > 1 else None,
                "class": one.number,
                "name": one.name,
                "images": one.images,
                "acr_text": scale.text(one.acr),
                "accuracy": [
                    {"radius_text": text, "text": percent(share.value)}
                    for (text, _), share in zip(radii, one.accuracy, strict=True)
                ],
                "abstained_text": "" if one.abstained is None else percent(one.abstained.value),
            }
            for row in group
            if not row.curves_only
            for one in by_class(row, [radius for _, radius in radii])
        ]
    return rows


def _rows(loaded: Sequence[Row], own: bool) -> list[dict[str, Any]]:
    scale = summary.first_unit(loaded)
    radii = summary.selected_radii(loaded, scale)
    rows = []
    for run in loaded:
        acr, gap, votes = summary.mean_acr(run), summary.spread(run)[2], summary.vote_cost(run)
        low, high = own_interval(run) or (None, None)
        shares = [(text, radius, summary.accuracy_share(run, radius)) for text, radius in radii]
        rows.append(
            {
                "regime": run.algorithm,
                "label": run.label,
                "seeds": [one.seed for one in run.runs],
                "images": sum(len(one.certificates) for one in run.runs),
                "clients": len(run.clients),
                "acr": acr,
                "acr_low": low,
                "acr_high": high,
                "acr_text": scale.text(acr),
                "acr_low_text": None if low is None else scale.down(low) + scale.suffix,
                "acr_high_text": None if high is None else scale.up(high) + scale.suffix,
                "spread": gap,
                "spread_text": scale.text(gap),
                "accuracy": [
                    {
                        "radius": radius,
                        "radius_text": text,
                        "value": s.value,
                        "text": percent(s.value),
                        "low": s.low,
                        "high": s.high,
                    }
                    for text, radius, s in shares
                ],
                "abstained": None if run.curves_only else summary.abstained_share(run).value,
                "votes_per_image": votes.per_image,
                "votes_saved": votes.saved,
                "left_out": _of_runs(run, summary.left_out_words),
                "privacy": _of_runs(run, privacy_words),
                "perturbation": summary.group_words(run) if own else None,
                "of_clients": run.clients.tolist() if own else None,
                "plain": [
                    {"client": client, "images": images, "correct": correct}
                    for _, client, images, correct in summary.plain_rows([run])
                ],
            }
        )
    return rows


def _of_runs(row: Row, words: Callable[[RunResults], str | None]) -> str | None:
    """Words about the runs of a row; with their seeds where these differ."""
    found = [(run.seed, text) for run in row.runs if (text := words(run)) is not None]
    if len({text for _, text in found}) <= 1 and len(found) in (0, len(row.runs)):
        return found[0][1] if found else None
    return "; ".join(f"seed {seed}: {text}" for seed, text in found)


# Results by class and by client: which images are certified, and which disease is not.


@dataclass(frozen=True)
class Group:
    """Some images of a row: those of one class, or of one client.

    Attributes:
        number, name: of the class or client. images: how many, over all seeds.
        acr: average certified radius, mean over these images and then over seeds.
        accuracy: certified accuracy at each given radius.
        abstained: share without a certificate; None where it was not shared.
        votes: estimation votes per image.
    """

    number: int
    name: str
    images: int
    acr: float
    accuracy: tuple[summary.Share, ...]
    abstained: summary.Share | None
    votes: float


def by_class(row: Row, radii: Sequence[float]) -> list[Group]:
    """One group for each class that some test image of a row has.

    Classes are those of the labels: what a client with this disease can expect. Images of all
    clients count once each. Radii are in the stored unit.
    """
    names = row.runs[0].class_names or []

    def name(label: int) -> str:
        return names[label] if label < len(names) else str(label)

    return _groups(row, radii, lambda certificates: certificates.label, name)


def by_client(row: Row, radii: Sequence[float]) -> list[Group]:
    """One group for each client of a row that has certificates."""
    name = row.runs[0].client_name
    return _groups(row, radii, lambda certificates: certificates.client, name)


def _groups(
    row: Row,
    radii: Sequence[float],
    key: Callable[[Certificates], Ints],
    name: Callable[[int], str],
) -> list[Group]:
    groups = []
    for number in np.unique(np.concatenate([key(run.certificates) for run in row.runs])):
        inside = [(run, key(run.certificates) == number) for run in row.runs]
        inside = [(run, own) for run, own in inside if own.any()]
        images = [summary.image_numbers(run)[own] for run, own in inside]
        certified = [[summary.certified_at(run, r)[own] for run, own in inside] for r in radii]
        abstained = [run.certificates.abstained[own] for run, own in inside]
        votes = np.concatenate([run.certificates.votes[own] for run, own in inside])
        groups.append(
            Group(
                int(number),
                name(int(number)),
                sum(len(own) for own in images),
                float(np.mean([summary.gains(run)[own].mean() for run, own in inside])),
                tuple(summary.shares_over_seeds(hits, images) for hits in certified),
                None if row.curves_only else summary.shares_over_seeds(abstained, images),
                float(np.mean(votes)),
            )
        )
    return groups


# Data frames.

_GROUPS = {"client": by_client, "class": by_class}


def curves_frame(run: RunResults, radii: Sequence[float | str] | Floats | None) -> DataFrame:
    """Certified accuracy by radius; see `RunResults.curves`."""
    require_one_perturbation(run)
    if radii is None:
        grid = summary.radius_grid([run])
    else:
        amounts = [r if isinstance(r, str) else float(r) for r in radii]
        grid = np.asarray(parse_amounts(amounts, str(run.conditions["unit"])), np.float64)
    curves = summary.client_curves(run, grid)
    named = dict(zip(("mean", "min", "max"), mean_and_band(curves), strict=True))
    columns: dict[Any, Floats] = {**named, **dict(zip(run.clients.tolist(), curves, strict=True))}
    frame = pandas().DataFrame(columns, index=pandas().Index(grid, name="radius"))
    return _described(frame, run.conditions)


def table_frame(run: RunResults, by: str | None) -> DataFrame:
    """The numbers of the report's tables; see `RunResults.table`."""
    require_one_perturbation(run)
    if by is None:
        return table([run])
    if by not in _GROUPS:
        raise InputError(f"table(by=...) takes None, 'client' or 'class'; got {by!r}.")
    if by == "class":
        require_rows(run.certificates)
    radii = summary.selected_radii([run], summary.first_unit([run]))
    groups = _GROUPS[by](run, [radius for _, radius in radii])
    index = pandas().Index([group.number for group in groups], name=by)
    columns = [
        {
            "name": group.name,
            "images": group.images,
            "acr": group.acr,
            **{f"at {t}": s.value for (t, _), s in zip(radii, group.accuracy, strict=True)},
            "abstained": None if group.abstained is None else group.abstained.value,
            "votes_per_image": group.votes,
        }
        for group in groups
    ]
    frame = pandas().DataFrame(columns, index=index)
    return _described(frame, run.conditions)


def table(results: Sequence[RunResults]) -> DataFrame:
    """Several results side by side: the numbers of the report's table; needs pandas.

    Args:
        results: of the same data and perturbation; those that differ in their seed alone share a
            row: means over seeds, with intervals that include the variation between them.

    Returns:
        A row for each algorithm and setting, its label the index: algorithm, seeds, clients,
        images, acr with its 95 % limits acr_low and acr_high, spread, "at R" (certified accuracy
        at a few radii), abstained, votes_per_image. Where clients certify different perturbations,
        a row for each of these, named in the column perturbation.

    Raises:
        StoreMismatch: results that cannot be compared. InputError: pandas is not installed.
    """
    rows = summary_rows(results)
    index = pandas().Index([row["label"] for row in rows], name="label")
    names = ("perturbation", "seeds", "clients", "images", "acr", "acr_low", "acr_high", "spread")
    columns = [
        {
            "algorithm": row["regime"],
            **{name: row[name] for name in names},
            **{f"at {one['radius_text']}": one["value"] for one in row["accuracy"]},
            "abstained": row["abstained"],
            "votes_per_image": row["votes_per_image"],
        }
        for row in rows
    ]
    frame = pandas().DataFrame(columns, index=index)
    if all(row["perturbation"] is None for row in rows):
        return _described(frame.drop(columns="perturbation"), results[0].conditions)
    return frame


def _described(frame: DataFrame, metadata: Mapping[str, Any]) -> DataFrame:
    """The frame with the unit and meaning of its radii."""
    frame.attrs = {name: metadata[name] for name in _MEANING if name in metadata}
    return frame
