"""The report page in a browser: wide and narrow, light and dark, printed, and its samples enlarged by keyboard."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from browser import PROGRAM, Browser
from PIL import Image
from report_run import build_run

from align.data.grids import save_samples
from align.report import write_report

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no chromium, chromium-browser or google-chrome here")
LAPTOP, PHONE = 1280, 390
CAPTION = "document.querySelector('#viewer figcaption').textContent"
OPEN = "document.getElementById('viewer').open"
FOLDS = "[...document.querySelectorAll('details.folded, details.more')].map(part => part.open)"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run with six sample prompts at four visits, and two more prompts so that some are folded."""
    folder = build_run(tmp_path_factory.mktemp("runs") / "run")
    for step, value in ((0, 40), (60, 200)):
        images = [np.full((64, 64, 3), value + row, np.uint8) for row in range(8)]
        prompts = [f"prompt {row}" for row in range(8)]
        save_samples(folder / "samples" / f"step-{step:06d}", images, prompts, list(range(8)), replaces=True)
    return write_report(folder)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as one:
        yield one


@pytest.mark.parametrize("width", [LAPTOP, PHONE])
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_does_not_scroll_sideways(browser: Browser, page: Path, tmp_path: Path, width: int, dark: bool):
    browser.open(page, width, 1600, dark)
    assert browser.run("document.documentElement.scrollWidth") == width
    browser.run("document.querySelectorAll('details').forEach(part => (part.open = true))")
    assert browser.run("document.documentElement.scrollWidth") == width
    pixels = np.asarray(Image.open(browser.shot(tmp_path / "page.png", whole=False)).convert("L"))
    assert len(np.unique(pixels)) > 40
    assert pixels.std() > 8
    assert (np.median(pixels) < 64) == dark


def test_secondary_parts_are_folded_on_a_phone_alone(browser: Browser, page: Path):
    browser.open(page, LAPTOP)
    wide = browser.run(FOLDS)
    assert len(wide) >= 4
    assert all(wide)
    assert not browser.run("document.querySelector('.more > summary').checkVisibility()")
    browser.open(page, PHONE)
    assert not any(browser.run(FOLDS))
    shown = browser.run("[...document.querySelectorAll('figure.pair')].filter(one => one.checkVisibility()).length")
    assert shown == 4
    assert browser.run("document.querySelector('.more > summary').textContent") == "4 more samples"
    browser.paper()
    assert all(browser.run(FOLDS))
    browser.run("dispatchEvent(new Event('afterprint'))")
    assert not any(browser.run(FOLDS))


def test_samples_enlarge_by_keyboard(browser: Browser, page: Path):
    browser.open(page)
    assert browser.run("document.querySelectorAll('main img').length") == browser.run(
        "document.querySelectorAll('button.zoom > img').length"
    )
    browser.run("document.querySelector('button.zoom').focus()")
    browser.press("Enter")
    assert browser.run(OPEN)
    assert browser.run("document.getElementById('viewer').getAttribute('aria-label')") == "Enlarged sample"
    count = browser.run("document.querySelectorAll('button.zoom').length")
    assert browser.run(CAPTION) == f"Before training (step 0): prompt 0 (1 of {count})"
    large, small = (browser.run(f"document.querySelector('{one} img').width") for one in ("#viewer", ".pair"))
    assert large > 3 * small
    browser.press("ArrowRight")
    assert browser.run(CAPTION) == f"Step 60: prompt 0 (2 of {count})"
    browser.press("ArrowLeft")
    browser.press("ArrowLeft")
    assert browser.run(CAPTION).endswith(f"({count} of {count})")  # round the end
    browser.press("ArrowRight")
    browser.press("Escape")
    assert not browser.run(OPEN)
    assert browser.run("document.activeElement.ariaLabel") == "Enlarge: Before training (step 0): prompt 0"


def test_samples_enlarge_on_click_and_folded_ones_are_passed_over(browser: Browser, page: Path):
    browser.open(page, PHONE)
    browser.run("document.querySelectorAll('button.zoom')[3].click()")
    assert browser.run(CAPTION) == "Step 60: prompt 1 (4 of 8)"
    assert browser.run("document.getElementById('viewer').scrollWidth") <= PHONE
    browser.run("document.querySelector('#viewer .on').click()")
    assert browser.run(CAPTION) == "Before training (step 0): prompt 2 (5 of 8)"
    browser.run("document.querySelector('#viewer .shut').click()")
    assert not browser.run(OPEN)
