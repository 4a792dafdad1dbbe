"""trace-sdk label: the teacher over a data set."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import click

from trace_sdk.cli.console import FAILED, errors, output, progress, say_error, status
from trace_sdk.cli.options import block_option, torch_device_option
from trace_sdk.cli.photos import check_apart


@click.command()
@click.argument("images", nargs=-1, required=True)
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
    help="Folder for the labels, one .npz an image; may be shared by processes and machines.",
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
@block_option("Only this block, from 0; repeatable. The first and the last often see texture.  [default: all]")
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
    "--offload",
    is_flag=True,
    help="Keep a latent model's weights in the computer's memory; the GPU sees a layer at a time.",
)
@click.option("--seed", default=0, show_default=True, help="Of the noise ε.")
@click.option("--limit", type=click.IntRange(min=1), help="Only the first N images.")
@click.option(
    "--batch",
    default=1,
    show_default=True,
    help="Images of one shape that go through the model together.",
)
@click.option("--retry-failed", is_flag=True, help="Try again what failed in an earlier run.")
@click.option(
    "--plot",
    "plots",
    is_flag=True,
    help="Beside each new label a picture: KL curve, attention PCA and ABDiv along t, labels; and t-star.png, "
    "how often each t* was found in the folder.",
)
@click.option(
    "--prompt",
    help="With --plot: also where the image looks at the words of this text, at the same t.",
)
@click.option(
    "--word", "words", multiple=True, help="Only this word or phrase of --prompt; repeatable.  [default: all]"
)
@torch_device_option
def command(
    images: tuple[str, ...],
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
    batch: int,
    retry_failed: bool,
    plots: bool,
    prompt: str | None,
    words: tuple[str, ...],
    device: str,
) -> None:
    """Find instance edges in IMAGES without any annotation.

    For each image: noise it step by step, find the timestep t* where self-attention changes most (IEP, by KL),
    measure there how much attention differs between neighbours (ABDiv), and call each token an edge
    (above μ+σ), interior (below μ−σ) or uncertain.

    \b
    IMAGES, one or several, of which only file names are read, never annotations:
      photos/                  a folder with its sub-folders; of VOC its JPEGImages/
      'photos/**/*.jpg'        a pattern, quoted
      train.txt                a list of paths, or of ids in VOC's ImageSets/
      instances_val2017.json   the images that a COCO file names
      'shards/*.tar'           WebDataset

    Look at one photo first, then label all and distil:

    \b
      trace-sdk label cars.jpg --backbone runs/backbone -o runs/look --plot
      trace-sdk label pets.jpg --backbone models/sd15 -o runs/look --plot --prompt "a dog and a cat" --word dog
      trace-sdk label photos/ --backbone runs/backbone -o runs/labels
      trace-sdk distill photos/ --labels runs/labels --backbone runs/backbone -o runs/student

    Several GPUs or machines: run the same command on each, with its own --device; they share the work in LABELS and
    each ends when all is done. A run that was cut, even by kill -9, goes on where it was, and ends with the bytes of
    one that was not. An image that cannot be read fails, with its reason, and the others are still done;
    manifest.jsonl in LABELS lists each image's state.

    \b
    Exit code:
      0    every image has a label
      1    an image failed (now or in an earlier run), or the model, the device or the folder did
      2    wrong usage
      130  interrupted; run it again to go on
    """
    if (prompt and not plots) or (words and not prompt):
        raise click.UsageError("--word picks from --prompt, and --prompt is for the pictures of --plot.")
    if plots:
        check_apart(out, images)
    from trace_sdk.backbones.registry import open_backbone, open_prompt
    from trace_sdk.labelling.images import find_images
    from trace_sdk.labelling.label import LabelJob
    from trace_sdk.teacher.labels import load_label
    from trace_sdk.teacher.plot import Words, plot_t_star
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
    found = find_images(images)[:limit]
    shown = None
    with status("label") as note:
        if prompt:
            note("reading the prompt")
            shown = Words(open_prompt(backbone, prompt, device=device, precision=precision, offload=offload), words)
            shown.check()
        note("opening the backbone")
        opened = open_backbone(backbone, device=device, precision=precision, offload=offload)
    teacher = Teacher(opened, settings)
    job = LabelJob(
        teacher, found, out, opened.identity, batch=batch, retry_failed=retry_failed, plots=plots, words=shown
    )
    start = time.perf_counter()
    with progress("label", total=len(found), done=job.before, unit="images") as advance:

        def report(name: str, reason: str | None) -> None:
            if reason:
                say_error(reason)
            advance(note=name)

        summary = job.run(report)
    seconds = time.perf_counter() - start
    if plots and len(found) > 1 and not timesteps:
        labels = [load_label(file).about for file in sorted(out.rglob("*.npz"))]
        plot_t_star([about["emergence"]["t_star"] for about in labels], window, out / "t-star.png")
    parts = [f"{summary.done} labelled in {seconds:.1f} s ({summary.done / max(seconds, 1e-9):.2f} images/s)"]
    parts += [f"{summary.before} were there already"] if summary.before else []
    parts += [f"{summary.elsewhere} done by other processes"] if summary.elsewhere else []
    parts += [f"{len(summary.failed)} failed"]
    parts += [f"median t* = {statistics.median(summary.t_star):g}"] if summary.t_star else []
    output.print(f"{', '.join(parts)}. Labels: {out}", markup=False, soft_wrap=True)
    if summary.failed:
        again = "Reasons are in manifest.jsonl there; --retry-failed tries again."
        errors.print(again, markup=False, soft_wrap=True)
        raise click.exceptions.Exit(FAILED)
