"""The whole teacher on one image, KL curve and ABDiv at t*: our kernels beside hooks that keep per-head maps.

    python benchmarks/teacher.py                      on CUDA; says plainly when there is none
    python benchmarks/teacher.py --device cpu         the backbone of trace-small at 512 px

Full-size models with random weights, null prompt, the paper's schedule of ten timesteps and one more pass at t*.
Ours must agree with hooks in float32 before they are timed (those that are timed compute in the model's dtype). Memory
is what a run takes beyond the model. Writes teacher-<device>.json and .md into benchmarks/results/.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from on_device import is_there, keep, measured_on, options_of, peak_of_one, peak_on_cpu
from torch import Tensor, nn

from trace_sdk.backbones.tap import SelfAttention, SelfAttentionTap
from trace_sdk.kernels import abdiv_reference, row_kl_reference, temporal_kl, upsample_attention_reference
from trace_sdk.teacher.attention import AttentionAverage
from trace_sdk.teacher.boundary import MeanBoundary
from trace_sdk.teacher.emergence import schedule

TOLERANCE = 0.02
OnAttention = Callable[[SelfAttention], None]
Forward = Callable[[float, OnAttention | None], None]


@dataclass(frozen=True)
class Model:
    """A denoiser with random weights: its finest attention grid, blocks, and one pass at t that shows its attention."""

    grid: tuple[int, int]
    blocks: int
    forward: Forward


def tapped(run: Callable[[float], object], image_tokens: Callable[[int, int], Any]) -> Forward:
    """A pass with the tap around it."""

    def forward(t: float, on_attention: OnAttention | None) -> None:
        if on_attention is None:
            run(t)
            return
        with SelfAttentionTap(on_attention, image_tokens):
            run(t)

    return forward


def noised(latents: Tensor, noise: Tensor, t: float) -> Tensor:
    """Enough of a noising rule for timing."""
    return (1 - t) * latents + t * noise


def build(make: Callable[[], nn.Module], device: str) -> nn.Module:
    """Evaluation mode, half precision on CUDA; made there, since a CPU draws 8 billion random weights for minutes."""
    dtype = torch.float16 if device == "cuda" else torch.float32
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = make()
    finally:
        torch.set_default_dtype(usual)
    return model.to(device, dtype).eval().requires_grad_(False)


def peaky(model: nn.Module) -> nn.Module:
    """Scores as uneven as trained models' (deviation about 3.5): evenly spread attention differs by rounding alone."""
    for module in model.modules():
        if getattr(module, "norm_q", None) is not None:
            module.norm_q.weight.fill_(3.5)
        elif hasattr(module, "to_q"):
            module.to_q.weight.mul_(10)
    return model


