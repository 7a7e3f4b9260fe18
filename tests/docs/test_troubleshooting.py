"""docs/troubleshooting.md: every message on it is what certifl says to that mistake."""

import re
import shutil
from pathlib import Path

import pytest

from provoked import CASES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "troubleshooting.md"
SHOWN = dict(re.findall(r"^### ([^\n]+)\n+```text\n(.*?)\n```", PAGE.read_text(), re.M | re.S))
_NUMBER = re.compile(r"\d+(\.\d+)*(e-?\d+)?")
_HASH = re.compile(r"(?<![.\w])[0-9a-f]{16}\b")
_FOLDERS = re.compile(r"(/[\w.-]+)+/")


def plain(text: str) -> str:
    """Without what differs from machine to machine: numbers, hashes, absolute paths, line ends."""
    for what, sign in ((_FOLDERS, ""), (_HASH, "HASH"), (_NUMBER, "0")):
        text = what.sub(sign, text)
    return " ".join(text.split())


def test_every_message_of_the_page_is_provoked():
    assert set(SHOWN) == set(CASES)


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # in Flower
@pytest.mark.parametrize("title", CASES)
def test_the_page_says_what_certifl_says(title, finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mine = Path("runs/alone")
    shutil.copytree(finished, mine)
    said, shown = plain(CASES[title](mine)), plain(SHOWN[title])
    pattern = ".+".join(re.escape(part) for part in shown.split("…"))
    assert re.fullmatch(pattern, said), f"certifl says:\n{said}\nthe page:\n{shown}"
