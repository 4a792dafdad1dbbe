"""`trace-sdk gallery`: photos in, one static web page of what was found in them out."""

from __future__ import annotations

import os
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import click

from trace_sdk.cli.console import FAILED, output, progress, say_error
from trace_sdk.cli.options import engine_options
from trace_sdk.cli.photos import find_photos, photo_count, save_jpeg
from trace_sdk.errors import ArgumentError, InputError

if TYPE_CHECKING:
    from PIL.Image import Image

    from trace_sdk.edge_map import EdgeMap


@click.command()
@click.argument("photos", nargs=-1, required=True, metavar="PHOTO...")
@click.option(
    "-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder for the page; made if missing."
)
@click.option("--title", default="Instance edges", show_default=True, help="Heading of the page.")
@click.option(
    "--masks",
    type=click.Path(path_type=Path),
    help="COCO results or data set: also show its masks, and refined; PHOTO is then the one folder of its photos.",
)
@click.option("--annotations", type=click.Path(path_type=Path), help="COCO data set that names the images of --masks.")
@click.option("--hatch", is_flag=True, help="Instances in stripes as well as colours.")
@click.option("--threshold", type=click.FloatRange(0, 1), help="From fine (0) to coarse (1).  [default: the engine's]")
@engine_options
def command(
    photos: tuple[str, ...],
    out: Path,
    title: str,
    masks: Path | None,
    annotations: Path | None,
    hatch: bool,
    threshold: float | None,
    engine: str | None,
    device: str,
    size: int | None,
) -> None:
    """Make a web page of photos, their edges, instances and refined masks.

    OUT/index.html shows each photo with a slider between any two of: the photo, edges over it, edge probability,
    instances, and with --masks the masks before and after refinement. It needs no server and loads nothing from
    elsewhere; OUT/pictures holds its JPEGs.

    \b
    Examples:
      trace-sdk gallery holiday/ -o page/
      trace-sdk gallery val2017/ --masks cutler.json -o page/ --title "CutLER, refined"

    \b
    Exit code:
      0    all photos are on the page
      1    a photo, the engine or the output folder failed (see stderr)
      2    wrong usage, or no photo found
      130  interrupted; no page is written
    """
    if annotations is not None and masks is None:
        raise ArgumentError("--annotations names the images of --masks. Give both, or none.")
    jobs = find_photos(photos, out)

    from trace_sdk.detector import EdgeDetector
    from trace_sdk.gallery import Exhibit, write_page

    shown = _predicted(masks, photos, annotations)
    detector = EdgeDetector(engine, device=device, size=size)
    exhibits = []
    failed = 0
    with progress("gallery", total=len(jobs)) as advance:
        for job in jobs:
            files = []
            try:
                edges = detector.run(job.photo)
                pictures = _pictures(edges, threshold, hatch)
                if masks is not None:
                    pictures += _mask_pictures(edges, shown.get(job.photo.resolve()), masks, threshold)
                for caption, picture in pictures:
                    name = Path("pictures", f"{job.name}.{caption.replace(' ', '-')}.jpg")
                    save_jpeg(picture.convert("RGB"), out / name, quality=88)
                    files.append((caption, _link(name)))
            except InputError as error:
                failed += 1
                say_error(error)
            else:
                height, width = edges.probability.shape
                note = f"{edges.info['engine']}, {edges.info['timings']['total']:.0f} ms"
                exhibits.append(Exhibit(_shown(job.relative), width, height, tuple(files), note))
            advance(note=job.photo.name)
    write_page(out / "index.html", title, exhibits)
    trouble = f", {failed} failed" if failed else ""
    done = photo_count(len(exhibits))
    output.print(f"{done} → {out / 'index.html'}{trouble}", markup=False, soft_wrap=True)
    if failed:
        raise click.exceptions.Exit(FAILED)


def _link(name: PurePath) -> str:
    return quote(os.fsencode(name.as_posix()))


def _shown(name: Path) -> str:
    """A name for people: bytes that are no text, as old archives have them, are replaced."""
    return os.fsencode(name).decode(errors="replace")


def _pictures(edges: EdgeMap, threshold: float | None, hatch: bool) -> list[tuple[str, Image]]:
    """Caption and picture, the photo first."""
    import numpy as np
    import PIL.Image

    grey = PIL.Image.fromarray(np.rint(edges.probability * 255).astype(np.uint8))
    found = edges.instances(threshold)
    return [
        ("photo", PIL.Image.fromarray(edges.rgb)),
        ("probability", grey),
        ("edges", edges.overlay()),
        ("instances", found.plot(hatch=hatch)),
    ]


def _predicted(masks: Path | None, photos: tuple[str, ...], annotations: Path | None) -> dict[Path, Any]:
    """Images of a file of masks, by photo."""
    if masks is None:
        return {}
    if len(photos) != 1 or not Path(photos[0]).is_dir():
        raise ArgumentError("--masks needs one folder of photos as PHOTO.")
    from trace_sdk.instances.predictions import read_predictions

    found = read_predictions(masks, Path(photos[0]), annotations, say_error)
    return {image.photo.resolve(): image for image in found.images}


def _mask_pictures(edges: EdgeMap, image: Any, file: Path, threshold: float | None) -> list[tuple[str, Image]]:
    import numpy as np

    from trace_sdk.instances.painting import paint_masks
    from trace_sdk.instances.predictions import decode_entries, refine_entries

    height, width = edges.probability.shape
    decoded = decode_entries(image, height, width, file, say_error) if image is not None else []
    given = np.array([mask for _, mask in decoded], np.bool_).reshape(-1, height, width)
    crowds = [place for place, (entry, _) in enumerate(decoded) if entry.get("iscrowd")]
    after, numbers = [given[crowds]], list(crowds)
    for places, found in refine_entries(edges, decoded, threshold):
        after.append(found.masks[~found.sides])
        # A refined mask keeps the colour of the mask it came from.
        numbers += [places[s[0]] for s, side in zip(found.sources, found.sides, strict=True) if not side]
    refined = paint_masks(edges.rgb, np.concatenate(after), numbers)
    return [("masks", paint_masks(edges.rgb, given)), ("refined masks", refined)]
