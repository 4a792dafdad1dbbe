"""Engines of students of every family: exported, right at sizes and batches they were not exported with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from trace_sdk import EdgeDetector
from trace_sdk.backbones.registry import families, open_backbone
from trace_sdk.errors import EngineError
from trace_sdk.export.onnx import export_onnx
from trace_sdk.student.model import Student

# Tracing takes a minute a family. Unasked runs one of a kind: the least of the transformers, cut after its first block.
SLOW = ("sd", "sdxl", "pixart", "sd3 (3.5 medium)", "flux", "flux2", "qwen-image", "aura-flow")
NO_GRAPH = ("z-image", "lumina2")


def student_of(folder: Path, blocks: tuple[int, ...] | None = None) -> Student:
    student = Student(open_backbone(folder), blocks=blocks).eval()
    torch.manual_seed(5)
    torch.nn.init.normal_(student.decoder.residual.weight)
    return student


def check(student: Student, file: Path) -> onnx.ModelProto:
    """Export, and compare with the student itself, nothing folded, at a third size and batch."""
    report = export_onnx(student, file, name="tiny", precision="fp32", default_size=student.min_size * 2)
    assert len(report.parity) == 3 and max(report.parity.values()) <= 1e-4
    sides = student.min_size + student.multiple_of, student.min_size + 3 * student.multiple_of
    photos = np.random.default_rng(1).integers(0, 256, (2, *sides, 3), np.uint8)
    engine = EdgeDetector(file, device="cpu", size=max(sides))
    with torch.inference_mode():
        expected = student.logits(torch.from_numpy(photos).permute(0, 3, 1, 2).float() / 127.5 - 1).sigmoid().numpy()
    for photo, answer in zip(photos, expected, strict=True):
        np.testing.assert_allclose(engine.run(photo).probability, answer, atol=1e-4)
    assert expected.std() > 0.01, "the comparison would not see a wrong engine"
    return onnx.load(file)


def test_every_family_is_exported_or_says_why_not() -> None:
    assert {name.partition(" ")[0] for name in (*SLOW, *NO_GRAPH)} == set(families())
    assert {name for name, family in families().items() if family.no_graph} == set(NO_GRAPH)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", SLOW)
def test_engine(name: str, open_tiny: Any, tmp_path: Path) -> None:
    check(student_of(open_tiny(name).folder), tmp_path / "tiny.onnx")


def test_engine_without_what_lies_behind_the_last_block_read(open_tiny: Any, tmp_path: Path) -> None:
    model = check(student_of(open_tiny("pixart").folder, blocks=(0,)), tmp_path / "tiny.onnx")
    weights = [tensor.name for tensor in model.graph.initializer]
    assert any(".vae.encoder." in name for name in weights), "the VAE is in the graph"
    behind = ("transformer_blocks.1", "proj_out", "attn2", ".ff.", "caption_projection", "timestep_embedder")
    assert not [name for name in weights if any(part in name for part in behind)]


@pytest.mark.parametrize("name", NO_GRAPH)
def test_family_without_a_graph_says_so(name: str, open_tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=f"Students of {name} cannot be exported: .* in torch"):
        export_onnx(student_of(open_tiny(name).folder), tmp_path / "x.onnx", name="x")
    assert not list(tmp_path.iterdir())
