"""`trace-sdk cutouts`: photos in, the things in them as RGBA pictures out."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import click

from trace_sdk.atomic import write_whole
from trace_sdk.cli.console import FAILED, output, progress, say_error
from trace_sdk.cli.options import engine_options, results_option
from trace_sdk.cli.parts import Parts, engine_facts
from trace_sdk.cli.photos import check_apart, find_photos, photo_count, read_photo
from trace_sdk.errors import InputError


@click.command()
@click.argument("photos", nargs=-1, required=True, metavar="PHOTO...")
@results_option
@click.option(
    "--min-score",
    type=click.FloatRange(0, 1),
    help="How clean an outline must be: mean edge probability, less the strongest border inside. "
    "[default: half the engine's threshold]",
)
@engine_options
def command(
    photos: tuple[str, ...], out: Path, min_score: float | None, engine: str | None, device: str, size: int | None
) -> None:
    """Cut out what the edges enclose: whole, compact, with a clean outline.

    PHOTO is a file, a folder or a quoted pattern. Each gives OUT/NAME-1.png, NAME-2.png …, best first, transparent
    outside the outline. They are what `trace-sdk self-train` composes its scenes of, and `trace-sdk pretrain` takes
    them, too. Look through them: what is no thing can be deleted.

    \b
    Examples:
      trace-sdk cutouts photos/ -o cutouts/ --size 384
      trace-sdk self-train runs/student photos/ --cutouts cutouts/ -o runs/better

    A photo that is done is not done again unless it, the engine or an option has changed; its cut-outs are then
    replaced.

    \b
    Exit code:
      0    all photos done
      1    a photo, the engine, the device or the output folder failed (see stderr)
      2    wrong usage, or no photo found
      130  interrupted; run it again to go on
    """
    check_apart(out, photos)
    jobs = find_photos(photos, out)

    from PIL.PngImagePlugin import PngInfo

    from trace_sdk.detector import EdgeDetector
    from trace_sdk.instances.cutouts import cut_out
    from trace_sdk.pretraining.cutouts import OF_PHOTO

    detector = EdgeDetector(engine, device=device, size=size)
    made_of = Parts(out / ".cutouts", {**engine_facts(detector, None), "min_score": min_score})
    records = Parts(out / ".cutouts", {})  # one a photo: what its files here were made of
    failed = count = 0
    with progress("cutouts", total=len(jobs)) as advance:
        for job in jobs:
            try:
                data = read_photo(job.photo)
                key = made_of.key(data, os.fsencode(job.name))
                place = records.key(os.fsencode(job.name))
                last = records.get(place) or {"of": None, "cutouts": []}
                if last["of"] != key:
                    cutouts = cut_out(detector.run(job.photo), min_score)
                    about = PngInfo()
                    about.add_text(OF_PHOTO, hashlib.sha256(data).hexdigest())
                    for number, cutout in enumerate(cutouts, start=1):
                        with write_whole(out / f"{job.name}-{number}.png") as file:
                            cutout.image.save(file, "PNG", pnginfo=about)
                    for number in range(len(cutouts) + 1, len(last["cutouts"]) + 1):  # that were there before
                        (out / f"{job.name}-{number}.png").unlink(missing_ok=True)
                    last = {"of": key, "cutouts": [{"box": one.box, "score": round(one.score, 4)} for one in cutouts]}
                    records.put(place, last)
                count += len(last["cutouts"])
            except InputError as error:
                failed += 1
                say_error(error)
            advance(note=job.photo.name)
    trouble = f", {failed} failed" if failed else ""
    done = photo_count(len(jobs) - failed)
    output.print(f"{done} → {out}{trouble}: {count} cut-outs", markup=False, soft_wrap=True)
    if failed:
        raise click.exceptions.Exit(FAILED)
