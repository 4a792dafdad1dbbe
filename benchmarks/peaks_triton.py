"""How many exp2 a second a GPU's special function units give, measured by a kernel that does nothing else."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

PROGRAMS, ELEMENTS, ROUNDS = 132 * 64, 1024, 512


@triton.jit
def _exponentials(out, ELEMENTS: tl.constexpr, ROUNDS: tl.constexpr):
    x = tl.arange(0, ELEMENTS).to(tl.float32) / ELEMENTS - 1
    for _ in range(ROUNDS):
        x = tl.exp2(x) - 1.5
    tl.store(out + tl.program_id(0) * ELEMENTS + tl.arange(0, ELEMENTS), x)


def exponentials() -> tuple[int, Callable[[], object]]:
    """How many there are in one run, and the run."""
    out = torch.empty(PROGRAMS * ELEMENTS, device="cuda")
    return PROGRAMS * ELEMENTS * ROUNDS, lambda: _exponentials[(PROGRAMS,)](out, ELEMENTS, ROUNDS, num_warps=4)
