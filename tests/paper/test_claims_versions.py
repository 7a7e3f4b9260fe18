"""Runs of an older version stand beside newer ones, whose specs have keys that came later."""

from __future__ import annotations

from certifl.report.results import LATER, decisive_settings
from certifl.spec import with_settings
from tiny_study import spec


def test_a_key_that_came_later_tells_no_two_runs_apart() -> None:
    newer = spec().model_dump(exclude_none=True)
    older = {**newer, "training": dict(newer["training"])}
    for name, default in LATER.items():
        section, _, key = name.partition(".")
        assert older[section].pop(key, default) == default
    assert decisive_settings(older) == decisive_settings(newer)
    between = {**newer, "training": {**newer["training"], "steps": "plain"}}  # as 0.1.0 wrote it
    assert decisive_settings(between) == decisive_settings(newer)


def test_what_was_chosen_still_tells_runs_apart() -> None:
    plain = spec().model_dump(exclude_none=True)
    for choice in ("training.precision=bfloat16", "training.lr=0.007", "certification.n=999"):
        other = with_settings(plain, [choice]).model_dump(exclude_none=True)
        key, _, value = choice.partition("=")
        assert str(decisive_settings(other)[key]) == value
        assert decisive_settings(other) != decisive_settings(plain)
