"""The time of short runs on a device."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor


def timed(run: Callable[[], object], device: str, runs: int, cold: Tensor | None) -> list[float]:
    """Milliseconds of each run, after three that don't count; `cold` is written before each, to empty the L2 cache."""
    times = []
    for number in range(runs + 3):
        if cold is not None:
            cold.zero_()
        if device == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            run()
            end.record()
            end.synchronize()
            elapsed = begin.elapsed_time(end)
        else:
            start = time.perf_counter()
            run()
            elapsed = (time.perf_counter() - start) * 1e3
        if number >= 3:
            times.append(elapsed)
    return times


def replayed(run: Callable[[], object]) -> Callable[[], None]:
    """A run as a CUDA graph."""
    for _ in range(2):  # libraries choose and allocate in the first ones
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    replay: Callable[[], None] = graph.replay
    return replay
