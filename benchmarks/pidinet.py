"""trace-nano's network beside PiDiNet's, both on onnxruntime, one picture of 512×512 px, in turns.

    pip install --no-deps controlnet-aux        for PiDiNet's definition; its weights are not needed to take its time
    python benchmarks/pidinet.py --threads 2

PiDiNet as its authors run it: 60 channels, difference convolutions turned into plain ones (`convert`), random weights.
Writes pidinet.json into benchmarks/results/.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from importlib.metadata import distribution
from pathlib import Path
from types import ModuleType

import numpy as np
import onnxruntime
import torch
from on_device import RESULTS, measured_on

from trace_sdk.atomic import write_text
from trace_sdk.machine import usable_cpus

SIDE, WARMUP, ROUNDS, RUNS = 512, 5, 5, 20
NANO = Path(__file__).parents[1] / "trace_sdk/engines/bundled/trace-nano.onnx"


def definition() -> ModuleType:
    """The module that defines PiDiNet, by its file: the package around it wants much else."""
    file = Path(str(distribution("controlnet-aux").locate_file("controlnet_aux/pidi/model.py")))
    spec = importlib.util.spec_from_file_location("pidinet_model", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pidinet(file: Path) -> None:
    """Export it; of its five answers the last one, fused, is the edges."""

    class Fused(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = definition().PiDiNet(60, ["cd", "ad", "rd", "cv"] * 4, dil=24, sa=True, convert=True)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            fused: torch.Tensor = self.net(image)[-1]
            return fused

    image = torch.rand(1, 3, SIDE, SIDE)
    torch.onnx.export(Fused().eval(), (image,), file, input_names=["image"], dynamo=True, external_data=False)


def session(file: Path, threads: int) -> onnxruntime.InferenceSession:
    """On the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=usable_cpus())
    parser.add_argument("-o", "--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as work:
        pidinet(Path(work) / "pidinet.onnx")
        networks = {
            "trace-nano": (session(NANO, options.threads), rng.integers(0, 256, (1, SIDE, SIDE, 3), np.uint8)),
            "PiDiNet": (
                session(Path(work) / "pidinet.onnx", options.threads),
                rng.random((1, 3, SIDE, SIDE), np.float32),
            ),
        }
        times: dict[str, list[list[float]]] = {name: [] for name in networks}
        for _ in range(ROUNDS):
            for name, (network, image) in networks.items():
                for _ in range(WARMUP):
                    network.run(None, {"image": image})
                times[name].append([])
                for _ in range(RUNS):
                    start = time.perf_counter()
                    network.run(None, {"image": image})
                    times[name][-1].append((time.perf_counter() - start) * 1e3)
    rows = {
        name: {
            "p50_ms": statistics.median(x for one in rounds for x in one),
            "p99_ms": float(np.percentile([x for one in rounds for x in one], 99)),
            "p50_ms_of_rounds": [statistics.median(one) for one in rounds],
        }
        for name, rounds in times.items()
    }
    ratio = rows["PiDiNet"]["p50_ms"] / rows["trace-nano"]["p50_ms"]
    result = {
        "what": f"network alone, {SIDE}×{SIDE} px, {options.threads} threads, {ROUNDS} rounds in turns of {RUNS} runs",
        **measured_on("cpu", ["onnxruntime", "torch", "controlnet-aux"]),
        "rows": rows,
        "PiDiNet's time over trace-nano's": ratio,
    }
    write_text(options.out / "pidinet.json", json.dumps(result, indent=2) + "\n")
    for name, row in rows.items():
        print(f"{name:12} p50 {row['p50_ms']:7.1f} ms   p99 {row['p99_ms']:7.1f} ms")
    print(f"PiDiNet takes {ratio:.1f} times as long.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
