"""The summary of some runs as rows, for a table on the terminal or for further processing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from certifl.report.compare import own_interval
from certifl.report.groups import by_class
from certifl.report.page.background import privacy_words
from certifl.report.results import Row, RunResults, by_perturbation, by_seed, load_runs
from certifl.report.summary import (
    abstained_share,
    accuracy_share,
    first_unit,
    group_words,
    left_out_words,
    mean_acr,
    plain_rows,
    selected_radii,
    spread,
    vote_cost,
)
from certifl.report.wording import percent


def summary_rows(runs: Sequence[str | Path | RunResults]) -> list[dict[str, Any]]:
    """One row per algorithm and setting, the same numbers as on the page.

    Runs that differ in their seed alone are one row: means over the seeds, with intervals that
    include the variation between them.

    Where clients certify different perturbations, one row per perturbation and run.

    Args:
        runs: run folders, or runs that were read before.

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
        StoreMismatch: a run that is missing or unfinished, or runs that cannot be compared.
        StoreError: a run that is damaged.
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
    groups = by_perturbation(load_runs(runs))
    several = len(groups) > 1
    return [row for group in groups for row in _class_rows(by_seed(group), several)]


def _class_rows(rows: Sequence[Row], several: bool) -> list[dict[str, Any]]:
    scale = first_unit(rows)
    radii = selected_radii(rows, scale)
    return [
        {
            "label": row.label,
            "perturbation": group_words(row) if several else None,
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
        for row in rows
        if not row.curves_only
        for one in by_class(row, [radius for _, radius in radii])
    ]


def _rows(loaded: Sequence[Row], own: bool) -> list[dict[str, Any]]:
    """Rows about the clients that certify one perturbation."""
    scale = first_unit(loaded)
    radii = selected_radii(loaded, scale)
    rows = []
    for run in loaded:
        acr, gap, votes = mean_acr(run), spread(run)[2], vote_cost(run)
        low, high = own_interval(run) or (None, None)
        shares = [(text, radius, accuracy_share(run, radius)) for text, radius in radii]
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
                "abstained": None if run.curves_only else abstained_share(run).value,
                "votes_per_image": votes.per_image,
                "votes_saved": votes.saved,
                "left_out": _of_runs(run, left_out_words),
                "privacy": _of_runs(run, privacy_words),
                "perturbation": group_words(run) if own else None,
                "of_clients": run.clients.tolist() if own else None,
                "plain": [
                    {"client": client, "images": images, "correct": correct}
                    for _, client, images, correct in plain_rows([run])
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
