"""One-step distillation (paper 3.4): LoRA on the backbone and the decoder, trained together on ternary labels.

One process, or several that Hugging Face accelerate started: each takes its part of every batch, see
`training.processes`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trace_sdk.backbones.backbone import Backbone
from trace_sdk.errors import ArgumentError
from trace_sdk.student.calibrate import calibrate_threshold
from trace_sdk.student.labelled_images import LabelledImages
from trace_sdk.student.look import draw_validation
from trace_sdk.student.losses import dice_loss, graded_loss, reconstruction_loss
from trace_sdk.student.model import Student
from trace_sdk.training.crops import check_crops, draw_crops, step_generator
from trace_sdk.training.loop import Report, train_until
from trace_sdk.training.processes import average_gradients, join_processes, process_count, process_index, wait_for_all
from trace_sdk.training.state import (
    check_same_run,
    fitting,
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
        blocks: numbers of the self-attention blocks that the decoder reads, None for all; the student ends after the
            last of them.
        tokens: 8×8 px tokens a step; each step takes as many crops of its size as fit.
        sizes: crop sides in pixels, taken in turn at random; multiples of the backbone's.
        batches: how many different batches there are, taken in turn; 0 makes a new one for every step. Kept in
            memory together with their features as long as the backbone stands still, which saves its pass: at
            6,400 tokens about 11 MB a batch; seen on a CPU: 2.6 s a step at first, then 0.6 s.
        graded: weight of the graded term, see `losses`.
        reconstruction: weight of ‖I − Î‖².
        precision: of the backbone's arithmetic, "bf16" or "fp32"; the decoder's is fp32 in both.
        accumulate: parts that a step's batch goes through the model in, to need less memory. Dice, and the decoder's
            normalisation, are then of each part, so that the curve is not quite that of the whole.
        checkpointing: compute the activations of the backbone's blocks again in the backward pass, rather than
            keep them.
        validate_every: steps between two scores on held-out images.
    """

    steps: int = 1500
    lora_from: float = 0.5
    lora_rank: int = 64
    blocks: tuple[int, ...] | None = None
    tokens: int = 16 * 1024
    sizes: tuple[int, ...] = (192, 256, 320)
    batches: int = 0
    learning_rate: float = 2e-3
    lora_learning_rate: float = 2e-4
    graded: float = 4.0
    reconstruction: float = 1.0
    precision: str = "bf16"
    accumulate: int = 1
    checkpointing: bool = False
    validate_every: int = 100
    seed: int = 0

    def check(self) -> None:
        """Raise ArgumentError naming the setting that is out of its range."""
        if self.steps < 1 or self.lora_rank < 0 or self.batches < 0 or not 0 <= self.lora_from <= 1:
            raise ArgumentError(
                "steps must be ≥ 1, LoRA rank and batches ≥ 0 and lora_from in [0, 1]; "
                f"got {self.steps}, {self.lora_rank}, {self.batches}, {self.lora_from}."
            )
        if self.precision not in ("bf16", "fp32"):
            raise ArgumentError(f"precision must be 'bf16' or 'fp32', got {self.precision!r}.")
        if self.accumulate < 1 or self.validate_every < 1:
            raise ArgumentError(
                f"accumulate and validate_every must be at least 1, got {self.accumulate} and {self.validate_every}."
            )
        if self.blocks == ():
            raise ArgumentError("blocks must name at least one block, or be None for all.")


