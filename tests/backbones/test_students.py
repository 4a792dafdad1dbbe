"""Students of every family: distilled, kept, read again, folded; what is not read is not computed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open

from trace_sdk import EdgeDetector
from trace_sdk.backbones.pixel import PixelBackbone
from trace_sdk.backbones.registry import open_backbone
from trace_sdk.cli import main
from trace_sdk.errors import ArgumentError, CheckpointError
from trace_sdk.export.graph import EngineGraph
from trace_sdk.labelling.images import find_images
from trace_sdk.labelling.label import LabelJob
from trace_sdk.labelling.ray import RayLabeller
from trace_sdk.labelling.states import label_file
from trace_sdk.student import calibrate
from trace_sdk.student.distill import DistillSettings, distill
from trace_sdk.student.labelled_images import LabelledImages
from trace_sdk.student.model import Student
from trace_sdk.teacher.labels import load_label
from trace_sdk.teacher.teacher import Teacher, TeacherSettings
from trace_sdk.training.state import load_state

SHORT = DistillSettings(steps=2, lora_from=0.5, lora_rank=4, tokens=256, sizes=(64,), precision="fp32")


@pytest.fixture(scope="session")
def images(tiny_backbone: PixelBackbone, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> LabelledImages:
    """Labels are labels, whichever backbone made them."""
    out = tmp_path_factory.mktemp("labels")
    LabelJob(Teacher(tiny_backbone, TeacherSettings(size=96, timesteps=(0.3,))), find_images(photos), out, "sha").run()
    return LabelledImages(photos, out, 0)


@pytest.fixture
def few_crops(monkeypatch: pytest.MonkeyPatch) -> None:
    """The threshold from one batch of crops rather than twelve."""
    monkeypatch.setattr(calibrate, "BATCHES", 1)


def photo(student: Student, batch: int = 2) -> torch.Tensor:
    """Noise of a size that no crop had."""
    height, width = student.min_size + 2 * student.multiple_of, student.min_size + student.multiple_of
    return torch.randint(
        0, 256, (batch, height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3)
    )


@torch.no_grad()
def edges(student: Student, image: torch.Tensor) -> torch.Tensor:
    return student.logits(image.permute(0, 3, 1, 2).float() / 127.5 - 1).sigmoid()


def vivid(student: Student) -> Student:
    """With a decoder that makes much of the features."""
    torch.manual_seed(5)
    torch.nn.init.normal_(student.decoder.residual.weight)
    return student.eval()


@pytest.mark.usefixtures("few_crops")
def test_distilled_kept_read_again_and_folded(model: Any, images: LabelledImages, tmp_path: Path) -> None:
    out = tmp_path / "student"
    made = distill(open_backbone(model.folder), images, out, SHORT)
    assert json.loads((out / "student.json").read_text())["distilled_steps"] == 2
    tensors, _, _ = load_state(out / "state.safetensors")
    learnt = [value for name, value in tensors.items() if name.startswith("lora.")]
    assert learnt and any(bool(value.abs().sum()) for value in learnt[1::2]), "LoRA learnt nothing"

    stored = [file for file in (out / "backbone").rglob("*.safetensors") if file.name != "null_prompt.safetensors"]
    names: list[str] = []
    for file in stored:
        with safe_open(file, "pt") as weights:
            names += [*weights.keys()]
            assert {weights.get_tensor(name).dtype for name in weights.keys()} <= {torch.float16, torch.int64}  # noqa: SIM118
    assert len(stored) == 2, "denoiser and VAE, each once"
    assert not any("lora" in name or name.startswith("decoder.") for name in names)

    again = Student.load(out)
    assert again.backbone.family == model.backbone.family and again.threshold == made.threshold
    assert set(again.backbone.prompt) == set(model.backbone.prompt)  # type: ignore[attr-defined]
    for student in (made, again):
        vivid(student)
    image = photo(again)
    torch.testing.assert_close(edges(again, image), edges(made, image), atol=5e-3, rtol=0)

    graph = EngineGraph(again, half_weights=False)
    with torch.no_grad():
        torch.testing.assert_close(graph(image), edges(again, image), atol=2e-6, rtol=1e-5)
    assert edges(again, image).std() > 0.01, "the comparison would not see a wrong graph"
    count = lambda student: sum(value.numel() for value in student.backbone.denoiser.parameters())  # noqa: E731
    assert count(graph.student) < count(again), "t = 0 and the null prompt are not folded"


@pytest.mark.usefixtures("few_crops")
def test_chosen_blocks_recomputed_and_resumed_give_the_same_student(
    open_tiny: Any, images: LabelledImages, tmp_path: Path
) -> None:
    settings = dataclasses.replace(SHORT, lora_from=0, blocks=(1, 3), precision="bf16", tokens=128)

    def run(out: str, **changes: Any) -> Student:
        backbone = open_backbone(open_tiny("sd").folder, precision="bf16")
        return distill(backbone, images, tmp_path / out, dataclasses.replace(settings, **changes), **more)

    more: dict[str, Any] = {}
    whole = run("whole")
    assert whole.blocks == (1, 3)
    run("recomputed", checkpointing=True)

    class Cut(Exception):
        pass

    def kill(step: int, _: object) -> None:
        if step == 1:
            raise Cut

    more = {"save_seconds": 0, "report": kill}
    with pytest.raises(Cut):
        run("cut")
    more = {}
    run("cut")
    curves = (tmp_path / "whole/curves.csv").read_text()
    for out in ("recomputed", "cut"):
        assert (tmp_path / out / "curves.csv").read_text() == curves, out
        first, second = (Student.load(tmp_path / folder).state_dict() for folder in ("whole", out))
        assert all(torch.equal(value, second[key]) for key, value in first.items()), out
    with pytest.raises(ArgumentError, match="blocks"):
        run("whole", blocks=(1,))


@pytest.mark.usefixtures("few_crops")
def test_by_command_and_in_torch(open_tiny: Any, photos: Path, images: LabelledImages, tmp_path: Path) -> None:
    labels = images.pairs[0][1].parent
    arguments = ("distill", photos, "--labels", labels, "--backbone", open_tiny("flux").folder, "-o", tmp_path / "out")
    options = ("--steps", 2, "--tokens", 64, "--size", 64, "--lora-rank", 2, "--block", 1)
    result = CliRunner().invoke(main, [str(word) for word in (*arguments, *options)])
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out/student.json").read_text())["blocks"] == [1]
    edges = EdgeDetector(tmp_path / "out", device="cpu", size=96).run(photos / "a.png")
    assert edges.probability.shape == (96, 120) and edges.info["engine"] == "out"


def test_ray_labels_with_any_backbone(open_tiny: Any, photos: Path, tmp_path: Path) -> None:
    """Its stage alone, without a cluster."""
    settings, folder, found = TeacherSettings(size=96, timesteps=(0.3,)), open_tiny("sd").folder, find_images(photos)
    rows = {
        "name": np.array([image.name for image in found]),
        "file": np.array([str(image.file) for image in found]),
        "start": np.zeros(len(found), int),
        "length": np.full(len(found), -1),
    }
    said = RayLabeller(str(folder), str(tmp_path / "ray"), settings)(rows)
    assert set(said["state"]) == {"done"}
    backbone = open_backbone(folder)
    LabelJob(Teacher(backbone, settings), found, tmp_path / "here", backbone.identity).run()
    for image in found:
        one, two = (load_label(label_file(tmp_path / where, image.name)) for where in ("ray", "here"))
        np.testing.assert_allclose(one.abdiv, two.abdiv, rtol=1e-3, atol=1e-5)


def test_the_reconstruction_holds_the_answer_that_the_model_had(open_tiny: Any) -> None:
    """At t = 0 a velocity leaves X̂_0 = X_0 whatever it is, so what is held is the answer itself."""
    student = Student(open_backbone(open_tiny("sd3").folder))
    student.add_lora(4)
    clean = student.encode(torch.rand(1, 3, 64, 64) * 2 - 1)
    with torch.no_grad():
        _, before = student.features(clean)
        for name, value in student.backbone.denoiser.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.1)
        _, after = student.features(clean)
    assert not torch.allclose(before, after, atol=1e-3)
    torch.testing.assert_close(student.reconstruction_target(clean, None), before)


@pytest.mark.parametrize(("name", "later"), [("sd", "up_blocks"), ("flux", "single_transformer_blocks.1")])
def test_blocks_after_the_last_one_read_are_not_computed(name: str, later: str, open_tiny: Any) -> None:
    folder = open_tiny(name).folder
    early, full = vivid(Student(open_backbone(folder), blocks=(0, 1))), vivid(Student(open_backbone(folder)))
    assert early.decoder.standardise.num_features < full.decoder.standardise.num_features
    for student, asked in ((early, 0), (full, 1)):
        calls: list[object] = []
        student.backbone.denoiser.get_submodule(later).register_forward_pre_hook(
            lambda *_, calls=calls: calls.append(0)
        )
        for block in getattr(student.backbone.denoiser, later, []):
            block.register_forward_pre_hook(lambda *_, calls=calls: calls.append(0))
        edges(student, photo(student))
        assert bool(calls) == bool(asked)
    with pytest.raises(ArgumentError, match="blocks must lie in 0 … "):
        Student(open_backbone(folder), blocks=(99,))


def test_what_no_student_is_made_of(tmp_path: Path, open_tiny: Any, images: LabelledImages) -> None:
    class Control:
        family, self_attention_blocks = "dinov2", 3

    with pytest.raises(ArgumentError, match="dinov2 is a control"):
        Student(Control())  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="multiples of 8 from 64"):
        distill(open_backbone(open_tiny("flux").folder), images, tmp_path, dataclasses.replace(SHORT, sizes=(60,)))
    Student(open_backbone(open_tiny("flux").folder)).save(tmp_path / "whole", {})
    (tmp_path / "whole/backbone/vae/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="vae"):
        Student.load(tmp_path / "whole")
