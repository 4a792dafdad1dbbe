"""The whole line as a user runs it: pretrain → label → distill → export → info → detect, each a command."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from trace_sdk.backbones.pixel import PixelBackbone
from trace_sdk.cli import main
from trace_sdk.student.nano import NanoStudent


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_from_photos_to_edges(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    backbone, labels, student = (tmp_path / part for part in ("backbone", "labels", "student"))
    small = ("--size", 64, "--tokens", 128)
    label = ("label", photos, "--backbone", backbone, "-o", labels, "--size", 64, "--stride", 300, "--plot")
    stages = (
        ("pretrain", photos, "-o", backbone, "--layers", 1, "--heads", 1, "--steps", 3, *small),
        label,
        ("distill", photos, "--labels", labels, "--backbone", backbone, "-o", student, "--steps", 2, *small),
        ("export", student, "-o", tmp_path / "mine.onnx", "--default-size", 96),
        ("info", tmp_path / "mine.onnx"),
        ("detect", photos, "-o", tmp_path / "edges", "--engine", tmp_path / "mine.onnx", "--overlay"),
    )
    for stage in stages:
        result = run(*stage)
        assert result.exit_code == 0, f"{stage[0]}: {result.output}"
    assert len(list(labels.rglob("*.npz"))) == len(list(labels.rglob("*.*.png"))) == 4
    assert len(list((tmp_path / "edges").rglob("*.png"))) >= 4
    index = json.loads((student / "student.json").read_text())
    assert index["distilled_steps"] == 2
    again = run(*label)
    assert "0 labelled" in again.output and "4 were there already" in again.output


@pytest.mark.parametrize(
    ("arguments", "code", "fragment"),
    [
        (("label", "nowhere", "--backbone", "nowhere", "-o", "out"), 1, "nowhere does not exist"),
        (("pretrain", "nowhere", "-o", "out"), 1, "nowhere does not exist"),
        (("distill", "nowhere", "--labels", "l", "--backbone", "b", "-o", "out"), 1, "nowhere does not exist"),
        (("label", "a.png", "nowhere.png", "--backbone", "b", "-o", "out"), 1, "nowhere.png does not exist"),
        (("pretrain", "a.png", "-o", "out"), 1, "a.png is a file, not a folder"),
        (("pretrain", "photos", "-o", "a.png", "--layers", "1", "--heads", "1"), 1, "a.png is a file"),
        (("export", "nowhere", "-o", "a.onnx"), 1, "nowhere does not exist"),
        (("export", "nothing.png", "-o", "a.onnx"), 1, "nothing.png does not exist"),
        (("export", ".", "-o", "a.onnx"), 1, ". holds no student"),
        (("export", "student", "-o", "student"), 1, "student is a folder"),
        (("export", "student", "-o", "a.png/e.onnx"), 1, "a.png is a file"),
        (("export", "student", "-o", "e.onnx", "--quality", "a.png"), 2, "a.png is not JSON"),
        (("label", ".", "--backbone", "student", "-o", "out"), 1, "student is a student, not a backbone"),
        (("combine", "student", "student", "-o", "out"), 2, "has no backbone of its own"),
        (("distill", ".", "--labels", "l", "--backbone", "b", "-o", "out", "--seed", "-1"), 2, "--seed"),
        (("distill-nano", ".", "--labels", "l", "-o", "out", "--learning-rate", "-1"), 2, "--learning-rate"),
        (("self-train", "student", ".", "--cutouts", ".", "-o", "out", "--seed", "-1"), 2, "--seed"),
        (("combine", "nowhere", "nowhere", "-o", "out"), 1, "nowhere does not exist"),
        (("label", ".", "--backbone", "b", "-o", "out", "--size", "8"), 2, "size must be at least 64"),
        (("label", ".", "--backbone", "b", "-o", "out", "-t", "1.5"), 2, "timesteps must lie"),
        (("pretrain", ".", "-o", "out", "--steps", "0"), 2, "steps must be"),
        (("pretrain", ".", "-o", "out", "--warmup", "0"), 2, "warmup must be"),
        (("pretrain", ".", "-o", "out", "--heads", "0"), 2, "heads and warmup must be"),
        (("pretrain", ".", "-o", "out", "--ema", "1"), 2, "ema in [0, 1)"),
    ],
)  # fmt: skip
def test_wrong_usage_is_one_line(
    arguments: tuple[str, ...], code: int, fragment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "photos" / "grey.png")
    NanoStudent().save(tmp_path / "student", {})
    result = run(*arguments)
    assert result.exit_code == code
    assert fragment in result.output
    assert "Traceback" not in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_that_is_not_there_is_an_error(photos: Path, tmp_path: Path, tiny_backbone: PixelBackbone) -> None:
    tiny_backbone.save(tmp_path / "b")
    result = run("label", photos, "--backbone", tmp_path / "b", "-o", tmp_path / "l", "--device", "cuda")
    assert result.exit_code == 1 and "--device cpu" in result.output
    assert not (tmp_path / "l").exists()


@pytest.mark.parametrize("command", ["pretrain", "label", "distill", "export"])
def test_help_teaches(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"trace-sdk {command} " in result.output, "no example"
