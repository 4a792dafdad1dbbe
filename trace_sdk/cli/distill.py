"""trace-sdk distill: the one-pass student."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import click

from trace_sdk.cli.console import output, progress
from trace_sdk.cli.options import (
    block_option,
    crop_options,
    learning_options,
    steps_option,
    torch_device_option,
    workers_option,
)


@click.command()
@click.argument("images", nargs=-1, required=True)
@click.option("--labels", required=True, type=click.Path(path_type=Path), help="Folder that `trace-sdk label` wrote.")
@click.option(
    "--backbone",
    required=True,
    help="Folder of diffusers or of `trace-sdk pretrain`, or a hub id owner/name; the teacher's.",
)
@click.option(
    "-o",
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder for the state and the student.",
)
@steps_option(1500)
@click.option(
    "--lora-from",
    default=0.5,
    show_default=True,
    help="Share of the steps that train the decoder alone, before LoRA joins.",
)
@click.option("--lora-rank", default=64, show_default=True, help="0 leaves the backbone as it is.")
@block_option("Read only this block, from 0; repeatable. The student ends after the last one read.  [default: all]")
@crop_options(tokens=16 * 1024, sizes=(192, 256, 320))
@click.option(
    "--batches",
    default=0,
    show_default=True,
    help="Keep this many batches and their features in memory and take them in turn: several times faster on a CPU. "
    "0 makes new crops for every step.",
)
@click.option(
    "--held-out",
    default=0.0,
    show_default=True,
    help="Share of the images to score on rather than learn from; the student is then that of the best score.",
)
@click.option("--validate-every", default=100, show_default=True, help="Steps between two scores.")
@click.option(
    "--precision",
    type=click.Choice(["bf16", "fp32"]),
    default="bf16",
    show_default=True,
    help="Of the backbone's arithmetic, and of a latent model's frozen weights. LoRA and decoder are fp32.",
)
@click.option(
    "--accumulate", default=1, show_default=True, help="Parts a step's batch goes through the model in: less memory."
)
@click.option("--checkpointing", is_flag=True, help="Compute activations again rather than keep them: less memory.")
@learning_options(2e-3, "Of the decoder; LoRA takes a tenth.")
@workers_option
@torch_device_option
def command(
    images: tuple[str, ...],
    labels: Path,
    backbone: str,
    out: Path,
    steps: int,
    lora_from: float,
    lora_rank: int,
    blocks: tuple[int, ...],
    tokens: int,
    sizes: tuple[int, ...],
    batches: int,
    held_out: float,
    validate_every: int,
    precision: str,
    accumulate: int,
    checkpointing: bool,
    learning_rate: float,
    seed: int,
    workers: int,
    device: str,
) -> None:
    """Distil the teacher into backbone + LoRA + decoder that answers in one pass at t = 0.

    Learns from those of IMAGES (as `trace-sdk label` takes them) that have a label below --labels. The loss is Dice on
    certain pixels plus the backbone's reconstruction of the photo, which keeps LoRA from drifting. The state is saved
    every two minutes and on Ctrl-C: run the same command again to go on. OUT also gets curves.csv and curves.png, and
    with --held-out pictures of what the student answers in validation/.

    OUT holds the whole student: of a latent model the denoiser with LoRA merged, the VAE's encoder and the null prompt,
    as fp16 safetensors. Crop sides are multiples of the backbone's: 64 for Stable Diffusion 1.5, 16 for transformers.

    \b
      trace-sdk distill photos/ --labels runs/labels --backbone runs/backbone -o runs/student --held-out 0.05
      trace-sdk distill photos/ --labels runs/labels --backbone models/sd15 --size 512 -o runs/student --device cuda
    On two GPUs, each with its part of every batch; the curve is that of one:
      accelerate launch --num_processes 2 $(which trace-sdk) distill photos/ … --device cuda
    Next:
      trace-sdk export runs/student -o mine.onnx
    """
    from trace_sdk.backbones.device import torch_device
    from trace_sdk.backbones.registry import open_backbone
    from trace_sdk.student.distill import DistillSettings, distill
    from trace_sdk.student.labelled_images import LabelledImages
    from trace_sdk.training.processes import join_processes, process_index
    from trace_sdk.training.state import steps_done

    settings = DistillSettings(
        steps=steps,
        lora_from=lora_from,
        lora_rank=lora_rank,
        blocks=blocks or None,
        tokens=tokens,
        sizes=sizes,
        batches=batches,
        precision=precision,
        accumulate=accumulate,
        checkpointing=checkpointing,
        validate_every=validate_every,
        learning_rate=learning_rate,
        lora_learning_rate=learning_rate / 10,
        seed=seed,
    )
    settings.check()
    found, judges = LabelledImages(images, labels, seed), None
    if held_out:
        found, judges = found.split(held_out)
    own_device = join_processes(torch_device(device))
    first = process_index() == 0
    with progress("distill", total=steps, done=steps_done(out)) if first else nullcontext() as advance:
        distill(
            open_backbone(backbone, device=str(own_device), precision=precision),
            found,
            out,
            settings,
            held_out=judges,
            device=own_device,
            workers=workers,
            report=lambda step, losses: (
                advance(note=" ".join(f"{k} {v:.3f}" for k, v in losses.items())) if advance else None
            ),
        )
    if first:
        output.print(f"Student written to {out}", markup=False, soft_wrap=True)
