"""Which tiles are fastest on this GPU: times a grid of them on each kernel and layer, and prints the best three.

    python benchmarks/tiles.py

Put them into `default_tile`, beside the kernel.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable

from layers import CASES, Inputs
from on_device import is_there
from timing import replayed, timed

from trace_sdk.kernels import head_mean_attention, log_sum_exp

RUNS = 20  # timed ones of each tile


def main() -> int:
    """Time all tiles on all layers; 2 without a GPU."""
    if not is_there("cuda"):
        return 2
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
                    times = timed(replayed(lambda launch=launch, tile=tile: launch(tile)), "cuda", RUNS, None)
                except Exception as error:  # a tile that doesn't fit into shared memory or registers
                    print(f"{case.name} {name} {tile}: {type(error).__name__}")
                    continue
                found.append((statistics.median(times), tile))
            for milliseconds, tile in sorted(found, key=lambda pair: pair[0])[:3]:
                print(f"{case.name:16} {name:12} {milliseconds:8.3f} ms  {tile}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
