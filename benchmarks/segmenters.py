"""Segmenters without annotations that run here: their masks are what refinement is to improve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.linalg import eigh
from scipy.ndimage import label

Mask = NDArray[np.bool_]
RGB = NDArray[np.uint8]

LEAST = 0.002  # share of the picture under which a segment is no mask
CUTS = 8  # masks that normalised cuts take from a picture
FAINT = 1e-5  # similarity with tokens that were taken already, as MaskCut has it


def felzenszwalb(rgb: RGB) -> list[Mask]:
    """Efficient graph-based segmentation (Felzenszwalb and Huttenlocher, IJCV 2004)."""
    from skimage.segmentation import felzenszwalb as segment

    return _masks(segment(rgb, scale=300, sigma=0.8, min_size=round(LEAST * rgb[..., 0].size)))  # type: ignore[no-untyped-call]


def slic_merged(rgb: RGB) -> list[Mask]:
    """SLIC superpixels (Achanta et al., TPAMI 2012), neighbours of like mean colour merged."""
    from skimage.graph import cut_threshold, rag_mean_color
    from skimage.segmentation import slic

    pieces = slic(rgb, n_segments=250, compactness=15, start_label=0)  # type: ignore[no-untyped-call]
    merged = cut_threshold(pieces, rag_mean_color(rgb, pieces), 18)  # type: ignore[no-untyped-call]
    return _masks(merged)


class AttentionCut:
    """Normalised cuts on our own backbone's attention, one foreground after the other as MaskCut (CVPR 2023) does.

    Two tokens are alike as their attention rows are: Σ √(p q), in [0, 1].
    """

    __name__ = "attention-cut"

    def __init__(self, backbone: Path, size: int = 256, t: float = 0.2) -> None:
        from trace_sdk.backbones.pixel import PixelBackbone
        from trace_sdk.teacher.teacher import Teacher, TeacherSettings

        self._teacher = Teacher(PixelBackbone.load(backbone), TeacherSettings(size=size))
        self._t = t

    def __call__(self, rgb: RGB) -> list[Mask]:
        import torch

        with torch.no_grad():
            images = self._teacher.prepare(rgb)
            grid = self._teacher.backbone.token_grid((images.shape[-2], images.shape[-1]))
            ((t, x_t),) = self._teacher.trajectory(images, self._teacher.noise_like(images), (self._t,))
            roots = self._teacher.attention(x_t, t)[0].double().exp2().sqrt().cpu().numpy()
        return [_enlarge(mask, rgb.shape[:2]) for mask in normalised_cuts(roots @ roots.T, grid)]


def normalised_cuts(alike: NDArray[np.float64], grid: tuple[int, int]) -> list[Mask]:
    """Foregrounds of successive normalised cuts (Shi and Malik, TPAMI 2000), bool [h, w] each.

    Args:
        alike: symmetric [N, N] in [0, 1], N = h · w.
    """
    free = np.ones(len(alike), np.bool_)
    found: list[Mask] = []
    for _ in range(CUTS):
        weights = np.where(free[:, None] & free, alike, FAINT)
        scale = 1 / np.sqrt(weights.sum(axis=1))
        _, vector = eigh(np.eye(len(alike)) - scale[:, None] * weights * scale, subset_by_index=[1, 1])
        value = vector[:, 0] * scale
        side = value > value[free].mean()
        peak = int(np.argmax(np.where(free, np.abs(value), -1)))
        if not side[peak]:
            side = ~side
        parts, _ = label((side & free).reshape(grid))
        mask = parts == parts.flat[peak]
        if mask.sum() < max(2, LEAST * mask.size):
            break
        found.append(mask)
        free &= ~mask.ravel()
        if free.sum() < 2:
            break
    return found


def _masks(segments: NDArray[Any]) -> list[Mask]:
    """Each segment of LEAST of the picture or more."""
    numbers, areas = np.unique(segments, return_counts=True)
    return [segments == number for number in numbers[areas >= LEAST * segments.size]]


def _enlarge(mask: Mask, shape: tuple[int, ...]) -> Mask:
    picture = Image.fromarray(mask.astype(np.uint8) * np.uint8(255))
    return np.asarray(picture.resize(shape[::-1], Image.Resampling.BILINEAR)) > 127
