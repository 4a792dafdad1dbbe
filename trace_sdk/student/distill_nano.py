"""Distillation into the small convolutional student: the teacher's graded edges at every scale, nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from trace_sdk.errors import ArgumentError
from trace_sdk.student.calibrate import calibrate_threshold
from trace_sdk.student.colour_gradient import ColourGradient
from trace_sdk.student.labelled_images import LabelledImages, cut
from trace_sdk.student.nano import NanoStudent
from trace_sdk.student.snapping import GRADE
from trace_sdk.training.averaged import AveragedTraining
from trace_sdk.training.crops import step_generator
from trace_sdk.training.loop import Report, train_until

ZOOM = (0.7, 1.8)  # sides of the squares that become crops, as a multiple of the crop's
LONGEST = 800  # pixels; larger photos count as reduced to it
COARSE = 0.2  # weight of the mean loss of the coarser outputs


@dataclass(frozen=True)
class NanoSettings:
    """What defines a distillation; a resumed run may only change `steps` and `learning_rate`.

    Attributes:
        steps: optimizer steps in all.
        crops: crops a step.
        size: their side in pixels, a multiple of 32.
        held_out: share of the images that is not learnt from and on which the threshold is chosen.
    """

    steps: int = 3000
    crops: int = 8
    size: int = 224
    learning_rate: float = 3e-3
    held_out: float = 0.05
    seed: int = 0

    def check(self) -> None:
        """Raise ArgumentError naming the setting that is out of its range."""
        step = NanoStudent.multiple_of
        if self.steps < 1 or self.crops < 2 or self.size < step or self.size % step or not 0 < self.held_out < 1:
            raise ArgumentError(
                f"steps must be ≥ 1, crops ≥ 2, size a multiple of {step} and held_out between 0 and 1; got "
                f"{self.steps}, {self.crops}, {self.size}, {self.held_out}."
            )


def distill_nano(
    images: LabelledImages,
    out: Path,
    settings: NanoSettings,
    *,
    device: torch.device | str = "cpu",
    save_seconds: float = 120,
    report: Report = lambda step, losses: None,
) -> NanoStudent:
    """Train until `settings.steps`, going on from `out` if a run was cut there.

    What is learnt at each pixel is √(soft edge of the teacher's score) × colour gradient, see `snapping`; the coarser
    outputs learn the soft edge alone. Crops are mirrored, flipped and turned, seen at many scales, and change their
    exposure, colours and noise; the gradient is that of the changed crop. The student is the running average of the
    weights.

    Args:
        images: photos with labels; each step's batch depends on (seed, step) alone.
        out: folder for the state and the finished student.
        save_seconds: how often the state is saved.
        report: called after each step with the steps done and the loss terms.

    Raises:
        ArgumentError: a setting is out of range, or `out` holds a run of another shape.
        CheckpointError: the state in `out` cannot be read.
    """
    settings.check()
    learnt, held_out = images.split(settings.held_out)
    trainer = _Trainer(learnt, settings, device)
    train_until(settings.steps, trainer, out, save_seconds, report)
    student = trainer.training.average
    student.threshold, score = calibrate_threshold(student, held_out, settings.size)
    student.save(out, {"distilled_steps": trainer.step, "score": score, "settings": asdict(settings)})
    return student


class _Trainer:
    """Student, its running average, optimizer and step; all that a checkpoint must hold."""

    def __init__(self, images: LabelledImages, settings: NanoSettings, device: torch.device | str) -> None:
        torch.manual_seed(settings.seed)
        self.images, self.settings, self.device, self.step = images, settings, torch.device(device), 0
        self.training = AveragedTraining(NanoStudent().to(self.device), settings.learning_rate, settings.steps)
        self.gradient = ColourGradient().to(self.device)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Images float [B, 3, size, size] in [−1, 1] as the student sees them, and scores [B, size, size]."""
        rng = np.random.default_rng([self.settings.seed, step])
        images, scores = zip(*self._crops(rng), strict=True)
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
        return change_light(pixels, step_generator(self.settings.seed, step)), torch.from_numpy(np.stack(scores))

    def _crops(self, rng: np.random.Generator) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.float32]]]:
        for _ in range(self.settings.crops):
            image, file = self.images.pairs[rng.integers(len(self.images.pairs))]
            width, height = self.images.size(image)
            zoom = math.exp(rng.uniform(*np.log(ZOOM))) * max(1.0, max(width, height) / LONGEST)
            side = min(width, height, round(self.settings.size * zoom))
            left, top = int(rng.integers(0, width - side + 1)), int(rng.integers(0, height - side + 1))
            pixels, _, scores = cut(image, file, (left, top, side), bool(rng.random() < 0.5), self.settings.size)
            if rng.random() < 0.25:
                pixels, scores = pixels[::-1], scores[::-1]
            if rng.random() < 0.25:
                pixels, scores = pixels.swapaxes(0, 1), scores.T
            yield pixels, scores

    def train(self, batch: tuple[Tensor, Tensor]) -> dict[str, float]:
        images, scores = (x.to(self.device) for x in batch)
        student = self.training.model.train()
        soft = torch.sigmoid(GRADE * (scores - 1))
        graded = soft.sqrt() * self.gradient(images).squeeze(1).sigmoid()
        logits, coarse = student(images)
        fine = F.binary_cross_entropy_with_logits(logits, graded)
        sides = torch.stack(
            [
                F.binary_cross_entropy_with_logits(side, F.adaptive_avg_pool2d(soft[:, None], side.shape[-2:])[:, 0])
                for side in coarse
            ]
        ).mean()
        self.training.step(fine + COARSE * sides, self.step)
        self.step += 1
        return {"graded": fine.item(), "coarse": sides.item()}

    def save(self, file: Path) -> None:
        self.training.save(file, self.step, asdict(self.settings))

    def restore(self, file: Path) -> None:
        self.step = self.training.restore(file, asdict(self.settings), ("crops", "size", "held_out", "seed"))


def change_light(images: Tensor, generator: torch.Generator) -> Tensor:
    """Other exposure, white balance, contrast, saturation and noise for each of images [B, 3, H, W] in [−1, 1]."""

    def draw(low: float, high: float, channels: int = 1) -> Tensor:
        return torch.empty(len(images), channels, 1, 1).uniform_(low, high, generator=generator)

    light = (images / 2 + 0.5).clamp(1e-3, 1) ** draw(-0.25, 0.25).exp() * draw(-0.12, 0.12, 3).exp()
    mean = light.mean((1, 2, 3), keepdim=True)
    light = mean + (light - mean) * draw(0.75, 1.2)
    grey = light.mean(1, keepdim=True)
    light = grey + (light - grey) * draw(0.5, 1.3)
    light = light + torch.randn(light.shape, generator=generator) * draw(0, 0.015)
    return light.clamp(0, 1) * 2 - 1
