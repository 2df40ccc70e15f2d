"""The page in a real browser, before the real server with the weights in the box.

Two flat shapes on a flat ground are objects that these small networks outline (IoU .8 to .9 for a
disk, a heart, a square, a cross, a triangle and a leaf; a crescent, whose center is not in it, .5).
"""

import base64
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from datasets.shapes import posed_outline
from tests.pipeline.serve.builders import png, random_image

ROOT = Path(__file__).resolve().parents[3]
CHROMIUM = shutil.which("chromium")
HEIGHT, WIDTH = 160, 280
CENTERS = {"disk": (75, 80), "heart": (205, 80)}
MAX_BYTES = 200_000
READY = "Click on an object"

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")


def draw(category: str) -> np.ndarray:
    """(H, W) uint8, 1 where the shape is."""
    outline = posed_outline(np.random.default_rng(0), category, 100) + CENTERS[category]
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    return cv2.fillPoly(mask, [np.round(outline).astype(np.int32)], 1)


SHAPES = np.full((HEIGHT, WIDTH, 3), (225, 225, 215), np.uint8)
for name, color in (("disk", (30, 60, 160)), ("heart", (190, 40, 30))):
    SHAPES[draw(name) > 0] = color


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> Iterator[str]:
    """Of tools/serve.py, with a folder of two images."""
    folder = tmp_path_factory.mktemp("photos")
    for seed in (1, 2):
        (folder / f"{seed}.png").write_bytes(png(random_image(seed)))
    command = [sys.executable, ROOT / "tools" / "serve.py", "--port", "0", "--images", folder]
    command += ["--device", "cpu", "--precision", "fp32", "--max-bytes", str(MAX_BYTES)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        said = ""
        for line in server.stdout:
            said += line
            if line.startswith("open "):
                break
        yield re.search(r"open (http://127.0.0.1:\d+/)\n$", said)[1]
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 128 + signal.SIGTERM


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address) -> Iterator[Page]:
    with browser.new_context() as context:
        yield open_page(context, address)


def open_page(context, address: str) -> Page:
    """A new tab; it has shown the folder's first image. An error in its script fails the test."""
    page = context.new_page()
    page.on("pageerror", lambda error: pytest.fail(f"in the page: {error}"))
    page.set_default_timeout(20_000)
    page.goto(address)
    expect(page.locator("#file-name")).to_contain_text("1.png")
    return page


def drop(page: Page, data: bytes, name: str) -> None:
    transfer = page.evaluate_handle(
        """([data, name]) => {
            const transfer = new DataTransfer();
            const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
            transfer.items.add(new File([bytes], name));
            return transfer;
        }""",
        [base64.b64encode(data).decode(), name],
    )
    page.dispatch_event("#stage", "drop", {"dataTransfer": transfer})


def show(page: Page, image: np.ndarray, name: str) -> None:
    """Drops an image, and waits until it can be clicked."""
    drop(page, png(image), name)
    expect(page.locator("#file-name")).to_contain_text(name)
    expect(page.locator("#which")).to_have_text(READY, timeout=60_000)


def place(page: Page, x: float, y: float) -> tuple[float, float]:
    """A point of the image on the page."""
    box = page.locator("#picture").bounding_box()
    return box["x"] + x * box["width"] / WIDTH, box["y"] + y * box["height"] / HEIGHT


def click(page: Page, category: str) -> None:
    page.mouse.click(*place(page, *CENTERS[category]))
    expect(page.locator("#which")).to_contain_text("1 of ")


def download(page: Page) -> COCO:
    with page.expect_download() as waiting:
        page.click("#save")
    assert waiting.value.suggested_filename == "maskpath-coco.json"
    return COCO(waiting.value.path())


def iou_with(coco: COCO, annotation: dict, category: str) -> float:
    truth = coco_mask.encode(np.asfortranarray(draw(category)))
    return coco_mask.iou([coco.annToRLE(annotation)], [truth], [0])[0, 0]


def test_a_click_gives_the_mask_of_the_object(page):
    show(page, SHAPES, "shapes.png")
    page.mouse.move(*place(page, *CENTERS["disk"]))
    expect(page.locator("#keep")).to_be_enabled()  # a preview
    for category in CENTERS:
        click(page, category)
        page.fill("#name", f"a {category}")
        page.click("#keep")
    coco = download(page)
    [image], annotations = coco.imgs.values(), list(coco.anns.values())
    assert image["file_name"] == "shapes.png" and image["height"] == HEIGHT
    names = [coco.cats[each["category_id"]]["name"] for each in annotations]
    assert names == ["a disk", "a heart"]
    for annotation, category in zip(annotations, CENTERS, strict=True):
        assert iou_with(coco, annotation, category) >= 0.6


def test_wheel_and_brackets_walk_through_the_masks_at_a_point(page):
    show(page, SHAPES, "shapes.png")
    click(page, "disk")
    which = page.locator("#which")
    page.mouse.wheel(0, 60)
    expect(which).to_contain_text("2 of ")
    page.keyboard.press("]")
    expect(which).to_contain_text("3 of ")
    page.keyboard.press("[")
    page.mouse.wheel(0, -600)
    expect(which).to_contain_text("1 of ")
    page.keyboard.press("Escape")
    expect(which).to_have_text(READY)


