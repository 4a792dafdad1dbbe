"""The benchmark of plain textures: densities of known maps, and what it says of a folder without the photos."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from trace_sdk.errors import DatasetError

FILE = Path(__file__).parents[1] / "benchmarks/textures.py"
spec = importlib.util.spec_from_file_location("benchmark_textures", FILE)
assert spec is not None and spec.loader is not None
textures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(textures)

PHOTO = np.zeros((40, 50, 3), np.uint8)


def test_density_of_a_flat_map_is_zero_and_of_a_line_its_share() -> None:
    line = np.zeros((40, 50), np.float32)
    line[:, 25] = 0.8
    flat = textures.densities([PHOTO], lambda rgb: np.zeros(rgb.shape[:2], np.float32), 0.5)
    assert flat == {"thinned": 0, "mean": 0, "drawn": 0}
    drawn = textures.densities([PHOTO, PHOTO], lambda rgb: line, 0.5)
    assert drawn["mean"] == pytest.approx(0.8 / 50)
    assert drawn["drawn"] == pytest.approx(1 / 50, rel=0.15)  # thinning may take the line's ends
    assert drawn["thinned"] == pytest.approx(0.8 * drawn["drawn"], rel=0.1)


def test_a_missing_texture_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"grass_g_4\.jpg"):
        textures.textures(tmp_path)
