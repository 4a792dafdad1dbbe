"""The benchmark of student sizes, on a tiny backbone: what is trained is what is exported, with every figure."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from trace_sdk.atomic import write_bytes
from trace_sdk.backbones.pixel import PixelBackbone
from trace_sdk.labelling.images import find_images
from trace_sdk.labelling.label import LabelJob
from trace_sdk.student.model import Student
from trace_sdk.teacher.teacher import Teacher, TeacherSettings

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        spec = importlib.util.spec_from_file_location("student_size", FOLDER / "student_size.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "student_size", module)
        spec.loader.exec_module(module)
    return module


def test_choices_of_eight_blocks(script: ModuleType) -> None:
    assert [choice.name for choice in script.choices(8)] == [
        "blocks 0–7", "blocks 0–1", "blocks 0–3", "blocks 0–5", "blocks 2–6", "blocks 4–7", "block 7", "no attention",
        "blocks 0–7, width 24", "blocks 0–7, width 96",
    ]  # fmt: skip


@torch.no_grad()
def test_a_student_that_stops_early_answers_as_it_was_trained(script: ModuleType, tiny_backbone: PixelBackbone) -> None:
    """The decoder learns from a part of all blocks' features; the student computes that part alone."""
    images = torch.rand(2, 3, 64, 72, generator=torch.Generator().manual_seed(0)) * 2 - 1
    features, _ = Student(tiny_backbone).features(images)
    for blocks in ((0,), (1,), (0, 1), ()):
        student = script.SizedStudent(tiny_backbone, script.Choice(blocks, 24)).eval()
        student.decoder.residual.weight.normal_(std=0.1)
        trained = student.decoder(script.chosen(features, student.choice), images)
        torch.testing.assert_close(student.logits(images), trained, atol=1e-4, rtol=1e-4)


def test_every_choice_gets_its_row(
    script: ModuleType, tiny_backbone: PixelBackbone, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_backbone.save(tmp_path / "backbone")
    images, labels, scenes = tmp_path / "images", tmp_path / "labels", tmp_path / "scenes"
    rng = np.random.default_rng(0)
    for folder, count in ((images, 12), (scenes, 2)):
        folder.mkdir()
        for number in range(count):
            ids = np.zeros((64, 64), np.uint8)
            ids[10 + number :, 20:50] = 1
            rgb = (rng.integers(0, 60, (64, 64, 3)) + 150 * ids[..., None]).astype(np.uint8)
            Image.fromarray(rgb).save(folder / f"{number}.png")
            if folder == scenes:
                Image.fromarray(ids).save(folder / f"{number}.ids.png")
    LabelJob(
        Teacher(tiny_backbone, TeacherSettings(size=64, timesteps=(0.2,))), find_images(images), labels, "sha", batch=4
    ).run()
    monkeypatch.setattr(script, "export_onnx", lambda student, out, name: write_bytes(out, bytes(int(name) + 1)))
    monkeypatch.setattr(script, "cpu_milliseconds", lambda files, size, rounds: dict.fromkeys(files, 2.0))
    threads = torch.get_num_threads()
    options = f"--labels {labels} --held-out {scenes} --backbone {tmp_path / 'backbone'} -o {tmp_path} --steps 4"
    options += f" --work {tmp_path / 'work'} --batches 2 --crops 1 --crop 64 --seeds 2 --thresholds 3"
    monkeypatch.setattr(sys, "argv", ["student_size.py", str(images), *options.split()])
    assert script.main() == 0
    result = json.loads((tmp_path / "student-size.json").read_text())
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == [choice.name for choice in script.choices(2)] and len(rows) == 6
    for row in rows.values():
        assert len(row["ods"]["seeds"]) == 2 and 0 <= row["ods"]["mean"] <= 1 and row["label_score"]["mean"] > 0
    assert rows["block 0"]["parameters"] < 0.7 * rows["block 1"]["parameters"]
    assert rows["no attention"]["parameters"] < rows["block 0"]["parameters"] / 5
    assert result["baselines"]["lab-gradient"]["ods"] > 0.3
    for name in ("train", "read_scenes"):  # all is known now
        monkeypatch.setattr(script, name, lambda *_: pytest.fail("done again"))
    assert script.main() == 0 and json.loads((tmp_path / "student-size.json").read_text())["rows"] == result["rows"]
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--crops", "2"])
    with pytest.raises(SystemExit, match="other settings"):
        script.main()
    torch.set_num_threads(threads)
    table = (tmp_path / "student-size.md").read_text()
    assert all(f"| {name} |" in table for name in [*rows, "canny", "lab-gradient"])
