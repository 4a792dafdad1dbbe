"""`trace-sdk prompts`: photos in, points and boxes for promptable segmenters out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from trace_sdk.atomic import write_text
from trace_sdk.cli.console import FAILED, output, progress, say_error
from trace_sdk.cli.options import cut_options, engine_options, results_option
from trace_sdk.cli.photos import find_photos, photo_count
from trace_sdk.errors import InputError


@click.command()
@click.argument("photos", nargs=-1, required=True, metavar="PHOTO...")
@results_option
@click.option(
    "--format",
    "form",
    type=click.Choice(["sam", "sam2", "ultralytics", "transformers"]),
    default="sam2",
    show_default=True,
    help="Whose keywords the file has.",
)
@click.option("--points", type=click.IntRange(min=1), default=1, show_default=True, help="Of each instance.")
@click.option("--min-score", type=click.FloatRange(0, 1), default=0.0, help="Leave out instances below this score.")
@cut_options
@engine_options
def command(
    photos: tuple[str, ...],
    out: Path,
    form: str,
    points: int,
    min_score: float,
    threshold: float | None,
    min_area: int | None,
    engine: str | None,
    device: str,
    size: int | None,
) -> None:
    """Write points and boxes of the instances of photos, as prompts for SAM.

    PHOTO is a file, a folder or a quoted pattern. Each gives OUT/NAME.prompts.json: `prompts`, the keywords of the
    format, `scores` of the instances, best first, and `size`, width and height that the coordinates refer to.

    \b
    Formats:
      sam           a list, one entry an instance: SamPredictor.predict(**entry), lists to be made arrays
      sam2          SAM2ImagePredictor.predict(**prompts), lists to be made arrays
      ultralytics   SAM("sam2.1_b.pt")(photo, **prompts)
      transformers  SamProcessor(photo, **prompts)

    \b
    Examples:
      trace-sdk prompts street.jpg -o out/ --format ultralytics
      trace-sdk prompts holiday/ -o out/ --points 3 --min-score 0.4

    \b
    Exit code:
      0    all photos done
      1    a photo, the engine, the device or the output folder failed (see stderr)
      2    wrong usage, or no photo found
      130  interrupted; finished files are whole
    """
    jobs = find_photos(photos, out)

    from trace_sdk.detector import EdgeDetector

    detector = EdgeDetector(engine, device=device, size=size)
    failed = count = 0
    with progress("prompts", total=len(jobs)) as advance:
        for job in jobs:
            try:
                edges = detector.run(job.photo)
                found = edges.sam_prompts(threshold, min_area=min_area, points=points, min_score=min_score)
            except InputError as error:
                failed += 1
                say_error(error)
            else:
                count += len(found)
                content = {
                    "format": form,
                    "photo": job.relative.as_posix(),
                    "size": list(found.size),
                    "scores": [round(float(score), 6) for score in found.scores],
                    "prompts": _plain(getattr(found, f"to_{form}")()),
                    "info": {**edges.provenance(), "threshold": found.info["threshold"]},
                }
                write_text(out / f"{job.name}.prompts.json", json.dumps(content))
            advance(note=job.photo.name)
    trouble = f", {failed} failed" if failed else ""
    done = photo_count(len(jobs) - failed)
    output.print(f"{done} → {out}{trouble}: {count} prompts", markup=False, soft_wrap=True)
    if failed:
        raise click.exceptions.Exit(FAILED)


def _plain(prompts: Any) -> Any:
    """Arrays as lists."""
    if isinstance(prompts, dict):
        return {key: _plain(value) for key, value in prompts.items()}
    if isinstance(prompts, list):
        return [_plain(value) for value in prompts]
    return prompts.tolist() if hasattr(prompts, "tolist") else prompts
