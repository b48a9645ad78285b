"""Draws docs/page.png: the page of a server with the shipped model, in headless Chromium.

    python tests/tools/page_screenshot.py docs/page.png

Needs the extra `test` and Debian's chromium; the font is Inter where it is installed.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from chromium import FLAGS, MISSING, find_chromium
from playwright.sync_api import Page, sync_playwright

PROMPTS = (
    "a person with blond hair in a white sweater and turquoise shorts rolling over the floor",
    "a person with black hair in a green sweater and purple trousers punching in a room with a red "
    "wall and a tiled floor",
    "a person with red hair in a blue sweater and white shorts doing a cartwheel on a lawn",
)
MINUTES = 10 * 60_000.0  # a slow machine may take so many ms for a clip


def draw(page: Page, url: str, target: Path) -> None:
    """Makes clips, then takes a picture of one while another is under way."""
    page.goto(url)
    page.locator("#generate:enabled").wait_for()
    page.locator("#size").select_option(index=2)
    for count, prompt in enumerate(PROMPTS):
        page.locator("#prompt").fill(prompt)
        page.locator("#base_seed").fill(str(count + 3))
        page.locator("#residual_seed").fill(str(count + 4))
        page.locator("#generate").click()
        page.locator(".job[data-status=completed]").nth(count).wait_for(timeout=MINUTES)
    page.get_by_role("button", name="Another motion of this look").click()
    half = re.compile("making the motion · [4-9]. %")
    page.locator(".job-status", has_text=half).wait_for(timeout=MINUTES)
    page.locator(".pick").nth(1).click()
    page.locator("#clip-video").wait_for()
    page.evaluate("document.querySelector('#clip-video').pause()")
    page.evaluate("document.querySelector('#clip-video').currentTime = 0.85")
    page.evaluate("document.activeElement.blur()")
    page.wait_for_timeout(300)
    page.screenshot(path=target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", type=Path, help="the .png file to write")
    parser.add_argument("--dark", action="store_true", help="as in the dark")
    arguments = parser.parse_args()
    if find_chromium() is None:
        parser.error(MISSING)
    with tempfile.TemporaryDirectory() as store, sync_playwright() as playwright:
        command = [sys.executable, "-m", "vfengine.serve", "--port", "0", "--store", store]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
            try:
                url = next(line.split()[-1] for line in server.stderr if "http://" in line)
                browser = playwright.chromium.launch(executable_path=find_chromium(), args=FLAGS)
                page = browser.new_page(
                    viewport={"width": 1280, "height": 800},
                    color_scheme="dark" if arguments.dark else "light",
                )
                draw(page, url, arguments.target)
                browser.close()
            finally:
                server.terminate()


if __name__ == "__main__":
    main()
