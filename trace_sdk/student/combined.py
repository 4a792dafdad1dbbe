"""Two students that answer as one: attention says between what, a convolutional network looks at twice the size."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trace_sdk.backbones.backbone import StudentBackbone
from trace_sdk.errors import ArgumentError, CheckpointError
from trace_sdk.network_input import padded_length
from trace_sdk.student.model import Student
from trace_sdk.student.nano import NanoStudent
from trace_sdk.student.record import read_record, recorded

SMALLER = 2  # the backbone, whose cost grows with the square of the pixels, sees the image at half its size
ALIKE = (1, 1, 1)  # weights of the image pyramid: at this larger size its half shows as much as its whole
SHARE = 0.7  # of the convolutional student in the answer, unless told otherwise


class CombinedStudent(nn.Module):
    """Images float [B, 3, H, W] in [−1, 1], sides as `multiple_of` and `min_size` say → edge logits [B, H, W].

    The weighted mean of the log-odds of both; its threshold is that of theirs.

    Args:
        attending: a student with a backbone. looking: a convolutional one.
        share: weight of the convolutional one, in [0, 1].

    Raises:
        ArgumentError: `share` is out of range.
    """

    decoder_name = f"{Student.decoder_name} + {NanoStudent.decoder_name}"

    def __init__(self, attending: Student, looking: NanoStudent, share: float = SHARE) -> None:
        super().__init__()
        if not 0 <= share <= 1:
            raise ArgumentError(f"share={share} must be in [0, 1].")
        self.attending, self.looking, self.share = attending, looking, share
        thresholds = torch.tensor([attending.threshold, looking.threshold], dtype=torch.float64).logit()
        self.threshold = float(thresholds[0].lerp(thresholds[1], share).sigmoid())
        self.multiple_of = math.lcm(SMALLER * attending.multiple_of, looking.multiple_of)
        least = max(SMALLER * attending.min_size, looking.min_size)
        self.min_size = padded_length(least, self.multiple_of, self.multiple_of)
        self.default_size = SMALLER * attending.default_size // self.multiple_of * self.multiple_of
        self.max_size = SMALLER * attending.max_size // self.multiple_of * self.multiple_of

    @property
    def backbone(self) -> StudentBackbone:
        """Of the attending student."""
        return self.attending.backbone

    @property
    def family(self) -> str:
        """Of the backbone."""
        return self.attending.family

    @property
    def no_graph(self) -> str:
        """Why it cannot be exported; empty if it can."""
        return self.attending.no_graph

    def weights_sha256(self) -> str:
        """Of the backbone, for engine metadata."""
        return self.attending.weights_sha256()

    def logits(self, images: Tensor, *, share_softmax: bool = False) -> Tensor:
        """The edge logits, [B, H, W]."""
        smaller = self.attending.logits(F.avg_pool2d(images, SMALLER), share_softmax=share_softmax)[:, None]
        attending = F.interpolate(smaller, images.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
        return torch.lerp(attending, self.looking.logits(images, ALIKE), self.share)

    def save(self, folder: Path, about: dict[str, Any]) -> None:
        """Write `attending/`, `looking/` and `student.json`."""
        with recorded(folder, {"architecture": "combined", "share": self.share, **about}):
            self.attending.save(folder / "attending", {})
            self.looking.save(folder / "looking", {})

    @classmethod
    def load(cls, folder: str | Path) -> CombinedStudent:
        """Read what `save` wrote. Raises CheckpointError if a part is missing or corrupt."""
        folder = Path(folder)
        try:
            share = float(read_record(folder)["share"])
            return cls(Student.load(folder / "attending"), NanoStudent.load(folder / "looking"), share).eval()
        except (OSError, ValueError, KeyError, TypeError, CheckpointError, ArgumentError) as error:
            raise CheckpointError(
                f"{folder} is not a whole combined student: {error} Make it again with `trace-sdk combine`."
            ) from error
