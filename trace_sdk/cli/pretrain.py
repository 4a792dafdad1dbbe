"""trace-sdk pretrain: a pixel backbone from photos."""

from __future__ import annotations

from pathlib import Path

import click

from trace_sdk.cli.console import output, progress, status
from trace_sdk.cli.options import crop_options, learning_options, steps_option, torch_device_option, workers_option
from trace_sdk.cli.photos import check_apart, check_new


@click.command()
@click.argument("photos", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder for the state and the weights.",
)
@click.option(
    "--cutouts",
    type=click.Path(path_type=Path),
    help="Folder of RGBA cut-outs; half of the images are then scenes composed of them.",
)
@click.option("--backgrounds", type=click.Path(path_type=Path), help="Photos behind the cut-outs.  [default: PHOTOS]")
@click.option("--start", type=click.Path(path_type=Path), help="Folder of weights to start from.  [default: random]")
@click.option("--layers", default=12, show_default=True, help="Transformer blocks.")
@click.option("--heads", default=6, show_default=True, help="Attention heads of width 64 in each block.")
@steps_option(4300)
@crop_options(tokens=256 * 1024, sizes=(256,))
@click.option("--optimizer", type=click.Choice(["adamw", "muon"]), default="adamw", show_default=True)
@learning_options(7e-4)
@click.option("--warmup", default=300, show_default=True, help="Steps of linear warm-up.")
@click.option("--ema", default=0.999, show_default=True, help="How long the averaged weights remember.")
@workers_option
@torch_device_option
def command(
    photos: tuple[Path, ...],
    out: Path,
    cutouts: Path | None,
    backgrounds: Path | None,
    start: Path | None,
    layers: int,
    heads: int,
    steps: int,
    tokens: int,
    sizes: tuple[int, ...],
    optimizer: str,
    learning_rate: float,
    warmup: int,
    ema: float,
    seed: int,
    workers: int,
    device: str,
) -> None:
    """Train a pixel diffusion backbone on the photos below PHOTOS. No annotations are read.

    The state is saved every two minutes and on Ctrl-C: run the same command again to go on. Only --steps and
    --learning-rate may then be others.

    \b
    A backbone of 27.5 M parameters on one GPU (about 16 minutes on an H100):
      trace-sdk pretrain photos/ --cutouts cutouts/ -o runs/backbone --device cuda
    A smaller one on a laptop, overnight:
      trace-sdk pretrain photos/ -o runs/backbone --layers 8 --heads 4 --size 128 --tokens 16384 --optimizer muon
    Next:
      trace-sdk label photos/ --backbone runs/backbone -o runs/labels
    """
    from trace_sdk.backbones.device import torch_device
    from trace_sdk.pretraining.pretrain import PretrainSettings, pretrain
    from trace_sdk.pretraining.training_images import TrainingImages
    from trace_sdk.training.state import steps_done

    settings = PretrainSettings(
        layers=layers,
        heads=heads,
        steps=steps,
        tokens=tokens,
        sizes=sizes,
        optimizer=optimizer,
        learning_rate=learning_rate,
        warmup=warmup,
        ema=ema,
        seed=seed,
    )
    settings.check()
    check_apart(out, photos)
    check_new(out, start)
    place = torch_device(device)
    with status("pretrain") as note:
        note("reading every photo once")
        images = TrainingImages(list(photos), cutouts, backgrounds, seed)
    with progress("pretrain", total=steps, done=steps_done(out)) as advance:
        pretrain(
            images,
            out,
            settings,
            start=start,
            device=place,
            workers=workers,
            report=lambda step, losses: advance(note=f"loss {losses['loss']:.4f}"),
        )
    output.print(f"Backbone written to {out}", markup=False, soft_wrap=True)
