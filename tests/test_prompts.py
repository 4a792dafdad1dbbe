"""Prompts: points lie deep inside, boxes are those of the instances, and SAM takes each format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from trace_sdk.cli import main
from trace_sdk.edge_map import EdgeMap
from trace_sdk.errors import ArgumentError
from trace_sdk.instances.prompts import inner_points

HEIGHT, WIDTH = 60, 90


def ring() -> EdgeMap:
    """A ring around a disc: three instances, the outer two with a hole."""
    y, x = np.indices((HEIGHT, WIDTH))
    far = np.hypot(y - 30, x - 40)
    edges = np.where(np.abs(far - 10) < 0.7, 0.9, np.where(np.abs(far - 25) < 0.7, 1.0, 0)).astype(np.float32)
    return EdgeMap(edges, np.zeros((HEIGHT, WIDTH, 3), np.uint8), 0.5)


@pytest.mark.parametrize("points", [1, 3, np.int64(2)])
def test_points_lie_in_their_instance_and_boxes_around_it(points: int) -> None:
    edges = ring()
    found, prompts = edges.instances(), edges.sam_prompts(points=points)
    assert len(prompts) == len(found) == 3 and prompts.size == (WIDTH, HEIGHT)
    assert (np.diff(prompts.scores) <= 0).all()
    for places, box in zip(prompts.points, prompts.boxes, strict=True):
        columns, rows = np.floor(places).astype(int).T
        (number,) = set(found.labels[rows, columns].tolist())
        assert box.tolist() == found.boxes[number - 1].tolist()
        assert len(np.unique(places, axis=0)) == points


def test_a_point_is_the_centre_of_the_largest_disc() -> None:
    mask = np.zeros((30, 40), np.bool_)
    mask[5:26, 3:24] = True  # a square of 21 px with a tail
    mask[14:17, 24:40] = True
    assert inner_points(mask, 1).tolist() == [[13.5, 15.5]]


@settings(max_examples=30, deadline=None)
@given(arrays(np.bool_, (7, 9)).filter(lambda mask: mask.any()), st.integers(1, 4))
def test_points_are_always_inside(mask: Any, count: int) -> None:
    found = inner_points(mask, count)
    assert found.shape == (count, 2)
    assert all(mask[int(y), int(x)] for x, y in found)


def test_formats() -> None:
    prompts = ring().sam_prompts(points=2, min_score=0.1)
    k = len(prompts)
    one = prompts.to_sam()[0]
    assert len(prompts.to_sam()) == k and one["point_coords"].shape == (2, 2) and one["box"].shape == (4,)
    assert one["point_labels"].tolist() == [1, 1] and one["multimask_output"] is False
    batch = prompts.to_sam2()
    assert batch["point_coords"].shape == (k, 2, 2) and batch["box"].shape == (k, 4)
    lists = prompts.to_ultralytics()
    assert np.shape(lists["bboxes"]) == (k, 4) and np.shape(lists["points"]) == (k, 2, 2)
    assert np.shape(lists["labels"]) == (k, 2)
    assert np.shape(prompts.to_transformers()["input_points"]) == (1, k, 2, 2)


def test_low_scores_are_left_out() -> None:
    scores = ring().instances().scores
    assert len(ring().sam_prompts(min_score=float(scores.max()))) == int((scores == scores.max()).sum())


@pytest.mark.parametrize("arguments", [{"points": 0}, {"points": True}, {"min_score": 2}, {"threshold": -1}])
def test_bad_arguments(arguments: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError):
        ring().sam_prompts(**arguments)


def test_a_real_sam_takes_them() -> None:
    """A SAM of random weights: one mask for each prompt, at the size of the picture."""
    import torch
    from transformers import SamConfig, SamMaskDecoderConfig, SamModel, SamPromptEncoderConfig, SamVisionConfig

    prompts = ring().sam_prompts(points=2)
    vision = SamVisionConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, mlp_dim=32, output_channels=16, image_size=128,
        patch_size=16, global_attn_indexes=[0], window_size=0, num_pos_feats=8,
    )  # fmt: skip
    config = SamConfig(
        vision_config=vision,
        prompt_encoder_config=SamPromptEncoderConfig(hidden_size=16, image_size=128, patch_size=16),
        mask_decoder_config=SamMaskDecoderConfig(
            hidden_size=16, mlp_dim=32, num_hidden_layers=1, num_attention_heads=2, iou_head_hidden_dim=16
        ),
    )
    torch.manual_seed(0)
    model = SamModel(config).eval()
    # What SamProcessor does, for which torchvision is not needed: scale to the model's side.
    scale = 128 / max(prompts.size)
    ready = prompts.to_transformers()
    with torch.no_grad():
        answer = model(
            pixel_values=torch.rand(1, 3, 128, 128),
            input_points=torch.tensor(ready["input_points"]) * scale,
            input_labels=torch.tensor(ready["input_labels"]),
            input_boxes=torch.tensor(ready["input_boxes"]) * scale,
            multimask_output=False,
        )
    assert answer.pred_masks.shape[:3] == (1, len(prompts), 1)
    assert torch.isfinite(answer.pred_masks).all()
    # Each prompt has a say: masks of different instances differ.
    assert (answer.pred_masks[0, 0] - answer.pred_masks[0, 1]).abs().max() > 0


@pytest.mark.parametrize("form", ["sam", "sam2", "ultralytics", "transformers"])
def test_command(tiny_engine: Path, tmp_path: Path, form: str) -> None:
    halves = np.where(np.indices((96, 120))[1] < 60, np.uint8(20), np.uint8(220))
    Image.fromarray(halves).save(tmp_path / "a.png")
    arguments = ["prompts", str(tmp_path / "a.png"), "-o", str(tmp_path), "--engine", str(tiny_engine)]
    result = CliRunner().invoke(main, [*arguments, "--format", form, "--points", "2"])
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "a.prompts.json").read_text())
    assert content["format"] == form and content["size"] == [120, 96] and content["info"]["engine"] == "tiny"
    count = len(content["scores"])
    held = content["prompts"] if form == "sam" else next(iter(content["prompts"].values()))
    assert len(held[0] if form == "transformers" else held) == count == 2


def test_command_goes_on_after_a_bad_photo(photos: Path, tiny_engine: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"\x89PNG")
    arguments = ["prompts", str(tmp_path / "bad.png"), str(photos / "a.png"), "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(main, [*arguments, "--engine", str(tiny_engine)])
    assert result.exit_code == 1 and "1 photo →" in result.stdout and "bad.png" in result.stderr
