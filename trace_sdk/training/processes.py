"""Several processes that train as one, started by `accelerate launch` or torchrun; a lone process is left as it is.

Every process computes the same loss over the whole batch from its own part of it: sums go through `total`, which
passes gradients on, and gradients are then averaged. So a global batch gives the same curve on any number of processes.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed
from torch import Tensor, nn


def join_processes(device: torch.device) -> torch.device:
    """Meet the other processes, if there are any: NCCL between GPUs, gloo between CPUs. Returns this one's device."""
    from accelerate import PartialState

    state = PartialState(cpu=device.type == "cpu")
    return state.device if state.num_processes > 1 else device


def process_count() -> int:
    """1 unless `join_processes` met others."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def process_index() -> int:
    """From 0; process 0 is the one that writes files and reports."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def wait_for_all() -> None:
    """Return when every process has come here, so that what process 0 wrote before can be read."""
    if process_count() > 1:
        torch.distributed.barrier()


def total(part: Tensor) -> Tensor:
    """The sum of every process's `part`; its gradient reaches all of them."""
    if process_count() == 1:
        return part
    from torch.distributed.nn.functional import all_reduce

    whole: Tensor = all_reduce(part)  # type: ignore[no-untyped-call]
    return whole


def mean_of_all(mean: Tensor, count: int) -> Tensor:
    """The mean over all processes, from each one's mean of `count` values."""
    return mean if process_count() == 1 else total(mean * count) / total(mean.new_tensor(float(count)))


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Give every process the mean of all gradients; the same parameters must have one everywhere."""
    if process_count() == 1:
        return
    gradients = [value.grad for value in parameters if value.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat)
    means = torch.split(flat / process_count(), [gradient.numel() for gradient in gradients])
    for gradient, mean in zip(gradients, means, strict=True):
        gradient.copy_(mean.view_as(gradient))


class SharedBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation by the statistics of all processes' batches; `nn.SyncBatchNorm` has no CPU version."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or process_count() == 1:
            return super().forward(x)
        count = total(x.new_tensor(float(x.numel() // x.shape[1])))
        mean = total(x.sum((0, 2, 3))) / count
        centred = x - mean[:, None, None]
        variance = total(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            assert self.running_mean is not None and self.running_var is not None
            assert self.num_batches_tracked is not None and self.momentum is not None
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return centred * scale[:, None, None] + self.bias[:, None, None]
