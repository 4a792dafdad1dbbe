"""trace-sdk self-train: a student learns from scenes of its own cut-outs."""

from __future__ import annotations

from pathlib import Path

import click

from trace_sdk.cli.console import output, progress, status
from trace_sdk.cli.options import learning_options, steps_option, torch_device_option, workers_option
from trace_sdk.cli.photos import check_apart, check_new


@click.command()
@click.argument("student", type=click.Path(path_type=Path))
@click.argument("photos", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="PHOTOS...")
@click.option(
    "--cutouts",
    required=True,
    multiple=True,
    type=click.Path(path_type=Path),
    help="Folder that `trace-sdk cutouts` wrote; may be given several times.",
)
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder for state and student.")
@steps_option(1500)
@click.option("--crops", default=8, show_default=True, help="Scenes a step.")
@click.option("--size", default=224, show_default=True, help="Their side in px, a multiple of 32.")
@click.option(
    "--lora-rank", default=0, show_default=True, help="LoRA on the backbone, which then learns too; 0 leaves it alone."
)
@learning_options(2e-3, "LoRA takes a tenth.")
@workers_option
@torch_device_option
def command(
    student: Path,
    photos: tuple[Path, ...],
    cutouts: tuple[Path, ...],
    out: Path,
    steps: int,
    crops: int,
    size: int,
    lora_rank: int,
    learning_rate: float,
    seed: int,
    workers: int,
    device: str,
) -> None:
    """Train STUDENT on scenes composed of what its edges cut out, over the PHOTOS (folders).

    No annotation is needed: where a cut-out was pasted is known to the pixel, whatever it shows. Three scenes of
    ten have random shapes of the photos instead; of the others half put cut-outs back into the photo they came from,
    which `trace-sdk cutouts` writes into them; of other cut-outs the names tell (PHOTO-1.png). Of a student with a
    backbone the decoder learns, with --lora-rank the backbone too. Every folder counts the same, however many pictures
    it has: keep a few varied, sharp photos in one of their own. The state is saved every two minutes and on Ctrl-C: run
    the same command again to go on.

    \b
      trace-sdk export runs/nano -o first.onnx
      trace-sdk cutouts photos/ --engine first.onnx --size 384 -o runs/cutouts
      trace-sdk self-train runs/nano photos/ --cutouts runs/cutouts -o runs/better
    Next:
      trace-sdk export runs/better -o mine.onnx
    """
    from trace_sdk.backbones.device import torch_device
    from trace_sdk.student.folder import open_student
    from trace_sdk.student.own_scenes import OwnScenes
    from trace_sdk.student.self_train import SelfTrainSettings, self_train
    from trace_sdk.training.state import steps_done

    settings = SelfTrainSettings(
        steps=steps, crops=crops, size=size, lora_rank=lora_rank, learning_rate=learning_rate, seed=seed
    )
    opened, place = open_student(student), torch_device(device)
    settings.check(opened)
    check_apart(out, photos)
    check_new(out, student)
    with status("self-train") as note:
        note("reading every photo once")
        scenes = OwnScenes(photos, cutouts, seed)
    with progress("self-train", total=steps, done=steps_done(out)) as advance:
        self_train(
            opened,
            scenes,
            out,
            settings,
            device=place,
            workers=workers,
            report=lambda step, losses: advance(note=f"loss {losses['loss']:.3f}"),
        )
    output.print(f"Student written to {out}", markup=False, soft_wrap=True)
