"""The gallery page: its files exist, its text is safe, and its slider and choices work in a real browser."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from click.testing import CliRunner
from scipy.ndimage import binary_dilation

from trace_sdk.cli import main
from trace_sdk.cli.gallery import _mask_pictures
from trace_sdk.edge_map import EdgeMap
from trace_sdk.gallery import Exhibit, write_page
from trace_sdk.instances.coco import encode_mask
from trace_sdk.instances.painting import paint_masks
from trace_sdk.instances.predictions import PredictedImage


@pytest.fixture
def page(tiny_engine: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "photos & more"
    folder.mkdir()
    grey = np.full((96, 128), 30, np.uint8)
    grey[24:72, 40:88] = 220
    PIL.Image.fromarray(grey).save(folder / "photo_7.png")
    mask = encode_mask(grey > 100)
    (tmp_path / "pred.json").write_text(json.dumps([{"image_id": 7, "segmentation": mask, "score": 0.9}]))
    arguments = ["gallery", str(folder), "-o", str(tmp_path / "page"), "--masks", str(tmp_path / "pred.json")]
    result = CliRunner().invoke(main, [*arguments, "--engine", str(tiny_engine), "--title", "A <b> & c", "--hatch"])
    assert result.exit_code == 0, result.output
    return tmp_path / "page/index.html"


def test_page_and_pictures(page: Path) -> None:
    text = page.read_text()
    assert "A &lt;b&gt; &amp; c" in text and "<b>" not in text and "http" not in text
    names = {file.name for file in (page.parent / "pictures").iterdir()}
    assert names == {
        f"photo_7.{what}.jpg" for what in ("photo", "probability", "edges", "instances", "masks", "refined-masks")
    }
    for name in names:
        assert f"pictures/{name}" in text
        with PIL.Image.open(page.parent / "pictures" / name) as picture:
            assert picture.size == (128, 96)


def test_text_from_outside_is_escaped(tmp_path: Path) -> None:
    name = '"><script>alert(1)</script>'
    write_page(tmp_path / "p.html", name, [Exhibit(name, 1, 1, ((name, name), (name, name)), name)])
    assert (tmp_path / "p.html").read_text().count("<script>") == 1


def test_slider_and_choices_in_a_browser(page: Path, browser: Any) -> None:
    tab = browser.new_page(viewport={"width": 900, "height": 900})
    trouble: list[Any] = []
    tab.on("console", lambda message: trouble.append(message.text))
    tab.on("pageerror", lambda error: trouble.append(error))
    tab.on("requestfailed", lambda request: trouble.append(request.url))
    tab.goto(page.as_uri())
    tab.wait_for_load_state("networkidle")
    assert tab.evaluate("[...document.images].every(i => i.complete && i.naturalWidth === 128)")
    left, slider = tab.locator("img.left"), tab.locator("input[type=range]")
    assert "50%" in left.evaluate("e => getComputedStyle(e).clipPath")
    slider.focus()
    for _ in range(20):
        tab.keyboard.press("ArrowRight")
    assert "30%" in left.evaluate("e => getComputedStyle(e).clipPath")
    box = slider.bounding_box()
    tab.mouse.click(box["x"] + 0.1 * box["width"], box["y"] + 0.5 * box["height"])
    assert int(slider.input_value()) < 25
    tab.locator("select.right").select_option(label="edges")
    tab.wait_for_function("document.querySelector('img.right').src.endsWith('edges.jpg')")
    tab.screenshot(path=str(page.parent / "shot.png"))
    assert not trouble


def test_masks_need_their_folder(tiny_engine: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "pred.json").write_text("[]")
    arguments = ["gallery", str(photos / "a.png"), "-o", str(tmp_path / "page"), "--masks", str(tmp_path / "pred.json")]
    result = CliRunner().invoke(main, [*arguments, "--engine", str(tiny_engine)])
    assert result.exit_code == 2 and "needs one folder" in result.stderr


def test_annotations_without_masks(photos: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["gallery", str(photos), "-o", str(tmp_path), "--annotations", "a.json"])
    assert result.exit_code == 2 and "--annotations names the images of --masks" in result.stderr


def test_painted_masks() -> None:
    rgb = np.full((40, 60, 3), 100, np.uint8)
    masks = np.zeros((2, 40, 60), np.bool_)
    masks[0, 5:35, 5:55], masks[1, 15:25, 20:30] = True, True
    painted = np.asarray(paint_masks(rgb, masks))
    assert (painted[1, 1] == 50).all() and (painted[15, 25] == 255).all()
    assert (painted[20, 25] != painted[10, 10]).any() and (painted[20, 25] != 100).any()


def test_refined_masks_keep_their_colour_and_category(tmp_path: Path) -> None:
    edges = np.zeros((80, 120), np.float32)
    edges[20:61, [20, 100]] = edges[[20, 60], 20:101] = 1
    thing = np.zeros(edges.shape, np.bool_)
    thing[20:61, 20:101] = True
    halves = thing & (np.arange(120) < 60), thing & (np.arange(120) >= 60)
    shown = EdgeMap(edges, np.full((80, 120, 3), 100, np.uint8), 0.5)

    def colours(*categories: int) -> list[Any]:
        entries = [
            (place, {"category_id": category, "segmentation": encode_mask(half), "score": 0.2 + 0.5 * place})
            for place, (category, half) in enumerate(zip(categories, halves, strict=True))
        ]
        image = PredictedImage(7, tmp_path / "7.png", None, entries)
        pictures = [np.asarray(picture) for _, picture in _mask_pictures(shown, image, tmp_path / "p.json", None)]
        return [[picture[40, column].tolist() for column in (35, 85)] for picture in pictures]

    # Each half grows to the whole thing: two masks, the second on top, or one where they may be joined.
    before, after = colours(1, 2)
    assert before[0] != before[1] and after == [before[1]] * 2
    before, after = colours(1, 1)
    assert after == [before[0]] * 2


def test_the_sides_of_a_mask_that_may_be_two_are_not_painted(tmp_path: Path) -> None:
    y, x = np.mgrid[:80, :120]
    pair = np.logical_or(*((y - 40) ** 2 + (x - centre) ** 2 < 18**2 for centre in (42, 75)))
    edges = np.where(pair ^ binary_dilation(pair), 0.6, 0.05).astype(np.float32)
    edges[25:56, 58:60] = 0.2
    shown = EdgeMap(edges, np.full((80, 120, 3), 100, np.uint8), 0.5)
    assert shown.refine(pair[None]).sides.any()
    image = PredictedImage(7, tmp_path / "7.png", None, [(0, {"segmentation": encode_mask(pair)})])
    (_, before), (_, after) = _mask_pictures(shown, image, tmp_path / "p.json", None)
    np.testing.assert_array_equal(np.asarray(before)[30:50, 50:70], np.asarray(after)[30:50, 50:70])


def test_hatching_leaves_the_photo_between_the_stripes() -> None:
    edges = np.zeros((80, 120), np.float32)
    edges[:, 60] = 1
    found = EdgeMap(edges, np.full((80, 120, 3), 100, np.uint8), 0.5).instances()
    plain, hatched = np.asarray(found.plot()), np.asarray(found.plot(hatch=True))
    for half in (np.s_[5:75, 5:55], np.s_[5:75, 65:115]):
        bare = (hatched[half] == 100).all(axis=2)
        assert 0.3 < bare.mean() < 0.7 and (hatched[half][~bare] == plain[half][~bare]).all()


def test_a_page_inside_the_folder_of_the_photos_is_no_photo(tiny_engine: Path, tmp_path: Path) -> None:
    """Its pictures came onto the page of the next run."""
    (tmp_path / "day").mkdir()
    for name in ("a.png", "day/b.png"):
        PIL.Image.new("RGB", (40, 30), "red").save(tmp_path / name)
    page = tmp_path / "page"
    for _ in range(2):
        result = CliRunner().invoke(main, ["gallery", str(tmp_path), "-o", str(page), "--engine", str(tiny_engine)])
        assert result.exit_code == 0, result.output
        assert (page / "index.html").read_text().count("<figure ") == 2


@pytest.mark.parametrize("command", ["gallery", "instances", "cutouts", "detect", "prompts"])
def test_a_name_that_is_no_text(command: str, tiny_engine: Path, tmp_path: Path) -> None:
    """Old archives hold names in other encodings; some commands ended with a traceback."""
    (tmp_path / "in").mkdir()
    file = os.path.join(os.fsencode(tmp_path / "in"), b"caf\xe9.png")  # noqa: PTH118
    try:
        PIL.Image.new("RGB", (40, 30), "red").save(os.fsdecode(file))
    except OSError:
        pytest.skip("this file system takes names in UTF-8 only")
    arguments = [command, str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--engine", str(tiny_engine)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    if command == "gallery":
        page = (tmp_path / "out/index.html").read_text()
        assert "caf\ufffd.png" in page and "pictures/caf%E9.photo.jpg" in page


def test_descriptions_have_every_letter(tmp_path: Path) -> None:
    write_page(tmp_path / "p.html", "t", [Exhibit('Straße "1"', 1, 1, (("a", "a.jpg"), ("b", "b.jpg")))])
    assert 'alt="Straße &quot;1&quot;, left"' in (tmp_path / "p.html").read_text()
