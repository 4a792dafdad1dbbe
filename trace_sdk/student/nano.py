"""The small convolutional student, for CPUs: no backbone, no attention, under a million parameters.

It never sees the teacher's attention: what it knows about instances is what the labels taught it. Like the large
student's decoder it answers with the colour gradient's log-odds plus what it has learnt to add.
"""

from __future__ import annotations

import hashlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from trace_sdk.backbones.checkpoint import write_tensors
from trace_sdk.errors import CheckpointError
from trace_sdk.student.colour_gradient import ColourGradient
from trace_sdk.student.record import read_record, recorded

WIDTHS = (16, 32, 64, 96, 128)  # channels at 1/2, 1/4 … 1/32 of the image's size
DEPTHS = (0, 1, 2, 4, 4)  # residual blocks at each
SMALLER = (2, 4)  # an answer is a mean over the image at its size, at a half and at a quarter
BY_SIDE = (4, 2, 1)  # how much each counts: as it has pixels a side


class NanoStudent(nn.Module):
    """Images float [B, 3, H, W] in [−1, 1], sides multiples of 32 → edge logits [B, H, W].

    An encoder from 1/2 to 1/32 of the size and back up, with an output at every scale on the way: the coarse ones
    are learnt from too, and only the finest is used. It learns on crops at one size and answers with a mean of the
    log-odds over an image pyramid: in a smaller picture less is texture, and less is to be seen. No layer takes
    statistics over the image.

    Args:
        threshold: probability above which a pixel counts as edge, calibrated by `distill_nano`.
    """

    family = "convolutional"
    decoder_name = "side-outputs"
    default_size = 512  # longest side that the network sees unless told otherwise, pixels
    max_size = 768  # longest side in one piece, pixels
    no_graph = ""
    multiple_of = 32
    min_size = 32

    def __init__(self, threshold: float = 0.5) -> None:
        super().__init__()
        self.threshold = threshold
        self.gradient = ColourGradient(step=2)
        self.stem = nn.Sequential(_conv(13, WIDTHS[0], 3), _conv(WIDTHS[0], WIDTHS[0], 3))
        pairs = list(pairwise(WIDTHS))
        self.down = nn.ModuleList(
            nn.Sequential(_conv(fine, coarse, 3, stride=2), *(_Block(coarse) for _ in range(depth)))
            for (fine, coarse), depth in zip(pairs, DEPTHS[1:], strict=True)
        )
        self.lateral = nn.ModuleList(_conv(coarse, fine, 1) for fine, coarse in pairs)
        self.refine = nn.ModuleList(
            _conv(fine, fine, 3) if scale == 0 else _Block(fine) for scale, (fine, _) in enumerate(pairs)
        )
        self.side = nn.ModuleList(nn.Conv2d(width, 1, 1) for width in WIDTHS[1:])
        self.head = nn.Conv2d(WIDTHS[0], 4, 3, padding=1)
        for value in self.head.parameters():
            nn.init.zeros_(value)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # learns a third faster on a CPU

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Edge logits [B, H, W] at this one size, and those of the coarser scales, [B, h, w] from 1/32 to 1/4."""
        gradient = self.gradient(images)
        scales = [self.stem(torch.cat([F.pixel_unshuffle(images, 2), gradient], 1))]
        for layer in self.down:
            scales.append(layer(scales[-1]))
        x = scales[-1]
        coarse = [self.side[-1](x).squeeze(1)]
        for scale in reversed(range(len(self.down))):
            finer = scales[scale]
            x = self.refine[scale](F.interpolate(self.lateral[scale](x), finer.shape[-2:]) + finer)
            if scale:
                coarse.append(self.side[scale - 1](x).squeeze(1))
        start = F.interpolate(gradient, scale_factor=2.0, mode="bilinear", align_corners=False)
        logits = start + F.pixel_shuffle(self.head(x), 2)
        return logits.squeeze(1), coarse

    def logits(self, images: Tensor, weights: tuple[float, float, float] = BY_SIDE) -> Tensor:
        """The answer: edge logits [B, H, W], the mean over the image pyramid.

        Args:
            weights: how much the image at its size, at a half and at a quarter count, in any unit.
        """
        first, *others = (sum(weights) / weight for weight in weights)
        answer: Tensor = self(images)[0][:, None] / first
        for smaller, part in zip(SMALLER, others, strict=True):
            logits = self(F.avg_pool2d(images, smaller))[0][:, None] / part
            answer = answer + F.interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=False)
        return answer[:, 0]

    @torch.no_grad()
    def raise_logits(self, by: float) -> None:
        """Add a constant to every answer."""
        self.head.bias.add_(by)  # type: ignore[union-attr]

    def weights_sha256(self) -> str:
        """sha256 over all weights, for engine metadata."""
        digest = hashlib.sha256()
        for _, value in sorted(self.state_dict().items()):
            digest.update(value.detach().cpu().numpy().tobytes())
        return digest.hexdigest()

    def save(self, folder: Path, about: dict[str, Any]) -> None:
        """Write `nano.safetensors` and `student.json`."""
        with recorded(folder, {"architecture": "nano", "threshold": self.threshold, **about}):
            write_tensors(folder / "nano.safetensors", self.state_dict())

    @classmethod
    def load(cls, folder: str | Path) -> NanoStudent:
        """Read what `save` wrote. Raises CheckpointError if a part is missing or corrupt."""
        folder = Path(folder)
        try:
            student = cls(float(read_record(folder)["threshold"]))
            student.load_state_dict(load((folder / "nano.safetensors").read_bytes()))
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(
                f"{folder} is not a whole nano student: {error}. Give the folder that `trace-sdk distill-nano -o` "
                "wrote."
            ) from error
        return student.eval()


class _Block(nn.Module):
    """Depthwise 5×5, then twice as wide and back, added to what came in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.change = nn.Sequential(
            nn.Conv2d(width, width, 5, padding=2, groups=width, bias=False),
            nn.BatchNorm2d(width),
            _conv(width, 2 * width, 1),
            nn.Conv2d(2 * width, width, 1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.change(x)
        return y


def _conv(inputs: int, outputs: int, side: int, stride: int = 1) -> nn.Sequential:
    """Convolution, normalisation, ReLU; an exporter folds the first two into one."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, side, stride, padding=side // 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )
