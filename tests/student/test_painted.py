"""What is painted over a scene changes colours, and no edge that is taught."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from trace_sdk.pretraining.shapes import SIDE, cut_shape
from trace_sdk.student import painted
from trace_sdk.student.nano import NanoStudent
from trace_sdk.student.own_scenes import OwnScenes
from trace_sdk.student.painted import paint
from trace_sdk.student.self_train import SelfTrainSettings, self_train

SCENE = np.full((64, 64, 3), 120, np.uint8)
IDS = np.zeros((64, 64), np.uint8)
IDS[10:30, 10:30], IDS[40:60, 40:60] = 1, 2
PHOTO = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)


def only(patch: pytest.MonkeyPatch, **shares: float) -> None:
    for name in ("PATTERN", "EVERYWHERE", "SHADOW", "REFLECTION"):
        patch.setattr(painted, name, shares.get(name, 0.0))


def painted_scene(seed: int) -> NDArray[np.uint8]:
    thing = cut_shape(np.random.default_rng(seed), np.resize(PHOTO, (SIDE, SIDE, 3)).astype(np.uint8))
    return paint(np.random.default_rng(seed), SCENE, IDS, lambda: PHOTO, lambda: thing)


def test_a_scene_on_which_nothing_was_painted_is_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch)
    assert painted_scene(0) is SCENE
    only(monkeypatch, PATTERN=1)
    empty = np.zeros_like(IDS)
    assert paint(np.random.default_rng(0), SCENE, empty, lambda: PHOTO, lambda: Image.new("RGBA", (8, 8))) is SCENE


def test_a_pattern_lies_on_things_and_keeps_their_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, PATTERN=1)
    surfaces = set()
    for seed in range(20):
        changed = (painted_scene(seed) != SCENE).any(2)
        assert not changed[IDS == 0].any()
        surfaces.add(tuple(bool(changed[number == IDS].mean() > 0.5) for number in (1, 2)))
    assert surfaces == {(True, False), (False, True), (True, True)}
    only(monkeypatch, PATTERN=1, EVERYWHERE=1)
    whole = painted_scene(1)
    assert (whole != SCENE).any(2).mean() > 0.9 and abs(float(whole.mean()) - 120) < 40


def test_a_shadow_darkens_and_a_reflection_brightens(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, SHADOW=1)
    shadows = [painted_scene(seed) for seed in range(20)]
    assert all((shadow <= SCENE).all() for shadow in shadows)
    shares = [float((shadow < 115).any(2).mean()) for shadow in shadows]
    assert np.mean([0.02 < share < 0.98 for share in shares]) >= 0.7, "most have a rim in the picture"
    only(monkeypatch, REFLECTION=1)
    assert all((seen >= SCENE).all() and (seen > SCENE).any() for seen in map(painted_scene, range(5)))


@pytest.fixture
def scenes(tmp_path: Path) -> OwnScenes:
    photos, cutouts = tmp_path / "photos", tmp_path / "cutouts"
    photos.mkdir(), cutouts.mkdir()
    rng = np.random.default_rng(3)
    for number in range(3):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
        coarse.resize((120, 120), Image.Resampling.BICUBIC).save(photos / f"{number}.png")
        cut_shape(rng, rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(cutouts / f"{number}.png")
    return OwnScenes([photos], [cutouts], seed=4)


def test_outlines_are_those_of_the_scene_without_paint(scenes: OwnScenes, monkeypatch: pytest.MonkeyPatch) -> None:
    images, plain, ridges, inside = scenes.batch(2, 8, 96)
    assert images.shape == plain.shape == (8, 3, 96, 96)
    differ = [not torch.equal(*pair) for pair in zip(images, plain, strict=True)]
    assert any(differ) and not all(differ)
    only(monkeypatch)
    bare = scenes.batch(2, 8, 96)
    assert torch.equal(bare.images, bare.plain) and torch.equal(bare.plain, plain)
    assert torch.equal(bare.ridges, ridges) and torch.equal(bare.inside, inside)


def test_the_edges_that_are_believed_are_those_without_paint(
    scenes: OwnScenes, tmp_path: Path, targets: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch, PATTERN=1, EVERYWHERE=1, SHADOW=1)
    torch.manual_seed(0)
    student, settings = NanoStudent(0.4).eval(), SelfTrainSettings(steps=1, crops=4, size=64)
    images, plain, ridges, inside = scenes.batch(0, 4, 64)
    with torch.no_grad():
        seen, believed = (student(pixels)[0].sigmoid() for pixels in (images, plain))
    self_train(student, scenes, tmp_path / "out", settings)
    photo = (ridges == 0) & ~inside
    assert torch.allclose(targets[0][photo], 0.4 * believed[photo], atol=1e-5)
    assert not torch.allclose(targets[0][photo], 0.4 * seen[photo], atol=1e-2)
