"""`trace-sdk instances`: photos in, pictures of their instances and one COCO file out."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import click

from trace_sdk.atomic import write_text
from trace_sdk.cli.console import FAILED, errors, output, progress, say_error
from trace_sdk.cli.options import cut_options, engine_options, results_option
from trace_sdk.cli.parts import Parts, engine_facts
from trace_sdk.cli.photos import find_photos, photo_count, read_photo, save_jpeg
from trace_sdk.errors import InputError


@click.command()
@click.argument("photos", nargs=-1, required=True, metavar="PHOTO...")
@results_option
@cut_options
@engine_options
def command(
    photos: tuple[str, ...],
    out: Path,
    threshold: float | None,
    min_area: int | None,
    engine: str | None,
    device: str,
    size: int | None,
) -> None:
    """Cut photos into instances along their edges.

    PHOTO is a file, a folder (searched with its sub-folders, which are kept), or a quoted pattern. Each photo gives
    OUT/NAME.instances.jpg, its instances in colour; all of them together OUT/instances.json, a COCO data set with
    RLE masks, boxes, areas and scores. Every pixel belongs to an instance: edges say where things end, not what
    they are, so sky and wall are instances, too. Scores tell a clean outline from a vague one.

    \b
    Examples:
      trace-sdk instances street.jpg -o out/
      trace-sdk instances holiday/ -o out/ --threshold 0.6      fewer, larger instances
      trace-sdk instances 'shots/*.png' -o out/ --min-area 400

    A photo that is done is not done again unless it, the engine or an option has changed; what is done is kept in
    OUT/.instances. A file that cannot be read is reported and the others are still done.

    \b
    Exit code:
      0    all photos done
      1    a photo, the engine, the device or the output folder failed (see stderr)
      2    wrong usage, or no photo found
      130  interrupted; finished pictures are whole, run it again to go on
    """
    jobs = find_photos(photos, out)

    from trace_sdk import __version__
    from trace_sdk.detector import EdgeDetector

    start = time.perf_counter()
    detector = EdgeDetector(engine, device=device, size=size)
    made_with = {
        "version": __version__,
        **engine_facts(detector, threshold),
        "min_area": min_area,
    }
    parts = Parts(out / ".instances", made_with)
    names = Counter(job.relative for job in jobs)
    done: list[dict[str, Any]] = []
    failed = skipped = 0
    try:
        with progress("instances", total=len(jobs)) as advance:
            for job in jobs:
                file_name = (job.relative if names[job.relative] == 1 else job.photo).as_posix()
                picture = out / f"{job.name}.instances.jpg"
                try:
                    key = parts.key(read_photo(job.photo), os.fsencode(file_name), os.fsencode(job.name))
                    part = parts.get(key) if picture.is_file() else None
                    if part is None:
                        found = detector.run(job.photo).instances(threshold, min_area=min_area)
                        save_jpeg(found.plot(), picture)
                        coco = found.to_coco(file_name=file_name)
                        part = {"image": coco["images"][0], "annotations": coco["annotations"]}
                        parts.put(key, part)
                    else:
                        skipped += 1
                except InputError as error:
                    failed += 1
                    say_error(error)
                else:
                    done.append(part)
                advance(note=job.photo.name)
    except KeyboardInterrupt:
        errors.print(f"{len(done)} of {len(jobs)} photos done, each whole.")
        raise
    write_text(out / "instances.json", json.dumps(_together(done, made_with)))
    seconds = time.perf_counter() - start
    count = sum(len(part["annotations"]) for part in done)
    trouble = f", {failed} failed" if failed else ""
    earlier = f" ({skipped} were done already)" if skipped else ""
    output.print(
        f"{photo_count(len(done))}{earlier} → {out}{trouble}: {count} instances in "
        f"{out / 'instances.json'}, total {seconds:.1f} s ({made_with['engine']} on {detector.info['device']}, "
        f"size {detector.size}, threshold {made_with['threshold']:.3g})",
        markup=False,
        soft_wrap=True,
    )
    if failed:
        raise click.exceptions.Exit(FAILED)


def _together(parts: list[dict[str, Any]], made_with: dict[str, Any]) -> dict[str, Any]:
    """One COCO data set, ids counted through from 1."""
    from trace_sdk.instances.coco import CATEGORY

    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, part in enumerate(parts, start=1):
        images.append({**part["image"], "id": image_id})
        for annotation in part["annotations"]:
            annotations.append({**annotation, "id": len(annotations) + 1, "image_id": image_id})
    info = {"description": "Instances from edges, made by trace-sdk", **made_with}
    return {"info": info, "images": images, "categories": [CATEGORY], "annotations": annotations}
