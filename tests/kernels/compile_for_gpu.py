"""Compiles every Triton kernel for NVIDIA GPUs on a machine that has none, through our own launchers.

One line of JSON a kernel comes out: its name, what it was compiled for, and what ptxas gave it.

    python tests/kernels/compile_for_gpu.py 90 72 bfloat16      compute capability 9.0, head width, dtype

The tests run it in a process of its own, because the interpreter that they use replaces the compiler.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from trace_sdk.kernels import (
    divergence_triton,
    group_norm_triton,
    head_mean_triton,
    per_head_triton,
    temporal_kl_triton,
    upsample_triton,
)

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class NoGpu:
    """A driver that names a GPU and has none."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_all(capability: int, width: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Call each launcher once with tensors of this head width and dtype; nothing is run."""
    from triton.runtime import driver

    driver.set_active(NoGpu(capability))
    compiled: list[tuple[str, Any]] = []
    run = JITFunction.run

    def only_compile(self: Any, *args: Any, **kwargs: Any) -> Any:
        kernel = run(self, *args, **{**kwargs, "warmup": True})
        compiled.append((self.fn.__name__, kernel))
        return kernel

    JITFunction.run = only_compile
    try:
        query = torch.empty(1, 512, 8, width, dtype=dtype).transpose(1, 2)  # as models hold it
        text = torch.empty(1, 8, 77, width, dtype=dtype)
        half = torch.float32 if dtype == torch.float32 else torch.float16
        log_map = torch.empty(1, 512, 512, dtype=half)
        lse = head_mean_triton.launch_log_sum_exp(query, query, 0.1)
        head_mean_triton.launch_image_log_sum_exp(lse, query, query, text, 0.1)
        for accumulate in (False, True):
            head_mean_triton.launch_head_mean(query, query, lse, 0.1, 0.5, accumulate, log_map)
        upsample_triton.launch_upsample(log_map, (16, 32), (16, 32), torch.arange(512), 0.5, True, log_map)
        for neighbourhood in (4, 8):
            divergence_triton.launch_abdiv(log_map, (16, 32), 0, 0, 16, neighbourhood)
        temporal_kl_triton.launch_row_kl(log_map, log_map)
        mean_key, lse = per_head_triton.launch_mean_key(query, query, 0.1)
        for symmetric in (False, True):
            per_head_triton.launch_head_divergence(query, mean_key, lse, (16, 32), 0.1, symmetric)
        channels = torch.empty(320, dtype=dtype)
        for weight, silu in ((channels, True), (None, False)):
            group_norm_triton.launch_group_norm(torch.empty(1, 320, 4096, dtype=dtype), 32, weight, weight, 1e-5, silu)
    finally:
        JITFunction.run = run
    return [
        {"kernel": name, "capability": capability, "width": width, "dtype": str(dtype), **resources(kernel)}
        for name, kernel in compiled
    ]


def resources(kernel: Any) -> dict[str, Any]:
    """Registers and stack a thread (stack is where registers spill to), and shared memory in bytes."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    tensor_cores = "wgmma" in kernel.asm["ptx"] or "mma.sync" in kernel.asm["ptx"]
    return {
        "registers": int(found[1]),
        "stack": int(found[2]),
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "tensor_cores": tensor_cores,
    }


if __name__ == "__main__":
    for line in compile_all(int(sys.argv[1]), int(sys.argv[2]), getattr(torch, sys.argv[3])):
        print(json.dumps(line))
