"""Which clients fit together before a study begins, and what does not fit about the others.

Clients of a study need images of one size, as many channels, and the same classes in the same
order. What is right is what the spec's data set has or most clients have, never what the first
one to arrive has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from certifl.data import EMBEDDED, load
from certifl.deploy.schemas import Joined
from certifl.errors import one_line
from certifl.spec import Spec

__all__ = ["SHAPES", "agreed", "difference", "lines", "properties"]

SHAPES = ("in_channels", "image_size", "class_names")
_SHARED = ("name", "fingerprint")
_NAMES_SHOWN = 10

Facts = dict[str, Any]


def properties(joined: Joined) -> Facts:
    """What must agree: shapes, classes, and the data set where it is one that all have."""
    facts: Facts = {name: getattr(joined, name) for name in SHAPES}
    shared = {name: getattr(joined, name) for name in _SHARED}
    return facts | {name: value for name, value in shared.items() if value is not None}


def agreed(joined: Mapping[int, Joined], spec: Spec, enough: int) -> Facts | None:
    """The properties that a study begins with; None where no group of clients prevails.

    Args:
        joined: what each client said. spec: of the study.
        enough: so many clients are needed; fewer do not prevail because the spec names their data.
    """
    groups = _groups(joined)
    if not groups:
        return None
    named = [group for group in groups if len(group) >= enough and _of_spec(group[0], spec)]
    if len(named) == 1:
        return _common(named[0])
    largest = max(map(len, groups))
    most = [group for group in groups if len(group) == largest]
    return _common(most[0]) if len(most) == 1 else None


def _groups(joined: Mapping[int, Joined]) -> list[list[Joined]]:
    """Clients that fit together; one with images of its own fits any data set of its shape."""
    groups: list[list[Joined]] = []
    shared_last = sorted(joined.items(), key=lambda item: (item[1].name is None, item[0]))
    for _, one in shared_last:
        for group in groups:
            if difference(properties(one), properties(group[0])) is None:
                group.append(one)
                break
        else:
            groups.append([one])
    return groups


def _common(group: Sequence[Joined]) -> Facts:
    """A group's properties; a data set's name only where all of them have that data set."""
    facts = properties(group[0])
    if all(one.name is not None for one in group):
        return facts
    return {name: facts[name] for name in SHAPES}


def _of_spec(one: Joined, spec: Spec) -> bool:
    """Whether a client has images like those of the data set that the spec names."""
    if one.name is not None:
        return one.name == spec.data.name
    if spec.data.name not in EMBEDDED:
        return False  # its shape is not known without reading it
    data = load(spec.data.name)
    shape = (data.in_channels, list(data.image_size), list(data.class_names))
    return shape == (one.in_channels, one.image_size, one.class_names)


def difference(found: Facts, wanted: Facts) -> str | None:
    """The first property in which a client differs, in words; None where it fits."""
    for name in SHAPES:
        if found[name] != wanted[name]:
            return _words(name, found[name], wanted[name])
    for name in _SHARED:
        if name in found and name in wanted and found[name] != wanted[name]:
            return _words(name, found[name], wanted[name])
    return None


def _words(name: str, found: object, wanted: object) -> str:
    if name == "class_names" and isinstance(found, list) and isinstance(wanted, list):
        listed = "[" + ", ".join(f'"{one_line(c, 40)}"' for c in wanted[:_NAMES_SHOWN])
        more = ", ...]" if len(wanted) > _NAMES_SHOWN else "]"
        return (
            f"its classes are {_classes(found)}, others have {_classes(wanted)}; if it has images "
            f"of some of these alone, write classes = {listed}{more} into its client.toml"
        )
    shown = {"in_channels": "number of channels", "image_size": "image size"}.get(name, name)
    return f"its {shown} is {one_line(found, 80)}, others have {one_line(wanted, 80)}"


def _classes(names: Sequence[str]) -> str:
    shown = ", ".join(one_line(name, 40) for name in names[:_NAMES_SHOWN])
    more = ", ..." if len(names) > _NAMES_SHOWN else ""
    return f"{len(names)} ({shown}{more})"


def lines(spec: Spec, joined: Mapping[int, Joined], others: Mapping[int, str]) -> Iterable[str]:
    """Every client of a study: what it has, or why it does not take part.

    Args:
        spec: of the study. joined: what clients said of themselves.
        others: why a client does not take part; -1 stands for a node of unknown number.
    """
    yield f"Study {spec.name!r} (spec {spec.hash()[:8]}), {spec.clients.count} clients:"
    for client in sorted({*range(spec.clients.count), *joined, *others}):
        who = f"client {client}" if client >= 0 else "a node"
        if client in joined:
            yield f"  {who}: {_described(joined[client])}"
        if client in others:
            yield f"  {who} does not take part: {others[client]}"
        elif client not in joined:
            yield f"  {who} is not there"


def _described(one: Joined) -> str:
    versions = ", ".join(f"{one_line(k, 20)} {one_line(v, 40)}" for k, v in one.versions.items())
    height, width = one.image_size
    channels = "1 channel" if one.in_channels == 1 else f"{one.in_channels} channels"
    return (
        f"{versions or 'version not said'}; {channels}, {height} x {width}; classes: "
        f"{_classes(one.class_names)}; {one.train_images} training images"
    )
