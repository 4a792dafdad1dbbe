"""What the student answers on held-out crops, as one picture: photo, labels, edges, edges above the threshold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from trace_sdk.pictures import save_png
from trace_sdk.student.labelled_images import LabelledImages
from trace_sdk.student.model import Student
from trace_sdk.teacher.plot import colour_labels

CROPS = 4


@torch.inference_mode()
def draw_validation(student: Student, images: LabelledImages, size: int, threshold: float, out: Path) -> None:
    """Write a PNG with a row for each of four crops of side `size`, the same crops at every step."""
    device = next(student.parameters()).device
    photos, labels, _ = images.batch(1 << 30, CROPS, size)
    edges = student.logits(photos.to(device)).sigmoid().cpu()
    shown = [
        ((photos.permute(0, 2, 3, 1) + 1) * 127.5).numpy(),
        colour_labels(labels.numpy().astype(np.int8)),
        np.repeat((edges * 255).numpy()[..., None], 3, 3),
        np.repeat((edges >= threshold).numpy()[..., None] * 255, 3, 3),
    ]
    rows = np.concatenate([np.asarray(column).round().astype(np.uint8) for column in shown], 2)
    save_png(Image.fromarray(np.concatenate(rows)), out)
