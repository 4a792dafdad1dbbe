"""Head-averaged attention and ABDiv of one layer: our kernels beside the hook that keeps per-head maps.

    python benchmarks/kernels.py                      on CUDA; says plainly when there is none
    python benchmarks/kernels.py --device cpu         the blocked torch path, two layers of 4,096 tokens
    python benchmarks/kernels.py --tune               on CUDA: which tiles are fastest

Each way is checked against float64 before it is timed. On CUDA it is timed as a CUDA graph, the GPU's time alone: in a
model launches queue up while the GPU works, and here it would wait for each. Writes kernels-<device>.json, .md and .png
into benchmarks/results/, of which the last shows each time as a multiple of the arithmetic floor.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from on_device import is_there, keep, measured_on, options_of, peak_on_cpu, peak_on_cuda
from torch import Tensor

from trace_sdk.backbones.tap import SelfAttention
from trace_sdk.kernels import (
    abdiv,
    abdiv_from_qk,
    abdiv_reference,
    head_mean_attention,
    head_mean_attention_reference,
    log_sum_exp,
    per_head_divergence,
    row_kl_reference,
)
from trace_sdk.kernels.divergence import HORIZONTAL, opposite

EXACT_ELEMENTS = 1 << 27  # float64 scores held at a time for the exact answer: 1 GiB
TOLERANCE = 0.02  # of the mean ABDiv; beyond it a way counts as wrong and is not timed
BASELINE = "hook"


@dataclass(frozen=True)
class Case:
    """One attention layer: tokens on a grid, heads, their width, and text tokens that a joint attention also reads."""

    name: str
    grid: tuple[int, int]
    heads: int
    width: int
    text: int = 0


CASES = {
    "cuda": (
        Case("SD1.5-512", (64, 64), 8, 40),
        Case("SDXL-1024", (64, 64), 10, 64),
        Case("PixArt-1024", (64, 64), 16, 72),
        Case("SD3.5-L-1024", (64, 64), 38, 64, text=333),
        Case("FLUX-1024", (64, 64), 24, 128, text=512),
        Case("SD1.5-1024", (128, 128), 8, 40),
    ),
    "cpu": (Case("SD1.5-512", (64, 64), 8, 40), Case("trace-small-512", (64, 64), 4, 64, text=1)),
}


@dataclass
class Inputs:
    """Queries and keys of the image, peaky as trained models' are, as views of the joint tensors."""

    query: Tensor
    key: Tensor
    joint: tuple[Tensor, Tensor, Tensor]
    attention: SelfAttention
    lse: Tensor

    @classmethod
    def of(cls, case: Case, device: str, seed: int = 0) -> Inputs:
        """Score deviation 3.6, smooth over neighbouring tokens, so that ABDiv is neither noise nor zero."""
        generator = torch.Generator().manual_seed(seed)
        dtype = torch.float16 if device == "cuda" else torch.float32
        tokens = case.text + case.grid[0] * case.grid[1]

        def draw() -> Tensor:
            coarse = torch.randn(case.heads * case.width, 1, case.grid[0] // 8, case.grid[1] // 8, generator=generator)
            image = F.interpolate(coarse, case.grid, mode="bicubic").flatten(2).view(case.heads, case.width, -1).mT
            text = torch.randn(case.heads, case.text, case.width, generator=generator)
            x = torch.cat([text, image / image.std()], 1)[None] * math.sqrt(3.6)
            # [B, tokens, heads, d] in memory, as models hold it
            return x.transpose(1, 2).contiguous().to(device, dtype).transpose(1, 2)

        joint = (draw(), draw(), draw())
        assert joint[0].shape[2] == tokens
        query, key = joint[0][:, :, case.text :], joint[1][:, :, case.text :]
        attention = SelfAttention(0, query, key, case.grid, case.width**-0.5)
        return cls(query, key, joint, attention, log_sum_exp(query, key))


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


def exact(x: Inputs) -> Tensor:
    """ABDiv in float64, by its definition, a few image rows and their neighbours at a time; where the inputs are."""
    a, (height, width) = x.attention, x.attention.grid
    query, key = (t.double() for t in (a.query, a.key))
    grid_query = torch.unflatten(query, 2, a.grid)
    at_once = max(1, EXACT_ELEMENTS // (query.shape[1] * width * key.shape[2]) - 2)
    strips = []
    for first in range(0, height, at_once):
        last = min(first + at_once, height)
        rows = torch.arange(first - 1, last + 1, device=query.device).clamp_(0, height - 1)
        log2_map = head_mean_attention_reference(grid_query[:, :, rows].flatten(2, 3), key, a.scale)
        image_rows = torch.unflatten(log2_map, 1, (len(rows), width))
        vertical = row_kl_reference(image_rows[:, 2:], image_rows[:, :-2])
        strips.append(vertical + row_kl_reference(*opposite(image_rows[:, 1:-1], HORIZONTAL)))
    return torch.cat(strips, 1)


def error_of(answer: Tensor, expected: Tensor) -> float:
    """Largest error, over the mean."""
    return float((answer.double() - expected).abs().max() / expected.mean())


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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
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
    figure.savefig(out, dpi=110)


def tune(runs: int) -> None:
    """Print the fastest tiles of each kernel and layer; put them into `default_tile` beside the kernel."""
    from trace_sdk.kernels.head_mean_triton import launch_head_mean, launch_log_sum_exp
    from trace_sdk.kernels.per_head_triton import launch_mean_key
    from trace_sdk.kernels.tiles_triton import Tile

    sides = (32, 64, 128)
    tiles = [Tile(q, k, w, s) for q in sides for k in sides for w in (4, 8) for s in (2, 3, 4)]
    for case in CASES["cuda"]:
        x = Inputs.of(case, "cuda")
        scale, lse, out = x.attention.scale, log_sum_exp(x.query, x.key), head_mean_attention(x.query, x.key)
        launches: dict[str, Callable[[Tile], object]] = {
            "log_sum_exp": lambda tile, x=x, s=scale: launch_log_sum_exp(x.query, x.key, s, tile),
            "head_mean": lambda tile, x=x, s=scale, lse=lse, out=out: launch_head_mean(
                x.query, x.key, lse, s, 1.0, False, out, tile
            ),
            "mean_key": lambda tile, x=x, s=scale: launch_mean_key(x.query, x.key, s, tile),
        }
        for name, launch in launches.items():
            found: list[tuple[float, Tile]] = []
            for tile in tiles:
                try:
                    times = timed(replayed(lambda launch=launch, tile=tile: launch(tile)), "cuda", runs, None)
                except Exception as error:  # a tile that doesn't fit into shared memory or registers
                    print(f"{case.name} {name} {tile}: {type(error).__name__}")
                    continue
                found.append((statistics.median(times), tile))
            for milliseconds, tile in sorted(found, key=lambda pair: pair[0])[:3]:
                print(f"{case.name:16} {name:12} {milliseconds:8.3f} ms  {tile}", flush=True)


def main() -> int:
    """Measure and write; 1 when a kernel's answer was wrong."""
    parser = options_of(__doc__)
    parser.add_argument("--runs", type=int, help="timed runs of each way; 100 on CUDA, 10 on a CPU")
    parser.add_argument("--case", action="append", help="only this layer; repeatable")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which is slow to start")
    parser.add_argument("--tune", action="store_true")
    options = parser.parse_args()
    if not is_there(options.device):
        return 2
    runs = options.runs or (100 if options.device == "cuda" else 10)
    if options.tune:
        tune(max(runs // 5, 1))
        return 0
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
