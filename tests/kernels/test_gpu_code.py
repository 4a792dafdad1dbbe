"""The code that a GPU would run, compiled here by Triton and ptxas for a GPU that is not there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton has no package for this system")
USE_TENSOR_CORES = {"_log_sum_exp", "_image_log_sum_exp", "_head_mean", "_mean_key"}
ALL = USE_TENSOR_CORES | {"_row_mass", "_upsample", "_abdiv", "_row_kl", "_head_divergence", "_moments", "_normalise"}
SHARED = {80: 163 * 1024, 90: 227 * 1024}


@pytest.mark.parametrize(
    ("capability", "width", "dtype"),
    [(90, 40, "float16"), (90, 72, "bfloat16"), (90, 128, "float16"), (90, 72, "float32"), (80, 64, "float32")],
)
def test_every_kernel_compiles_for_a_gpu(capability: int, width: int, dtype: str) -> None:
    script = Path(__file__).parent / "compile_for_gpu.py"
    run = subprocess.run(
        [sys.executable, script, str(capability), str(width), dtype], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    kernels = [json.loads(line) for line in run.stdout.splitlines()]
    assert {kernel["kernel"] for kernel in kernels} == ALL
    for kernel in kernels:
        assert kernel["shared"] <= SHARED[capability], kernel
        if kernel["kernel"] in USE_TENSOR_CORES:
            assert kernel["tensor_cores"], kernel
            spills = (
                kernel["stack"] > 0 and capability == 90 and dtype != "float32"
            )  # tiles were chosen for halves on 90
            assert not spills, f"registers spill: {kernel}"


def test_the_driver_is_asked_for_shared_memory_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen on an H200: a launch took 1.2 ms of the host's time, whatever its size; each asked for it."""
    from trace_sdk.kernels import tiles_triton
    from trace_sdk.kernels.tiles_triton import Tile, fitted, shared_memory

    asked: list[int] = []

    def properties(device: int) -> dict[str, int]:
        asked.append(device)
        return {"max_shared_mem": 64 * 1024}

    active = SimpleNamespace(utils=SimpleNamespace(get_device_properties=properties))
    stand_in = SimpleNamespace(runtime=SimpleNamespace(driver=SimpleNamespace(active=active)))
    monkeypatch.setattr(tiles_triton, "triton", stand_in)
    shared_memory.cache_clear()
    query = SimpleNamespace(
        is_cuda=True,
        device=SimpleNamespace(index=3),
        shape=(1, 8, 4096, 64),
        dtype=torch.float16,
        element_size=lambda: 2,
    )
    try:
        tiles = [fitted(Tile(128, 128, warps=8, stages=2), query) for _ in range(5)]  # type: ignore[arg-type]
    finally:
        shared_memory.cache_clear()
    assert asked == [3]
    assert set(tiles) == {Tile(64, 64, warps=8, stages=2)}  # 80 KiB do not fit into 64, half of them do
