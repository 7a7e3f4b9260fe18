"""Every code block of the documentation: Python runs, specs load, commands are understood."""

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main

import certifl
from certifl.cli import app
from certifl.spec import with_settings

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    path
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md"))
    if "reference" not in path.parts
)
_BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_CONTINUED = re.compile(r"\\\n\s*")
_SPEC_SECTIONS = {"data", "certification"}
_SOURCE = re.compile(r"[\w./-]*\w/\w+\.py\b")
_INVENTED = ("my_", "NAME")  # a reader's own files, and "any of these files"


def blocks(page: Path, *languages: str) -> list[str]:
    return [text for language, text in _BLOCK.findall(page.read_text()) if language in languages]


def named(pages: list[Path]) -> Any:
    return pytest.mark.parametrize(
        "page", pages, ids=[path.relative_to(ROOT).as_posix() for path in pages]
    )


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a reader of a Python block has: a folder, a model, a few images with labels."""
    monkeypatch.chdir(tmp_path)
    original = certifl.certify

    def quick(*args: Any, **options: Any) -> Any:
        return original(*args, **{**options, "n": min(options.get("n", 500), 500)})

    monkeypatch.setattr(certifl, "certify", quick)
    return {
        "model": certifl.models.build("small_cnn", 1, 10, seed=0).eval(),
        "images": torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)),
        "labels": torch.tensor([0, 1, 2]),
    }


@named([page for page in PAGES if blocks(page, "python")])
def test_python_blocks_run(page, reader):
    for code in blocks(page, "python"):
        exec(compile(code, str(page), "exec"), reader)


@named([page for page in PAGES if blocks(page, "toml")])
def test_toml_blocks_are_specs_or_parts_of_one(page):
    for text in blocks(page, "toml"):
        values = tomllib.loads(text)
        if values.keys() >= _SPEC_SECTIONS:
            with_settings(values)
        elif "tool" not in values and "superlink" not in values:
            known = set(certifl_spec_keys())
            assert values.keys() <= known, f"{page}: {values.keys() - known} are no keys of a spec"


@named(PAGES)
def test_source_files_that_a_page_names_exist(page):
    roots = ("src", "tests", "examples", "benchmarks", "docs")
    known = [path.as_posix() for root in roots for path in (ROOT / root).rglob("*.py")]
    for name in set(_SOURCE.findall(page.read_text())):
        if not any(word in name for word in _INVENTED):
            ending = "/" + re.sub(r"^(\.+/)+", "", name)
            assert any(path.endswith(ending) for path in known), f"{page}: there is no {name}"


def certifl_spec_keys() -> list[str]:
    from certifl.spec import Spec

    return list(Spec.model_fields)


def commands(page: Path) -> list[list[str]]:
    """All calls of certifl in the page's blocks and in its text."""
    shell = [_CONTINUED.sub(" ", text) for text in blocks(page, "", "sh", "bash", "console")]
    lines = [line.strip().removeprefix("$ ") for text in shell for line in text.splitlines()]
    return [
        shlex.split(line, comments=True)[1:]
        for line in lines
        if line.startswith("certifl ") and "..." not in line.split("#")[0]
    ]


@named([page for page in PAGES if commands(page)])
def test_commands_are_understood(page):
    group = typer.main.get_command(app)
    for words in commands(page):
        understood(group, "certifl", words)


def understood(command: Any, name: str, words: list[str]) -> None:
    """Parse the words as the command line would, without running anything.

    A group is known by its `commands`: newer releases of typer bring a click of their own. No
    command asks of a path that it exists, so files that a reader has may be missing here.
    """
    inside = getattr(command, "commands", None)
    if inside is not None:
        assert words, f"{name}: which command?"
        if words[0].startswith("-"):
            assert words[0] in ("--help", "--version"), words
            return
        assert words[0] in inside, f"there is no command {name} {words[0]}"
        understood(inside[words[0]], f"{name} {words[0]}", words[1:])
        return
    command.make_context(name, list(words))