def pixel(device: str, side: int = 512) -> Model:
    """The backbone of trace-small: 8 blocks of 4 heads."""
    from trace_sdk.backbones.pixel import SMALL, PixelBackbone

    def make() -> PixelBackbone:
        backbone = PixelBackbone.create(**SMALL)
        for block in backbone.denoiser.single_transformer_blocks:  # zero at first: every block would be the identity
            nn.init.normal_(block.norm.linear.weight, std=0.02)
        return backbone

    built: Any = build(make, device)
    like = next(built.parameters())
    image, noise = torch.rand(2, 1, 3, side, side).to(like) * 2 - 1

    def forward(t: float, on_attention: OnAttention | None) -> None:
        built(noised(image, noise, t), t, on_attention)

    return Model((side // 8, side // 8), built.self_attention_blocks, forward)


def stable_diffusion(device: str, side: int = 512) -> Model:
    """SD 1.5's UNet: 16 self-attention layers on grids of 64, 32, 16 and 8 at 512 px."""
    from diffusers import UNet2DConditionModel

    unet = build(
        lambda: peaky(UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)), device
    )
    like = next(unet.parameters())
    latents, noise = torch.randn(2, 1, 4, side // 8, side // 8).to(like)
    prompt = torch.zeros(1, 77, 768).to(like)

    def image_tokens(queries: int, keys: int) -> tuple[slice, tuple[int, int]] | None:
        return (slice(None), (math.isqrt(queries),) * 2) if queries == keys else None

    return Model(
        (side // 8, side // 8),
        16,
        tapped(lambda t: unet(noised(latents, noise, t), 1000 * t, prompt), image_tokens),
    )


def stable_diffusion_35_large(device: str, side: int = 1024) -> Model:
    """SD 3.5 Large: 38 joint blocks, image tokens first."""
    from diffusers import SD3Transformer2DModel

    transformer = build(
        lambda: peaky(
            SD3Transformer2DModel(
                sample_size=128, in_channels=16, num_layers=38, num_attention_heads=38, attention_head_dim=64,
                joint_attention_dim=4096, caption_projection_dim=2432, pooled_projection_dim=2048, out_channels=16,
                pos_embed_max_size=192, qk_norm="rms_norm",
            )
        ),
        device,
    )  # fmt: skip
    like = next(transformer.parameters())
    latents, noise = torch.randn(2, 1, 16, side // 8, side // 8).to(like)
    prompt, pooled = torch.zeros(1, 333, 4096).to(like), torch.zeros(1, 2048).to(like)
    tokens = (side // 16) ** 2
    return Model(
        (side // 16, side // 16),
        38,
        tapped(
            lambda t: transformer(noised(latents, noise, t), prompt, pooled, like.new_tensor([1000 * t])),
            lambda queries, keys: (slice(0, tokens), (side // 16, side // 16)),
        ),
    )


def flux(device: str, side: int = 1024) -> Model:
    """FLUX.1: 19 double and 38 single blocks, text tokens first."""
    from diffusers import FluxTransformer2DModel

    from trace_sdk.backbones.pixel import position_ids

    transformer = build(lambda: peaky(FluxTransformer2DModel(guidance_embeds=True)), device)
    like = next(transformer.parameters())
    grid = (side // 16, side // 16)
    latents, noise = torch.randn(2, 1, grid[0] * grid[1], 64).to(like)
    prompt, pooled = torch.zeros(1, 512, 4096).to(like), torch.zeros(1, 768).to(like)
    image_ids, text_ids = position_ids(grid, like), torch.zeros(512, 3).to(like)

    def run(t: float) -> None:
        transformer(
            noised(latents, noise, t), prompt, pooled, like.new_tensor([t]), image_ids, text_ids, like.new_tensor([3.5])
        )

    return Model(grid, 57, tapped(run, lambda queries, keys: (slice(512, None), grid)))


MODELS: dict[str, dict[str, Callable[[str], Model]]] = {
    "cpu": {"trace-small-512": pixel},
    "cuda": {
        "trace-small-512": pixel,
        "SD1.5-512": stable_diffusion,
        "SD1.5-1024": lambda device: stable_diffusion(device, 1024),
        "SD3.5-L-1024": stable_diffusion_35_large,
        "FLUX-1024": flux,
    },
}


class HookAverage:
    """What a hook does: every head's map at once, their mean, enlarged, added to a running mean.

    In the model's dtype, as hooks do; or in float32, since half precision loses the small probabilities that KL is of.
    """

    def __init__(self, finest: tuple[int, int], blocks: int, *, exact: bool) -> None:
        self._finest, self._blocks, self._exact = finest, blocks, exact
        self.mean: Tensor | None = None

    def add(self, attention: SelfAttention) -> None:
        """Take one block into the mean."""
        query, key = attention.query, attention.key
        if self._exact:
            query, key = query.float(), key.float()
        one = (query @ key.mT * attention.scale).softmax(-1).mean(1).float()
        if attention.grid != self._finest:
            log2_map = one.clamp_min(1e-12).log2()
            one = upsample_attention_reference(log2_map, attention.grid, self._finest).exp2()
        self.mean = one / self._blocks if self.mean is None else self.mean + one / self._blocks

    def log2_mean(self) -> Tensor:
        """The averaged map."""
        assert self.mean is not None
        return self.mean.clamp_min(1e-12).log2()


def kl_curve(
    log2_map: Callable[[float], Tensor], kl: Callable[[Tensor, Tensor], Tensor], timesteps: tuple[float, ...]
) -> Tensor:
    """KL of each timestep's map from the one before, mean over rows: [T − 1]; two maps are held at a time."""
    curve, previous = [], log2_map(timesteps[0])
    for t in timesteps[1:]:
        current = log2_map(t)
        curve.append(kl(previous, current).mean())
        previous = current
    return torch.stack(curve)


def with_hooks(model: Model, timesteps: tuple[float, ...], *, exact: bool = False) -> tuple[Tensor, Tensor]:
    """KL curve [T − 1] and ABDiv [1, H, W] at its largest step."""

    def log2_map(t: float) -> Tensor:
        average = HookAverage(model.grid, model.blocks, exact=exact)
        model.forward(t, average.add)
        return average.log2_mean()

    curve = kl_curve(log2_map, row_kl_reference, timesteps)
    return curve, abdiv_reference(log2_map(timesteps[1 + int(curve.argmax())]), model.grid)


def with_kernels(model: Model, timesteps: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """The same through the teacher's own parts."""

    def log2_map(t: float) -> Tensor:
        average = AttentionAverage(model.grid, range(model.blocks))
        model.forward(t, average.add)
        return average.log2_mean()

    curve = kl_curve(log2_map, temporal_kl, timesteps)
    boundary = MeanBoundary(model.grid, range(model.blocks), 4)
    model.forward(timesteps[1 + int(curve.argmax())], boundary.add)
    return curve, boundary.abdiv()


def model_alone(model: Model, timesteps: tuple[float, ...]) -> None:
    """As many passes, and nothing read."""
    for t in (*timesteps, timesteps[-1]):
        model.forward(t, None)


WAYS: dict[str, Callable[[Model, tuple[float, ...]], object]] = {
    "model alone": model_alone,
    "hooks": with_hooks,
    "kernels": with_kernels,
}


def disagreement(answers: list[tuple[Tensor, Tensor]]) -> float:
    """Largest difference of KL and of ABDiv between two ways, over their means."""
    return max(float((a.double() - b.double()).abs().max() / a.double().mean()) for a, b in zip(*answers, strict=True))


def timed(run: Callable[[], object], device: str, runs: int) -> list[float]:
    """Milliseconds of each run, none left out: each way has run once before."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def ready(name: str, way: str, timesteps: tuple[float, ...]) -> Callable[[], object]:
    """A run on a CPU, after one pass of the model: libraries load and allocate once."""
    model = MODELS["cpu"][name]("cpu")
    model.forward(0.0, None)
    return lambda: WAYS[way](model, timesteps)


def measure(
    name: str, device: str, runs: int, timesteps: tuple[float, ...], tolerance: float = TOLERANCE
) -> list[dict[str, Any]]:
    """One row a way."""
    torch.manual_seed(0)
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    model = MODELS[device][name](device)
    model_mib = (torch.cuda.memory_allocated() - before) / 2**20 if device == "cuda" else None
    answers: dict[str, Any] = {}
    peaks: dict[str, float] = {}
    for way in WAYS:

        def answer(way: str = way) -> None:
            answers[way] = WAYS[way](model, timesteps)

        if device == "cuda":
            model.forward(0.0, None)  # libraries load and allocate once
            peaks[way] = peak_of_one(answer)
        else:
            answer()
    exact = with_hooks(model, timesteps, exact=True) if device == "cuda" else answers["hooks"]
    apart = disagreement([exact, answers["kernels"]])
    if not apart <= tolerance:
        print(f"{name}: the two ways differ by {apart:.3f}, so they are not timed")
        return [{"model": name, "trouble": "the two ways differ", "disagreement": apart, "peak_mib": peaks}]
    rows: list[dict[str, Any]] = []
    for way in WAYS:

        def run(way: str = way) -> object:
            return WAYS[way](model, timesteps)

        times = timed(run, device, runs)
        row = {
            "model": name,
            "way": way,
            "ms": statistics.median(times),
            "slowest_ms": max(times),
            "runs": runs,
            "model_mib": model_mib,
            "peak_mib": peaks[way] if device == "cuda" else peak_on_cpu(ready, name, way, timesteps),
            "disagreement": apart,
            "hooks_error": disagreement([exact, answers["hooks"]]),
        }
        rows.append(row)
        print(f"{name:16} {way:12} {row['ms']:10.1f} ms {row['peak_mib']:9.1f} MiB", flush=True)
    alone, hooks = rows[0]["ms"], rows[1]["ms"]
    for row in rows[1:]:
        row["speedup"] = hooks / row["ms"]
        row["reading_ms"] = row["ms"] - alone
    return rows


def to_markdown(result: dict[str, Any]) -> str:
    """The rows as a table."""
    lines = [
        f"Teacher on one image, {len(result['timesteps']) + 1} passes, {result['device']}, median.",
        "",
        "| model | way | ms | × hooks | beyond the model, ms | peak MiB beyond the model |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        if "trouble" in row:
            lines.append(f"| {row['model']} | {row['trouble']} | | | | |")
            continue
        speedup = f"{row['speedup']:.2f}" if "speedup" in row else ""
        reading = f"{row['reading_ms']:.1f}" if "reading_ms" in row else ""
        lines.append(
            f"| {row['model']} | {row['way']} | {row['ms']:.1f} | {speedup} | {reading} | {row['peak_mib']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure and write; 1 when the two ways differ."""
    parser = options_of(__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--model", action="append", help="only this model; repeatable")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="beyond which the ways are not timed")
    parser.add_argument("--stride", type=int, default=100, help="of the schedule, in thousandths of t")
    options = parser.parse_args()
    if not is_there(options.device):
        return 2
    torch.set_grad_enabled(False)
    timesteps = schedule(options.stride)
    rows: list[dict[str, Any]] = []
    result = {
        **measured_on(options.device, ["torch", "triton", "diffusers"]),
        "timesteps": timesteps,
        "rows": rows,
    }
    for name in MODELS[options.device]:
        if not options.model or name in options.model:
            rows += measure(name, options.device, options.runs, timesteps, options.tolerance)
            keep(result, to_markdown(result), options.out, f"teacher-{options.device}")
    return int(any("trouble" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
