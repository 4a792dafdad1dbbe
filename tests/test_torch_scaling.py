"""Photos scaled by torch are those of Pillow, bit for bit, and so are answers."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest
import torch
from numpy.typing import NDArray

from trace_sdk.engines import torch_scaling
from trace_sdk.engines.torch_scaling import Scaling
from trace_sdk.network_input import fit, padded_length, unfit

SHAPES = [  # height, width
    (96, 128), (128, 128), (97, 61), (61, 97), (200, 333), (1, 1), (1, 50), (50, 1), (2, 500), (500, 2), (300, 90),
    (90, 300), (129, 129), (20, 31), (128, 5),
]  # fmt: skip


@pytest.fixture(scope="module")
def scaling() -> Scaling:
    return Scaling(torch.device("cpu"))


def padded(length: int) -> int:
    return padded_length(length, 8, 16)


def photo(kind: str, height: int, width: int) -> NDArray[np.uint8]:
    rng = np.random.default_rng(height * 1000 + width)
    if kind == "saturated":
        return rng.choice(np.array([0, 255], np.uint8), (height, width, 3))
    if kind == "grey":
        return np.repeat(rng.integers(120, 136, (height, width, 1), np.uint8), 3, 2)
    rough = PIL.Image.fromarray(rng.integers(0, 256, (7, 5, 3), np.uint8))
    return np.asarray(rough.resize((width, height)))


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
@pytest.mark.parametrize("kind", ["saturated", "grey", "smooth"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_network_sees_the_same_pixels(scaling: Scaling, kind: str, shape: tuple[int, int]) -> None:
    rgb = photo(kind, *shape)
    expected, *sides = fit(rgb, 128, padded)
    pixels, *found = scaling.fit(rgb, 128, padded)
    assert found == sides and pixels.dtype == torch.uint8
    np.testing.assert_array_equal(pixels.numpy(), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_answers_come_back_the_same(scaling: Scaling, shape: tuple[int, int]) -> None:
    padded_picture, height, width = fit(np.zeros((*shape, 3), np.uint8), 128, padded)
    answer = np.random.default_rng(0).random(padded_picture.shape[:2], np.float32)
    expected = unfit(answer, height, width, shape)
    edges = scaling.unfit(torch.from_numpy(answer), height, width, shape).numpy()
    assert edges.dtype == np.float32 and edges.shape == shape
    np.testing.assert_array_equal(edges, expected)


def test_filters_are_kept_and_long_strips_left_to_pillow(scaling: Scaling, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    kernel = torch_scaling._bicubic
    monkeypatch.setattr(torch_scaling, "_bicubic", lambda *given: made.append(given[1]) or kernel(*given))
    scaling = Scaling(torch.device("cpu"))
    for _ in range(2):
        scaling.fit(photo("smooth", 100, 60).copy(), 64, padded)
    assert sorted(made) == [60, 100]
    strip = photo("saturated", 3, 16 * torch_scaling.STRIP + 1)
    np.testing.assert_array_equal(scaling.fit(strip, 16, padded)[0].numpy(), fit(strip, 16, padded)[0])
    assert max(made) == 100
