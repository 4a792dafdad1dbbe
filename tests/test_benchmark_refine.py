"""The benchmark of refinement on two small scenes, and the segmenters that it refines."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from trace_sdk.backbones.pixel import PixelBackbone

FOLDER = Path(__file__).parents[1] / "benchmarks"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


segmenters = script("segmenters")
refine = script("refine")


def scene(shift: int = 0) -> tuple[Any, Any]:
    ids = np.zeros((96, 128), np.uint8)
    ids[20:70, 10 + shift : 60], ids[20:70, 60:110] = 1, 2
    return np.array([[20, 30, 40], [230, 60, 60], [60, 220, 90]], np.uint8)[ids], ids


def overlap(masks: list[Any], true: Any) -> float:
    return max(float((m & true).sum() / (m | true).sum()) for m in masks)


@pytest.mark.parametrize("segmenter", [segmenters.felzenszwalb, segmenters.slic_merged])
def test_segmenters_find_flat_things(segmenter: Any) -> None:
    rgb, ids = scene()
    masks = segmenter(rgb)
    assert all(mask.dtype == np.bool_ and mask.shape == ids.shape for mask in masks)
    assert min(overlap(masks, ids == i) for i in (0, 1, 2)) > 0.8


def test_normalised_cuts_find_blocks() -> None:
    """Tokens of three things, alike within and unlike between: each is cut out whole."""
    things = np.zeros((8, 9), np.int64)
    things[2:6, 1:4], things[2:6, 5:8] = 1, 2
    same = things.ravel()[:, None] == things.ravel()
    rng = np.random.default_rng(0)
    noise = rng.uniform(0, 0.05, same.shape)
    masks = segmenters.normalised_cuts(np.where(same, 0.9, 0.05) + (noise + noise.T) / 2, (8, 9))
    assert min(overlap(masks, things == i) for i in (1, 2)) == 1


def test_attention_cut_gives_masks_of_the_photo(tiny_backbone: PixelBackbone, tmp_path: Path) -> None:
    tiny_backbone.save(tmp_path / "backbone")
    rgb, ids = scene()
    masks = segmenters.AttentionCut(tmp_path / "backbone", size=96)(rgb)
    assert masks and all(mask.shape == ids.shape and mask.dtype == np.bool_ for mask in masks)
    # Foregrounds are taken one after the other: no token is taken twice.
    assert np.sum(masks, axis=0).max() <= 2


@pytest.mark.parametrize("kind", ["ids", "coco"])
def test_one_command_makes_the_figures(
    kind: str, tiny_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    (data / "images").mkdir(parents=True)
    images, annotations = [], []
    for shift, name in enumerate("ab"):
        rgb, ids = scene(6 * shift)
        Image.fromarray(rgb).save(data / ("images" if kind == "coco" else ".") / f"{name}.png")
        if kind == "ids":
            Image.fromarray(ids).save(data / f"{name}.ids.png")
            continue
        images.append({"id": shift + 1, "file_name": f"{name}.png", "height": 96, "width": 128})
        annotations += [
            {"id": 2 * shift + i, "image_id": shift + 1, "iscrowd": 0, "segmentation": refine.encode_mask(ids == i)}
            for i in (1, 2)
        ]
    if kind == "coco":
        (data / "instances.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    out = tmp_path / "r.json"
    monkeypatch.setattr(sys, "argv", ["refine.py", str(data), "-o", str(out), "--engine", str(tiny_engine)])
    refine.main()
    content = json.loads(out.read_text())
    scores = content["scores"]
    assert content["images"] == 2 and content["engines"][0]["engine"] == "tiny"
    assert set(scores) == {"merged", "split", "holes", "loose", "mixed", "untouched", "felzenszwalb", "slic_merged"}
    assert scores["untouched"]["before"]["ap"] == pytest.approx(1)
    assert scores["merged"]["true"]["ap50"] > scores["merged"]["before"]["ap50"] + 0.4
    for failure in content["failures"]:
        assert failure["before"] - failure["after"] >= 0.1 and (tmp_path / failure["picture"]).is_file()


def test_failures_are_the_instance_that_lost_most() -> None:
    rgb, ids = scene()
    photo = refine.Photo(1, "a", rgb, [ids == 1, ids == 2], [])
    edges = refine.EdgeMap(np.zeros(ids.shape, np.float32), rgb)
    half = (ids == 2) & (np.arange(128) < 85)
    (failure,) = refine.failures("x", photo, edges, photo.masks, np.stack([ids == 1, half]))
    assert failure.before == 1 and failure.after == pytest.approx(0.5) and failure.picture.height == 240
    assert refine.failures("x", photo, edges, photo.masks, np.stack(photo.masks)) == []
