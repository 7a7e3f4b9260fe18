"""HTML built from parts: text is escaped by construction, only what this module made is not."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from certifl.report.characters import unbroken

Attributes = Mapping[str, str | bool]

# Text that is copied out of the page, so not a character of it may change.
_VERBATIM = frozenset({"code", "pre", "kbd"})
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
    if name in _VERBATIM:
        children = tuple(c if isinstance(c, Markup) else verbatim(c) for c in children)
    return Markup(f"<{name}{shown}>{join(children)}</{name}>")


def join(parts: Iterable[str]) -> Markup:
    """Parts one after the other; plain text is escaped, and numbers stay with their signs."""
    return Markup("".join(map(_text, parts)))


def verbatim(text: str) -> Markup:
    """Escaped text of which no character changes: the page's script writes the same."""
    return Markup(html.escape(text))


def _text(part: str) -> str:
    return part if isinstance(part, Markup) else html.escape(unbroken(part))


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
