"""trace-sdk distill: the one-pass student."""

from __future__ import annotations

from pathlib import Path

import click

from trace_sdk.cli.console import output, progress


@click.command("distill", short_help="Train the one-pass student on the teacher's labels.")
@click.argument("photos", type=click.Path(path_type=Path))
@click.option("--labels", required=True, type=click.Path(path_type=Path), help="Folder that `trace-sdk label` wrote.")
@click.option(
    "--backbone",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder that `trace-sdk pretrain` wrote.",
)
@click.option(
    "-o",
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder for the state and the student.",
)
@click.option("--steps", default=1500, show_default=True, help="Optimizer steps in all; may be raised when going on.")
@click.option(
    "--lora-from",
    default=0.5,
    show_default=True,
    help="Share of the steps that train the decoder alone, before LoRA joins.",
)
@click.option("--lora-rank", default=64, show_default=True, help="0 leaves the backbone as it is.")
@click.option("--tokens", default=16 * 1024, show_default=True, help="8×8 px tokens a step (1,024 in a 256 px crop).")
@click.option(
    "--size",
    "sizes",
    multiple=True,
    default=(192, 256, 320),
    show_default=True,
    help="Crop side in px; give several to mix.",
)
@click.option(
    "--batches",
    default=0,
    show_default=True,
    help="Keep this many batches and their features in memory and take them in turn: several times faster on a CPU. "
    "0 makes new crops for every step.",
)
@click.option("--learning-rate", default=2e-3, show_default=True, help="Of the decoder; LoRA takes a tenth.")
@click.option("--seed", default=0, show_default=True)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
def command(
    photos: Path,
    labels: Path,
    backbone: Path,
    out: Path,
    steps: int,
    lora_from: float,
    lora_rank: int,
    tokens: int,
    sizes: tuple[int, ...],
    batches: int,
    learning_rate: float,
    seed: int,
    device: str,
) -> None:
    """Distil the teacher into backbone + LoRA + decoder that answers in one pass at t = 0.

    Learns from the photos below PHOTOS that have a label below --labels. The loss is Dice on certain pixels plus
    the backbone's reconstruction of the photo, which keeps LoRA from drifting. The state is saved every two minutes
    and on Ctrl-C: run the same command again to go on.

    \b
      trace-sdk distill photos/ --labels runs/labels --backbone runs/backbone -o runs/student
    Next:
      trace-sdk export runs/student -o mine.onnx
    """
    from trace_sdk.backbones.device import torch_device
    from trace_sdk.backbones.pixel import PixelBackbone
    from trace_sdk.student.distill import DistillSettings, distill
    from trace_sdk.student.labelled_images import LabelledImages
    from trace_sdk.training.state import steps_done

    settings = DistillSettings(
        steps=steps,
        lora_from=lora_from,
        lora_rank=lora_rank,
        tokens=tokens,
        sizes=sizes,
        batches=batches,
        learning_rate=learning_rate,
        lora_learning_rate=learning_rate / 10,
        seed=seed,
    )
    images = LabelledImages(photos, labels, seed)
    with progress("distill", total=steps, done=steps_done(out)) as advance:
        distill(
            PixelBackbone.load(backbone),
            images,
            out,
            settings,
            device=torch_device(device),
            report=lambda step, losses: advance(note=" ".join(f"{k} {v:.3f}" for k, v in losses.items())),
        )
    output.print(f"Student written to {out}")