def distill(
    backbone: Backbone,
    images: LabelledImages,
    out: Path,
    settings: DistillSettings,
    *,
    held_out: LabelledImages | None = None,
    device: torch.device | str = "cpu",
    save_seconds: float = 120,
    workers: int = 0,
    report: Report = lambda step, losses: None,
) -> Student:
    """Train until `settings.steps`, going on from `out` if a run was cut there.

    Args:
        backbone: the teacher's backbone, with bf16 weights where they are many; LoRA and decoder are fp32.
        images: photos with labels; each step's batch depends on (seed, step) alone.
        out: folder for the state, the curves (`curves.csv`, `curves.png`) and the finished student.
        held_out: labelled images that are not learnt from. The student is then the one of the step with the best
            score on them: its edges' F-measure against the snapped labels at the best threshold. What it saw and
            answered at each of these steps is drawn in `validation/`.
        save_seconds: how often the state is saved.
        workers: processes that prepare batches, see `train_until`.
        report: called after each step with the steps done and the loss terms.

    Returns:
        The student with LoRA merged, as written to `out`.

    Raises:
        ArgumentError: a setting is out of range, or `out` holds a run of another shape.
        CheckpointError: the state in `out` cannot be read.
    """
    settings.check()
    trainer = _Trainer(backbone, images, settings, join_processes(torch.device(device)), out, held_out)
    train_until(settings.steps, trainer, out, save_seconds, report, workers)
    about: dict[str, Any] = {"distilled_steps": trainer.step, "settings": asdict(settings)}
    if held_out:
        if trainer.best_score < 0:  # a run that had done all its steps before, with other held-out images or without
            trainer.validate(held_out)
        about |= trainer.take_best()
    student = trainer.student.eval()
    student.threshold, _ = calibrate_threshold(student, held_out or images, settings.sizes[0])
    student.merge_lora()
    if process_index() == 0:
        student.save(out, about)
    return student


BEST = "best.safetensors"

Batch = tuple[Tensor, Tensor, Tensor]
"""Images, snapped labels and graded edges; see `LabelledImages.batch`."""

Part = tuple[float, Batch]
"""The share of a step's batch that this part is over all processes, and what this process has of it."""


Read = tuple[list[Tensor], Tensor, Tensor]
"""Features of each block, the backbone's answer, and what it is to be; see `Student.features`."""


