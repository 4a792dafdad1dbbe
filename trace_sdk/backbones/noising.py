"""How a backbone was noised in training: X_t from X_0 and ε, and both back from the network's answer.

t is in [0, 1] for every rule: 0 is X_0 itself, 1 the last training step. A number, or one for each image: [B].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from trace_sdk.errors import CheckpointError

SCHEDULE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")


class Noising(Protocol):
    """A rule X_t = a(t)·X_0 + s(t)·ε, with a(0) = 1 and s(0) = 0."""

    @property
    def steps(self) -> int:
        """Training steps."""
        ...

    @property
    def predicts(self) -> str:
        """What the network answers."""
        ...

    def add_noise(self, clean: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
        """X_t, of the shape of `clean`; at t = 0 `clean` itself."""
        ...

    def split(self, x_t: Tensor, prediction: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """(X̂_0, ε̂) that the network's answer stands for: `add_noise` of the two at t is X_t again.

        A network that predicts X_0 ("sample") leaves no ε at t = 0.
        """
        ...

    def timestep(self, t: Tensor) -> Tensor:
        """t [B] on the scale of the training steps, as the network takes it."""
        ...


@dataclass(frozen=True)
class FlowMatching:
    """X_t = (1 − t)·X_0 + t·ε; the network answers ε − X_0 ("velocity") or X_0 ("sample")."""

    predicts: str = "velocity"
    steps: int = 1000

    def add_noise(self, clean: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
        t = each(t)
        return (1 - t) * clean + t * noise

    def split(self, x_t: Tensor, prediction: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor]:
        t = each(t)
        if self.predicts == "sample":
            return prediction, (x_t - (1 - t) * prediction) / t
        return x_t - t * prediction, x_t + (1 - t) * prediction

    def timestep(self, t: Tensor) -> Tensor:
        return t * self.steps


@dataclass(frozen=True)
class Diffusion:
    """X_t = √ᾱ·X_0 + √(1 − ᾱ)·ε (DDPM); the network answers ε, v = √ᾱ·ε − √(1 − ᾱ)·X_0, or X_0.

    Attributes:
        alphas: ᾱ of each training step, float32 [steps]; t stands for the step nearest to t·steps.
        predicts: "epsilon", "v_prediction" or "sample".
    """

    alphas: Tensor
    predicts: str

    @property
    def steps(self) -> int:
        """Training steps."""
        return len(self.alphas)

    def add_noise(self, clean: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
        signal, spread = self._weights(t, clean)
        return signal * clean + spread * noise

    def split(self, x_t: Tensor, prediction: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor]:
        signal, spread = self._weights(t, x_t)
        if self.predicts == "epsilon":
            return (x_t - spread * prediction) / signal, prediction
        if self.predicts == "sample":
            return prediction, (x_t - signal * prediction) / spread
        return signal * x_t - spread * prediction, signal * prediction + spread * x_t

    def timestep(self, t: Tensor) -> Tensor:
        return (t.double() * self.steps).round().long().clamp(max=self.steps - 1)

    def _weights(self, t: Tensor | float, like: Tensor) -> tuple[Tensor, Tensor]:
        """√ᾱ and √(1 − ᾱ); the training steps begin a little way into the noise, t = 0 does not."""
        times = torch.as_tensor(t, dtype=torch.float32, device=like.device)
        alpha = self.alphas.to(like.device)[self.timestep(times)]
        alpha = each(torch.where(times == 0, 1.0, alpha))
        return alpha.sqrt(), (1 - alpha).sqrt()


def each(t: Tensor | float) -> Any:
    """t so that it multiplies images [B, C, H, W] one by one."""
    return t.view(-1, 1, 1, 1) if isinstance(t, Tensor) else t


def noising_of(scheduler: dict[str, Any]) -> Noising:
    """The rule that a diffusers scheduler_config.json describes.

    Raises:
        CheckpointError: another kind of scheduler.
    """
    name, predicts = str(scheduler.get("_class_name", "?")), scheduler.get("prediction_type")
    flow = name.startswith("FlowMatch") or predicts == "flow_prediction" or scheduler.get("use_flow_sigmas")
    if flow:
        return FlowMatching(steps=scheduler.get("num_train_timesteps", 1000))
    predicts = predicts or "epsilon"
    continuous = scheduler.get("timestep_type") == "continuous"  # the network then takes log σ as its timestep
    if "beta_schedule" not in scheduler or continuous or predicts not in ("epsilon", "v_prediction", "sample"):
        raise CheckpointError(
            f"The scheduler {name} (prediction type {predicts}) has no known noising rule; known are flow matching "
            "and DDPM schedules that predict epsilon, v_prediction or sample. Put one into scheduler_config.json."
        )
    from diffusers import DDPMScheduler

    try:
        alphas = DDPMScheduler(**{name: scheduler[name] for name in SCHEDULE if name in scheduler}).alphas_cumprod
    except (NotImplementedError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"The noise schedule of {name} cannot be made: {reason}.") from error
    return Diffusion(alphas.float(), predicts)
