"""The student's loss (paper 3.4): L = ‖I − Î‖² + Dice(E, Ê) on certain pixels, and a graded term on all of them.

Dice alone leaves the uncertain two thirds of an image free, and a student then fills them: its edges grow into blobs
within fifty steps. The graded term asks there for what the teacher measured.

Where several processes train as one, each term is that of their whole batch.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from trace_sdk.teacher.pseudo_labels import EDGE, UNCERTAIN
from trace_sdk.training.processes import mean_of_all, total


def dice_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """1 − (2·Σ e·ê + 1) / (Σ e² + Σ ê² + 1) over the certain pixels of the batch.

    Args:
        logits: [B, H, W].
        labels: int [B, H, W], 1 edge, 0 interior, −1 uncertain: those take no part.

    Returns:
        Scalar in [0, 1]; 0 for a batch without certain pixels.
    """
    certain = (labels != UNCERTAIN).float()
    edge = (labels == EDGE).float()
    probability = logits.float().sigmoid() * certain
    overlap = total((probability * edge).sum())
    return 1 - (2 * overlap + 1) / (total(edge.square().sum()) + total(probability.square().sum()) + 1)


def reconstruction_loss(answer: Tensor, target: Tensor) -> Tensor:
    """‖I − Î‖², mean over values, in the terms of the backbone's own answer at t = 0; both of the shape of X_0.

    A backbone that answers X̂_0 is asked for X_0: the photo in [−1, 1], or its latents.

    One that answers ε or a velocity has X̂_0 = X_0 at t = 0 whatever it answers, so that ‖I − Î‖² would hold nothing.
    At any other t, X̂_0 is X_t less the answer times a weight of t: what LoRA changes of the reconstruction is what it
    changes of the answer. So the target is the answer without LoRA. That costs a pass without gradients in place of the
    VAE's decoder, its weights, and a backward pass through it.
    """
    return mean_of_all((answer.float() - target.float()).square().mean(), target.numel())


def graded_loss(logits: Tensor, graded: Tensor) -> Tensor:
    """Cross-entropy against graded edges in [0, 1]; both [B, H, W]."""
    return mean_of_all(F.binary_cross_entropy_with_logits(logits.float(), graded), graded.numel())