def test_kept_objects_are_named_deleted_and_come_back(page):
    show(page, SHAPES, "shapes.png")
    rows, kept = page.locator("#kept-list li"), page.locator("#num-kept")
    for category in CENTERS:
        click(page, category)
        page.keyboard.press("k")
    expect(rows).to_have_count(2)
    name = rows.nth(0).locator("input")
    name.fill("plate")
    name.press("Enter")
    assert page.locator('#names option[value="cup"]').count() == 1  # suggestions
    rows.nth(1).get_by_label("Delete").click()
    expect(rows).to_have_count(1)
    page.locator("#stage").focus()
    page.keyboard.press("Control+z")
    expect(rows).to_have_count(2)
    page.keyboard.press("Control+z")
    expect(name).to_have_value("")
    page.keyboard.press("Control+Shift+z")
    expect(name).to_have_value("plate")
    page.keyboard.press("Delete")  # the last
    expect(kept).to_have_text("1")
    page.on("dialog", lambda dialog: dialog.accept())  # that they were not downloaded
    page.reload()
    expect(kept).to_have_text("1")
    show(page, SHAPES, "shapes.png")
    expect(name).to_have_value("plate")


def test_sliders_change_what_is_shown_and_downloaded(page):
    show(page, SHAPES, "shapes.png")
    page.click("#tab-proposals")
    shown = page.locator("#proposal-list li")
    expect(shown).to_have_count(20)
    page.locator("#max-count").fill("7")
    expect(shown).to_have_count(7)
    assert len(download(page).anns) == 7
    page.locator("#max-count").fill("300")
    page.locator("#max-iou").fill("1")
    expect(shown).to_have_count(300)
    page.locator("#max-iou").fill("0.3")
    expect(page.locator("#num-proposals")).not_to_contain_text("300 of")
    few = shown.count()
    assert 0 < few < 300
    page.locator("#min-score").fill("0.9")
    expect(page.locator("#num-proposals")).not_to_contain_text(f"{few} of")
    assert shown.count() < few
    shown.nth(0).locator("button").click()
    page.keyboard.press("Enter")
    expect(page.locator("#num-kept")).to_have_text("1")


def test_detections_have_names_and_can_be_kept(page):
    show(page, SHAPES, "shapes.png")
    page.locator("#stage").focus()
    page.keyboard.press("d")
    page.locator("#min-detection").fill("0")
    button = page.locator("#detection-list button").first
    name = button.locator("span").first.text_content()
    button.click()
    page.keyboard.press("Enter")
    page.keyboard.press("1")
    expect(page.locator("#kept-list input")).to_have_value(name)


def test_errors_are_one_line_and_the_page_goes_on(page):
    show(page, SHAPES, "shapes.png")
    error = page.locator("#error span")
    drop(page, b"no image", "broken.jpg")
    expect(error).to_have_text("broken.jpg: not an image, or a broken one")
    drop(page, bytes(MAX_BYTES + 1), "huge.png")
    expect(error).to_have_text("huge.png has 0.2 MB; the limit is 0.2 MB (--max-bytes)")
    click(page, "heart")
    page.route("**/api/**", lambda route: route.abort())
    page.mouse.click(*place(page, *CENTERS["disk"]))
    expect(error).to_contain_text("The server does not answer")
    page.unroute("**/api/**")
    page.get_by_label("Close the message").click()
    expect(error).to_be_hidden()
    click(page, "disk")


def test_two_tabs_do_not_disturb_each_other(page, address):
    other = open_page(page.context, address)
    show(page, SHAPES, "shapes.png")
    show(other, SHAPES[:, ::-1], "mirrored.png")
    for _ in range(2):
        click(page, "disk")
        click(other, "disk")
    page.keyboard.press("k")
    expect(page.locator("#num-kept")).to_have_text("1")
    expect(other.locator("#num-kept")).to_have_text("0")
    other.keyboard.press("k")
    for tab, category in ((page, "disk"), (other, "heart")):
        coco = download(tab)
        [annotation] = coco.anns.values()
        truth = np.asfortranarray(draw(category)[:, :: 1 if tab == page else -1])
        iou = coco_mask.iou([coco.annToRLE(annotation)], [coco_mask.encode(truth)], [0])
        assert iou >= 0.6


def test_the_keyboard_is_enough(page):
    page.keyboard.press("n")
    expect(page.locator("#file-name")).to_contain_text("2.png")
    expect(page.locator("#which")).to_have_text(READY, timeout=60_000)
    assert page.locator("#files img").count() == 2
    page.locator("#stage").focus()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Shift+ArrowUp")
    page.keyboard.press("Space")
    expect(page.locator("#which")).to_contain_text("1 of ")
    page.keyboard.press("Enter")
    expect(page.locator("#num-kept")).to_have_text("1")
    page.keyboard.press("?")
    expect(page.locator("#help")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#help")).to_be_hidden()


def test_on_a_phone_a_tap_is_a_click_and_targets_are_large(browser, address):
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    with browser.new_context(**phone) as context:
        page = open_page(context, address)
        show(page, SHAPES, "shapes.png")
        page.touchscreen.tap(*place(page, *CENTERS["heart"]))
        page.get_by_label("Next mask here").tap()
        expect(page.locator("#which")).to_contain_text("2 of ")
        for target in page.locator("button:visible, select:visible, input:visible").all():
            box = target.bounding_box()
            assert min(box["width"], box["height"]) >= 44 or target.get_attribute("id") == "choose"
        assert page.evaluate("document.documentElement.scrollWidth") == 390
