"""Head-averaged attention and ABDiv of one layer: our kernels beside the hook that keeps per-head maps.

    python benchmarks/kernels.py                      on CUDA; says plainly when there is none
    python benchmarks/kernels.py --device cpu         the blocked torch path, two layers of 4,096 tokens

Each way is checked against float64 before it is timed. On CUDA it is timed as a CUDA graph, the GPU's time alone: in a
model launches queue up while the GPU works, and here it would wait for each. Writes kernels-<device>.json, .md and .png
into benchmarks/results/, of which the last shows each time as a multiple of the arithmetic floor.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from layers import CASES, Case, Inputs, exact
from on_device import is_there, keep, measured_on, options_of, peak_on_cpu, peak_on_cuda
from timing import replayed, timed
from torch import Tensor

from trace_sdk.figures import new_figure, save_figure
from trace_sdk.kernels import (
    abdiv,
    abdiv_from_qk,
    abdiv_reference,
    head_mean_attention,
    head_mean_attention_reference,
    per_head_divergence,
)

TOLERANCE = 0.02  # of the mean ABDiv; beyond it a way counts as wrong and is not timed
BASELINE = "hook"


def hook(x: Inputs) -> Tensor:
    """Eager: every head's map, their mean, and the stencil in torch, as a hook on attention would do it."""
    a = x.attention
    maps = (a.query @ a.key.mT * a.scale).softmax(-1)
    return abdiv_reference(maps.mean(1).float().clamp_min(1e-12).log2(), a.grid)


def compiled_reference(x: Inputs) -> Tensor:
    """The reference, compiled by torch."""
    return _compiled(x.query, x.key, x.attention.scale, x.attention.grid)


@torch.compile
def _compiled(query: Tensor, key: Tensor, scale: float, grid: tuple[int, int]) -> Tensor:
    return abdiv_reference(head_mean_attention_reference(query, key, scale), grid)


def attention_call(x: Inputs) -> None:
    """One attention call of the model itself: the practical floor."""
    F.scaled_dot_product_attention(*x.joint)


def kernels_map(x: Inputs) -> Tensor:
    """Ours through one map: log-sum-exp, head mean, stencil."""
    return abdiv(head_mean_attention(x.query, x.key), x.attention.grid)


def kernels_known_lse(x: Inputs) -> Tensor:
    """Ours, with the log-sum-exp that the model's own call has left."""
    return abdiv(head_mean_attention(x.query, x.key, lse=x.lse), x.attention.grid)


def kernels_strips(x: Inputs) -> Tensor:
    """Ours without a map."""
    return abdiv_from_qk([x.attention])


def kernels_per_head(x: Inputs) -> Tensor:
    """Another quantity: each head's own divergence, averaged."""
    return per_head_divergence(x.attention, symmetric=False).sum(1) / x.query.shape[1]


WAYS: dict[str, Callable[[Inputs], Tensor | None]] = {
    BASELINE: hook,
    "torch.compile": compiled_reference,
    "attention call": attention_call,
    "kernels: map": kernels_map,
    "kernels: map, known lse": kernels_known_lse,
    "kernels: strips": kernels_strips,
    "kernels: per head": kernels_per_head,
}
ANOTHER_QUANTITY = {"attention call", "kernels: per head"}


def error_of(answer: Tensor, expected: Tensor) -> float:
    """Largest error, over the mean."""
    return float((answer.double() - expected).abs().max() / expected.mean())


def ready(case: Case, way: str) -> Callable[[], object]:
    """A run on a CPU, after a small one: libraries load and allocate once."""
    WAYS[way](Inputs.of(Case("small", (8, 8), case.heads, case.width, case.text), "cpu"))
    inputs = Inputs.of(case, "cpu")
    return lambda: WAYS[way](inputs)


@dataclass(frozen=True)
class Peaks:
    """Measured rates of the device: multiply-adds as FLOP/s, exp2 a second, bytes a second."""

    flops: float
    exponentials: float
    bandwidth: float

    def floor_ms(self, case: Case) -> float:
        """Least time for QKᵀ and its exponentials, whichever takes longer."""
        scores = case.heads * (case.grid[0] * case.grid[1]) ** 2
        return max(2 * scores * case.width / self.flops, scores / self.exponentials) * 1e3


def measured_peaks(device: str) -> Peaks:
    """A large matrix product, exponentials in registers (in cache on a CPU), and a large copy."""
    if device == "cuda":
        from peaks_triton import exponentials

        a = torch.randn(8192, 8192, device=device, dtype=torch.float16)
        big = torch.empty(2**29, device=device, dtype=torch.uint8)
        exp_count, run_exponentials = exponentials()
    else:
        a = torch.randn(2048, 2048)
        big = torch.empty(2**28, dtype=torch.uint8)
        small = torch.rand(2**15)
        exp_count, run_exponentials = small.numel() * 64, lambda: [small.exp2() for _ in range(64)]
    side = a.shape[0]
    product = min(timed(lambda: a @ a, device, 10, None))
    exponent = min(timed(run_exponentials, device, 10, None))
    copy = min(timed(big.clone, device, 10, None))
    return Peaks(2 * side**3 / product * 1e3, exp_count / exponent * 1e3, 2 * big.numel() / copy * 1e3)