class _Trainer:
    """Student, optimizer and step; all that a checkpoint must hold."""

    def __init__(
        self,
        backbone: Backbone,
        images: LabelledImages,
        settings: DistillSettings,
        device: torch.device,
        out: Path,
        held_out: LabelledImages | None,
    ) -> None:
        check_crops(settings.sizes, settings.tokens, backbone.multiple_of, backbone.min_size)
        parts = process_count() * settings.accumulate
        if draw_crops((max(settings.sizes),), settings.tokens, step_generator(0, 0))[0] < parts:
            raise ArgumentError(
                f"{settings.tokens} tokens a step do not hold a crop of {max(settings.sizes)} px for each of {parts} "
                f"parts ({process_count()} processes × {settings.accumulate}). Raise --tokens."
            )
        torch.manual_seed(settings.seed)
        self.images, self.settings, self.device, self.step = images, settings, device, 0
        self.record = asdict(settings) | {"backbone": backbone.identity}
        self.out, self.held_out, self.best_score = out, held_out, -1.0
        self.student = Student(backbone, blocks=settings.blocks)
        self.student.add_lora(settings.lora_rank)
        if settings.checkpointing:
            self.student.checkpoint_activations()
        self.student.to(self.device)
        self.known: dict[int, list[Part]] = {}  # by number
        self.read: dict[tuple[int, int], Read] = {}  # of known parts
        self.lora = [value for value in self.student.backbone.denoiser.parameters() if value.requires_grad]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": list(self.student.decoder.parameters()), "weight_decay": 1e-2},
                {"params": self.lora, "weight_decay": 0.0},
            ]
        )

    def batch(self, step: int) -> tuple[int, list[Part]]:
        """(number, this process's images with labels, part by part); the number tells equal batches."""
        settings = self.settings
        number = step % settings.batches if settings.batches else step
        if number in self.known:
            return number, self.known[number]
        count, size = draw_crops(settings.sizes, settings.tokens, step_generator(settings.seed, number))
        parts: list[Part] = []
        for whole in np.array_split(np.arange(count), settings.accumulate):
            own = np.array_split(whole, process_count())[process_index()]
            parts.append((len(whole) / count, self.images.batch(number, count, size, own.tolist())))
        if settings.batches:
            self.known[number] = parts
        return number, parts

    def features(self, key: tuple[int, int], images: Tensor, *, joint: bool) -> Read:
        """What a pass over the images gives; from memory while no LoRA changes it."""
        if joint:
            self.read.clear()
        if key in self.read:
            return self.read[key]
        reduced = self.settings.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=reduced), torch.set_grad_enabled(joint):
            clean = self.student.encode(images)
            maps, answer = self.student.features(clean)
            read = maps, answer, self.student.reconstruction_target(clean, None if joint else answer)
        if self.settings.batches and not joint:
            self.read[key] = read
        return read

    def train(self, numbered: tuple[int, list[Part]]) -> dict[str, float]:
        number, parts = numbered
        joint = bool(self.lora) and self.step >= self.settings.lora_from * self.settings.steps
        self.student.decoder.train()
        terms = {"dice": 0.0, "graded": 0.0, "reconstruction": 0.0}
        for index, (share, batch) in enumerate(parts):
            images, labels, edges = (x.to(self.device) for x in batch)
            maps, answer, target = self.features((number, index), images, joint=joint)
            logits = self.student.decoder(maps, images)
            dice = dice_loss(logits, labels)
            graded = graded_loss(logits, edges)
            rebuilt = reconstruction_loss(answer, target)
            loss = dice + self.settings.graded * graded
            if joint:
                loss = loss + self.settings.reconstruction * rebuilt
            (share * loss).backward()  # type: ignore[no-untyped-call]
            for name, term in zip(terms, (dice, graded, rebuilt), strict=True):
                terms[name] += share * term.item()
        decay = min(1.0, 2 * (1 - self.step / self.settings.steps)) * min(1.0, (self.step + 1) / 50)
        for group, rate in zip(
            self.optimizer.param_groups,
            (self.settings.learning_rate, self.settings.lora_learning_rate),
            strict=True,
        ):
            group["lr"] = rate * decay
        learning = [value for value in self.student.parameters() if value.grad is not None]
        average_gradients(learning)
        nn.utils.clip_grad_norm_(learning, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self.held_out and (self.step % self.settings.validate_every == 0 or self.step == self.settings.steps):
            terms["score"] = self.validate(self.held_out)
        return terms

    def validate(self, held_out: LabelledImages) -> float:
        """The score on held-out images; the state with the best one is kept beside the latest."""
        self.student.eval()
        size = self.settings.sizes[0]
        threshold, score = calibrate_threshold(self.student, held_out, size)
        if process_index() == 0:
            draw_validation(self.student, held_out, size, threshold, self.out / f"validation/{self.step:06}.png")
            if score > self.best_score:
                save_state(
                    self.out / BEST, self.weights(), self.step, {"score": score, "held_out": held_out.names_sha256()}
                )
        self.best_score = max(score, self.best_score)
        return score

    def take_best(self) -> dict[str, float]:
        """Go back to the weights with the best score; returns that score and their step."""
        wait_for_all()
        tensors, step, about = load_state(self.out / BEST)
        self.put(tensors)
        return {"best_step": step, "score": about["score"]}

    def weights(self) -> dict[str, Tensor]:
        """What is learnt, by name."""
        tensors = {f"decoder.{name}": value for name, value in self.student.decoder.state_dict().items()}
        return tensors | {f"lora.{index}": value for index, value in enumerate(self.lora)}

    def put(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `weights` gave."""
        self.student.decoder.load_state_dict(part(tensors, "decoder"))
        with torch.no_grad():
            for index, value in enumerate(self.lora):
                value.copy_(tensors[f"lora.{index}"])

    def save(self, file: Path) -> None:
        save_state(file, self.weights() | optimizer_tensors(self.optimizer, "optimizer"), self.step, self.record)

    def restore(self, file: Path) -> None:
        tensors, step, before = load_state(file)
        check_same_run(file, before, self.record, ("lora_rank", "blocks", "batches", "seed", "backbone"))
        with fitting(file):
            self.put(tensors)
            restore_optimizer(self.optimizer, "optimizer", tensors)
        self.step = step
        if self.held_out and (file.parent / BEST).is_file():
            about = load_state(file.parent / BEST)[2]
            if about.get("held_out") == self.held_out.names_sha256():  # scores on other images compare with none
                self.best_score = about["score"]
