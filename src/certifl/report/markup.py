"""HTML built from parts: text is escaped by construction, only what this module made is not."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = ["Attributes", "Markup", "el", "embedded_json", "join", "table"]

Attributes = Mapping[str, str | bool]

_VOID = frozenset({"br", "img", "input", "meta", "line", "path"})


class Markup(str):
    """Text that is HTML already. Made here only: everything read from files goes through `el`."""

    __slots__ = ()


def el(name: str, attributes: Attributes | None = None, *children: str) -> Markup:
    """One element.

    Args:
        name: of the element.
        attributes: a true value stands for an attribute without value, a false one for none.
        children: plain text is escaped, `Markup` is taken as it is.
    """
    shown = "".join(_attribute(key, value) for key, value in (attributes or {}).items())
    if name in _VOID:
        return Markup(f"<{name}{shown}>" if name not in ("line", "path") else f"<{name}{shown}/>")
    return Markup(f"<{name}{shown}>{join(children)}</{name}>")


def join(parts: Iterable[str]) -> Markup:
    """Parts one after the other; plain text is escaped."""
    return Markup("".join(p if isinstance(p, Markup) else html.escape(p) for p in parts))


def _attribute(key: str, value: str | bool) -> str:
    if value is False:
        return ""
    return f" {key}" if value is True else f' {key}="{html.escape(value)}"'


def table(
    caption: str,
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    attributes: Attributes | None = None,
) -> Markup:
    """A table in a container of its own that scrolls; the first cell of a row names the row.

    Args:
        caption: what the table shows; also the container's name for screen readers.
        head: one text per column.
        rows: cells, plain text or `Markup`.
        attributes: of the table.
    """
    header = el("tr", None, *(el("th", {"scope": "col"}, cell) for cell in head))
    lines = [
        el("tr", None, el("th", {"scope": "row"}, first), *(el("td", None, c) for c in rest))
        for first, *rest in rows
    ]
    whole = el(
        "table",
        attributes,
        el("caption", None, caption),
        el("thead", None, header),
        el("tbody", None, *lines),
    )
    around = {"class": "scroll", "role": "region", "tabindex": "0", "aria-label": caption}
    return el("div", around, whole)


def embedded_json(name: str, content: Any) -> Markup:
    """Data for the page's script; no text inside it can end the element or start another."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False, ensure_ascii=True)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(f'<script type="application/json" id="{html.escape(name)}">{text}</script>')
