"""Scenes composed of own cut-outs and shapes, whose outlines are known."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import label
from torch import Tensor

from trace_sdk.errors import DatasetError
from trace_sdk.pretraining.cutouts import OF_PHOTO
from trace_sdk.pretraining.photos import check_photos
from trace_sdk.pretraining.shapes import cut_shape, signed_distance
from trace_sdk.student import own_scenes
from trace_sdk.student.own_scenes import OwnScenes, homes


def green_disc(cutouts: Path) -> Image.Image:
    """As the red one."""
    disc = np.asarray(Image.open(cutouts / "disc.png")).copy()
    disc[..., :3] = (20, 220, 20)
    return Image.fromarray(disc, "RGBA")


def test_shapes_are_whole_and_differ() -> None:
    areas = []
    for seed in range(40):
        inside = signed_distance(np.random.default_rng(seed), 160) < 0
        areas.append(int(inside.sum()))
        assert inside.any() and not inside.all() and label(inside)[1] <= 3
    assert len(set(areas)) == len(areas)
    rgb = np.random.default_rng(1).integers(0, 255, (160, 160, 3), np.uint8)
    shape = np.asarray(cut_shape(np.random.default_rng(0), rgb))
    assert (shape[..., :3] == rgb).all() and shape[..., 3].max() == 255 and shape[..., 3].min() == 0


def test_a_scene_tells_exactly_where_something_was_pasted(plain: Path, cutouts: Path) -> None:
    scenes = OwnScenes([plain], [cutouts], seed=3)
    images, _, ridges, inside = scenes.batch(5, 8, 96)
    assert images.shape == (8, 3, 96, 96) and ridges.shape == (8, 96, 96)
    assert images.abs().max() <= 1 and ridges.min() >= 0 and ridges.max() == 1
    slope = (images.diff(dim=2)[..., 1:].abs() + images.diff(dim=3)[:, :, 1:].abs()).sum(1)
    near, far = ridges[:, 1:, 1:] > 0.5, ridges[:, 1:, 1:] == 0
    assert slope[near].mean() > 10 * slope[far].mean()
    shown = images[:, 0] != images[:, 0, :1, :1]  # the ground is plain
    assert inside.dtype == torch.bool and inside.any() and not inside.all()
    assert (ridges[~inside] > 0).any() and shown[inside].float().mean() > 0.9
    again, *_ = OwnScenes([plain], [cutouts], seed=3).batch(5, 8, 96)
    other, *_ = scenes.batch(6, 8, 96)
    assert torch.equal(images, again) and not torch.equal(images, other)


def test_every_folder_counts_the_same(plain: Path, cutouts: Path, tmp_path: Path) -> None:
    few, many, green = tmp_path / "few", tmp_path / "many", tmp_path / "green"
    for folder, count, light in ((few, 1, 255), (many, 30, 0)):
        folder.mkdir()
        for number in range(count):
            Image.new("RGB", (160, 140), (light, light, light)).save(folder / f"{number}.png")
    green.mkdir()
    for number in range(30):
        green_disc(cutouts).save(green / f"{number}.png")
    _, images, _, inside = OwnScenes([few, many], [cutouts, green], seed=1).batch(0, 60, 64)
    ground = torch.stack([image.mean(0)[~own].median() for image, own in zip(images, inside, strict=True)])
    assert 20 <= int((ground > 0).sum()) <= 40
    things = images.permute(0, 2, 3, 1)[inside]
    red, greenish, blue = (int((things.argmax(1) == channel).sum()) for channel in range(3))
    assert 0.3 < greenish / (red + greenish + blue) < 0.7


def test_cut_outs_come_home_in_their_own_light(cutouts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A green disc was cut out of the one photo; the red disc and the blue bar are of others."""
    for name, share in (("SHAPES", 0.0), ("AT_HOME", 1.0), ("BLURRED", 0.0), ("JPEG", 0.0)):
        monkeypatch.setattr(own_scenes, name, share)
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (160, 140), (128, 128, 128)).save(photos / "a-photo.png")

    def things(name: str) -> Tensor:
        green = tmp_path / name
        green.mkdir()
        green_disc(cutouts).save(green / f"{name}.png")
        _, images, _, inside = OwnScenes([photos], [cutouts, green], seed=1).batch(0, 20, 64)
        return ((images + 1) * 127.5).round().permute(0, 2, 3, 1)[inside]

    own = things("a-photo-3")
    assert (own.argmax(1) == 1).all(), "none but its own"
    assert own.median(0).values.tolist() == [20, 220, 20]
    assert (things("b-photo-3").argmax(1) != 1).any(), "of another photo: drawn from all"


def test_a_cut_out_comes_home_to_the_photo_that_it_carries(cutouts: Path, tmp_path: Path) -> None:
    """Two folders with a photo of one name: each got the cut-outs of both. Copies of a photo get the same."""
    names = "one/street.png", "two/street.png", "copy/street.png", "two/other.png"
    for number, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (30 * number, 0, 0)).save(tmp_path / name)
    one, two, copied, _ = photos = [tmp_path / name for name in names]
    copied.write_bytes(one.read_bytes())
    disc = Image.open(cutouts / "disc.png")

    sha256 = check_photos(photos)

    def of(photo: Path) -> Image.Image:
        cutout = disc.copy()
        cutout.info[OF_PHOTO] = hashlib.sha256(photo.read_bytes()).hexdigest()
        return cutout

    first, second, named = of(one), of(two), disc.copy()
    clash, plain = tmp_path / "street-1.png", tmp_path / "other-7.png"
    found = homes(sha256, [(clash, first), (tmp_path / "street-2-1.png", second), (plain, named)])
    assert [found.get(photo) for photo in photos] == [[first], [second], [first], [named]]
    with pytest.raises(DatasetError, match=r"street-1\.png may be of any of \S+one/street\.png, .*, which differ"):
        homes(sha256, [(clash, named)])
    assert set(homes(check_photos([one, copied]), [(clash, named)])) == {one, copied}


def test_some_scenes_were_a_jpeg_file(plain: Path, cutouts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_scenes, "BLURRED", 0.0)

    def untouched(share: float) -> float:
        monkeypatch.setattr(own_scenes, "JPEG", share)
        _, images, ridges, inside = OwnScenes([plain], [cutouts], seed=1).batch(0, 8, 96)
        grounds = [image[:, ground] for image, ground in zip(images, (ridges == 0) & ~inside, strict=True)]
        return float(torch.cat([(x == x.median(1, keepdim=True).values).all(0) for x in grounds]).float().mean())

    assert untouched(0.0) > untouched(1.0) + 0.05, "ringing beside what was pasted"


def test_without_cutouts_it_says_so(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="none does not exist"):
        OwnScenes([plain], [tmp_path / "none"], 0)


def test_a_damaged_photo_is_said_before_the_training(plain: Path, cutouts: Path, tmp_path: Path) -> None:
    (tmp_path / "half.png").write_bytes((plain / "60.png").read_bytes()[:90])
    with pytest.raises(DatasetError, match=r"Of 4 photos 1 cannot be read\. \S+half\.png"):
        OwnScenes([plain, tmp_path], [cutouts], 0)
