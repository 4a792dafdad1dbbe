"""One process over a folder: each image gets its state, cut runs end with the same bytes, failures have reasons."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from trace_sdk.backbones.pixel import PixelBackbone
from trace_sdk.errors import ArgumentError, DatasetError, OutOfMemoryError
from trace_sdk.labelling.claims import Claims
from trace_sdk.labelling.images import find_images
from trace_sdk.labelling.label import LabelJob
from trace_sdk.labelling.states import label_file
from trace_sdk.student.labelled_images import LabelledImages
from trace_sdk.teacher.labels import CLAIMS, load_label
from trace_sdk.teacher.teacher import Annotation, Teacher, TeacherSettings

SMALL = TeacherSettings(size=96, stride=300)


def test_every_image_has_its_state_and_labels_are_those_of_one_image(
    tiny_backbone: PixelBackbone, many: Path, whole: Path, states: Any
) -> None:
    expected = {image.name: "failed" if image.name == "p03b.png" else "done" for image in find_images(many)}
    assert states(whole) == expected and len(expected) == 22
    assert json.loads((whole / "labels.json").read_text())["backbone_sha256"] == "sha"
    for name in ("p00.png", "t.tar/1.png"):
        image = next(image for image in find_images(many) if image.name == name)
        alone = Teacher(tiny_backbone, SMALL).annotate(np.asarray(Image.open(io.BytesIO(image.read()))))
        label = load_label(label_file(whole, name))
        np.testing.assert_allclose(label.abdiv, alone.abdiv, rtol=1e-3, atol=1e-4)
        assert (label.labels != alone.labels).mean() < 0.02
        assert label.about["emergence"]["t_star"] == alone.emergence.t_star


@pytest.mark.parametrize(
    "settings",
    [
        TeacherSettings(size=96, tile=64, stride=300),
        TeacherSettings(size=96, timesteps=(0.1, 0.4), mirror=True),
        TeacherSettings(size=96, tile=64, form="per-head", mirror=True, stride=300),
    ],
)
def test_a_batch_answers_as_each_of_its_images(tiny_backbone: PixelBackbone, settings: TeacherSettings) -> None:
    """Windows, mirrors and each image's own t* are put back to the image they belong to."""
    teacher = Teacher(tiny_backbone, settings)
    rng = np.random.default_rng(1)
    prepared = [teacher.prepare(rng.integers(0, 255, (64, 96, 3), np.uint8)) for _ in range(3)]
    together = teacher.annotate_batch(prepared)
    for image, found in zip(prepared, together, strict=True):
        (alone,) = teacher.annotate_batch([image])
        np.testing.assert_allclose(found.abdiv, alone.abdiv, rtol=1e-3, atol=1e-5)
        assert found.timesteps == alone.timesteps and (found.emergence is None) == (alone.emergence is None)
    assert np.abs(together[0].abdiv - together[1].abdiv).max() > 0.01, "it would not see images mixed up"


@pytest.mark.parametrize("images_done", [1, 2, 9])
def test_a_cut_run_ends_with_the_same_bytes(
    tiny_backbone: PixelBackbone, many: Path, whole: Path, tmp_path: Path, images_done: int, contents: Any, job: Any
) -> None:
    seen = []

    def cut(name: str, reason: str | None) -> None:
        seen.append(name)
        if len(seen) == images_done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job(tiny_backbone, many, tmp_path).run(cut)
    assert not list((tmp_path / CLAIMS).iterdir()), "a claim was left behind"
    rest = job(tiny_backbone, many, tmp_path)
    assert 0 < rest.before < 22
    summary = rest.run()
    assert summary.done + summary.before + 1 >= 22 and contents(tmp_path) == contents(whole)
    assert job(tiny_backbone, many, tmp_path).run().done == 0


def test_half_a_batch_is_done_again_with_its_whole_batch(
    tiny_backbone: PixelBackbone, many: Path, whole: Path, tmp_path: Path, contents: Any, job: Any
) -> None:
    """One image of a batch of two has its label: the other must not go through the model alone."""
    job(tiny_backbone, many, tmp_path).run()
    label_file(tmp_path, "p01.png").unlink()
    sizes: list[int] = []
    again = job(tiny_backbone, many, tmp_path)
    annotate = again._teacher.annotate_batch
    again._teacher.annotate_batch = lambda prepared: (sizes.append(len(prepared)), annotate(prepared))[1]
    assert again.run().done == 1 and sizes == [2]
    assert contents(tmp_path) == contents(whole)


