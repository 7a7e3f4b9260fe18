"""What the site takes from outside docs/: the README and its neighbors, examples as pages.

One text, two places: links are turned to where the site has what they point at. A link to a file
that the site does not show becomes plain text in the file's own words.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "extending.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
}
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)#\s]*)(#[^)\s]*)?\)")
_LANGUAGES = {
    ".toml": "toml",
    ".py": "python",
    ".sbatch": "bash",
    ".sh": "bash",
    ".md": "markdown",
}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie outside docs/."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    for example in _examples():
        name = example.relative_to(ROOT).as_posix()
        content = _notebook(example) if example.suffix == ".ipynb" else _listing(example, name)
        files.append(File.generated(config, f"{name}.md", content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn the links of a page."""
    here = PurePosixPath(page.file.src_uri)
    source = {made: written for written, made in PAGES.items()}.get(
        here.as_posix(), f"docs/{here.as_posix()}"
    )
    known = {file.src_uri for file in files}
    return _LINK.sub(lambda found: _turned(found, source, here, known), markdown)


def _turned(found: re.Match[str], source: str, here: PurePosixPath, known: set[str]) -> str:
    """A link as the site needs it: its target named from the repository, then from the page."""
    picture, text, target, anchor = found[1], found[2], found[3], found[4] or ""
    if not target or "://" in target or target.startswith("mailto:"):
        return found[0]
    named = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    inside = PAGES.get(named) or (
        named.removeprefix("docs/") if "docs/" in named else f"{named}.md"
    )
    if inside not in known:
        return found[0] if named.startswith("docs/") or picture else text
    way = posixpath.relpath(inside, here.parent.as_posix() or ".")
    return f"{picture}[{text}]({way}{anchor})"


def _examples() -> list[Path]:
    suffixes = (*_LANGUAGES, ".ipynb")
    return sorted(p for p in (ROOT / "examples").rglob("*") if p.suffix in suffixes)


def _listing(example: Path, name: str) -> str:
    return f"# {name}\n\n```{_LANGUAGES[example.suffix]}\n{example.read_text()}```\n"


def _notebook(example: Path) -> str:
    """Text and code of a notebook, one cell after the other."""
    cells = json.loads(example.read_text())["cells"]
    sources = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    parts = [text if kind == "markdown" else f"```python\n{text}\n```" for kind, text in sources]
    return "\n\n".join(parts) + "\n"
