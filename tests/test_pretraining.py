"""Pretraining: it learns, resumes to the same weights, and refuses what does not fit; its scenes and batches."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from trace_sdk.backbones.pixel import PixelBackbone
from trace_sdk.errors import ArgumentError, CheckpointError, DatasetError
from trace_sdk.images import read_image
from trace_sdk.pretraining.cutouts import open_cutout
from trace_sdk.pretraining.photos import list_photos, open_photo
from trace_sdk.pretraining.pretrain import (
    PretrainSettings,
    flow_matching_loss,
    learning_rate,
    pretrain,
    sample_timesteps,
)
from trace_sdk.pretraining.scenes import compose
from trace_sdk.pretraining.training_images import TrainingImages, random_crop
from trace_sdk.training.state import load_state, save_state

TINY = PretrainSettings(layers=1, heads=1, steps=6, tokens=128, sizes=(64,), warmup=2, ema=0.9, learning_rate=2e-3)


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile costs half a minute and changes no result here."""
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)


@pytest.fixture(scope="module")
def cutouts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cutouts")
    for number in range(3):
        sprite = Image.new("RGBA", (40, 50), (0, 0, 0, 0))
        ImageDraw.Draw(sprite).ellipse((2, 2, 37, 47), fill=(80 * number, 200, 40, 255))
        sprite.save(folder / f"{number}.png")
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return PixelBackbone.load(folder).state_dict()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_cut_pretraining_ends_with_the_same_weights(
    photos: Path, tmp_path: Path, optimizer: str, killed_at: Any
) -> None:
    settings = PretrainSettings(**{**TINY.__dict__, "optimizer": optimizer})
    images = TrainingImages([photos], None, None, 0)
    losses: list[float] = []
    pretrain(images, tmp_path / "whole", settings, report=lambda _, terms: losses.append(terms["loss"]))
    assert len(losses) == 6 and all(np.isfinite(losses))
    with killed_at(4) as report:
        pretrain(images, tmp_path / "cut", settings, save_seconds=0, report=report)
    assert load_state(tmp_path / "cut/state.safetensors")[1] == 3
    pretrain(images, tmp_path / "cut", settings)
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    curves = [(tmp_path / part / "curves.csv").read_text() for part in ("whole", "cut")]
    assert curves[0] == curves[1] and [line.split(",")[0] for line in curves[0].splitlines()] == ["step", *"123456"]
    assert [float(line.split(",")[1]) for line in curves[0].splitlines()[1:]] == pytest.approx(losses, rel=1e-5)


def test_worker_processes_change_no_batch(photos: Path, cutouts: Path, tmp_path: Path) -> None:
    images = TrainingImages([photos], cutouts, None, seed=0)
    pretrain(images, tmp_path / "thread", TINY)
    pretrain(images, tmp_path / "processes", TINY, workers=2)
    expected, found = weights(tmp_path / "thread"), weights(tmp_path / "processes")
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    with pytest.raises(ArgumentError, match="workers must be at least 0, got -1"):
        pretrain(images, tmp_path / "none", TINY, workers=-1)


def test_pretraining_learns(photos: Path, tmp_path: Path) -> None:
    settings = PretrainSettings(**{**TINY.__dict__, "steps": 60, "warmup": 5})
    losses: list[float] = []
    pretrain(
        TrainingImages([photos], None, None, 0),
        tmp_path,
        settings,
        report=lambda _, terms: losses.append(terms["loss"]),
    )
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])


def test_ctrl_c_saves_the_step_it_reached(photos: Path, tmp_path: Path) -> None:
    def interrupt(step: int, _: float) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain(TrainingImages([photos], None, None, 0), tmp_path, TINY, report=interrupt)
    assert load_state(tmp_path / "state.safetensors")[1] == 3


