"""The small convolutional student: what it starts from, how it learns, its engine, and when it is the default."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from trace_sdk import EdgeDetector, engines
from trace_sdk.errors import ArgumentError, CheckpointError, DeviceError, OutputError
from trace_sdk.export.onnx import export_onnx
from trace_sdk.student.colour_gradient import ColourGradient
from trace_sdk.student.distill_nano import NanoSettings, change_light, distill_nano
from trace_sdk.student.folder import open_student
from trace_sdk.student.labelled_images import LabelledImages
from trace_sdk.student.nano import NanoStudent
from trace_sdk.teacher.labels import save_label
from trace_sdk.teacher.teacher import Annotation

SHORT = NanoSettings(steps=6, crops=2, size=64, held_out=0.6)


@pytest.fixture(scope="module")
def images(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> LabelledImages:
    """Labels that have edges in the middle of each photo."""
    labels = tmp_path_factory.mktemp("labels")
    abdiv = np.zeros((12, 15), np.float32)
    abdiv[:, 6:9] = 1
    for photo in sorted(photos.rglob("*.*")):
        ternary = np.where(abdiv > 0, 1, 0).astype(np.int8)
        annotation = Annotation(labels=ternary, abdiv=abdiv, rule="mu-sigma", timesteps=(0.2,), emergence=None)
        save_label(labels / f"{photo.relative_to(photos)}.npz", annotation)
    return LabelledImages(photos, labels, 0)


@pytest.fixture(scope="module")
def student() -> NanoStudent:
    """With weights that answer, and running statistics as after training."""
    torch.manual_seed(0)
    student = NanoStudent(0.4)
    torch.nn.init.normal_(student.head.weight, std=0.2)
    for _ in range(3):
        student(torch.rand(2, 3, 64, 96) * 2 - 1)
    return student.eval()


def test_small_enough() -> None:
    assert sum(value.numel() for value in NanoStudent().parameters()) <= 1_000_000


@torch.inference_mode()
def test_untrained_it_is_the_colour_gradient_at_half_size() -> None:
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    half = F.interpolate(ColourGradient(step=2)(images), scale_factor=2.0, mode="bilinear")[:, 0]
    logits, coarse = NanoStudent().eval()(images)
    assert torch.equal(logits, half)
    assert [tuple(side.shape[1:]) for side in coarse] == [(2, 3), (4, 6), (8, 12), (16, 24)]


@torch.inference_mode()
@pytest.mark.parametrize("size", [(32, 32), (64, 96), (96, 160)])
def test_it_answers_with_the_weighted_mean_over_an_image_pyramid(student: NanoStudent, size: tuple[int, int]) -> None:
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(2)) * 2 - 1
    answers = []
    for step in (1, 2, 4):
        smaller = images.unflatten(2, (-1, step)).unflatten(4, (-1, step)).mean((3, 5))
        answers.append(F.interpolate(student(smaller)[0][:, None], size, mode="bilinear")[:, 0])
    weighted = (4 * answers[0] + 2 * answers[1] + answers[2]) / 7
    assert torch.allclose(student.logits(images), weighted, atol=1e-5)


def test_gradient_at_half_size_has_the_same_unit() -> None:
    """A slope of a known number of Lab units per pixel is measured alike at both sizes."""
    ramp = torch.linspace(-0.5, 0.5, 96).expand(1, 3, 64, 96).contiguous()
    full, half = (ColourGradient(step)(ramp)[0, 0].exp() for step in (1, 2))
    assert half.shape == (32, 48)
    assert torch.allclose(half[16, 12:36], full[32, 24:72:2], rtol=0.05)


@torch.inference_mode()
def test_answers_are_local(student: NanoStudent) -> None:
    """No layer takes statistics over the picture: what lies far away changes nothing."""
    picture = torch.rand(1, 3, 64, 1024, generator=torch.Generator().manual_seed(1)) * 2 - 1
    other = picture.clone()
    other[..., -64:] = 0
    before, after = student.logits(picture)[..., :64], student.logits(other)[..., :64]
    assert torch.allclose(before, after, atol=1e-5)


def test_cut_distillation_ends_with_the_same_student(images: LabelledImages, tmp_path: Path, killed_at: Any) -> None:
    distill_nano(images, tmp_path / "whole", SHORT)
    with killed_at(4) as report:
        distill_nano(images, tmp_path / "cut", SHORT, save_seconds=0, report=report)
    distill_nano(images, tmp_path / "cut", SHORT)
    whole, cut = (open_student(tmp_path / part) for part in ("whole", "cut"))
    assert isinstance(whole, NanoStudent) and whole.threshold == cut.threshold
    for name, value in whole.state_dict().items():
        assert torch.equal(value, cut.state_dict()[name]), name
    with pytest.raises(ArgumentError, match="crops=2"):
        distill_nano(images, tmp_path / "cut", NanoSettings(crops=4, held_out=0.6))


def test_it_learns_its_labels(images: LabelledImages, tmp_path: Path) -> None:
    losses: list[float] = []
    settings = NanoSettings(steps=50, crops=4, size=64, held_out=0.6)
    distill_nano(images, tmp_path, settings, report=lambda _, terms: losses.append(terms["coarse"]))
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:10])


def test_changed_light_keeps_the_range_and_depends_on_the_generator_alone() -> None:
    pictures = torch.rand(3, 3, 32, 32) * 2 - 1
    first, again, other = (change_light(pictures, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.allclose(first, other)
    assert first.min() >= -1 and first.max() <= 1


@pytest.mark.parametrize(
    "settings",
    [NanoSettings(steps=0), NanoSettings(crops=1), NanoSettings(size=100), NanoSettings(held_out=1.0)],
)
def test_settings_out_of_range(images: LabelledImages, tmp_path: Path, settings: NanoSettings) -> None:
    with pytest.raises(ArgumentError, match="multiple of 32"):
        distill_nano(images, tmp_path, settings)


def test_a_save_that_is_cut_leaves_no_student_of_two(
    student: NanoStudent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New weights lay beside the threshold of the old ones."""
    student.save(tmp_path, {})

    def full(file: Path, _: str) -> None:
        raise OutputError(f"Cannot write {file}.")

    monkeypatch.setattr("trace_sdk.student.record.write_text", full)
    with pytest.raises(OutputError):
        student.save(tmp_path, {})
    with pytest.raises(CheckpointError, match="holds no student"):
        open_student(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "gone", "no threshold"])