def test_failures_stay_until_they_are_retried(
    tiny_backbone: PixelBackbone, tmp_path: Path, picture: Any, write: Any, states: Any, job: Any
) -> None:
    write(tmp_path / "in", {"a.png": b"cut short", "b.png": picture()})
    first = job(tiny_backbone, tmp_path / "in", tmp_path / "out").run()
    assert first.done == 1 and list(first.failed) == ["a.png"]
    write(tmp_path / "in", {"a.png": picture()})
    second = job(tiny_backbone, tmp_path / "in", tmp_path / "out").run()
    assert (second.done, second.before) == (0, 2) and list(second.failed) == ["a.png"]
    third = job(tiny_backbone, tmp_path / "in", tmp_path / "out", retry_failed=True).run()
    assert (third.done, third.failed) == (1, {}) and states(tmp_path / "out") == {"a.png": "done", "b.png": "done"}


def test_settings_can_be_changed_until_there_is_a_label(
    tiny_backbone: PixelBackbone, photos: Path, tmp_path: Path, job: Any
) -> None:
    """A size that did not fit left labels.json behind, and the smaller size that was advised was then refused."""
    first = LabelJob(Teacher(tiny_backbone, TeacherSettings(size=999)), find_images(photos), tmp_path, "sha")
    job(tiny_backbone, photos, tmp_path)
    assert json.loads((tmp_path / "labels.json").read_text())["settings"]["size"] == SMALL.size
    with Claims(tmp_path / CLAIMS) as claims:
        assert claims.take("somebody is at work")
        with pytest.raises(ArgumentError, match="another backbone or other settings"):
            LabelJob(Teacher(tiny_backbone, TeacherSettings(size=999)), find_images(photos), tmp_path, "sha")
        with pytest.raises(ArgumentError, match="another backbone or other settings"):
            first.run()
    assert not list(tmp_path.rglob("*.npz"))
    (tmp_path / "labels.json").write_text("half")
    with pytest.raises(DatasetError, match=r"labels\.json is not whole"):
        job(tiny_backbone, photos, tmp_path)


def test_labels_of_two_makings_are_not_mixed(
    tiny_backbone: PixelBackbone, photos: Path, tmp_path: Path, job: Any
) -> None:
    job(tiny_backbone, photos, tmp_path).run()
    with pytest.raises(ArgumentError, match="another backbone or other settings"):
        LabelJob(Teacher(tiny_backbone, SMALL), find_images(photos), tmp_path, "other sha")
    with pytest.raises(ArgumentError, match="batch must be"):
        LabelJob(Teacher(tiny_backbone, SMALL), find_images(photos), tmp_path, "sha", batch=0)


@pytest.mark.parametrize(("room", "fits"), [(2, True), (1, True), (0, False)])
def test_without_gpu_memory_the_batch_is_halved_once(
    tiny_backbone: PixelBackbone, photos: Path, tmp_path: Path, room: int, fits: bool
) -> None:
    """As torch says it, from within the model: once the teacher's own error for it went past the halving."""
    teacher = Teacher(tiny_backbone, SMALL)
    annotate, sizes = teacher._annotate, []

    def on_a_small_gpu(images: torch.Tensor) -> list[Annotation]:
        sizes.append(len(images))
        if len(images) > room:
            raise torch.OutOfMemoryError("CUDA full")
        return annotate(images)

    teacher._annotate = on_a_small_gpu
    work = LabelJob(teacher, find_images(photos), tmp_path, "sha", batch=2)
    if fits:
        assert work.run().done == 4 and sizes == ([2, 2] if room == 2 else [2, 1, 1] * 2)
    else:
        with pytest.raises(OutOfMemoryError, match=r"CUDA full .* Lower --batch"):
            work.run()
        assert sizes == [2, 1]


def test_student_crops_lie_as_the_teacher_saw_them(tiny_backbone: PixelBackbone, tmp_path: Path, job: Any) -> None:
    """A photo that EXIF turns by 90° was read as stored, so that labels lay across it."""
    turned = np.zeros((64, 96, 3), np.uint8)
    turned[:, 48:] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(turned).save(tmp_path / "phone.png", exif=exif)
    job(tiny_backbone, tmp_path, tmp_path / "labels").run()
    images, _, _ = LabelledImages(tmp_path, tmp_path / "labels", 0).batch(0, 8, 64)
    rows, columns = images.mean((1, 3)), images.mean((1, 2))
    assert rows.std(1).max() > 0.5 and columns.std(1).max() < 0.05
