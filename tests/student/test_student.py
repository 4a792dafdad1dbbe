"""The student: losses, snapping, decoder; distillation learns, resumes to the same student, refuses what cannot be."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from trace_sdk.backbones.pixel import PixelBackbone
from trace_sdk.errors import ArgumentError, CheckpointError, DatasetError
from trace_sdk.evaluation.baselines import lab_gradient
from trace_sdk.labelling.images import find_images
from trace_sdk.labelling.label import LabelJob
from trace_sdk.student import distill as distill_module
from trace_sdk.student.calibrate import best_threshold
from trace_sdk.student.colour_gradient import ColourGradient
from trace_sdk.student.decoder import EdgeDecoder
from trace_sdk.student.distill import DistillSettings, distill
from trace_sdk.student.labelled_images import LabelledImages
from trace_sdk.student.losses import dice_loss, graded_loss, reconstruction_loss
from trace_sdk.student.model import Student
from trace_sdk.student.snapping import snap
from trace_sdk.teacher.teacher import Teacher, TeacherSettings

SHORT = DistillSettings(steps=6, lora_from=0.5, lora_rank=4, tokens=128, sizes=(64,))


@pytest.fixture(scope="module")
def labels(tiny_backbone: PixelBackbone, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("labels")
    teacher = Teacher(tiny_backbone, TeacherSettings(size=96, timesteps=(0.3,)))
    LabelJob(teacher, find_images(photos), out, "sha").run()
    return out


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return PixelBackbone.load(folder).state_dict()


@pytest.mark.parametrize("change", [{"steps": 0}, {"lora_from": 2}, {"batches": -1}, {"blocks": ()}, {"accumulate": 0}])
def test_distillation_settings_out_of_range(change: dict) -> None:
    with pytest.raises(ArgumentError):
        DistillSettings(**{**SHORT.__dict__, **change}).check()


@pytest.mark.parametrize("change", [{"sizes": (63,)}, {"sizes": ()}, {"tokens": 1}])
def test_crops_that_the_backbone_cannot_take(
    change: dict, tiny_backbone: PixelBackbone, photos: Path, labels: Path, tmp_path: Path
) -> None:
    settings = DistillSettings(**{**SHORT.__dict__, **change})
    with pytest.raises(ArgumentError, match=r"--size|--tokens"):
        distill(copy.deepcopy(tiny_backbone), LabelledImages(photos, labels, 0), tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()


def test_dice_counts_certain_pixels_only() -> None:
    logits = torch.tensor([[[2.0, -1.0, 0.5, 30.0]]])
    labels = torch.tensor([[[1, 0, 1, -1]]])
    p = 1 / (1 + np.exp(-np.array([2.0, -1.0, 0.5])))
    expected = 1 - (2 * (p[0] + p[2]) + 1) / (2 + (p**2).sum() + 1)
    assert dice_loss(logits, labels).item() == pytest.approx(expected, rel=1e-5)
    assert dice_loss(torch.full((1, 2, 2), 40.0), torch.ones(1, 2, 2, dtype=torch.int8)).item() == pytest.approx(
        0, abs=1e-6
    )
    assert dice_loss(logits, torch.full((1, 1, 4), -1)).item() == 0


def test_graded_term_is_cross_entropy() -> None:
    logits, graded = torch.tensor([[[0.3, -2.0]]]), torch.tensor([[[0.8, 0.1]]])
    p = 1 / (1 + np.exp(-logits.double().numpy()))
    target = graded.double().numpy()
    expected = -(target * np.log(p) + (1 - target) * np.log(1 - p)).mean()
    assert graded_loss(logits, graded).item() == pytest.approx(expected, rel=1e-5)


def test_snapping_keeps_an_edge_band_only_where_the_photo_changes() -> None:
    rgb = np.zeros((48, 64, 3), np.uint8)
    rgb[:, 30:] = 200
    labels = np.zeros((48, 64), np.int8)
    labels[:, 20:44] = 1
    scores = np.where(labels == 1, 2.0, -1.5).astype(np.float32)
    snapped, graded = snap(rgb, labels, scores)
    columns = np.flatnonzero((snapped == 1).all(0))
    assert columns.min() >= 26 and columns.max() <= 33 and {29, 30} & set(columns)
    np.testing.assert_array_equal(snapped[labels == 0], 0)
    assert ((snapped == -1) == ((labels == 1) & (snapped != 1))).all()
    assert graded[:, 29:31].min() > 5 * max(graded[:, :20].max(), graded[:, 44:].max())


def test_colour_gradient_is_the_baselines(photos: Path) -> None:
    """Odds g/5 ↔ probability g/(g + 5): in torch as by scipy and scikit-image, borders and black corners included."""
    rgb = np.array(Image.open(sorted(photos.iterdir())[0]).convert("RGB").resize((72, 56)))
    rgb[:20, :20] = 0
    images = torch.from_numpy(rgb).permute(2, 0, 1)[None].float() / 127.5 - 1
    found = ColourGradient()(images).sigmoid()[0, 0].numpy()
    assert np.abs(found - lab_gradient(rgb)).max() < 2e-3


def test_untrained_decoder_answers_with_the_colour_gradient() -> None:
    torch.manual_seed(0)
    features, images = torch.randn(2, 6, 8, 12), torch.rand(2, 3, 64, 96) * 2 - 1
    decoder = EdgeDecoder(6).eval()
    assert torch.equal(decoder([features], images), decoder.gradient(images)[:, 0])
    torch.nn.init.normal_(decoder.residual.weight)
    assert not torch.allclose(decoder([features], images), decoder([features.flip(-1)], images))
    assert not any("gradient" in name for name in decoder.state_dict())  # it is fixed, so it is not stored


def test_reconstruction_is_the_mean_square() -> None:
    assert reconstruction_loss(torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), 0.5)).item() == 0.25


def test_best_threshold_separates() -> None:
    probability = torch.tensor([0.1, 0.2, 0.62, 0.7])
    threshold, f_measure = best_threshold(probability, torch.tensor([False, False, True, True]))
    assert 0.2 < threshold <= 0.62 and f_measure == 1
    assert best_threshold(probability, torch.tensor([True, False, True, True]))[1] == pytest.approx(6 / 7)


@pytest.mark.parametrize("batches", [0, 2])
def test_cut_distillation_ends_with_the_same_student(
    tiny_backbone: PixelBackbone, photos: Path, labels: Path, tmp_path: Path, batches: int, killed_at: Any
) -> None:
    tiny_backbone.save(tmp_path / "backbone")
    images = LabelledImages(photos, labels, 0)
    settings = DistillSettings(**{**SHORT.__dict__, "batches": batches})

    def run(out: str, **more) -> Student:
        return distill(PixelBackbone.load(tmp_path / "backbone"), images, tmp_path / out, settings, **more)

    run("whole")
    with killed_at(5) as report:
        run("cut", save_seconds=0, report=report)
    run("cut")
    whole, cut = (Student.load(tmp_path / part) for part in ("whole", "cut"))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, cut.state_dict()[name]), name
    before, after = weights(tmp_path / "backbone"), weights(tmp_path / "whole/backbone")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(any(part in name for part in ("to_q", "to_k", "to_v")) for name in changed)
    with pytest.raises(ArgumentError, match="lora_rank=4"):
        distill(PixelBackbone.load(tmp_path / "backbone"), images, tmp_path / "cut", DistillSettings(lora_rank=8))
    with pytest.raises(ArgumentError, match=r"of a run with backbone=[0-9a-f]{64}, now"):
        distill(PixelBackbone.load(tmp_path / "whole/backbone"), images, tmp_path / "cut", settings)


def test_kept_features_change_nothing(
    tiny_backbone: PixelBackbone, photos: Path, labels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two batches taken in turn: read once while the backbone stands still, every time once LoRA learns."""
    tiny_backbone.save(tmp_path / "backbone")
    images, read = LabelledImages(photos, labels, 0), Student.features
    settings = DistillSettings(**{**SHORT.__dict__, "steps": 8, "batches": 2})
    passes: list[int] = []

    def counted(self: Student, *args, **more):
        passes.append(1)
        return read(self, *args, **more)

    class Forgetful(dict):
        def __setitem__(self, *_: object) -> None:
            pass

    def run(out: str) -> Student:
        passes.clear()
        distill(PixelBackbone.load(tmp_path / "backbone"), images, tmp_path / out, settings)
        return Student.load(tmp_path / out)

    monkeypatch.setattr(Student, "features", counted)
    kept = run("kept")
    assert len(passes) == 2 + 4
    restart = distill_module._Trainer.__init__

    def forget(self, *args) -> None:
        restart(self, *args)
        self.read = Forgetful()

    monkeypatch.setattr(distill_module._Trainer, "__init__", forget)
    fresh = run("fresh")
    assert len(passes) == 8
    assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in kept.state_dict().items())