def measure(case: Case, device: str, runs: int, peaks: Peaks, ways: list[str]) -> list[dict[str, Any]]:
    """One row a way: error first, then times and memory."""
    inputs = Inputs.of(case, device)
    expected = exact(inputs)
    floor = peaks.floor_ms(case)
    rows: list[dict[str, Any]] = []
    for way in ways:
        row: dict[str, Any] = {"case": case.name, "way": way, "floor_ms": floor}
        rows.append(row)

        def run(way: str = way) -> Tensor | None:
            return WAYS[way](inputs)

        try:
            answer = run()
        except torch.OutOfMemoryError:
            row["trouble"] = "out of memory"
            continue
        if answer is not None and way not in ANOTHER_QUANTITY:
            row["error"] = error_of(answer, expected)
            if not row["error"] <= TOLERANCE and way.startswith("kernels"):
                row["trouble"] = "wrong, so not timed"
                continue
        del answer
        flush = torch.empty(2**28, dtype=torch.uint8, device=device) if device == "cuda" else None
        timed_run = replayed(run) if device == "cuda" else run
        for state, cold in (("warm", None), ("cold", flush)):
            if state == "cold" and cold is None:
                continue
            times = sorted(timed(timed_run, device, runs, cold))
            row[f"{state}_ms"] = {
                "p20": times[len(times) // 5],
                "p50": statistics.median(times),
                "p80": times[len(times) * 4 // 5],
                "runs": runs,
            }
        del flush, timed_run
        if device == "cuda":
            row["called_ms"] = statistics.median(timed(run, device, runs, None))
        row["times_floor"] = row["warm_ms"]["p50"] / floor
        row["peak_mib"] = peak_on_cuda(run) if device == "cuda" else peak_on_cpu(ready, case, way)
        print(f"{case.name:16} {way:26} {row['warm_ms']['p50']:9.3f} ms  {row['peak_mib']:9.1f} MiB", flush=True)
    baseline = rows[0]
    for row in rows:
        if "warm_ms" in row and "warm_ms" in baseline:
            row["speedup"] = baseline["warm_ms"]["p50"] / row["warm_ms"]["p50"]
            row["memory_ratio"] = baseline["peak_mib"] / max(row["peak_mib"], 1)  # less than 1 MiB is noise
    return rows


def to_markdown(result: dict[str, Any]) -> str:
    """The rows as a table, with what they were measured on."""
    lines = [
        f"Head mean and ABDiv of one layer, {result['device']}, {result['runs']} runs each, median (p20–p80), warm."
        " Called: with the host's share, one call at a time.",
        "",
        "| layer | way | ms | × hook | × floor | called, ms | peak MiB | hook's ÷ this | error |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        if "trouble" in row:
            lines.append(f"| {row['case']} | {row['way']} | {row['trouble']} | | | | | | {row.get('error', '')} |")
            continue
        warm = row["warm_ms"]
        error = f"{row['error']:.1e}" if "error" in row else "another quantity"
        called = f"{row['called_ms']:.3f}" if "called_ms" in row else ""
        lines.append(
            f"| {row['case']} | {row['way']} | {warm['p50']:.3f} ({warm['p20']:.3f}–{warm['p80']:.3f}) "
            f"| {row['speedup']:.2f} | {row['times_floor']:.1f} | {called} | {row['peak_mib']:.1f} "
            f"| {row['memory_ratio']:.0f} "
            f"| {error} |"
        )
    return "\n".join(lines) + "\n"


def plot(result: dict[str, Any], out: Path) -> None:
    """Time over the arithmetic floor, one group of bars a layer."""
    figure = new_figure(10, 4)
    axes = figure.add_subplot()
    cases = list(dict.fromkeys(row["case"] for row in result["rows"]))
    ways = list(dict.fromkeys(row["way"] for row in result["rows"]))
    for index, way in enumerate(ways):
        heights = {row["case"]: row["times_floor"] for row in result["rows"] if row["way"] == way and "warm_ms" in row}
        places = [cases.index(case) + (index - len(ways) / 2) * 0.8 / len(ways) for case in heights]
        axes.bar(places, list(heights.values()), 0.8 / len(ways), label=way, align="edge")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_yscale("log")
    axes.set_xticks(range(len(cases)), cases)
    axes.set_ylabel("time ÷ arithmetic floor")
    axes.set_title(f"Head mean and ABDiv of one layer, {result['device']}")
    axes.legend(fontsize=8, ncols=2)
    save_figure(figure, out, dpi=110)


def main() -> int:
    """Measure and write; 1 when a kernel's answer was wrong."""
    parser = options_of(__doc__)
    parser.add_argument("--runs", type=int, help="timed runs of each way; 100 on CUDA, 10 on a CPU")
    parser.add_argument("--case", action="append", help="only this layer; repeatable")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which is slow to start")
    options = parser.parse_args()
    if not is_there(options.device):
        return 2
    runs = options.runs or (100 if options.device == "cuda" else 10)
    torch.set_grad_enabled(False)
    compiled = options.device == "cuda" and not options.no_compile
    ways = [way for way in WAYS if compiled or way != "torch.compile"]
    cases = [case for case in CASES[options.device] if not options.case or case.name in options.case]
    peaks = measured_peaks(options.device)
    rows: list[dict[str, Any]] = []
    result = {
        **measured_on(options.device, ["torch", "triton", "numpy"]),
        "runs": runs,
        "peaks": asdict(peaks),
        "cases": [asdict(case) for case in cases],
        "rows": rows,
    }
    name = f"kernels-{options.device}"
    for case in cases:
        rows += measure(case, options.device, runs, peaks, ways)
        keep(result, to_markdown(result), options.out, name, show=case == cases[-1])
    plot(result, options.out / f"{name}.png")
    return int(any("wrong" in row.get("trouble", "") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
