"""Results as pandas data frames: curves, and the numbers of the report's tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from certifl.certification.certificates import pandas, require_rows
from certifl.errors import InputError
from certifl.perturbations.units import parse_amounts
from certifl.report.groups import Group, by_class, by_client
from certifl.report.results import Row, RunResults
from certifl.report.summary import client_curves, first_unit, radius_grid, selected_radii
from certifl.report.table import summary_rows
from certifl.smoothing.bounds import Floats
from certifl.smoothing.curves import mean_and_band

if TYPE_CHECKING:
    from pandas import DataFrame

_GROUPS = {"client": by_client, "class": by_class}
_MEANING = ("family", "sigma", "unit", "norm", "alpha", "estimator")


def curves_frame(run: RunResults, radii: Sequence[float | str] | Floats | None) -> DataFrame:
    """Certified accuracy by radius; see `RunResults.curves`."""
    require_one_perturbation(run)
    if radii is None:
        grid = radius_grid([run])
    else:
        amounts = [r if isinstance(r, str) else float(r) for r in radii]
        grid = np.asarray(parse_amounts(amounts, str(run.conditions["unit"])), np.float64)
    curves = client_curves(run, grid)
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
    radii = selected_radii([run], first_unit([run]))
    groups = _GROUPS[by](run, [radius for _, radius in radii])
    index = pandas().Index([group.number for group in groups], name=by)
    frame = pandas().DataFrame([_columns(group, radii) for group in groups], index=index)
    return _described(frame, run.conditions)


def _columns(group: Group, radii: Sequence[tuple[str, float]]) -> dict[str, Any]:
    at = {f"at {text}": s.value for (text, _), s in zip(radii, group.accuracy, strict=True)}
    return {
        "name": group.name,
        "images": group.images,
        "acr": group.acr,
        **at,
        "abstained": None if group.abstained is None else group.abstained.value,
        "votes_per_image": group.votes,
    }


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
    frame = pandas().DataFrame([_summary(row) for row in rows], index=index)
    if all(row["perturbation"] is None for row in rows):
        return _described(frame.drop(columns="perturbation"), results[0].conditions)
    return frame


def _summary(row: Mapping[str, Any]) -> dict[str, Any]:
    names = ("perturbation", "seeds", "clients", "images", "acr", "acr_low", "acr_high", "spread")
    return {
        "algorithm": row["regime"],
        **{name: row[name] for name in names},
        **{f"at {one['radius_text']}": one["value"] for one in row["accuracy"]},
        "abstained": row["abstained"],
        "votes_per_image": row["votes_per_image"],
    }


def _described(frame: DataFrame, metadata: Mapping[str, Any]) -> DataFrame:
    """The frame with the unit and meaning of its radii."""
    frame.attrs = {name: metadata[name] for name in _MEANING if name in metadata}
    return frame


def require_one_perturbation(row: Row) -> None:
    """Refuse a row whose clients certify different perturbations.

    Raises:
        InputError: they do: their radii have no common axis.
    """
    if len(row.parts) > 1:
        noise = ", ".join(str(part.conditions.get("family")) for part in row.parts)
        raise InputError(
            f"The clients of {row.label} certify different perturbations ({noise}), whose radii "
            "have no common axis. Take them one by one: for part in result.parts."
        )
