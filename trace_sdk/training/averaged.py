"""AdamW on a cosine, with a running average of the weights: how the small students are trained."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from trace_sdk.training.state import (
    check_same_run,
    fitting,
    load_state,
    optimizer_tensors,
    part,
    restore_optimizer,
    save_state,
)

Model = TypeVar("Model", bound=nn.Module)

WARMUP = 100  # steps
EMA = 0.998
LAST = 0.02  # of the learning rate is left at the end
WEIGHT_DECAY = 0.02


class AveragedTraining(Generic[Model]):
    """A model, the running average of its weights, and its optimizer.

    Args:
        model: parameters that don't require gradients stay as they are.
        learning_rate: highest, after a warm-up of 100 steps; then a cosine down to 2 % at `steps`.
        careful: parameters that learn at a tenth of that rate, without weight decay: LoRA on what was trained before.
    """

    def __init__(self, model: Model, learning_rate: float, steps: int, careful: Iterable[Tensor] = ()) -> None:
        self.model, self.average = model, copy.deepcopy(model).eval().requires_grad_(False)
        self._learnt = [value for value in model.parameters() if value.requires_grad]
        self._steps, careful = steps, list(careful)
        slow = {id(value) for value in careful}
        groups = [
            {"params": [x for x in self._learnt if id(x) not in slow], "highest": learning_rate},
            {"params": careful, "highest": learning_rate / 10, "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW(groups if careful else groups[:1], weight_decay=WEIGHT_DECAY)

    def step(self, loss: Tensor, step: int) -> None:
        """Follow the gradients of `loss`, `step` steps after the start."""
        loss.backward()  # type: ignore[no-untyped-call]
        cosine = LAST + (1 - LAST) * (1 + math.cos(math.pi * step / self._steps)) / 2
        for group in self._optimizer.param_groups:
            group["lr"] = group["highest"] * cosine * min(1.0, (step + 1) / WARMUP)
        nn.utils.clip_grad_norm_(self._learnt, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        keep = min(EMA, (step + 1) / (step + 10))  # a short memory at first, or it would stay at the first weights
        averages = self.average.state_dict()
        with torch.no_grad():
            for name, value in self.model.state_dict().items():
                average = averages[name]
                average.copy_(average.lerp(value, 1 - keep) if value.is_floating_point() else value)

    def save(self, file: Path, step: int, settings: dict[str, Any]) -> None:
        """Write all that a run needs to go on, whole or not at all."""
        tensors = {f"student.{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"average.{name}": value for name, value in self.average.state_dict().items()}
        save_state(file, tensors | optimizer_tensors(self._optimizer, "optimizer"), step, settings)

    def restore(self, file: Path, settings: dict[str, Any], fixed: tuple[str, ...]) -> int:
        """Read what `save` wrote, and return the steps done.

        Raises:
            ArgumentError: a setting of `fixed` differs from the stored one.
            CheckpointError: the file cannot be read, or is of another model.
        """
        tensors, step, before = load_state(file)
        check_same_run(file, before, settings, fixed)
        with fitting(file):
            self.model.load_state_dict(part(tensors, "student"))
            self.average.load_state_dict(part(tensors, "average"))
            restore_optimizer(self._optimizer, "optimizer", tensors)
        return step