def test_damaged_folder(student: NanoStudent, tmp_path: Path, damage: str) -> None:
    student.save(tmp_path, {})
    weights = tmp_path / "nano.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "gone":
        weights.unlink()
    else:
        (tmp_path / "student.json").write_text('{"architecture": "nano"}')
    with pytest.raises(CheckpointError, match="not a whole nano student"):
        open_student(tmp_path)


@pytest.fixture(scope="module")
def engine(student: NanoStudent, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("engine") / "nano.onnx"
    report = export_onnx(student, out, name="nano", default_size=128)
    assert report.file_bytes < 4e6
    return out


@pytest.mark.parametrize("shape", [(1, 1), (32, 32), (64, 64), (70, 45), (33, 200)])
def test_engine_answers_like_torch_at_any_size(engine: Path, student: NanoStudent, shape: tuple[int, int]) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    edges = EdgeDetector(engine, device="cpu", size=max(*shape, 32)).run(picture)
    assert edges.probability.shape == shape and edges.info["padded_size"][0] % 32 == 0
    if shape == (64, 64):
        pixels = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 127.5 - 1
        with torch.inference_mode():
            expected = student.logits(pixels).sigmoid()[0].numpy()
        assert np.abs(edges.probability - expected).max() < 2e-3  # weights are stored in fp16


def test_student_folder_runs_in_torch(student: NanoStudent, engine: Path, tmp_path: Path) -> None:
    student.save(tmp_path / "student", {})
    picture = np.random.default_rng(1).integers(0, 256, (64, 96, 3), np.uint8)
    assert EdgeDetector(tmp_path / "student").info["size"] == 512
    in_torch, exported = (EdgeDetector(where, size=96).run(picture) for where in (tmp_path / "student", engine))
    assert np.abs(in_torch.probability - exported.probability).max() < 2e-3


@pytest.mark.parametrize(
    ("device", "cuda", "name"),
    [("auto", False, "trace-nano"), ("cpu", True, "trace-nano"), ("auto", True, "trace-small")],
)
def test_default_engine_by_device(monkeypatch: pytest.MonkeyPatch, device: str, cuda: bool, name: str) -> None:
    providers = ["CUDAExecutionProvider"] * cuda + ["CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
    assert engines.default_engine(device)[0] == name


def test_default_on_this_machine() -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    info = EdgeDetector().info
    assert info["engine"] == "trace-nano" and "CPUs" in info["engine_reason"]
    assert EdgeDetector("trace-small").info["engine_reason"] == "asked for"
    with pytest.raises(DeviceError):
        EdgeDetector(device="cuda")


def test_bundled_nano_finds_the_outline_of_a_disc() -> None:
    y, x = np.mgrid[:160, :200]
    picture = np.full((160, 200, 3), 60, np.uint8)
    picture[(y - 80) ** 2 + (x - 100) ** 2 < 50**2] = (200, 120, 40)
    edges = EdgeDetector("trace-nano").run(Image.fromarray(picture))
    distance = np.abs(np.hypot(y - 80, x - 100) - 50)
    thin = edges.thin() >= edges.threshold
    assert thin.sum() > 250 and distance[thin].max() <= 3
