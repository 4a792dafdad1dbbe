"""Edge detectors without learning, measured beside every engine: a figure without them is not a result."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

CANNY_SIGMA = 2.0
CANNY_SETTINGS = 24
CANNY_LOW_TO_HIGH = 0.4
LAB_SIGMA = 2.0
LAB_SCALE = 5.0


def canny(rgb: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Canny's detector (TPAMI 1986) as a soft map.

    The detector runs on grey values in [0, 1] smoothed by a Gaussian of σ = 2 px, at 24 pairs of absolute
    hysteresis thresholds: high from 0.01 to 0.6 in a geometric series, low = 0.4 · high. A pixel that
    survives up to setting k of 24 has the value k / 24.

    Args:
        rgb: uint8 [H, W, 3].

    Returns:
        float32 [H, W] in [0, 1].
    """
    from skimage import feature
    from skimage.color import rgb2gray

    grey = rgb2gray(rgb)
    survived = np.zeros(grey.shape, np.int64)
    for setting, high in enumerate(np.geomspace(0.01, 0.6, CANNY_SETTINGS), start=1):
        low = CANNY_LOW_TO_HIGH * high
        edges = feature.canny(grey, CANNY_SIGMA, low, high)  # type: ignore[no-untyped-call]
        survived[edges] = setting
    return (survived / CANNY_SETTINGS).astype(np.float32)


def lab_gradient(rgb: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Colour gradient: magnitudes of Gaussian derivatives (σ = 2 px) of CIE L*, a* and b*, summed.

    The sum g, in Lab units per pixel, is mapped to g / (g + 5), a fixed scale: one threshold means the same
    contrast on every image.

    Args:
        rgb: uint8 [H, W, 3].

    Returns:
        float32 [H, W] in [0, 1).
    """
    from scipy.ndimage import gaussian_gradient_magnitude
    from skimage.color import rgb2lab

    lab = rgb2lab(rgb)
    gradient = sum(gaussian_gradient_magnitude(lab[..., c], LAB_SIGMA, mode="nearest") for c in range(3))
    return np.asarray(gradient / (gradient + LAB_SCALE), np.float32)
