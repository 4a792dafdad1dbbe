"""Criteria of the IEP against other libraries' numbers, and t* by each of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from scipy import stats

from trace_sdk.backbones.pixel import PixelBackbone
from trace_sdk.cli import main
from trace_sdk.errors import ArgumentError
from trace_sdk.teacher.criteria import CRITERIA
from trace_sdk.teacher.plot import plot_t_star
from trace_sdk.teacher.teacher import Teacher, TeacherSettings

GRID = (3, 5)


def expected(name: str, p: np.ndarray, q: np.ndarray) -> float:
    """Of one row, by scipy and numpy."""
    if name == "kl":
        return float(stats.entropy(p, q))
    if name == "l2":
        return float(np.linalg.norm(p - q))
    if name == "entropy":
        return abs(float(stats.entropy(p) - stats.entropy(q)))
    height, width = (
        stats.wasserstein_distance(
            range(GRID[axis]), range(GRID[axis]), *(m.reshape(GRID).sum(1 - axis) for m in (p, q))
        )
        for axis in (0, 1)
    )
    return float(height + width)


@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize("std", [0.5, 6.0])
def test_criterion_is_the_mean_of_its_rows(name: str, std: float) -> None:
    maps = (torch.randn(2, 2, 7, 15, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * std).softmax(-1)
    got = CRITERIA[name](maps[0].log2(), maps[1].log2(), GRID)
    want = [
        np.mean([expected(name, p, q) for p, q in zip(*rows, strict=True)]) for rows in zip(*maps.numpy(), strict=True)
    ]
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert CRITERIA[name](maps[0].log2(), maps[0].log2(), GRID).abs().max() < 1e-12


def test_wasserstein_knows_how_far_attention_moves() -> None:
    """One token aside costs 1, two costs 2; L2 sees no difference."""
    rows = torch.full((1, 3, 15), -torch.inf)
    rows[0, [0, 1, 2], [0, 1, 2]] = 0.0
    here, near, far = rows[:, :1], rows[:, 1:2], rows[:, 2:]
    assert (
        CRITERIA["wasserstein"](here, near, GRID).item() == 1 and CRITERIA["wasserstein"](here, far, GRID).item() == 2
    )
    assert CRITERIA["l2"](here, near, GRID).item() == CRITERIA["l2"](here, far, GRID).item() > 0


def test_teacher_takes_t_star_by_the_criterion(tiny_backbone: PixelBackbone, photos: Path) -> None:
    photo = np.asarray(Image.open(photos / "a.png").convert("RGB"))
    curves = {}
    for name in CRITERIA:
        settings = TeacherSettings(size=64, stride=250, window=(0.2, 0.8), criterion=name)
        emergence = Teacher(tiny_backbone, settings).annotate(photo).emergence
        assert emergence is not None and emergence.t_star == emergence.timesteps[int(np.argmax(emergence.kl))]
        curves[emergence.kl] = name
    assert len(curves) == len(CRITERIA)
    with pytest.raises(ArgumentError, match="criterion must be one of kl, l2, entropy, wasserstein"):
        Teacher(tiny_backbone, TeacherSettings(criterion="cosine"))


def test_histogram_of_a_folder_counts_every_label(tiny_backbone: PixelBackbone, photos: Path, tmp_path: Path) -> None:
    """Labels of an earlier run are in it too."""
    tiny_backbone.save(tmp_path / "backbone")
    command = ["label", str(photos), "--backbone", str(tmp_path / "backbone"), "-o", str(tmp_path / "labels")]
    options = ["--size", "64", "--stride", "300", "--criterion", "l2"]
    assert CliRunner().invoke(main, [*command, *options]).exit_code == 0
    assert not (tmp_path / "labels" / "t-star.png").exists()
    result = CliRunner().invoke(main, [*command, *options, "--plot"])
    assert result.exit_code == 0 and "4 were there already" in result.output
    assert np.asarray(Image.open(tmp_path / "labels" / "t-star.png").convert("L")).std() > 5


def test_bars_are_as_high_as_the_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    bars = []
    monkeypatch.setattr(Axes, "bar", lambda self, x, height, **more: bars.append((list(x), list(height))))
    plot_t_star([0.3, 0.1, 0.3, 0.3], (0.1, 0.6), tmp_path / "t.png")
    assert bars == [([0.1, 0.3], [1, 3])]
