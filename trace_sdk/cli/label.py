"""trace-sdk label: the teacher over a folder of photos."""

from __future__ import annotations

import statistics
from pathlib import Path

import click

from trace_sdk.cli.console import FAILED, output, progress, say_error


@click.command("label", short_help="Label photos edge / interior / uncertain with the teacher.")
@click.argument("photos", type=click.Path(path_type=Path))
@click.option(
    "--backbone",
    required=True,
    help="A diffusers folder (Stable Diffusion, FLUX, …), one that `trace-sdk pretrain` wrote, or a hub id owner/name.",
)
@click.option(
    "-o",
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder for the labels, one .npz a photo.",
)
@click.option("--size", default=512, show_default=True, help="Longest side shown to the backbone, in px.")
@click.option(
    "--tile",
    type=int,
    help="Read larger photos in square windows of this side, in px: finer tokens at --size 800.  [default: whole]",
)
@click.option(
    "-t",
    "--timestep",
    "timesteps",
    multiple=True,
    type=float,
    help="Fixed t in [0, 1) in place of IEP; give several to average their ABDiv.",
)
@click.option("--stride", default=100, show_default=True, help="IEP: step of the schedule, in thousandths of t.")
@click.option(
    "--window",
    nargs=2,
    default=(0.1, 0.6),
    show_default=True,
    help="IEP: lowest and highest t that t* may take.",
)
@click.option(
    "--criterion",
    type=click.Choice(["kl", "l2", "entropy", "wasserstein"]),
    default="kl",
    show_default=True,
    help="IEP: t* is where this changes most between timesteps; all but KL for comparison only.",
)
@click.option(
    "--iep-rows",
    type=int,
    help="IEP: take the KL on this many rows of the map; 256 move it by about 1 % and save memory.  [default: all]",
)
@click.option(
    "--trajectory",
    type=click.Choice(["noising", "inversion"]),
    default="noising",
    show_default=True,
    help="Towards noise with one fixed ε, or along the model's own flow.",
)
@click.option(
    "--form",
    type=click.Choice(["mean", "per-head", "log-per-head"]),
    default="mean",
    show_default=True,
    help="Divergence of the head-averaged map, or mean over the heads' own (no N×N map).",
)
@click.option("--neighbourhood", type=click.Choice(["4", "8"]), default="4", show_default=True)
@click.option(
    "--block",
    "blocks",
    multiple=True,
    type=int,
    help="Only this block, from 0; repeatable. The first and the last often see texture.  [default: all]",
)
@click.option("--mirror", is_flag=True, help="Average with the mirrored photo's map.")
@click.option(
    "--precision",
    type=click.Choice(["fp32", "bf16", "fp16"]),
    default="fp32",
    show_default=True,
    help="Of the backbone's arithmetic; bf16 is about twice as fast where the CPU or GPU has it, and takes half the "
    "memory of a latent model.",
)
@click.option(
    "--offload", is_flag=True, help="Keep the weights in the computer's memory; the GPU sees a layer at a time."
)
@click.option("--seed", default=0, show_default=True, help="Of the noise ε.")
@click.option("--limit", type=int, help="Only the first N photos.")
@click.option(
    "--plot",
    "plots",
    is_flag=True,
    help="Beside each label a picture: KL curve, attention PCA and ABDiv along t, labels; and t-star.png, how often "
    "each t* was found in the folder.",
)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
def command(
    photos: Path,
    backbone: str,
    out: Path,
    size: int,
    tile: int | None,
    timesteps: tuple[float, ...],
    stride: int,
    window: tuple[float, float],
    criterion: str,
    iep_rows: int | None,
    trajectory: str,
    form: str,
    neighbourhood: str,
    blocks: tuple[int, ...],
    mirror: bool,
    precision: str,
    offload: bool,
    seed: int,
    limit: int | None,
    plots: bool,
    device: str,
) -> None:
    """Find instance edges in the photos below PHOTOS (a folder, or one photo) without any annotation.

    For each photo: noise it step by step, find the timestep t* where self-attention changes most (IEP, by KL),
    measure there how much attention differs between neighbours (ABDiv), and call each token an edge
    (above μ+σ), interior (below μ−σ) or uncertain.

    Photos that have a label are skipped, so a run that was cut goes on. One that cannot be read is reported and
    the others are still done; the exit code is then 1.

    \b
    Look at one photo first:
      trace-sdk label cars.jpg --backbone runs/backbone -o runs/look --plot
    Then label a folder and distil:
      trace-sdk label photos/ --backbone runs/backbone -o runs/labels
      trace-sdk distill photos/ --labels runs/labels --backbone runs/backbone -o runs/student
    """
    from trace_sdk.backbones.registry import open_backbone
    from trace_sdk.pretraining.training_images import list_photos
    from trace_sdk.teacher.labeller import label_folder
    from trace_sdk.teacher.labels import load_label
    from trace_sdk.teacher.plot import plot_t_star
    from trace_sdk.teacher.teacher import Teacher, TeacherSettings

    settings = TeacherSettings(
        size=size,
        tile=tile,
        timesteps=timesteps or None,
        stride=stride,
        window=window,
        criterion=criterion,
        iep_rows=iep_rows,
        trajectory=trajectory,
        form=form,
        neighbourhood=int(neighbourhood),
        blocks=blocks or None,
        mirror=mirror,
        precision=precision,
        seed=seed,
    )
    settings.check()
    single = photos.is_file()
    files = [photos] if single else list_photos([photos])[:limit]
    opened = open_backbone(backbone, device=device, precision=precision, offload=offload)
    teacher = Teacher(opened, settings)
    with progress("label", total=len(files)) as advance:
        summary = label_folder(
            teacher,
            files,
            photos.parent if single else photos,
            out,
            opened.identity,
            plots=plots,
            report=lambda photo: advance(note=photo.name),
        )
    if plots and not single and not timesteps:
        labels = [load_label(file).about for file in sorted(out.rglob("*.npz"))]
        plot_t_star([about["emergence"]["t_star"] for about in labels], window, out / "t-star.png")
    for reason in summary.failed.values():
        say_error(reason)
    found = f", median t* = {statistics.median(summary.t_star):g}" if summary.t_star else ""
    output.print(
        f"{summary.done} labelled, {summary.skipped} were there already, {len(summary.failed)} failed{found}. "
        f"Labels: {out}"
    )
    if summary.failed:
        raise click.exceptions.Exit(FAILED)
