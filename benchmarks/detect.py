"""How long an answer takes: cold start (import, load, first answer) and warm p50, p99, on this machine's CPU.

python benchmarks/detect.py examples/photos/cars.jpg -o benchmarks/results/detect-cpu.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime

from trace_sdk import EdgeDetector, __version__
from trace_sdk.engines.onnx import usable_cpus

COLD_START = "import sys; from trace_sdk import EdgeDetector; EdgeDetector(device='cpu').run(sys.argv[1])"


def cold_starts(photo: Path, runs: int) -> list[float]:
    """Seconds from starting Python to the first answer, each in a process of its own."""
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", COLD_START, str(photo)], check=True)
        seconds.append(time.perf_counter() - start)
    return seconds


def warm(photo: Path, runs: int) -> list[float]:
    """Seconds of each answer, bytes in → edges out, after three that don't count."""
    detector, data = EdgeDetector(device="cpu"), photo.read_bytes()
    for _ in range(3):
        detector.run(data)
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        detector.run(data)
        seconds.append(time.perf_counter() - start)
    return seconds


def main() -> None:
    """Measure and write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photo", type=Path)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("-o", "--out", type=Path, required=True)
    options = parser.parse_args()
    cold, steady = cold_starts(options.photo, 10), warm(options.photo, options.runs)
    detector = EdgeDetector(device="cpu")
    edges = detector.run(options.photo)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    result = {
        "engine": detector.info,
        "input_size": edges.info["input_size"],
        "network_size": edges.info["network_size"],
        "cold_start_s": {"median": float(np.median(cold)), "max": max(cold), "runs": len(cold)},
        "answer_s": {
            "p50": float(np.quantile(steady, 0.5)),
            "p99": float(np.quantile(steady, 0.99)),
            "runs": len(steady),
        },
        "stages_ms": edges.info["timings"],
        "cpu": platform.processor() or platform.machine(),
        "cpus": usable_cpus(),
        "load_before": os.getloadavg()[0],
        "versions": {
            "trace-sdk": __version__,
            "onnxruntime": onnxruntime.__version__,
            "python": platform.python_version(),
        },
        "commit": commit.stdout.strip(),
    }
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"cold start {result['cold_start_s']['median']:.2f} s, p50 {result['answer_s']['p50']:.3f} s, "
          f"p99 {result['answer_s']['p99']:.3f} s")  # fmt: skip


if __name__ == "__main__":
    main()