def test_student_learns_its_labels(tiny_backbone: PixelBackbone, photos: Path, labels: Path, tmp_path: Path) -> None:
    """On two batches: what the colour gradient, where it starts, has wrong falls by three tenths."""
    tiny_backbone.save(tmp_path / "backbone")
    losses: list[float] = []
    settings = DistillSettings(steps=120, lora_rank=0, tokens=256, sizes=(64,), batches=2, learning_rate=5e-3)
    student = distill(
        PixelBackbone.load(tmp_path / "backbone"),
        LabelledImages(photos, labels, 0),
        tmp_path,
        settings,
        report=lambda _, terms: losses.append(terms["dice"]),
    )
    assert np.mean(losses[-2:]) < 0.7 * np.mean(losses[:2])
    assert 0 < student.threshold < 1


def test_label_crop_lies_over_the_image_crop(tmp_path: Path, tiny_backbone: PixelBackbone) -> None:
    """Left half black and interior, right half white and edge: every crop must agree pixel by pixel."""
    from trace_sdk.teacher.labels import save_label
    from trace_sdk.teacher.teacher import Annotation

    pixels = np.zeros((64, 96, 3), np.uint8)
    pixels[:, 48:] = 255
    Image.fromarray(pixels).save(tmp_path / "half.png")
    ternary = np.zeros((8, 12), np.int8)
    ternary[:, 6:] = 1
    ternary[0] = -1
    save_label(tmp_path / "half.png.npz", Annotation(ternary.astype(np.float32), ternary, "mu-sigma", (0.1,), None))
    images, labels, graded = LabelledImages(tmp_path, tmp_path, 0).batch(0, 8, 64)
    certain = labels != -1
    bright = images[:, 0] > 0
    assert ((labels == 1) == bright)[certain].float().mean() > 0.97
    assert (labels == -1).any(-1).any(-1).sum() >= 1
    assert graded.shape == labels.shape and graded.min() >= 0 and graded.max() <= 1


def test_no_labels_at_all(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="trace-sdk label"):
        LabelledImages(photos, tmp_path, 0)


def test_labels_under_other_names(photos: Path, labels: Path) -> None:
    """As where `label` was given the folder above."""
    with pytest.raises(DatasetError, match=r"There is one of \S+, but none of \S+/a\.png: give the photos as"):
        LabelledImages(photos.parent / f"{photos.name[:-1]}?", labels, 0)


@pytest.mark.parametrize("damage", ["student.json", "decoder.safetensors"])
def test_damaged_student_folder(tiny_backbone: PixelBackbone, tmp_path: Path, damage: str) -> None:
    Student(tiny_backbone).save(tmp_path, {})
    (tmp_path / damage).write_bytes(b"{")
    with pytest.raises(CheckpointError, match="not a whole student"):
        Student.load(tmp_path)
