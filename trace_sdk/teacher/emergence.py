"""Instance Emergence Point (paper 3.2): the timestep at which self-attention changes most, by KL."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from trace_sdk.backbones.backbone import Backbone
from trace_sdk.errors import ArgumentError

INVERSION_STEP = 0.025


@dataclass(frozen=True)
class Emergence:
    """Where along the noising instances emerge.

    Attributes:
        timesteps: t of each point of the curve, ascending, in [0, 1]; the schedule without its first step.
        kl: KL(SA(X_t_prev) ‖ SA(X_t)) in nats, mean over rows, at each of `timesteps`; with another criterion than KL,
            that one's value.
        t_star: the timestep of the largest value within the search window.
    """

    timesteps: tuple[float, ...]
    kl: tuple[float, ...]
    t_star: float


def schedule(stride: int = 100, steps: int = 1000) -> tuple[float, ...]:
    """τ₀ < … < τ_n over `steps` training steps, as t in [0, 1): stride 100 gives 0, .1, …, .9."""
    if not 1 <= stride < steps:
        raise ArgumentError(f"The stride must be from 1 to {steps - 1} of {steps} steps, got {stride}.")
    return tuple(step / steps for step in range(0, steps, stride))


def search_window(timesteps: tuple[float, ...], window: tuple[float, float]) -> slice:
    """Which of the ascending timesteps lie in the window.

    The window keeps small backbones, whose KL rises again towards pure noise, from choosing that end.

    Raises:
        ArgumentError: none of them does.
    """
    inside = [index for index, t in enumerate(timesteps) if window[0] <= t <= window[1]]
    if not inside:
        raise ArgumentError(
            f"No timestep from {timesteps[0]:g} to {timesteps[-1]:g} lies in the search window {window}. "
            "Give the lowest t first, widen it, or lower the stride."
        )
    return slice(inside[0], inside[-1] + 1)


def row_sample(tokens: int, count: int | None, device: torch.device) -> Tensor | None:
    """Sorted queries whose rows stand for the whole map, the same each time: int64 [count]; None for all of them."""
    if count is None or count >= tokens:
        return None
    chosen = torch.randperm(tokens, generator=torch.Generator().manual_seed(0))[:count]
    return chosen.sort().values.to(device)


def forward_noising(
    backbone: Backbone, clean: Tensor, timesteps: tuple[float, ...], noise: Tensor
) -> Iterator[tuple[float, Tensor]]:
    """(t, X_t) along the schedule from X_0 with one fixed ε for all steps."""
    for t in timesteps:
        yield t, backbone.noising.add_noise(clean, noise, t)


def inversion(
    backbone: Backbone, clean: Tensor, timesteps: tuple[float, ...], noise: Tensor
) -> Iterator[tuple[float, Tensor]]:
    """(t, X_t) along the model's own way from X_0 towards noise (the paper's "inversion").

    Each step takes X̂_0 and ε̂ from the network and noises the one with the other a little further: DDIM inversion for
    a diffusion model, Euler steps for a flow. A network that answers X_0 says nothing of ε at t = 0; its first short
    step takes ε from `noise`.
    """
    noising = backbone.noising
    t, x_t = 0.0, clean
    for target in timesteps:
        while t < target - 1e-9:
            after = min(t + INVERSION_STEP, target)
            if t == 0 and noising.predicts == "sample":
                x_t = noising.add_noise(clean, noise, after)
            else:
                x_t = noising.add_noise(*noising.split(x_t, backbone(x_t, t), t), after)
            t = after
        yield target, x_t


TRAJECTORIES = {"noising": forward_noising, "inversion": inversion}
