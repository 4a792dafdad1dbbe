"""`trace_sdk.network_input` on torch's device: photos are scaled where the network runs, by Pillow's own arithmetic.

Pictures of 8 bits are summed in whole numbers, as Pillow does, so that the network sees the same pixels, bit for bit;
answers in float64, rounded to float32 after each axis. Sums go over a filter's taps and not through matrix products,
which a GPU may round. torch is imported when the functions are called, since engines without it must start without it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from trace_sdk.network_input import FIXED_POINT, fit, scaled_shape

if TYPE_CHECKING:
    import torch
    from torch import Tensor

KEPT = 32  # filters that stay on the device, of one axis and one pair of lengths each
STRIP = 64  # how many times longer than the network's size a photo may be to be scaled on the device
WIDTH_FIRST = (1, 0)  # the order of the axes, as `trace_sdk.network_input`

# Which samples each result is a sum of, int64 [taps, out], and their weights, [taps, out].
Filter: TypeAlias = "tuple[Tensor, Tensor]"


class Scaling:
    """Scales photos and answers on one device. Not for several threads at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._bicubic = lru_cache(KEPT)(partial(_bicubic, device))
        self._bilinear = lru_cache(KEPT)(partial(_bilinear, device))

    def fit(self, rgb: NDArray[np.uint8], size: int, padded: Callable[[int], int]) -> tuple[Tensor, int, int]:
        """As `trace_sdk.network_input.fit`: uint8 [H, W, 3] on the host → uint8 [h + bottom, w + right, 3] here."""
        import torch

        height, width = scaled_shape(rgb.shape[0], rgb.shape[1], size)
        if max(rgb.shape[:2]) > STRIP * size:  # a strip's filter would be longer than worth the memory
            rgb = fit(rgb, size, lambda side: side)[0]
        pixels = torch.from_numpy(rgb).to(self._device)
        for axis in WIDTH_FIRST:
            source, side = rgb.shape[axis], (height, width)[axis]
            if not source == side == padded(side):
                total = _summed(pixels, axis, self._bicubic(source, side, padded(side)))
                levels = (total + (1 << (FIXED_POINT - 1))) >> FIXED_POINT
                pixels = levels.clamp(0, 255).to(torch.uint8)
        return pixels, height, width

    def unfit(self, answer: Tensor, height: int, width: int, shape: tuple[int, ...]) -> Tensor:
        """As `trace_sdk.network_input.unfit`: float32 [h + bottom, w + right] → float32 of the photo's `shape`."""
        answer = answer[:height, :width]
        for axis in WIDTH_FIRST:
            if answer.shape[axis] != shape[axis]:
                answer = _summed(answer, axis, self._bilinear(answer.shape[axis], shape[axis])).float()
        return answer.clamp(0, 1)


def _summed(values: Tensor, axis: int, taps_and_weights: Filter) -> Tensor:
    """Σ over taps of `values` there × its weight, along `axis`; of the weights' dtype."""
    taps, weights = taps_and_weights
    shape = [*values.shape[:axis], taps.shape[1], *values.shape[axis + 1 :]]
    total = weights.new_zeros(shape)
    along = weights.view(*weights.shape, *[1] * (values.ndim - axis - 1))
    for tap, weight in zip(taps, along, strict=True):
        total += values.index_select(axis, tap) * weight  # two steps: addcmul would round once
    return total


def _bicubic(device: torch.device, source: int, scaled: int, out: int) -> Filter:
    """Keys' kernel with a = −1/2, weights as int32 in fixed point; the last result is repeated up to `out`."""

    def kernel(x: NDArray[np.float64]) -> NDArray[np.float64]:
        near = (1.5 * x - 2.5) * x * x + 1
        far = (((x - 5) * x + 8) * x - 4) * -0.5
        return np.where(x < 1, near, np.where(x < 2, far, 0.0))

    taps, shares = _filter(kernel, 2.0, source, scaled, out)
    fixed = shares * (1 << FIXED_POINT)
    return _on(device, taps, (fixed + np.copysign(0.5, fixed)).astype(np.int32))


def _bilinear(device: torch.device, source: int, scaled: int) -> Filter:
    """The triangle, weights as float64."""
    return _on(device, *_filter(lambda x: np.maximum(1 - x, 0.0), 1.0, source, scaled, scaled))


def _filter(
    kernel: Callable[[NDArray[np.float64]], NDArray[np.float64]], reach: float, source: int, scaled: int, out: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Of one axis, scaled from `source` to `scaled` samples and lengthened to `out` by repeating the last one."""
    scale = source / scaled
    stretch = max(scale, 1.0)
    support = reach * stretch
    centre = (np.minimum(np.arange(out), scaled - 1) + 0.5) * scale
    first = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    end = np.minimum((centre + support + 0.5).astype(np.int64), source)
    taps = first + np.arange((end - first).max())[:, None]
    shares = np.where(taps < end, kernel(np.abs((taps - centre + 0.5) * (1.0 / stretch))), 0.0)
    total: NDArray[np.float64] = sum(shares, np.zeros(out))  # tap by tap, as Pillow: numpy's own sum may go in pairs
    return np.minimum(taps, source - 1), shares / total


def _on(device: torch.device, taps: NDArray[np.int64], weights: NDArray[np.int32] | NDArray[np.float64]) -> Filter:
    import torch

    return torch.from_numpy(taps).to(device), torch.from_numpy(weights).to(device)
