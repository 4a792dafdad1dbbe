"""A student of Stable Diffusion 1.5's size with random weights, kept, exported and run once: bytes, memory, seconds.

    python benchmarks/large_student.py --precision fp32 --size 512

Random weights answer nothing of use, but cost what trained ones do. The graph is checked against PyTorch at small sizes
only, since a CPU does the checking. Writes benchmarks/results/sd15-student-PRECISION.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import diffusers
import numpy as np
import torch
from gpu_latency import SD15_SCHEDULER, VAE

from trace_sdk import EdgeDetector
from trace_sdk.atomic import write_text
from trace_sdk.backbones.families.sd import StableDiffusion
from trace_sdk.export import verify
from trace_sdk.export.onnx import export_onnx
from trace_sdk.machine import commit, hardware, peak_memory, versions
from trace_sdk.student.model import Student

RESULTS = Path(__file__).parent / "results"
SHAPES = ((1, 2, 4), (2, 4, 2))  # in place of verify.SHAPES: 64×128 and 128×64 px


def save_student(folder: Path) -> int:
    """Write the folder of a student whose UNet and VAE have the published sizes; parameters of the two."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(cross_attention_dim=768)
    vae = diffusers.AutoencoderKL(**VAE)
    vae.decoder = torch.nn.Identity()
    prompt = StableDiffusion.zero_prompt(dict(unet.config))
    student = Student(StableDiffusion(unet, vae, SD15_SCHEDULER, prompt, ""))
    torch.nn.init.normal_(student.decoder.residual.weight)
    student.save(folder, {})
    return sum(value.numel() for model in (unet, vae) for value in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precision", default="fp32", choices=("fp32", "fp16"))
    parser.add_argument("--size", type=int, default=512, help="longest side of the one run, pixels")
    options = parser.parse_args()
    verify.SHAPES = SHAPES
    record: dict[str, object] = {"what": __doc__.splitlines()[0], "precision": options.precision, "size": options.size}
    with tempfile.TemporaryDirectory() as name:
        folder, engine = Path(name, "student"), Path(name, "sd15.onnx")
        record["parameters"] = save_student(folder)
        record["student_bytes"] = sum(file.stat().st_size for file in folder.rglob("*.*") if file.is_file())
        start = time.perf_counter()
        report = export_onnx(
            Student.load(folder), engine, name="sd15", precision=options.precision, default_size=128, note=print
        )
        record |= {
            "export_seconds": round(time.perf_counter() - start),
            "parity": report.parity,
            "nodes": report.nodes,
            "files": {file.name: file.stat().st_size for file in sorted(engine.parent.glob("sd15.onnx*"))},
            "peak_bytes_of_export": peak_memory(),
        }
        start = time.perf_counter()
        detector = EdgeDetector(engine, device="cpu", size=options.size, threads=1)
        record["load_seconds"] = round(time.perf_counter() - start, 1)
        start = time.perf_counter()
        edges = detector.run(np.random.default_rng(0).integers(0, 256, (options.size, options.size, 3), np.uint8))
        record["answer_seconds"] = round(time.perf_counter() - start, 1)
        record["answer_range"] = [float(edges.probability.min()), float(edges.probability.max())]
    record |= {"hardware": hardware(), "versions": versions(("torch", "diffusers", "onnx", "onnxruntime"))}
    record["commit"] = commit()
    write_text(RESULTS / f"sd15-student-{options.precision}.json", json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
