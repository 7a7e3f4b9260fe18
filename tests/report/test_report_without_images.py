"""Pages of private data: no pixel of a test image is in the file, and the page says so."""

import base64
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import expect

import tiny_study as tiny
from browser import tab_to
from certifl.report import write_report
from report_pages import data_of

SAYS = "Test images are left out"
# How files of pictures begin: PNG, JPEG, GIF, BMP, WebP.
PICTURES = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"RIFF")


@pytest.fixture(scope="module")
def page(shifted: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("page") / "report.html"
    return write_report(shifted, place, figures=False, images=False)


def pictures_in(page: Path) -> list[bytes]:
    """Everything in base64 that decodes to the beginning of a picture, or holds one."""
    found = []
    for block in re.findall(r"[A-Za-z0-9+/]{60,}={0,2}", page.read_text()):
        bare = block.rstrip("=")
        content = base64.b64decode(bare[: len(bare) // 4 * 4])
        if content.startswith(PICTURES) or b"<image" in content or b"data:image" in content:
            found.append(content[:20])
    return found


def strips(run: Path) -> Iterator[str]:
    for image in json.loads((run / "explorer.json").read_text())["images"]:
        yield from (walk["strip"] for walk in image["walks"])


def test_no_pixel_of_an_image_is_in_the_file(bare, shifted, page, tmp_path):
    shown = write_report(shifted, tmp_path / "shown.html", figures=False)
    assert len(pictures_in(shown)) >= 6  # they would be found
    assert pictures_in(page) == []
    content = page.read_text()
    for picture in (one for run in shifted for one in strips(run)):
        assert picture not in content
        assert picture[40:100] not in content
    assert not re.search(r"data:image/(?!svg\+xml)", content.split("<script>")[0])
    names = set(re.findall(r'"(strip|picture|tile)":', content))
    assert names == set()


def test_the_page_says_so_and_keeps_what_was_voted(page):
    assert SAYS in page.read_text()
    explorer = data_of(page)["explorer"]
    assert explorer["pictures"] is False
    assert len(explorer["images"]) == 3
    assert all(run["sweeps"][0]["winners"] for run in explorer["images"][0]["runs"])


def test_a_rewritten_page_leaves_them_out_again(shifted, page, tmp_path):
    place = tmp_path / "report.html"
    shutil.copy(page, place)
    write_report(shifted, place, figures=False)
    assert place.read_bytes() == page.read_bytes()
    write_report(shifted, place, figures=False, images=True)
    assert SAYS not in place.read_text()
    assert len(pictures_in(place)) >= 6


def test_the_explorer_works_without_pictures(windows, page):
    shown = windows(page, 390)
    explorer = shown.locator("#explorer")
    expect(explorer.locator("canvas")).to_have_count(0)
    expect(explorer).to_contain_text(SAYS)
    explorer.locator("#pictures input").nth(1).check()
    says = explorer.locator('[data-explored="1"] .explored-answer')
    before = says.inner_text()
    explorer.locator("#step").fill("0")
    expect(says).not_to_have_text(before)
    explorer.locator('input[name="sweep"][value="1"]').check()
    tab_to(shown, "#step")
    shown.keyboard.press("ArrowRight")
    expect(explorer.locator("#step-text")).to_contain_text("half-widths up")
    assert shown.evaluate("document.documentElement.scrollWidth") == 390


def test_the_command_leaves_them_out(bare, shifted, tmp_path):
    run = Path(shutil.copytree(shifted[0], tmp_path / "run"))
    tiny.cli("report", run, "--no-images", "--format", "svg").fine("Report:")
    assert SAYS in (run / "report.html").read_text()
    assert pictures_in(run / "report.html") == []
