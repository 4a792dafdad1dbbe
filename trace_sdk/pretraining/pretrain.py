"""Pretraining a pixel backbone: flow matching with x-prediction on photos and composed scenes (DESIGN section 5)."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from trace_sdk.backbones.pixel import PixelBackbone
from trace_sdk.errors import ArgumentError
from trace_sdk.pretraining.training_images import TrainingImages
from trace_sdk.training.crops import check_crops, draw_crops, step_generator
from trace_sdk.training.loop import Report, train_until
from trace_sdk.training.state import (
    check_same_run,
    fitting,
    load_state,
    optimizer_tensors,
    part,
    restore_optimizer,
    save_state,
)

CHANGEABLE = ("steps", "learning_rate")  # of a run that goes on


@dataclass(frozen=True)
class PretrainSettings:
    """What defines a run; a resumed run may only change those of `CHANGEABLE`: how long, and how fast.

    Attributes:
        layers, heads: single-stream blocks, and heads of width 64 in each.
        steps: optimizer steps in all; the last `decay` of them fall linearly to 0.
        tokens: tokens a step; each step takes as many crops of its size as fit.
        sizes: crop sides in pixels, taken in turn at random.
        optimizer: "adamw", or "muon" (block matrices by Muon, the rest by AdamW).
    """

    layers: int = 12
    heads: int = 6
    steps: int = 4300
    tokens: int = 256 * 1024
    sizes: tuple[int, ...] = (256,)
    optimizer: str = "adamw"
    learning_rate: float = 7e-4
    weight_decay: float = 0.01
    warmup: int = 300
    decay: float = 0.35
    ema: float = 0.999
    seed: int = 0

    def check(self) -> None:
        """Raise ArgumentError naming the setting that is out of its range."""
        if self.steps < 1:
            raise ArgumentError(f"steps must be at least 1, got {self.steps}.")
        if self.layers < 1 or self.heads < 1 or self.warmup < 1 or not 0 <= self.ema < 1:
            raise ArgumentError(
                "layers, heads and warmup must be ≥ 1 and ema in [0, 1); "
                f"got {self.layers}, {self.heads}, {self.warmup}, {self.ema}."
            )
        check_crops(self.sizes, self.tokens)
        if self.optimizer not in ("adamw", "muon"):
            raise ArgumentError(f"optimizer must be 'adamw' or 'muon', got {self.optimizer!r}.")


def pretrain(
    images: TrainingImages,
    out: Path,
    settings: PretrainSettings,
    *,
    start: Path | None = None,
    device: torch.device | str = "cpu",
    save_seconds: float = 120,
    workers: int = 0,
    report: Report = lambda step, losses: None,
) -> PixelBackbone:
    """Train until `settings.steps`, going on from `out` if a run was cut there.

    Args:
        images: what to train on; each step's batch depends on (seed, step) alone.
        out: folder for the state (`state.safetensors`), the curves (`curves.csv`) and the EMA weights in diffusers'
            own format.
        start: folder of weights to start a new run from.
        save_seconds: how often the state is saved.
        workers: processes that prepare batches, see `train_until`.
        report: called after each step with the steps done and {"loss": …}.

    Returns:
        The backbone with averaged (EMA) weights.

    Raises:
        ArgumentError: a setting is out of range, or `out` holds a run of another shape.
        CheckpointError: `start` or the state in `out` cannot be read.
    """
    settings.check()
    trainer = _Trainer(images, settings, start, device)
    train_until(settings.steps, trainer, out, save_seconds, report, workers)
    trainer.average.save(out)
    return trainer.average


class _Trainer:
    """Model, its running average, optimizers and the step; all that a checkpoint must hold."""

    def __init__(
        self, images: TrainingImages, settings: PretrainSettings, start: Path | None, device: torch.device | str
    ) -> None:
        torch.manual_seed(settings.seed)
        self.images, self.settings, self.device, self.step = images, settings, torch.device(device), 0
        self.record = asdict(settings) | {"start": ""}
        if start is None:
            model = PixelBackbone.create(num_single_layers=settings.layers, num_attention_heads=settings.heads)
        else:
            model = PixelBackbone.load(start)
            if (model.self_attention_blocks, model.heads) != (settings.layers, settings.heads):
                raise ArgumentError(
                    f"{start} has {model.self_attention_blocks} layers of {model.heads} heads, the run was asked for "
                    f"{settings.layers} of {settings.heads}; set --layers and --heads to match."
                )
            self.record["start"] = model.identity
        self.model = model.to(self.device).train()
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.optimizers = _optimizers(self.model, settings)
        self.model.compile_blocks()

    def batch(self, step: int) -> Tensor:
        """uint8 [B, S, S, 3]."""
        generator = step_generator(self.settings.seed, step)
        count, size = draw_crops(self.settings.sizes, self.settings.tokens, generator)
        return torch.from_numpy(self.images.batch(step, count, size))

    def train(self, batch: Tensor) -> dict[str, float]:
        x = batch.to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        generator = step_generator(self.settings.seed, self.step + 1, self.device)
        t = sample_timesteps(len(x), generator)
        noise = torch.randn(x.shape, generator=generator, device=self.device)
        with torch.autocast(self.device.type, torch.bfloat16):
            prediction = self.model(self.model.noising.add_noise(x, noise, t), t)
        loss = flow_matching_loss(prediction.float(), x, t)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(self.step, self.settings)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        with torch.no_grad():
            # A short memory at first, or the average would stay at the first weights.
            keep = min(self.settings.ema, (self.step + 1) / (self.step + 10))
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - keep)
        return {"loss": loss.item()}

    def save(self, file: Path) -> None:
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"average.{name}": value for name, value in self.average.state_dict().items()}
        for number, optimizer in enumerate(self.optimizers):
            tensors |= optimizer_tensors(optimizer, f"optimizer{number}")
        save_state(file, tensors, self.step, self.record)

    def restore(self, file: Path) -> None:
        tensors, step, before = load_state(file)
        check_same_run(file, before, self.record, tuple(name for name in self.record if name not in CHANGEABLE))
        with fitting(file):
            self.model.load_state_dict(part(tensors, "model"))
            self.average.load_state_dict(part(tensors, "average"))
            for number, optimizer in enumerate(self.optimizers):
                restore_optimizer(optimizer, f"optimizer{number}", tensors)
        self.step = step


def sample_timesteps(count: int, generator: torch.Generator) -> Tensor:
    """t in (0, 1): logit-normal(−0.1, 1.1), 15 % uniform; [count], on the generator's device."""
    device = generator.device
    t = torch.sigmoid(torch.randn(count, generator=generator, device=device) * 1.1 - 0.1)
    uniform = torch.rand(count, generator=generator, device=device)
    return torch.where(torch.rand(count, generator=generator, device=device) < 0.15, uniform, t)


def flow_matching_loss(prediction: Tensor, images: Tensor, t: Tensor) -> Tensor:
    """mean of (x̂ − x)²/max(t, 0.1)²: the velocity error, kept finite near t = 0."""
    weight = t.clamp(min=0.1).reciprocal().view(-1, 1, 1, 1)
    return ((prediction - images) * weight).square().mean()


def learning_rate(step: int, settings: PretrainSettings) -> float:
    """Linear warm-up, constant, then linear to 0 over the last `decay` of the steps."""
    rise = min(1.0, (step + 1) / settings.warmup)
    fall = min(1.0, (settings.steps - step) / max(1.0, settings.decay * settings.steps))
    return settings.learning_rate * min(rise, fall)


def _optimizers(model: PixelBackbone, settings: PretrainSettings) -> list[torch.optim.Optimizer]:
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for name, value in model.named_parameters():
        inside = "single_transformer_blocks" in name and value.ndim == 2 and ".norm." not in name
        (matrices if settings.optimizer == "muon" and inside else others).append(value)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=settings.weight_decay)
    ]
    if matrices:
        optimizers.append(
            torch.optim.Muon(
                matrices,
                lr=settings.learning_rate,
                weight_decay=settings.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    return optimizers
