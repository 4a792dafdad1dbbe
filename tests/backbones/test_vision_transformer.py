"""The control: ABDiv on the attention of a plain vision transformer, a tiny random DINOv2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from trace_sdk.backbones.registry import open_backbone
from trace_sdk.backbones.tap import SelfAttention, attention_map
from trace_sdk.cli import main
from trace_sdk.errors import ArgumentError, CheckpointError
from trace_sdk.teacher.labels import load_label
from trace_sdk.teacher.teacher import Teacher, TeacherSettings

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14, "image_size": 112}


@pytest.fixture(scope="module", params=["plain", "registers"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    made: Any
    if request.param == "plain":
        made = Dinov2Model(Dinov2Config(**SIZES))
    else:
        made = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SIZES, num_register_tokens=3))
    with torch.no_grad():
        for name, value in made.named_parameters():
            if "query" in name or "key" in name:
                value.normal_(std=0.4)
    path = tmp_path_factory.mktemp("vit") / request.param
    made.save_pretrained(path)
    return path


def test_attention_is_that_of_transformers_over_image_tokens(folder: Path) -> None:
    """The eager implementation gives whole maps; the image's part of them, renormalised, is what the tap shows."""
    backbone: Any = open_backbone(folder)
    images = torch.rand(1, 3, 112, 126, generator=torch.Generator().manual_seed(0)) * 2 - 1
    seen: list[SelfAttention] = []
    clean = backbone.encode(images)
    with torch.inference_mode():
        backbone(clean, 0.0, seen.append)
        eager = type(backbone.model).from_pretrained(folder, attn_implementation="eager").eval()
        whole = eager(clean, output_attentions=True).attentions
    assert [attention.grid for attention in seen] == [(8, 9)] * 2 == [backbone.token_grid((112, 126))] * 2
    for attention, expected in zip(seen, whole, strict=True):
        part = expected[..., -72:, -72:]
        got = attention_map(attention.query, attention.key, attention.scale)
        torch.testing.assert_close(got, part / part.sum(-1, keepdim=True), atol=1e-5, rtol=1e-4)


def test_teacher_reads_it_without_timesteps(folder: Path, photos: Path, tmp_path: Path) -> None:
    photo = np.random.default_rng(0).integers(0, 255, (112, 126, 3), np.uint8)
    annotation = Teacher(open_backbone(folder), TeacherSettings(size=126, timesteps=(0.0,))).annotate(photo)
    assert annotation.abdiv.shape == (8, 9) and annotation.abdiv.std() > 0 and annotation.emergence is None
    with pytest.raises(ArgumentError, match="has no timesteps"):
        Teacher(open_backbone(folder), TeacherSettings(size=126)).annotate(photo)
    command = ["label", str(photos / "a.png"), "--backbone", str(folder), "-o", str(tmp_path), "--size", "126"]
    assert CliRunner().invoke(main, [*command, "-t", "0"]).exit_code == 0
    assert load_label(tmp_path / "a.png.npz").labels.shape == (8, 9)
    # The picture showed it at other t, which ended in an error.
    command[-3] = str(tmp_path / "plots")
    assert CliRunner().invoke(main, [*command, "-t", "0", "--plot"]).exit_code == 0
    assert (tmp_path / "plots" / "a.png.png").is_file()


def test_wrong_sizes_and_weights_are_said(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="multiples of 14 from 112"):
        open_backbone(folder).encode(torch.zeros(1, 3, 112, 120))
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(CheckpointError, match="Cannot read the weights"):
        open_backbone(tmp_path)
    weights = load_file(folder / "model.safetensors")
    save_file(dict(list(weights.items())[1:]), tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="lacks 1 weights"):  # it was random, with a remark
        open_backbone(tmp_path)
