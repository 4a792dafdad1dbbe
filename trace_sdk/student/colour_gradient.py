"""The colour gradient as a fixed layer: where the photo changes, which the decoder then weighs.

The same numbers as `evaluation.baselines.lab_gradient`, in torch so that they travel inside the engine.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIGMA = 2.0
SCALE = 5.0
FLOOR = 1e-3  # keeps the logarithm finite where a photo is flat; far below any visible contrast
_RGB_TO_XYZ = [[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]]
_WHITE = [0.95047, 1.0, 1.08883]  # D65, 2°
_LAB = [[0.0, 116.0, 0.0], [500.0, -500.0, 0.0], [0.0, 200.0, -200.0]]  # the −16 of L* has no gradient


class ColourGradient(nn.Module):
    """Image float [B, 3, H, W] in [−1, 1] → log-odds float [B, 1, H, W] of the colour gradient.

    g is the sum over CIE L*, a*, b* of the magnitudes of Gaussian derivatives (σ = 2 px), in Lab units per pixel.
    Its edge probability g / (g + 5) has the log-odds log(g / 5), which are returned.

    Args:
        step: 1; or 2 to take the gradient, in the same units, of the image at half its size: [B, 1, H/2, W/2], for a
            quarter of the time.
    """

    to_xyz: Tensor
    to_lab: Tensor
    across: Tensor
    down: Tensor

    def __init__(self, step: int = 1) -> None:
        super().__init__()
        sigma = SIGMA / step
        reach = int(4 * sigma + 0.5)
        x = torch.arange(-reach, reach + 1, dtype=torch.float64)
        smooth = torch.exp(-0.5 * (x / sigma).square())
        smooth = smooth / smooth.sum()
        slope = smooth * x / sigma**2 / step  # per pixel of the image at its own size
        # Each Lab channel becomes (slope, smooth) across, then (smooth, slope) down: its two derivatives.
        across, down = torch.stack([slope, smooth] * 3).float(), torch.stack([smooth, slope] * 3).float()
        xyz = torch.tensor(_RGB_TO_XYZ) / torch.tensor(_WHITE)[:, None]
        for name, value in {
            "to_xyz": xyz[:, :, None, None],
            "to_lab": torch.tensor(_LAB)[:, :, None, None],
            "across": across[:, None, None, :],
            "down": down[:, None, :, None],
        }.items():
            self.register_buffer(name, value, persistent=False)
        self.reach, self.step = reach, step

    def forward(self, images: Tensor) -> Tensor:
        if self.step > 1:
            images = F.avg_pool2d(images, self.step)
        srgb = (images.float() / 2 + 0.5).clamp(0, 1)
        linear = torch.where(srgb > 0.04045, ((srgb + 0.055) / 1.055).pow(2.4), srgb / 12.92)
        xyz = F.conv2d(linear, self.to_xyz)
        cube_root = torch.where(xyz > 0.008856, xyz.clamp(min=1e-6).pow(1 / 3), 7.787 * xyz + 16 / 116)
        lab = F.conv2d(cube_root, self.to_lab)
        lab = F.pad(lab, [self.reach] * 4, mode="replicate")
        derivatives = F.conv2d(F.conv2d(lab, self.across, groups=3), self.down, groups=6)
        power = derivatives.square()
        gradient = (power[:, 0::2] + power[:, 1::2]).clamp(min=1e-12).sqrt().sum(1, keepdim=True)
        return torch.log(gradient / SCALE + FLOOR)