def test_run_of_another_shape_is_not_overwritten(photos: Path, tmp_path: Path) -> None:
    images = TrainingImages([photos], None, None, 0)
    pretrain(images, tmp_path, PretrainSettings(**{**TINY.__dict__, "steps": 1}))
    with pytest.raises(ArgumentError, match="heads=1"):
        pretrain(images, tmp_path, PretrainSettings(**{**TINY.__dict__, "heads": 2}))
    (tmp_path / "state.safetensors").write_bytes(b"\x80\x04pickle")
    with pytest.raises(CheckpointError, match="pickle"):
        pretrain(images, tmp_path, TINY)
    (tmp_path / "state.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="not a whole training state"):
        pretrain(images, tmp_path, TINY)


def test_a_run_goes_on_only_as_it_began(photos: Path, tmp_path: Path) -> None:
    """Another crop size, warm-up or start was taken, or left out, without a word."""
    images, short = TrainingImages([photos], None, None, 0), replace(TINY, steps=1)
    pretrain(images, tmp_path / "start", short)
    pretrain(images, tmp_path / "out", short)
    for changed in (replace(short, sizes=(64, 72)), replace(short, warmup=9), replace(short, ema=0.5)):
        with pytest.raises(ArgumentError, match="Give the same value to go on"):
            pretrain(images, tmp_path / "out", changed)
    with pytest.raises(ArgumentError, match="is of a run with start="):
        pretrain(images, tmp_path / "out", short, start=tmp_path / "start")
    pretrain(images, tmp_path / "out", replace(short, steps=2, learning_rate=1e-3))
    assert load_state(tmp_path / "out/state.safetensors")[1] == 2


def test_damaged_photos_are_said_before_the_training(photos: Path, cutouts: Path, tmp_path: Path) -> None:
    """They were found when they were drawn, maybe hours later, and one by one."""
    jpeg = (photos / "b.jpg").read_bytes()
    for name, data in {"whole.jpg": jpeg, "cut.jpg": jpeg[: len(jpeg) // 2], "empty.png": b""}.items():
        (tmp_path / name).write_bytes(data)
    for folders in (([tmp_path], None, None), ([photos], cutouts, tmp_path)):
        with pytest.raises(DatasetError, match=r"2 cannot be read\. \S+cut\.jpg: .*damaged.* Nor can \S+empty\.png\. "):
            TrainingImages(*folders, seed=0)
    (tmp_path / "cut.jpg").unlink()
    with pytest.raises(DatasetError, match=r"Of 2 photos 1 cannot be read\. \S+empty\.png: is empty"):
        TrainingImages([tmp_path], None, None, seed=0)


def test_hidden_files_and_folders_named_like_photos_are_none(photos: Path, tmp_path: Path) -> None:
    """macOS puts `._a.jpg` beside a.jpg; as photos they ended a training."""
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name in ("a.jpg", "._a.jpg", ".hidden/b.jpg", "folder.jpg/c.jpg"):
        (tmp_path / name).write_bytes((photos / "b.jpg").read_bytes())
    assert list_photos([tmp_path]) == [tmp_path / "a.jpg", tmp_path / "folder.jpg/c.jpg"]


def test_photos_are_what_the_teacher_sees(tmp_path: Path) -> None:
    """16-bit grey was white all over, and what alpha hides was shown."""
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    Image.new("RGBA", (64, 64), (200, 0, 0, 0)).save(tmp_path / "clear.png")
    deep, clear = (np.asarray(open_photo(tmp_path / name)) for name in ("deep.png", "clear.png"))
    assert deep[0, 0].tolist() == [0, 0, 0] and deep.mean() == pytest.approx(127.5, abs=1) and (clear == 255).all()
    np.testing.assert_array_equal(deep, read_image(tmp_path / "deep.png").rgb)


WARNED = """
import warnings
from trace_sdk.backbones.pixel import PixelBackbone
import torch

assert not any("Mismatch" in str(rule) for rule in warnings.filters), "muted for the whole process"
backbone = PixelBackbone.create(num_single_layers=1, num_attention_heads=1)
with warnings.catch_warnings(record=True) as said, torch.autocast("cpu", torch.bfloat16):
    warnings.simplefilter("always")
    backbone(torch.zeros(1, 3, 64, 64), 0.5)
print(*(str(one.message) for one in said if "Mismatch" in str(one.message)), sep="\\n", end="")
"""


def test_torch_s_remark_on_norms_is_muted_where_it_arises_alone() -> None:
    done = subprocess.run([sys.executable, "-c", WARNED], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_batches_depend_on_seed_and_step_alone(photos: Path, cutouts: Path) -> None:
    images = TrainingImages([photos], cutouts, None, seed=3)
    first = images.batch(5, 2, 64)
    images.batch(6, 2, 64)
    np.testing.assert_array_equal(images.batch(5, 2, 64), first)
    assert first.shape == (2, 64, 64, 3) and first.dtype == np.uint8
    assert not np.array_equal(TrainingImages([photos], cutouts, None, seed=4).batch(5, 2, 64), first)


def test_scene_ids_show_where_each_instance_is(cutouts: Path) -> None:
    sprites = [open_cutout(file) for file in sorted(cutouts.iterdir())]
    background = np.full((96, 96, 3), 255, np.uint8)
    counts = []
    for seed in range(20):
        scene = compose(np.random.default_rng(seed), sprites, background)
        assert scene.rgb.shape == (96, 96, 3) and scene.ids.shape == (96, 96)
        green = scene.rgb[..., 1].astype(int) - scene.rgb[..., 2]
        if (scene.ids > 0).sum() > 200:
            assert green[scene.ids > 0].mean() > green[scene.ids == 0].mean() + 20
        counts.append(scene.ids.max())
    assert max(counts) >= 3


def test_pictures_are_enlarged_no_more_than_asked() -> None:
    rgba = np.full((12, 12, 4), (20, 220, 20, 255), np.uint8)
    sprites = [Image.fromarray(np.pad(rgba, ((4, 4), (4, 4), (0, 0))), "RGBA")]
    background = np.full((96, 96, 3), 200, np.uint8)
    largest = {1.0: 0, 3.0: 0}
    for enlarged in largest:
        for seed in range(20):
            ids = compose(np.random.default_rng(seed), sprites, background, enlarged).ids
            largest[enlarged] = max(largest[enlarged], *(int((ids == n).sum()) for n in range(1, 8)))
    assert 100 < largest[1.0] <= 200 < 500 < largest[3.0]
    ramp = Image.fromarray(np.tile(np.arange(60, dtype=np.uint8), (60, 1)))
    seen = [random_crop(np.random.default_rng(seed), ramp, 80, enlarged) for seed in range(10) for enlarged in (1.1, 2)]
    spans = [int(np.ptp(crop[..., 0])) for crop in seen]
    assert min(spans[::2]) == 59 and min(spans[1::2]) < 50


def test_opaque_cutout_and_empty_folder_are_errors(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no transparent pixel"):
        open_cutout(photos / "a.png")
    with pytest.raises(DatasetError, match="No photos in"):
        list_photos([tmp_path])


def test_flow_matching_loss_is_the_formula() -> None:
    prediction, images, t = torch.rand(3, 3, 8, 8), torch.rand(3, 3, 8, 8), torch.tensor([0.02, 0.4, 1.0])
    expected = np.mean(
        [((prediction[i] - images[i]).double() ** 2).mean() / max(t[i].item(), 0.1) ** 2 for i in range(3)]
    )
    assert flow_matching_loss(prediction, images, t).item() == pytest.approx(expected, rel=1e-5)


def test_timesteps_follow_the_mixture() -> None:
    t = sample_timesteps(20000, torch.Generator().manual_seed(0)).numpy()
    assert t.min() > 0 and t.max() < 1
    normal = 1 / (1 + np.exp(-(np.random.default_rng(0).standard_normal(200000) * 1.1 - 0.1)))
    expected = 0.85 * (normal < 0.2).mean() + 0.15 * 0.2
    assert (t < 0.2).mean() == pytest.approx(expected, abs=0.01)


def test_learning_rate_rises_holds_and_falls() -> None:
    settings = PretrainSettings(steps=100, warmup=10, decay=0.4, learning_rate=1.0)
    assert learning_rate(0, settings) == pytest.approx(0.1)
    assert learning_rate(30, settings) == 1.0
    assert learning_rate(80, settings) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "change", [{"steps": 0}, {"sizes": ()}, {"sizes": (60,)}, {"tokens": 10}, {"optimizer": "sgd"}]
)
def test_pretraining_settings_out_of_range(change: dict) -> None:
    with pytest.raises(ArgumentError):
        PretrainSettings(**{**TINY.__dict__, **change}).check()


def test_state_round_trip(tmp_path: Path) -> None:
    save_state(tmp_path / "s", {"a.b": torch.arange(3)}, 7, {"seed": 1})
    tensors, step, settings = load_state(tmp_path / "s")
    assert torch.equal(tensors["a.b"], torch.arange(3)) and step == 7 and settings == {"seed": 1}
