"""A student with a backbone and a convolutional one as one: its answer, folder, engine and command."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from trace_sdk import EdgeDetector
from trace_sdk.backbones.pixel import PixelBackbone
from trace_sdk.cli import main
from trace_sdk.errors import ArgumentError, CheckpointError
from trace_sdk.student.combined import CombinedStudent
from trace_sdk.student.folder import open_student
from trace_sdk.student.model import Student
from trace_sdk.student.nano import NanoStudent
from trace_sdk.student.own_scenes import OwnScenes
from trace_sdk.student.self_train import SelfTrainSettings, self_train


@pytest.fixture(scope="module")
def parts(tiny_backbone: PixelBackbone, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of the two, each with something learnt."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(1)
    attending, looking = Student(tiny_backbone, threshold=0.2), NanoStudent(0.5)
    torch.nn.init.normal_(attending.decoder.residual.weight, std=0.5)
    torch.nn.init.normal_(looking.head.weight, std=0.2)
    attending.save(folder / "attending", {})
    looking.save(folder / "looking", {})
    return folder / "attending", folder / "looking"


def combine(parts: tuple[Path, Path], out: Path, *options: str) -> CombinedStudent:
    result = CliRunner().invoke(main, ["combine", *map(str, parts), "-o", str(out), *options])
    assert result.exit_code == 0, result.output
    student = open_student(out)
    assert isinstance(student, CombinedStudent)
    return student


@pytest.mark.parametrize("share", [0.7, 0.25])
@torch.inference_mode()
def test_log_odds_are_averaged(share: float, parts: tuple[Path, Path], tmp_path: Path) -> None:
    student = combine(parts, tmp_path / "both", "--share", str(share))
    images = torch.rand(2, 3, 128, 192) * 2 - 1
    half = images.unflatten(2, (64, 2)).unflatten(4, (96, 2)).mean((3, 5))
    attending = torch.nn.functional.interpolate(
        Student.load(parts[0]).logits(half)[:, None], (128, 192), mode="bilinear"
    )
    expected = (1 - share) * attending[:, 0] + share * NanoStudent.load(parts[1]).logits(images, (1, 1, 1))
    assert torch.allclose(student.logits(images), expected, atol=1e-4)
    odds = (1 - share) * math.log(0.2 / 0.8) + share * math.log(0.5 / 0.5)
    assert student.threshold == pytest.approx(1 / (1 + math.exp(-odds)))


def test_sizes_suit_both(parts: tuple[Path, Path], tmp_path: Path) -> None:
    attending, student = Student.load(parts[0]), combine(parts, tmp_path / "both")
    assert student.multiple_of % (2 * attending.multiple_of) == 0 == student.multiple_of % NanoStudent.multiple_of
    assert student.min_size == 2 * attending.min_size and student.default_size == 2 * attending.default_size
    assert student.max_size == 2 * attending.max_size


def test_its_engine_answers_like_the_folder_in_torch(parts: tuple[Path, Path], tmp_path: Path) -> None:
    combine(parts, tmp_path / "both")
    engine = tmp_path / "both.onnx"
    result = CliRunner().invoke(main, ["export", str(tmp_path / "both"), "-o", str(engine), "--default-size", "192"])
    assert result.exit_code == 0, result.output
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (100, 170, 3), np.uint8))
    exported = EdgeDetector(engine, device="cpu").run(picture)
    in_torch = EdgeDetector(tmp_path / "both", device="cpu", size=192).run(picture)
    assert np.abs(exported.probability - in_torch.probability).max() < 2e-3  # weights are stored in fp16
    assert exported.threshold == pytest.approx(in_torch.threshold)


@pytest.mark.parametrize("part", ["attending/decoder.safetensors", "looking/nano.safetensors", "attending/backbone"])
def test_a_part_is_missing(part: str, parts: tuple[Path, Path], tmp_path: Path) -> None:
    combine(parts, tmp_path / "both")
    (tmp_path / "both" / part).rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="trace-sdk combine"):
        open_student(tmp_path / "both")


def test_parts_in_the_wrong_order(parts: tuple[Path, Path], tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["combine", str(parts[1]), str(parts[0]), "-o", str(tmp_path / "both")])
    assert result.exit_code == 2 and "has no backbone of its own" in result.output and not (tmp_path / "both").exists()


def test_it_does_not_train_itself(parts: tuple[Path, Path], photos: Path, tmp_path: Path) -> None:
    student = combine(parts, tmp_path / "both")
    cutout = np.zeros((60, 60, 4), np.uint8)
    cutout[10:50, 10:50] = (255, 0, 0, 255)
    Image.fromarray(cutout).save(tmp_path / "cutout.png")
    scenes = OwnScenes([photos], [tmp_path], 0)
    with pytest.raises(ArgumentError, match="train its parts"):
        self_train(student, scenes, tmp_path / "out", SelfTrainSettings(steps=1, size=128))
