"""One-step distillation (paper 3.4): LoRA on the backbone and the decoder, trained together on ternary labels."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from trace_sdk.backbones.pixel import PixelBackbone
from trace_sdk.errors import ArgumentError, CheckpointError
from trace_sdk.student.calibrate import calibrate_threshold
from trace_sdk.student.labelled_images import LabelledImages
from trace_sdk.student.losses import dice_loss, graded_loss, reconstruction_loss
from trace_sdk.student.model import Student
from trace_sdk.training.crops import check_crops, draw_crops, step_generator
from trace_sdk.training.loop import Report, train_until
from trace_sdk.training.state import (
    check_same_run,
    load_state,
    optimizer_tensors,
    part,
    restore_optimizer,
    save_state,
)


@dataclass(frozen=True)
class DistillSettings:
    """What defines a distillation; a resumed run may only change `steps` and `learning_rate`.

    Attributes:
        steps: optimizer steps in all.
        lora_from: share of the steps after which LoRA joins; before it only the decoder learns, from a backbone
            that needs no backward pass.
        lora_rank: 0 leaves the backbone as it is.
        tokens: tokens a step; each step takes as many crops of its size as fit.
        sizes: crop sides in pixels, taken in turn at random.
        batches: how many different batches there are, taken in turn; 0 makes a new one for every step. Kept in
            memory together with their features as long as the backbone stands still, which saves its pass: at
            6,400 tokens about 11 MB a batch; seen on a CPU: 2.6 s a step at first, then 0.6 s.
        graded: weight of the graded term, see `losses`.
        reconstruction: weight of ‖I − Î‖².
    """

    steps: int = 1500
    lora_from: float = 0.5
    lora_rank: int = 64
    tokens: int = 16 * 1024
    sizes: tuple[int, ...] = (192, 256, 320)
    batches: int = 0
    learning_rate: float = 2e-3
    lora_learning_rate: float = 2e-4
    graded: float = 4.0
    reconstruction: float = 1.0
    seed: int = 0

    def check(self) -> None:
        """Raise ArgumentError naming the setting that is out of its range."""
        if self.steps < 1 or self.lora_rank < 0 or self.batches < 0 or not 0 <= self.lora_from <= 1:
            raise ArgumentError(
                "steps must be ≥ 1, LoRA rank and batches ≥ 0 and lora_from in [0, 1]; "
                f"got {self.steps}, {self.lora_rank}, {self.batches}, {self.lora_from}."
            )
        check_crops(self.sizes, self.tokens)


def distill(
    backbone: PixelBackbone,
    images: LabelledImages,
    out: Path,
    settings: DistillSettings,
    *,
    device: torch.device | str = "cpu",
    save_seconds: float = 120,
    report: Report = lambda step, losses: None,
) -> Student:
    """Train until `settings.steps`, going on from `out` if a run was cut there.

    Args:
        backbone: the teacher's backbone.
        images: photos with labels; each step's batch depends on (seed, step) alone.
        out: folder for the state and the finished student.
        save_seconds: how often the state is saved.
        report: called after each step with the steps done and the loss terms.

    Returns:
        The student with LoRA merged, as written to `out`.

    Raises:
        ArgumentError: a setting is out of range, or `out` holds a run of another shape.
        CheckpointError: the state in `out` cannot be read.
    """
    settings.check()
    trainer = _Trainer(backbone, images, settings, device)
    train_until(settings.steps, trainer, out, save_seconds, report)
    student = trainer.student
    student.merge_lora()
    student.eval()
    student.threshold = calibrate_threshold(student, images, settings.sizes[0])
    student.save(out, {"distilled_steps": trainer.step, "settings": asdict(settings)})
    return student


Batch = tuple[Tensor, Tensor, Tensor]
"""Images, snapped labels and graded edges; see `LabelledImages.batch`."""


class _Trainer:
    """Student, optimizer and step; all that a checkpoint must hold."""

    def __init__(
        self, backbone: PixelBackbone, images: LabelledImages, settings: DistillSettings, device: torch.device | str
    ) -> None:
        torch.manual_seed(settings.seed)
        self.images, self.settings, self.device, self.step = images, settings, torch.device(device), 0
        self.student = Student(backbone)
        self.student.add_lora(settings.lora_rank)
        self.student.to(self.device)
        self.known: dict[int, Batch] = {}  # by number
        self.read: dict[int, tuple[Tensor, Tensor]] = {}  # features and reconstruction of known batches
        self.lora = [value for value in self.student.backbone.parameters() if value.requires_grad]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": list(self.student.decoder.parameters()), "weight_decay": 1e-2},
                {"params": self.lora, "weight_decay": 0.0},
            ]
        )

    def batch(self, step: int) -> tuple[int, Batch]:
        """(number, images with labels); the number tells equal batches."""
        settings = self.settings
        number = step % settings.batches if settings.batches else step
        if number in self.known:
            return number, self.known[number]
        crops = draw_crops(settings.sizes, settings.tokens, step_generator(settings.seed, number))
        batch = self.images.batch(number, *crops)
        if settings.batches:
            self.known[number] = batch
        return number, batch

    def features(self, number: int, images: Tensor, *, joint: bool) -> tuple[Tensor, Tensor]:
        """The student's features and reconstruction; from memory while no LoRA changes them."""
        if joint:
            self.read.clear()
        if number in self.read:
            return self.read[number]
        with torch.autocast(self.device.type, torch.bfloat16), torch.set_grad_enabled(joint):
            answer = self.student.features(images)
        if self.settings.batches and not joint:
            self.read[number] = answer
        return answer

    def train(self, numbered: tuple[int, Batch]) -> dict[str, float]:
        number, batch = numbered
        images, labels, edges = (x.to(self.device) for x in batch)
        joint = bool(self.lora) and self.step >= self.settings.lora_from * self.settings.steps
        self.student.train()
        features, reconstruction = self.features(number, images, joint=joint)
        logits = self.student.decoder(features, images)
        dice = dice_loss(logits, labels)
        graded = graded_loss(logits, edges)
        rebuilt = reconstruction_loss(reconstruction, images)
        loss = dice + self.settings.graded * graded
        if joint:
            loss = loss + self.settings.reconstruction * rebuilt
        loss.backward()  # type: ignore[no-untyped-call]
        decay = min(1.0, 2 * (1 - self.step / self.settings.steps)) * min(1.0, (self.step + 1) / 50)
        for group, rate in zip(
            self.optimizer.param_groups,
            (self.settings.learning_rate, self.settings.lora_learning_rate),
            strict=True,
        ):
            group["lr"] = rate * decay
        nn.utils.clip_grad_norm_([v for v in self.student.parameters() if v.grad is not None], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return {"dice": dice.item(), "graded": graded.item(), "reconstruction": rebuilt.item()}

    def save(self, file: Path) -> None:
        tensors = {f"decoder.{name}": value for name, value in self.student.decoder.state_dict().items()}
        tensors |= {f"lora.{index}": value for index, value in enumerate(self.lora)}
        save_state(file, tensors | optimizer_tensors(self.optimizer, "optimizer"), self.step, asdict(self.settings))

    def restore(self, file: Path) -> None:
        tensors, step, settings = load_state(file)
        check_same_run(file, settings, asdict(self.settings), ("lora_rank", "batches", "seed"))
        try:
            self.student.decoder.load_state_dict(part(tensors, "decoder"))
            with torch.no_grad():
                for index, value in enumerate(self.lora):
                    value.copy_(tensors[f"lora.{index}"])
            restore_optimizer(self.optimizer, "optimizer", tensors)
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(f"{file} does not fit this run: {error}") from error
        self.step = step
