"""trace-sdk distill-nano: the small convolutional student."""

from __future__ import annotations

from pathlib import Path

import click

from trace_sdk.cli.console import output, progress
from trace_sdk.cli.options import learning_options, steps_option, torch_device_option


@click.command()
@click.argument("photos", nargs=-1, required=True, metavar="PHOTOS...")
@click.option("--labels", required=True, type=click.Path(path_type=Path), help="Folder that `trace-sdk label` wrote.")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder for state and student.")
@steps_option(3000)
@click.option("--crops", default=8, show_default=True, help="Crops a step.")
@click.option("--size", default=224, show_default=True, help="Their side in px, a multiple of 32.")
@click.option(
    "--held-out", default=0.05, show_default=True, help="Share of the images that only choose the edge threshold."
)
@learning_options(3e-3)
@torch_device_option
def command(
    photos: tuple[str, ...],
    labels: Path,
    out: Path,
    steps: int,
    crops: int,
    size: int,
    learning_rate: float,
    held_out: float,
    seed: int,
    device: str,
) -> None:
    """Distil the teacher's labels into a convolutional network of 0.8 million parameters.

    Learns from the images in PHOTOS (as `trace-sdk label` takes them) that have a label below --labels; no backbone
    is needed. It answers about ten times faster on a CPU than the student of `trace-sdk distill`. The state is saved
    every two minutes and on Ctrl-C: run the same command again to go on.

    \b
      trace-sdk distill-nano photos/ --labels runs/labels -o runs/nano
    Next:
      trace-sdk export runs/nano -o mine.onnx
    """
    from trace_sdk.backbones.device import torch_device
    from trace_sdk.student.distill_nano import NanoSettings, distill_nano
    from trace_sdk.student.labelled_images import LabelledImages
    from trace_sdk.training.state import steps_done

    settings = NanoSettings(
        steps=steps, crops=crops, size=size, learning_rate=learning_rate, held_out=held_out, seed=seed
    )
    images = LabelledImages(photos, labels, seed)
    with progress("distill-nano", total=steps, done=steps_done(out)) as advance:
        distill_nano(
            images,
            out,
            settings,
            device=torch_device(device),
            report=lambda step, losses: advance(note=" ".join(f"{k} {v:.3f}" for k, v in losses.items())),
        )
    output.print(f"Student written to {out}", markup=False, soft_wrap=True)
