"""Distillation at scale: several processes, parts of a batch, recomputed activations, held-out scores, best student."""

import csv
import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from trace_sdk.backbones.pixel import PixelBackbone
from trace_sdk.errors import ArgumentError
from trace_sdk.labelling.images import find_images
from trace_sdk.labelling.label import LabelJob
from trace_sdk.student.distill import DistillSettings, distill
from trace_sdk.student.labelled_images import LabelledImages
from trace_sdk.student.model import Student
from trace_sdk.teacher.teacher import Teacher, TeacherSettings
from trace_sdk.training.state import load_state, save_state

SHORT = DistillSettings(steps=6, lora_from=0.5, lora_rank=4, tokens=256, sizes=(64,), precision="fp32")


@pytest.fixture(scope="module")
def backbone(tiny_backbone: PixelBackbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("backbone")
    tiny_backbone.save(folder)
    return folder


@pytest.fixture(scope="module")
def labels(tiny_backbone: PixelBackbone, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("labels")
    LabelJob(Teacher(tiny_backbone, TeacherSettings(size=96, timesteps=(0.3,))), find_images(photos), out, "sha").run()
    return out


@pytest.fixture(scope="module")
def images(photos: Path, labels: Path) -> LabelledImages:
    return LabelledImages(photos, labels, 0)


def curves(out: Path) -> dict[str, np.ndarray]:
    rows = list(csv.DictReader((out / "curves.csv").open()))
    return {name: np.array([float(row[name] or "nan") for row in rows]) for name in rows[0]}


def same(one: Path, two: Path) -> bool:
    first, second = (Student.load(folder).state_dict() for folder in (one, two))
    return all(torch.equal(value, second[name]) for name, value in first.items())


PROCESSES = """
import os, sys
from dataclasses import asdict
from pathlib import Path
from trace_sdk.backbones.pixel import PixelBackbone
from trace_sdk.student.distill import DistillSettings, distill
from trace_sdk.student.labelled_images import LabelledImages
import accelerate, peft

rank = "0" if os.fork() else "1"
os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
backbone, photos, labels, out, settings = sys.argv[1:]
student = distill(
    PixelBackbone.load(backbone), LabelledImages(photos, Path(labels), 0), Path(out), eval(settings), save_seconds=1e9
)
"""


def test_two_processes_give_the_curve_of_one(
    backbone: Path, photos: Path, labels: Path, images: LabelledImages, tmp_path: Path
) -> None:
    """Five crops in two parts, so that no process has as many as the other; both halves of the training."""
    settings = replace(SHORT, steps=4, tokens=320, accumulate=2)
    distill(PixelBackbone.load(backbone), images, tmp_path / "one", settings)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    subprocess.run(
        [sys.executable, "-c", PROCESSES, backbone, photos, labels, tmp_path / "two", repr(settings)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        check=True, timeout=120,
    )  # fmt: skip
    one, two = curves(tmp_path / "one"), curves(tmp_path / "two")
    assert one.keys() == two.keys() == {"step", "dice", "graded", "reconstruction"}
    for name, values in one.items():
        np.testing.assert_allclose(two[name], values, rtol=2e-5, err_msg=name)
    assert np.abs(np.diff(one["dice"])).max() > 1e-3, "the comparison would not see a difference"
    first, second = (Student.load(tmp_path / name).decoder.state_dict() for name in ("one", "two"))
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-3, atol=2e-5, msg=name)


def test_recomputed_activations_change_no_bit(
    backbone: Path, images: LabelledImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock

    forward, passes = FluxSingleTransformerBlock.forward, []

    def counted(self, *args, **more):
        passes.append(torch.is_grad_enabled())
        return forward(self, *args, **more)

    monkeypatch.setattr(FluxSingleTransformerBlock, "forward", counted)
    counts = []
    for checkpointing in (False, True):
        passes.clear()
        settings = replace(SHORT, steps=3, checkpointing=checkpointing, precision="bf16", lora_from=0)
        distill(PixelBackbone.load(backbone), images, tmp_path / str(checkpointing), settings)
        counts.append(sum(passes))
    assert counts == [3 * 2, 2 * 3 * 2], "blocks with gradients: twice as many where they are computed again"
    assert same(tmp_path / "False", tmp_path / "True")


def test_parts_of_a_batch_weigh_as_many_crops_as_they_have(
    backbone: Path, images: LabelledImages, tmp_path: Path
) -> None:
    """The graded term is a mean over pixels, so its first value does not depend on how a batch is parted."""
    first = []
    for accumulate in (1, 3):
        settings = replace(SHORT, steps=1, tokens=320, accumulate=accumulate)
        distill(PixelBackbone.load(backbone), images, tmp_path / str(accumulate), settings)
        first.append(curves(tmp_path / str(accumulate)))
    assert first[0]["graded"] == pytest.approx(first[1]["graded"], rel=1e-5)
    assert first[0]["reconstruction"] == pytest.approx(first[1]["reconstruction"], rel=1e-5)
    with pytest.raises(ArgumentError, match="each of 5 parts"):
        distill(PixelBackbone.load(backbone), images, tmp_path / "x", replace(SHORT, accumulate=5))


def test_the_best_student_by_held_out_score_survives_a_cut(
    backbone: Path, images: LabelledImages, tmp_path: Path, killed_at: Any
) -> None:
    learnt, held_out = images.split(0.5)
    settings = replace(SHORT, steps=4, validate_every=2, learning_rate=0.5, lora_from=0.25)

    def run(out: str, **more: object) -> Student:
        return distill(PixelBackbone.load(backbone), learnt, tmp_path / out, settings, held_out=held_out, **more)

    student = run("whole")
    with killed_at(3) as report:
        run("cut", save_seconds=0, report=report)
    run("cut")
    assert (tmp_path / "whole/curves.csv").read_text() == (tmp_path / "cut/curves.csv").read_text()
    assert same(tmp_path / "whole", tmp_path / "cut")

    scores = curves(tmp_path / "whole")["score"]
    assert [step for step, score in enumerate(scores, 1) if not np.isnan(score)] == [2, 4]
    best = int(np.nanargmax(scores)) + 1
    assert best == 2, "the last is the best here, so that going back to the best would not show"
    tensors, step, about = load_state(tmp_path / "whole/best.safetensors")
    assert step == best and about["score"] == pytest.approx(np.nanmax(scores), rel=1e-5)
    for name, value in student.decoder.state_dict().items():
        assert torch.equal(value, tensors[f"decoder.{name}"]), name
    for picture in [tmp_path / f"whole/validation/{step:06}.png" for step in (2, 4)]:
        assert np.asarray(Image.open(picture)).shape == (4 * 64, 4 * 64, 3)
    assert np.asarray(Image.open(tmp_path / "whole/curves.png").convert("L")).std() > 10


def test_the_best_by_other_held_out_images_is_not_compared_with(
    backbone: Path, images: LabelledImages, tmp_path: Path
) -> None:
    """A run that goes on with others kept the student of a better score, which those had given."""
    learnt, held_out = images.split(0.5)
    settings = replace(SHORT, steps=2, validate_every=1)

    def score(judges: LabelledImages | None) -> float:
        distill(PixelBackbone.load(backbone), learnt, tmp_path, settings, held_out=judges)
        return float(json.loads((tmp_path / "student.json").read_text()).get("score", -1))

    assert score(None) == -1, "no best.safetensors"
    first = score(held_out)
    about = load_state(tmp_path / "best.safetensors")
    save_state(tmp_path / "best.safetensors", *about[:2], {**about[2], "score": 2.0})
    assert score(held_out) == 2.0 and 0 <= first <= 1
    assert 0 <= score(learnt) <= 1


def test_chosen_crops_are_those_of_the_whole_batch(images: LabelledImages) -> None:
    whole, some = images.batch(3, 5, 64), images.batch(3, 5, 64, [4, 1])
    for one, two in zip(whole, some, strict=True):
        assert torch.equal(one[[4, 1]], two)


def test_held_out_images_are_told_by_their_names(photos: Path, images: LabelledImages, labels: Path) -> None:
    learnt, held_out = images.split(0.5)
    names = {image.name for image, _ in held_out.pairs}
    assert names and names.isdisjoint(image.name for image, _ in learnt.pairs)
    assert len(learnt.pairs) + len(held_out.pairs) == len(images.pairs) == 4
    some = images._of([*held_out.pairs, learnt.pairs[0]])
    assert {image.name for image, _ in some.split(0.5)[1].pairs} == names
    for share in (0.0, 1.0):
        with pytest.raises(ArgumentError, match="both need one"):
            images.split(share)


@pytest.mark.parametrize("change", [{"precision": "fp16"}, {"accumulate": 0}, {"validate_every": 0}])
def test_settings_out_of_range(change: dict) -> None:
    with pytest.raises(ArgumentError, match=next(iter(change))):
        replace(SHORT, **change).check()
