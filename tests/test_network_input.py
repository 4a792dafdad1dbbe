"""The width is scaled first, then the height, by every version of Pillow, by torch, and for the teacher."""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from numpy.typing import NDArray
from PIL.Image import Resampling

from trace_sdk import network_input
from trace_sdk.backbones.pixel import PixelBackbone
from trace_sdk.engines.torch_scaling import Scaling
from trace_sdk.teacher.teacher import Teacher, TeacherSettings

# Height, width. Pillow 13 by itself takes (200, 60), (500, 30) and the answer to (60, 20) the other way round.
SHAPES = [(200, 60), (500, 30), (60, 200), (60, 20), (20, 60), (300, 400), (400, 300), (128, 40), (90, 128)]


def in_two_passes(pixels: NDArray[Any], height: int, width: int, how: Resampling) -> NDArray[Any]:
    picture = PIL.Image.fromarray(pixels)
    return np.asarray(picture.resize((width, picture.height), how).resize((width, height), how))


@pytest.mark.parametrize("where", ["host", "torch"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_width_goes_first(shape: tuple[int, int], where: str) -> None:
    scaling: Any = network_input if where == "host" else Scaling(torch.device("cpu"))
    rng = np.random.default_rng(0)
    photo = rng.integers(0, 256, (*shape, 3), np.uint8)
    pixels, height, width = scaling.fit(photo, 128, lambda side: side)
    np.testing.assert_array_equal(pixels, in_two_passes(photo, height, width, Resampling.BICUBIC))
    answer = rng.random((height, width), np.float32)
    edges = scaling.unfit(answer if where == "host" else torch.from_numpy(answer), height, width, shape)
    np.testing.assert_array_equal(edges, in_two_passes(answer, *shape, Resampling.BILINEAR))


def test_the_width_goes_first_for_the_teacher(tiny_backbone: PixelBackbone) -> None:
    photo = np.random.default_rng(0).integers(0, 256, (400, 80, 3), np.uint8)
    seen = Teacher(tiny_backbone, TeacherSettings(size=320)).prepare(photo)[0].permute(1, 2, 0).numpy()
    expected = in_two_passes(photo, 320, 64, Resampling.BICUBIC)
    np.testing.assert_array_equal(np.round((seen + 1) * 127.5), expected)
