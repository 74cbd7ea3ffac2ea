"""The page, driven in Chromium."""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image, ImageChops

from sphinxkit.nano.examples import examples

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(600)]
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
WAIT = 120_000  # milliseconds until an answer; a busy machine is slow
DESKTOP, PHONE = (1280, 900), (390, 844)

Open = Callable[..., "Page"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as engine:
        try:
            found = engine.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"needs Chromium (apt install chromium, or playwright install chromium): {error}")
        yield found
        found.close()


@pytest.fixture
def visit(browser: Any, address: str) -> Iterator[Open]:
    """Opens the page at a size; nothing may be asked of another server."""
    elsewhere: list[str] = []
    pages: list[Page] = []

    def note(request: Any) -> None:
        if not request.url.startswith((f"{address}/", "data:", "blob:")):
            elsewhere.append(request.url)

    def start(size: tuple[int, int] = DESKTOP, scheme: str = "light") -> Page:
        page: Page = browser.new_page(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
        pages.append(page)
        page.set_default_timeout(WAIT)
        page.on("request", note)
        page.goto(f"{address}/")
        page.wait_for_selector("#examples button")
        return page

    yield start
    for page in pages:
        page.close()
    assert not elsewhere


def choose(page: Page, task: str) -> None:
    page.get_by_label("Task").click()
    page.get_by_role("option", name=task).click()


def ask(page: Page) -> str:
    page.get_by_role("button", name="Ask").click()
    page.wait_for_selector("#conversation >> text=confidence")
    return page.inner_text("#conversation pre.answer")


def drawing_of(page: Page) -> Image.Image:
    shown = page.locator("img[src*='gradio_api/file=']").last
    source = shown.get_attribute("src")
    return Image.open(io.BytesIO(page.request.get(str(source)).body())).convert("RGB")


def errors_of(page: Page) -> list[str]:
    return [each.inner_text() for each in page.locator("[role=alert]:visible").all()]


def test_a_picture_is_uploaded_asked_about_and_drawn_on(visit: Open, tmp_path: Path) -> None:
    example = next(each for each in examples() if each.task == "rec")
    picture = Image.fromarray(example.picture)
    picture.save(tmp_path / "scene.png")
    page = visit()
    page.set_input_files("input[type=file]", tmp_path / "scene.png")
    page.wait_for_selector("button[aria-label='Remove Image']")
    choose(page, "Find one thing")
    page.get_by_label("What to find").fill(example.fields["phrase"])
    answer = ask(page)
    numbers = re.fullmatch(r"\[([\d.]+),([\d.]+),([\d.]+),([\d.]+)\]", answer)
    assert numbers is not None
    page.wait_for_function("document.querySelectorAll(\"img[src*='gradio_api/file=']\").length > 9")
    drawn = drawing_of(page)
    assert drawn.size == (896, 672)  # pixels of 2 x 2
    changed = ImageChops.difference(drawn, picture.resize(drawn.size, Image.Resampling.NEAREST)).getbbox()
    assert changed is not None
    x1, _, x2, y2 = (float(number) * 896 for number in numbers.groups())
    assert changed[0] == pytest.approx(x1, abs=1)
    assert changed[3] == pytest.approx(y2 - 112, abs=1)  # the square of SPHINX is padded by 112 above
    assert changed[2] >= x2 - 1  # the label may be wider
    assert "1 box drawn; confidence -" in page.inner_text("#conversation")


def test_answers_grow_and_are_shown_letter_by_letter(visit: Open) -> None:
    page = visit()
    page.evaluate(
        """() => { window.seen = []; new MutationObserver(() => {
            const text = document.querySelector('#conversation pre.answer')?.innerText ?? '';
            if (text && text !== window.seen.at(-1)) window.seen.push(text);
        }).observe(document.body, {subtree: true, childList: true, characterData: true}) }"""
    )
    page.get_by_role("button", name=re.compile("Thumbnail 4")).click()  # names what it marks
    page.wait_for_selector("#conversation >> text=confidence")
    answer = page.inner_text("#conversation pre.answer")
    assert re.match(r'<p>The word "BOCOZ"</p>\[0\.\d{3}', answer)
    grown = [text for text in page.evaluate("window.seen") if text != "…"]
    assert len(set(grown)) > 2
    assert all(answer.startswith(text) for text in grown)


def test_a_task_shows_only_its_fields(visit: Open) -> None:
    page = visit()
    fields = ["Question", "What to find", "Kind of thing", "Answers to choose from", "Region", "Remember earlier"]

    def shown(task: str, wanted: list[str]) -> None:
        choose(page, task)
        for field in fields:
            role = "checkbox" if field.startswith("Remember") else "textbox"
            count = int(field in wanted)
            playwright.expect(page.get_by_role(role, name=field)).to_have_count(count, timeout=WAIT)

    shown("Find one thing", ["What to find"])
    shown("Choose among answers", ["Question", "Answers to choose from"])
    shown("Find a person's joints", ["Region"])
    shown("Read a chart as a table", [])
    shown("Chat in your own words", ["Question", "Remember earlier"])


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_a_file_that_is_no_picture(visit: Open, tmp_path: Path, size: tuple[int, int]) -> None:
    (tmp_path / "notes.txt").write_text("no picture")
    page = visit(size)
    drop = """() => { const all = new DataTransfer(); all.items.add(new File(['no picture'], 'dropped.txt'));
        const target = document.querySelector('#picture button');
        target.dispatchEvent(new DragEvent('drop', {dataTransfer: all, bubbles: true, cancelable: true})); }"""
    for name, give in (
        ("notes.txt", lambda: page.set_input_files("input[type=file]", tmp_path / "notes.txt")),
        ("dropped.txt", lambda: page.evaluate(drop)),
    ):
        give()
        page.wait_for_selector(f"[role=alert]:visible >> text={name}")
        [message] = errors_of(page)
        assert message.startswith(f"image {name}: not an image in a format that is opened")
        assert page.get_by_text("Error", exact=True).count() == 0  # gradio's own message


CONTRAST = """(element) => {
    const numbers = (color) => color.match(/[\\d.]+/g).map(Number);
    const light = (rgb) => { const [r, g, b] = rgb.map((value) => value / 255)
        .map((value) => value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
    let below = element, fill;
    do { fill = numbers(getComputedStyle(below).backgroundColor); below = below.parentElement; }
    while (below && fill.length === 4 && fill[3] === 0);
    const [dark, bright] = [fill, numbers(getComputedStyle(element).color)]
        .map((color) => light(color.slice(0, 3))).sort((a, b) => a - b);
    return (bright + 0.05) / (dark + 0.05);
}"""
"""Contrast of a text and what is below it. Source: WCAG 2.1, relative luminance and contrast ratio."""
LEAST_CONTRAST = 4.5  # source: WCAG 2.1, success criterion 1.4.3


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_are_readable_by_day_and_night(visit: Open, scheme: str) -> None:
    page = visit(scheme=scheme)
    assert page.locator("body.dark").count() == int(scheme == "dark")
    page.get_by_role("button", name=re.compile("Thumbnail 6")).click()  # a person, with a region
    page.wait_for_selector("#conversation >> text=confidence")
    choose(page, "Find one thing")
    page.get_by_label("What to find").fill("")
    page.get_by_role("button", name="Ask").click()
    page.wait_for_selector("[role=alert]:visible")
    texts = ["h1", ".caption-label", "pre.asked", "pre.answer", ".sphinxkit-note", ".sphinxkit-error", "button.primary"]
    for text in texts:
        assert page.locator(f"{text}:visible").first.evaluate(CONTRAST) >= LEAST_CONTRAST, text
    choose(page, "Find a person's joints")
    about = page.get_by_text("Click two corners in the picture.")
    assert about.evaluate(CONTRAST) >= LEAST_CONTRAST


def test_one_error_stands_below_its_field(visit: Open, tmp_path: Path) -> None:
    page = visit()
    page.get_by_label("Question").fill("What is it?")
    page.get_by_role("button", name="Ask").click()
    page.wait_for_selector("[role=alert]:visible")
    assert errors_of(page) == ["This task is about a picture: choose one, or one of the examples."]
    (tmp_path / "notes.png").write_text("no picture")
    page.set_input_files("input[type=file]", tmp_path / "notes.png")
    page.wait_for_selector("[role=alert]:visible >> text=notes.png")
    [message] = errors_of(page)
    assert message.startswith("image notes.png: not an image in a format that is opened")
    alert = page.locator("[role=alert]:visible").bounding_box()
    field = page.locator(".block", has=page.locator("input[type=file]")).first.bounding_box()
    assert alert is not None
    assert field is not None
    assert 0 <= alert["y"] - (field["y"] + field["height"]) < 60
    page.get_by_role("button", name=re.compile("Thumbnail 2")).click()  # a picture, and the error goes
    page.wait_for_selector("#conversation >> text=confidence")
    assert errors_of(page) == []
    page.get_by_label("What to find").fill("")
    page.get_by_role("button", name="Ask").click()
    page.wait_for_selector("[role=alert]:visible")
    assert errors_of(page) == ["This task asks about a phrase: type one."]
    assert page.get_by_text("Error", exact=True).count() == 0


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_two_clicks_mark_a_region(visit: Open, size: tuple[int, int]) -> None:
    page = visit(size)
    page.get_by_role("button", name=re.compile("Thumbnail 6")).click()
    page.wait_for_selector("#conversation >> text=confidence")
    region = page.get_by_label("Region")
    picture = page.locator("#picture img")
    drawn = picture.bounding_box()
    assert drawn is not None
    scale = min(drawn["width"] / 448, drawn["height"] / 336)  # the picture is in the middle of its place
    left, top = (drawn["width"] - 448 * scale) / 2, (drawn["height"] - 336 * scale) / 2
    for x, y, given in ((112, 252, 2), (224, 84, 4)):
        picture.click(position={"x": left + x * scale, "y": top + y * scale})
        playwright.expect(region).to_have_value(re.compile(f"^[^,]+(,[^,]+){{{given - 1}}}$"))
    numbers = [float(word) for word in region.input_value().split(",")]
    assert numbers == pytest.approx([112, 84, 224, 252], abs=3)
    page.wait_for_function("document.querySelector('.sphinxkit-region').clientWidth > 10")
    drawn, mark = picture.bounding_box(), page.locator(".sphinxkit-region").bounding_box()
    assert drawn is not None
    assert mark is not None
    wanted = [drawn["x"] + left + 112 * scale, drawn["y"] + top + 84 * scale, 112 * scale, 168 * scale]
    assert [mark[side] for side in ("x", "y", "width", "height")] == pytest.approx(wanted, abs=4)
    choose(page, "Find one thing")  # asks about no region
    playwright.expect(page.locator(".sphinxkit-region")).to_have_count(0)


def test_a_photograph_is_doubted(visit: Open, tmp_path: Path) -> None:
    data = pytest.importorskip("skimage.data", reason="needs scikit-image for a photograph")
    Image.fromarray(data.astronaut()).save(tmp_path / "photo.png")
    page = visit()
    page.set_input_files("input[type=file]", tmp_path / "photo.png")
    page.wait_for_selector("button[aria-label='Remove Image']")
    choose(page, "Find one thing")
    page.get_by_label("What to find").fill("the person")
    ask(page)
    assert "low confidence (-" in page.inner_text(".sphinxkit-warning")


def test_a_phone(visit: Open) -> None:
    page = visit(PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE[0]
    page.get_by_role("button", name=re.compile("Thumbnail 1")).click()
    page.wait_for_selector("#conversation >> text=confidence")
    assert page.inner_text("#conversation pre.answer") == "star"
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE[0]
    playwright.expect(page.locator("#conversation pre.answer")).to_be_in_viewport()
