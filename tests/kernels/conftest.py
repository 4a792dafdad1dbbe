"""Every kernel test runs twice: through the blocked torch path and through Triton.

Triton runs on a GPU where there is one, and else in its interpreter on the CPU, for real and never skipped.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:  # read when the kernels are defined, so before their first import
    os.environ["TRITON_INTERPRET"] = "1"
    from trace_sdk.kernels import (  # noqa: F401
        divergence_triton,
        head_mean_triton,
        per_head_triton,
        temporal_kl_triton,
        upsample_triton,
    )

    del os.environ["TRITON_INTERPRET"]


@pytest.fixture(params=["torch", "triton"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The device for a test's tensors, with the path chosen."""
    if request.param == "torch":
        return "cpu"
    if GPU:
        return "cuda"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return "cpu"


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan() -> Iterator[None]:
    """`torch.empty` gives NaN, so that a kernel which leaves a part unwritten fails."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all() and torch.ones(1).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)
