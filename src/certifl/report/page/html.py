"""HTML built from parts: text is escaped by construction, only what this module made is not."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any

from certifl.report.figures import Drawing, image_bytes
from certifl.report.style import unbroken

Attributes = Mapping[str, str | bool]

# Text that is copied out of the page, so not a character of it may change.
_VERBATIM = frozenset({"code", "pre", "kbd"})
_VOID = frozenset({"br", "img", "input", "meta", "line", "path"})


class Markup(str):
    """Text that is HTML already. Made here only: everything read from files goes through `el`."""

    __slots__ = ()


def el(name: str, attributes: Attributes | None = None, *children: str) -> Markup:
    """One element; an attribute that is true has no value, and one that is false is left out.

    Children that are plain text are escaped, `Markup` is taken as it is.
    """
    shown = "".join(_attribute(key, value) for key, value in (attributes or {}).items())
    if name in _VOID:
        return Markup(f"<{name}{shown}>" if name not in ("line", "path") else f"<{name}{shown}/>")
    if name in _VERBATIM:
        children = tuple(c if isinstance(c, Markup) else verbatim(c) for c in children)
    return Markup(f"<{name}{shown}>{join(children)}</{name}>")


def join(parts: Iterable[str]) -> Markup:
    """Parts one after the other; plain text is escaped, and numbers stay with their signs."""
    return Markup("".join(p if isinstance(p, Markup) else html.escape(unbroken(p)) for p in parts))


def verbatim(text: str) -> Markup:
    """Escaped text of which no character changes: the page's script writes the same."""
    return Markup(html.escape(text))


def _attribute(key: str, value: str | bool) -> str:
    if value is False:
        return ""
    return f" {key}" if value is True else f' {key}="{html.escape(value)}"'


# Elements that several parts of the page consist of.


def section(name: str, heading: str, *children: str) -> Markup:
    """A section with its heading."""
    return el("section", {"id": name}, el("h2", None, heading), *children)


def paragraph(text: str) -> Markup:
    """Ordinary text."""
    return el("p", None, text)


def note(text: str) -> Markup:
    """Small print."""
    return el("p", {"class": "note"}, text)


def notice(text: str) -> Markup:
    """Something no reader should miss."""
    return el("p", {"class": "notice", "role": "note"}, text)


def details(summary: str, *children: str) -> Markup:
    """Text that unfolds."""
    return el("details", None, el("summary", None, summary), *children)


def stacked(first: str, second: str) -> Markup:
    """A cell of two lines: a number, and what belongs to it in small print."""
    return join([el("b", None, first), el("small", None, second)])


def toggle(box: Attributes, label: str) -> Markup:
    """A check box or radio button with its label."""
    words = label if isinstance(label, Markup) else el("span", None, label)
    return el("label", {"class": "toggle"}, el("input", box), words)


def fieldset(legend: str, *children: str, name: str = "", kind: str = "") -> Markup:
    """Controls that belong together."""
    attributes = {"class": f"toggles {kind}".strip(), **({"id": name} if name else {})}
    return el("fieldset", attributes, el("legend", None, legend), *children)


def choice(legend: str, name: str, options: Sequence[str]) -> Markup:
    """Radio buttons, the first of them chosen; the script finds their number in `data-<name>`."""
    boxes: list[dict[str, str | bool]] = [
        {"type": "radio", "name": name, f"data-{name}": str(i), "checked": i == 0}
        for i in range(len(options))
    ]
    return fieldset(legend, *map(toggle, boxes, options))


def asset(name: str) -> str:
    """A file that belongs to the page: style, script or template."""
    return (resources.files("certifl.report") / "assets" / name).read_text(encoding="utf-8")


def picture(drawing: Drawing, alt: str) -> Markup:
    """A figure as an image inside the page."""
    data = base64.b64encode(image_bytes(drawing, "svg")).decode()
    source = f"data:image/svg+xml;base64,{data}"
    return el("img", {"src": source, "alt": alt, "class": "fallback"})


def table(
    caption: str,
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    attributes: Attributes | None = None,
) -> Markup:
    """A table in its own scrolling container; the first cell of a row names the row.

    The caption is also the container's name for screen readers, the attributes are the table's.
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
