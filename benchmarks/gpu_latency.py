"""Latency on a GPU, a photo's bytes in → edges of its size out, batch 1: students in torch, and engines on onnxruntime.

    python benchmarks/gpu_latency.py sd15:torch:512 sd15:torch.compile:512 trace-small:onnxruntime:448

Each task is WHAT:RUNTIME:SIZE. WHAT is an engine (a bundled name, a file, a student's folder), or "sd15" or
"sd35-large": a student of that size with random weights, which answers nothing of use but costs what a trained one
does. SIZE is the side of the one square that photos are padded to, which the runtime prepares itself for. Writes
gpu-latency.json and .md after each task; one that fails is told and left out.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from on_device import RESULTS, is_there, keep, measured_on

from trace_sdk import EdgeDetector
from trace_sdk.student.model import Student

PHOTOS = Path(__file__).parents[1] / "examples/photos"
WARMUP = 10
STAGES = ("decode", "resize", "network", "resize_back")
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}
SD15_SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}


def sd15(device: str) -> Student:
    """UNet and VAE of Stable Diffusion 1.5's sizes, told to be for 1024 px so that this is one piece, too."""
    import diffusers

    from trace_sdk.backbones.families.sd import StableDiffusion

    with torch.device(device):
        unet, encoder = diffusers.UNet2DConditionModel(sample_size=128, cross_attention_dim=768), vae()
    prompt = StableDiffusion.zero_prompt(dict(unet.config))
    backbone = StableDiffusion(unet, encoder, SD15_SCHEDULER, prompt, "")
    return Student(backbone)


def sd35_large(device: str) -> Student:
    """Transformer and VAE of Stable Diffusion 3.5 Large's sizes."""
    import diffusers

    from trace_sdk.backbones.families.sd3 import StableDiffusion3

    more = {"latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609, "use_quant_conv": False}
    with torch.device(device):
        encoder = vae(**more)
        transformer = diffusers.SD3Transformer2DModel(
            sample_size=128, in_channels=16, num_layers=38, num_attention_heads=38, attention_head_dim=64,
            joint_attention_dim=4096, caption_projection_dim=2432, pooled_projection_dim=2048, out_channels=16,
            pos_embed_max_size=192, qk_norm="rms_norm",
        )  # fmt: skip
    prompt = StableDiffusion3.zero_prompt(dict(transformer.config))
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    return Student(StableDiffusion3(transformer, encoder, scheduler, prompt, ""))


def vae(**more: Any) -> Any:
    """The encoder of the VAE that these models share but for its channels."""
    import diffusers

    made = diffusers.AutoencoderKL(**VAE, **more)
    made.decoder = torch.nn.Identity()
    made.enable_slicing()
    return made


RANDOM: dict[str, Callable[[str], Student]] = {"sd15": sd15, "sd35-large": sd35_large}


def made(what: str, device: str) -> Student:
    """Random weights drawn on the device, rounded as a student's folder holds them."""
    torch.manual_seed(0)
    with torch.no_grad():
        student = RANDOM[what](device)
        torch.nn.init.normal_(student.decoder.residual.weight)
        for value in student.parameters():
            value.copy_(value.half())
    return student.eval().requires_grad_(False)


def opened(what: str, runtime: str, size: int, device: str, work: Path) -> EdgeDetector:
    """A detector for squares of that size; a random student is put where its folder's weights would be read.

    It is drawn anew each time: a detector on a GPU keeps it, and lowers its precision in place.
    """
    if what not in RANDOM:
        return EdgeDetector(what, device=device, size=size, buckets=[size], runtime=runtime)
    import trace_sdk.student.folder as folders
    from trace_sdk.atomic import write_bytes, write_text

    student = made(what, device)
    write_text(work / "student.json", "{}")
    write_bytes(work / "random.safetensors", b"")
    usual = folders.open_student
    folders.open_student = lambda folder: student
    try:
        return EdgeDetector(work, device=device, size=size, buckets=[size], runtime=runtime)
    finally:
        folders.open_student = usual


def measure(task: str, detector: EdgeDetector, photos: list[bytes], runs: int) -> dict[str, Any]:
    """Milliseconds of `runs` single answers to photos in turn, and the medians of their stages."""
    for number in range(WARMUP):
        detector.run(photos[number % len(photos)])
    times, stages = [], []
    for number in range(runs):
        start = time.perf_counter()
        edges = detector.run(photos[number % len(photos)])
        times.append((time.perf_counter() - start) * 1e3)
        stages.append(edges.info["timings"])
    return {
        "task": task,
        "p50": median(times),
        "p90": float(np.percentile(times, 90)),
        "p99": float(np.percentile(times, 99)),
        "runs": runs,
        "stages": {name: median(timings[name] for timings in stages) for name in STAGES if name in stages[0]},
        "milliseconds": times,
        "info": {name: str(value) for name, value in detector.info.items()},
        "answer": [float(edges.probability.min()), float(edges.probability.max())],
    }


def to_markdown(result: dict[str, Any]) -> str:
    """The rows as a table."""
    lines = [
        f"A photo's bytes in → edges out, batch 1, {result['device']}.",
        "",
        "| task | p50 ms | p90 | p99 | decode | resize | network | resize back | graphs | precision | ready after, s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        if "trouble" in row:
            lines.append(f"| {row['task']} | {row['trouble']} |" + " |" * 9)
            continue
        stages = " | ".join(f"{row['stages'].get(name, 0):.2f}" for name in STAGES)
        lines.append(
            f"| {row['task']} | {row['p50']:.2f} | {row['p90']:.2f} | {row['p99']:.2f} | {stages} "
            f"| {row['info']['cuda_graphs']} | {row['info']['precision']} | {row['ready']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+", metavar="WHAT:RUNTIME:SIZE")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("-o", "--out", type=Path, default=RESULTS)
    parser.add_argument("--name", default="gpu-latency", help="of the files that are written")
    parser.add_argument("--runs", type=int, default=200)
    options = parser.parse_args()
    if not is_there(options.device):
        return 2
    photos = [file.read_bytes() for file in sorted(PHOTOS.glob("*.jpg"))]
    rows: list[dict[str, Any]] = []
    packages = ["torch", "triton", "diffusers", "onnxruntime", "onnxruntime-gpu"]
    result = {**measured_on(options.device, packages), "photos": len(photos), "rows": rows}

    def failed(task: str) -> None:
        error = traceback.format_exc()
        print(f"{task}: {error}", file=sys.stderr)
        rows.append({"task": task, "trouble": error.strip().splitlines()[-1][:300]})

    def measured(task: str, detector: EdgeDetector, seconds: float) -> None:
        try:
            rows.append({**measure(task, detector, photos, options.runs), "ready": seconds})
        except Exception:
            failed(task)
        keep(result, to_markdown(result), options.out, options.name, show=False)

    with tempfile.TemporaryDirectory() as work:
        for task in options.tasks:
            what, runtime, size = task.rsplit(":", 2)
            start = time.perf_counter()
            try:
                detector = opened(what, runtime, int(size), options.device, Path(work))
                detector.warmup()
            except Exception:
                failed(task)
                continue
            seconds = time.perf_counter() - start
            print(f"{task}: ready after {seconds:.1f} s; {detector.info}", flush=True)
            measured(task, detector, seconds)
            del detector  # one at a time: a large student fills half of a card
    keep(result, to_markdown(result), options.out, options.name)
    return int(any("trouble" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
