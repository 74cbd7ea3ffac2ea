"""Take the screenshots of docs/demo.md of a demo that runs: ``python docs/demo_screenshots.py http://127.0.0.1:7860``.

Needs playwright and Chromium.
"""

import io
import re
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

IMAGES = Path(__file__).parent / "images"
WIDTHS = (1280, 390)
WAIT = 120_000  # milliseconds


def save(page: Page, name: str) -> None:
    picture = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
    picture.save(IMAGES / f"demo_{name}.webp", quality=80, method=6)


def main(address: str) -> None:
    with sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for width in WIDTHS:
            page = browser.new_page(viewport={"width": width, "height": 844})
            page.set_default_timeout(WAIT)
            page.goto(address)
            page.get_by_role("button", name=re.compile("Thumbnail 4")).click()
            page.wait_for_selector("#conversation >> text=confidence")
            page.wait_for_timeout(2000)
            save(page, f"answer_{width}")
            page.get_by_label("Task").click()
            page.get_by_role("option", name="Find one thing").click()
            page.get_by_role("textbox", name="What to find").fill("")
            page.get_by_role("button", name="Ask").click()
            page.wait_for_selector("[role=alert]:visible")
            page.wait_for_timeout(1000)
            save(page, f"error_{width}")
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1])
