"""`trace-sdk benchmark` from code: the bundled engine on this machine, into benchmarks/results/latency/.

python benchmarks/latency.py
"""

from __future__ import annotations

from pathlib import Path

from rich import print

from trace_sdk.benchmarking.measure import benchmark
from trace_sdk.engines import BUNDLED

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Measure, show and write."""
    report = benchmark(BUNDLED, sorted((ROOT / "examples/photos").glob("*.jpg")))
    print(*report.to_tables(), report.verdict(), sep="\n")
    report.save(ROOT / "benchmarks/results/latency", plot=True)


if __name__ == "__main__":
    main()
