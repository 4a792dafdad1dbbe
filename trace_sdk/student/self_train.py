"""Self-training: a student becomes better by scenes of its own cut-outs, whose outlines it need not guess.

The teacher's labels, and so the student, draw texture as well, and draw weakly where two things look alike. What the
student cuts out of one photo and what is pasted over another has an outline that is known exactly. Elsewhere in the
scene the student as it was is believed in part: real edges are there, too; less so inside of what was pasted, where
most are texture and parts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trace_sdk.errors import ArgumentError
from trace_sdk.student.calibrate import rise_to_mean, threshold_on_scenes
from trace_sdk.student.combined import CombinedStudent
from trace_sdk.student.decoder import EdgeDecoder
from trace_sdk.student.distill_nano import change_light
from trace_sdk.student.folder import AnyStudent
from trace_sdk.student.losses import reconstruction_loss
from trace_sdk.student.model import Student
from trace_sdk.student.nano import NanoStudent
from trace_sdk.student.own_scenes import OwnScenes, Scenes
from trace_sdk.training.averaged import AveragedTraining
from trace_sdk.training.crops import step_generator
from trace_sdk.training.loop import Report, train_until

BELIEVED = 0.4  # share of the student's own edge probability that it learns where nothing was pasted
BELIEVED_INSIDE = 0.1  # and inside of what was
CALIBRATION = 1 << 30  # steps that training never reaches


@dataclass(frozen=True)
class SelfTrainSettings:
    """What defines a run; a resumed run may only change `steps` and `learning_rate`.

    Attributes:
        steps: optimizer steps in all.
        crops: scenes a step. size: their side in pixels, a multiple of what the student's sides are multiples of.
        lora_rank: of LoRA on the backbone, if the student has one, which then learns with the decoder; 0 leaves it as
            it is.
    """

    steps: int = 1500
    crops: int = 8
    size: int = 224
    lora_rank: int = 0
    learning_rate: float = 2e-3
    seed: int = 0

    def check(self, student: AnyStudent) -> None:
        """Raise ArgumentError naming the setting that is out of its range or does not suit the student."""
        step = student.multiple_of
        if self.steps < 1 or self.crops < 2 or self.size < student.min_size or self.size % step:
            raise ArgumentError(
                f"steps must be ≥ 1, crops ≥ 2, size a multiple of {step} from {student.min_size}; got {self.steps}, "
                f"{self.crops}, {self.size}."
            )
        if isinstance(student, CombinedStudent):
            raise ArgumentError("A combined student does not train itself: train its parts, then combine them.")
        if self.lora_rank < 0 or (self.lora_rank and not isinstance(student, Student)):
            raise ArgumentError(
                f"A LoRA rank of {self.lora_rank} does not suit this student: it is ≥ 0, and 0 without a backbone."
            )


def self_train(
    student: AnyStudent,
    scenes: OwnScenes,
    out: Path,
    settings: SelfTrainSettings,
    *,
    device: torch.device | str = "cpu",
    save_seconds: float = 120,
    workers: int = 0,
    report: Report = lambda step, losses: None,
) -> AnyStudent:
    """Train until `settings.steps`, going on from `out` if a run was cut there.

    Of a student with a backbone the decoder learns, and LoRA if it is asked for. The threshold is chosen on scenes that
    were not learnt from.

    Args:
        student: where to start.
        out: folder for the state and the finished student.
        workers: processes that prepare scenes, see `train_until`.

    Raises:
        ArgumentError: a setting is out of range or does not suit the student, or `out` holds a run of another shape.
        CheckpointError: the state in `out` cannot be read.
    """
    settings.check(student)
    assert not isinstance(student, CombinedStudent)
    trainer = _Trainer(student.to(device), scenes, settings, device)
    train_until(settings.steps, trainer, out, save_seconds, report, workers)
    better = trainer.finished()
    better.save(out, {"self_trained_steps": trainer.step, "settings": asdict(settings)})
    return better


def calibrate(before: NanoStudent, after: NanoStudent, scenes: OwnScenes, settings: SelfTrainSettings) -> None:
    """Make a student as sure as the one that it was made of, and choose its threshold, both as `self_train` does."""
    trainer = _Trainer(before, scenes, settings, "cpu")
    trainer.training.average = after.eval()
    after.threshold = trainer.calibrate()


class _Trainer:
    """What learns: all of a convolutional student; the decoder of one with a backbone, or all with LoRA.

    As it was and as it becomes.
    """

    def __init__(
        self, student: Student | NanoStudent, scenes: OwnScenes, settings: SelfTrainSettings, device: torch.device | str
    ) -> None:
        torch.manual_seed(settings.seed)
        self.student, self.scenes, self.settings = student, scenes, settings
        self.record = asdict(settings) | {"student": student.weights_sha256()}  # where it began
        self.device, self.step = torch.device(device), 0
        learner: nn.Module = student
        if isinstance(student, Student) and not settings.lora_rank:
            learner = student.decoder
        self.before = copy.deepcopy(learner).eval().requires_grad_(False)
        careful: list[Tensor] = []
        learner.requires_grad_(True)
        if isinstance(student, Student) and settings.lora_rank:
            student.add_lora(settings.lora_rank)
            student.to(self.device)
            careful = [value for value in student.backbone.denoiser.parameters() if value.requires_grad]
        self.training = AveragedTraining(learner, settings.learning_rate, settings.steps, careful)

    def batch(self, step: int) -> Scenes:
        scenes = self.scenes.batch(step, self.settings.crops, self.settings.size)
        return scenes._replace(images=change_light(scenes.images, step_generator(self.settings.seed, step)))

    def train(self, batch: Scenes) -> dict[str, float]:
        images, plain, ridges, inside = (x.to(self.device) for x in batch)
        with torch.no_grad():
            before = self._answers(plain)(self.before)
        self.rebuilt = torch.zeros((), device=self.device)
        logits = self._answers(images)(self.training.model.train())
        share = torch.where(inside, BELIEVED_INSIDE, BELIEVED)
        believed = share * before.sigmoid() * (1 - ridges)
        loss = F.binary_cross_entropy_with_logits(logits, torch.maximum(ridges, believed))
        self.training.step(loss + self.rebuilt, self.step)
        self.step += 1
        terms = {"loss": loss.item()}
        return terms | {"reconstruction": self.rebuilt.item()} if self.settings.lora_rank else terms

    def _answers(self, images: Tensor, *, pyramid: bool = False) -> Callable[[nn.Module], Tensor]:
        """Logits of a learner for these images; a backbone that stands still runs once for all, in bf16.

        A convolutional student learns at the one size of the images, and is calibrated as it answers, over the pyramid.
        """
        if not isinstance(self.student, Student):
            return lambda learner: learner.logits(images) if pyramid else learner(images)[0]  # type: ignore[operator]
        if self.settings.lora_rank:
            return lambda learner: self._attend(learner, images)  # type: ignore[arg-type]
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16):
            maps = [features.float() for features in self.student.maps(images)]
        return lambda decoder: decoder(maps, images)

    def _attend(self, student: Student, images: Tensor) -> Tensor:
        """Logits; of a student that learns with its LoRA, `rebuilt` becomes ‖I − Î‖²."""
        with torch.autocast(self.device.type, torch.bfloat16):
            if student.training:
                clean = student.encode(images)
                maps, answer = student.features(clean)
                self.rebuilt = reconstruction_loss(answer, student.reconstruction_target(clean, None))
            else:
                maps = student.maps(images)
        logits: Tensor = student.decoder([features.float() for features in maps], images)
        return logits

    def finished(self) -> Student | NanoStudent:
        """The student with the averaged weights, as sure of photos as it was, and a threshold for it."""
        threshold, average = self.calibrate(), self.training.average
        if isinstance(self.student, Student) and isinstance(average, EdgeDecoder):
            self.student.decoder = average
        elif isinstance(average, Student):
            average.merge_lora()
            self.student = average
        elif isinstance(average, NanoStudent):
            self.student = average
        self.student.threshold = threshold
        return self.student

    @torch.inference_mode()
    def calibrate(self, batches: int = 6) -> float:
        """Make the average as sure of photos as the student was, and find its threshold, see `threshold_on_scenes`.

        Where nothing was pasted it learnt a share of the edges it had, which sets outlines apart: all log-odds are
        raised alike until those pixels have the mean probability that they had. Both on scenes that were not learnt
        from. Where nothing was pasted and the student before drew an edge, nobody knows: left out of the F-measure.
        """
        parts: list[tuple[Tensor, ...]] = []
        for step in range(batches):
            _, plain, ridges, inside = (x.to(self.device) for x in self.batch(CALIBRATION + step))
            answers = self._answers(plain, pyramid=True)
            parts.append((answers(self.before), answers(self.training.average), ridges, inside))
        before, logits, ridges, inside = (torch.cat(values) for values in zip(*parts, strict=True))
        photo = ~inside & (ridges == 0)
        rise = rise_to_mean(logits[photo], float(before[photo].sigmoid().mean()))
        average = self.training.average
        (average.decoder if isinstance(average, Student) else average).raise_logits(rise)  # type: ignore[operator]
        outline = ridges > 0.5
        known = outline | (before.sigmoid() < self.student.threshold)
        return threshold_on_scenes((logits + rise).sigmoid(), outline, known)

    def save(self, file: Path) -> None:
        self.training.save(file, self.step, self.record)

    def restore(self, file: Path) -> None:
        self.step = self.training.restore(file, self.record, ("crops", "size", "lora_rank", "seed", "student"))
