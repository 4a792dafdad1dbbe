"""What scenes are made of, and what a student is asked for on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


@pytest.fixture(scope="module")
def cutouts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A red disc and a blue bar."""
    folder = tmp_path_factory.mktemp("cutouts")
    y, x = np.mgrid[:50, :50] - 25
    for name, colour, inside in (
        ("disc", (220, 20, 20), x**2 + y**2 < 400),
        ("bar", (20, 20, 220), abs(y) < 8),
    ):
        rgba = np.zeros((50, 50, 4), np.uint8)
        rgba[inside] = (*colour, 255)
        Image.fromarray(rgba, "RGBA").save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos without any edge: what differs in a scene was pasted."""
    folder = tmp_path_factory.mktemp("plain")
    for grey in (60, 128, 200):
        Image.new("RGB", (160, 140), (grey, grey, grey)).save(folder / f"{grey}.png")
    return folder


@pytest.fixture
def targets(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What self-training asks for, [B, S, S] a step."""
    asked: list[Tensor] = []

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        asked.append(target)
        return F.mse_loss(logits, target)

    monkeypatch.setattr(F, "binary_cross_entropy_with_logits", loss)
    return asked
