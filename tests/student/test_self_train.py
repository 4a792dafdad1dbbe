"""A student that learns from scenes of its own cut-outs."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor

from trace_sdk.backbones.pixel import PixelBackbone
from trace_sdk.cli import main
from trace_sdk.errors import ArgumentError
from trace_sdk.pretraining.cutouts import OF_PHOTO, load_cutouts
from trace_sdk.student.calibrate import threshold_on_scenes
from trace_sdk.student.folder import open_student
from trace_sdk.student.model import Student
from trace_sdk.student.nano import NanoStudent
from trace_sdk.student.own_scenes import OwnScenes
from trace_sdk.student.self_train import SelfTrainSettings, self_train
from trace_sdk.training.averaged import AveragedTraining
from trace_sdk.training.state import STATE, check_same_run

SHORT = SelfTrainSettings(steps=4, crops=2, size=64)


def test_inside_of_what_was_pasted_its_own_edges_are_believed_less(
    plain: Path, cutouts: Path, tmp_path: Path, targets: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trace_sdk.student.self_train.change_light", lambda images, _: images)
    scenes = OwnScenes([plain], [cutouts], seed=0)
    torch.manual_seed(0)
    student = NanoStudent(0.4).eval()
    _, images, ridges, inside = scenes.batch(0, SHORT.crops, SHORT.size)
    with torch.no_grad():
        before = student(images)[0].sigmoid()
    self_train(student, scenes, tmp_path, replace(SHORT, steps=1))
    believed, flat = targets[0] / before, ridges == 0
    assert (targets[0][ridges == 1] == 1).all()
    for where, share in ((inside, 0.1), (~inside, 0.4)):
        assert believed[flat & where].numpy() == pytest.approx(share, rel=1e-3)


def test_of_thresholds_as_good_it_is_the_lowest() -> None:
    """A line of .6 is pasted, another of .2 is none: anything from .21 to .6 tells them apart, also a pixel beside."""
    probability, ridges, known = (torch.zeros(1, 200, 200) for _ in range(3))
    probability[0, 10:190, 61], probability[0, 10:190, 140] = 0.6, 0.2
    ridges[0, 10:190, 60] = 1
    assert threshold_on_scenes(probability, ridges == 1, known == 0) == 0.21
    known[0, :, :100] = 1  # nothing is known about the weak one
    assert threshold_on_scenes(probability, ridges == 1, known == 1) == 0.01


def test_a_cut_run_ends_with_the_same_student(plain: Path, cutouts: Path, tmp_path: Path, killed_at: Any) -> None:
    scenes = OwnScenes([plain], [cutouts], seed=0)
    torch.manual_seed(0)
    NanoStudent(0.4).save(tmp_path / "start", {})
    whole = self_train(open_student(tmp_path / "start"), scenes, tmp_path / "whole", SHORT)
    with killed_at(2) as report:
        self_train(open_student(tmp_path / "start"), scenes, tmp_path / "cut", SHORT, save_seconds=0, report=report)
    self_train(open_student(tmp_path / "start"), scenes, tmp_path / "cut", SHORT)
    first, second = ((tmp_path / name / "nano.safetensors").read_bytes() for name in ("whole", "cut"))
    assert first == second != (tmp_path / "start/nano.safetensors").read_bytes()
    assert 0 < whole.threshold < 1 and open_student(tmp_path / "whole").threshold == whole.threshold


def test_outlines_are_learnt(plain: Path, cutouts: Path, tmp_path: Path) -> None:
    scenes = OwnScenes([plain], [cutouts], seed=0)
    torch.manual_seed(0)
    settings = SelfTrainSettings(steps=60, crops=4, size=64, learning_rate=1e-2)
    losses: list[float] = []
    after = self_train(
        NanoStudent(0.4), scenes, tmp_path, settings, report=lambda _, terms: losses.append(terms["loss"])
    )
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:10])
    _, images, ridges, _ = scenes.batch(1 << 20, 16, 64)
    with torch.inference_mode():
        drawn = after.logits(images).sigmoid() >= after.threshold
    outline = ridges > 0.5
    assert float((drawn & outline).sum()) > 0.5 * float(outline.sum())  # the threshold suits the outlines


def test_it_stays_as_sure_of_photos_as_it_was(plain: Path, cutouts: Path, tmp_path: Path) -> None:
    scenes = OwnScenes([plain], [cutouts], seed=0)
    torch.manual_seed(0)
    before = NanoStudent(0.4).eval()
    before.raise_logits(1.0)
    settings = SelfTrainSettings(steps=40, crops=4, size=64, learning_rate=1e-2)
    after = self_train(copy.deepcopy(before), scenes, tmp_path, settings)
    _, images, ridges, inside = scenes.batch(1 << 20, 24, 64)
    photo = ~inside & (ridges == 0)
    with torch.inference_mode():
        was, now = (student.logits(images).sigmoid()[photo].mean() for student in (before, after))
    assert float(now) == pytest.approx(float(was), rel=0.15)


def test_of_a_student_with_a_backbone_the_decoder_learns_alone(
    tiny_backbone: PixelBackbone, plain: Path, cutouts: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    Student(tiny_backbone).save(tmp_path / "start", {})
    self_train(open_student(tmp_path / "start"), OwnScenes([plain], [cutouts], 0), tmp_path / "better", SHORT)
    start, better = open_student(tmp_path / "start").state_dict(), open_student(tmp_path / "better").state_dict()
    changed = {name for name, value in start.items() if not torch.equal(value, better[name])}
    assert changed and all(name.startswith("decoder.") for name in changed)


def test_with_lora_attention_learns_too_and_a_cut_run_ends_the_same(
    tiny_backbone: PixelBackbone, plain: Path, cutouts: Path, tmp_path: Path, killed_at: Any
) -> None:
    torch.manual_seed(0)
    Student(tiny_backbone, blocks=[0]).save(tmp_path / "start", {})
    scenes, settings = OwnScenes([plain], [cutouts], 0), replace(SHORT, lora_rank=4, learning_rate=1e-1)
    terms: list[dict[str, float]] = []
    self_train(
        open_student(tmp_path / "start"),
        scenes,
        tmp_path / "whole",
        settings,
        report=lambda _, losses: terms.append(losses),
    )
    with killed_at(2) as report:
        self_train(open_student(tmp_path / "start"), scenes, tmp_path / "cut", settings, save_seconds=0, report=report)
    self_train(open_student(tmp_path / "start"), scenes, tmp_path / "cut", settings)
    start, whole, cut = (open_student(tmp_path / name).state_dict() for name in ("start", "whole", "cut"))
    assert all(torch.equal(value, cut[name]) for name, value in whole.items())
    changed = {name for name, value in start.items() if not torch.equal(value, whole[name])}
    attention = {name for name in changed if not name.startswith("decoder.")}
    assert attention and all(name.endswith(("to_q.weight", "to_k.weight", "to_v.weight")) for name in attention)
    assert changed > attention
    assert len(terms) == 4 and all(term["reconstruction"] > 0 for term in terms)


def test_lora_needs_a_backbone(plain: Path, cutouts: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="LoRA rank of 4 does not suit"):
        self_train(NanoStudent(), OwnScenes([plain], [cutouts], 0), tmp_path, replace(SHORT, lora_rank=4))


def test_what_was_trained_before_learns_at_a_tenth_of_the_rate() -> None:
    model = torch.nn.Linear(3, 1)
    before = copy.deepcopy(model)
    training = AveragedTraining(model, 1e-3, steps=10, careful=[model.bias])
    training.step(model(torch.ones(1, 3)).sum(), 200)
    moved = (before.weight - model.weight).abs().mean(), (before.bias - model.bias).abs().mean()
    assert float((moved[0] / moved[1]).detach()) == pytest.approx(
        10, rel=0.2
    )  # weight decay adds a little to the first


@pytest.mark.parametrize("change", [{"steps": 0}, {"crops": 1}, {"size": 100}, {"size": 0}])
def test_settings_out_of_range(change: dict, plain: Path, cutouts: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="multiple of 32"):
        self_train(
            NanoStudent(), OwnScenes([plain], [cutouts], 0), tmp_path, SelfTrainSettings(**{**vars(SHORT), **change})
        )
    assert not list(tmp_path.iterdir())


def test_a_run_of_another_student_is_not_gone_on_with(
    tiny_backbone: PixelBackbone, plain: Path, cutouts: Path, tmp_path: Path
) -> None:
    scenes = OwnScenes([plain], [cutouts], 0)
    self_train(NanoStudent(), scenes, tmp_path, SHORT)
    for other in (NanoStudent(), Student(tiny_backbone)):  # the first has the same shapes
        with pytest.raises(ArgumentError, match=r"is of a run with student=[0-9a-f]{64}, now"):
            self_train(other, scenes, tmp_path, SHORT)
    with pytest.raises(ArgumentError, match="another kind of training"):
        check_same_run(tmp_path / STATE, {"layers": 1}, {"crops": 2}, ("crops",))


@pytest.mark.parametrize(
    "command",
    [
        ("cutouts",),
        ("label", "--backbone", "none", "--plot"),
        ("pretrain",),
        ("self-train", "student", "--cutouts", "none"),
    ],
    ids=lambda command: command[0],
)
def test_pictures_do_not_go_among_the_photos(command: tuple[str, ...], plain: Path, tmp_path: Path) -> None:
    """Cut-outs, plots and curves were taken for photos by the next run, and by that which went on with one."""
    NanoStudent().save(tmp_path / "student", {})
    arguments = [str(tmp_path / "student") if name == "student" else name for name in command]
    for out in (plain, plain / "out"):
        result = CliRunner().invoke(main, [*arguments, str(plain), "-o", str(out)])
        assert result.exit_code == 2 and "Give a folder beside it" in result.output, result.output
        assert not (plain / "out").exists()


@pytest.mark.parametrize(
    "command",
    [("self-train", "photos", "--cutouts", "none"), ("combine", "student"), ("pretrain", "photos", "--start")],
)
def test_what_is_read_is_not_written_over(command: tuple[str, ...], plain: Path, tmp_path: Path) -> None:
    """`combine A B -o A` left nothing of student A."""
    NanoStudent().save(tmp_path / "student", {})
    place = {"photos": str(plain), "student": str(tmp_path / "student")}
    read = [place.get(name, name) for name in command]
    read.insert(1 if command[0] == "self-train" else len(read), place["student"])
    result = CliRunner().invoke(main, [*read, "-o", place["student"]])
    assert result.exit_code == 2 and "would be written over" in result.output, result.output


def test_from_photos_to_a_better_student(tiny_engine: Path, plain: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    square = np.full((120, 160, 3), 40, np.uint8)
    square[30:90, 50:110] = (220, 180, 90)
    Image.fromarray(square).save(folder / "square.png")
    Image.fromarray(square[:, ::-1]).save(folder / "mirrored.png")

    def run(*arguments: object) -> str:
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output
        return result.output

    cut = tmp_path / "cut"
    command = ("cutouts", folder, "-o", cut, "--engine", tiny_engine)
    assert "2 photos" in run(*command)
    names = sorted(file.name for file in cut.glob("*.png"))
    assert {"square-1.png", "mirrored-1.png"} <= set(names)
    carried = {file.name: image.info[OF_PHOTO] for file, image in load_cutouts(cut).items()}
    assert carried["square-1.png"] == hashlib.sha256((folder / "square.png").read_bytes()).hexdigest()
    assert carried["mirrored-1.png"] == hashlib.sha256((folder / "mirrored.png").read_bytes()).hexdigest()
    written = (cut / "square-1.png").stat().st_mtime_ns
    run(*command)
    assert (cut / "square-1.png").stat().st_mtime_ns == written
    assert "0 cut-outs" in run(*command, "--min-score", 1)
    assert not list(cut.glob("*.png")), "left over from other options"
    run(*command)
    assert sorted(file.name for file in cut.glob("*.png")) == names
    NanoStudent(0.4).save(tmp_path / "start", {})
    told = run(
        "self-train",
        tmp_path / "start",
        plain,
        "--cutouts",
        cut,
        "--steps",
        2,
        "--crops",
        2,
        "--size",
        64,
        "-o",
        tmp_path / "[b] or not",
    )
    assert f"Student written to {tmp_path / '[b] or not'}\n" in told
    assert isinstance(open_student(tmp_path / "[b] or not"), NanoStudent)
