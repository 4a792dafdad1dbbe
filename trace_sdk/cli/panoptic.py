"""`trace-sdk panoptic`: semantic label pictures and photos in, a COCO panoptic data set out."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from trace_sdk.atomic import write_text
from trace_sdk.cli.console import BadEntries, errors, output, progress
from trace_sdk.cli.options import engine_options, results_option
from trace_sdk.cli.parts import Parts, engine_facts
from trace_sdk.cli.photos import read_photo, save_jpeg
from trace_sdk.errors import DatasetError, InputError
from trace_sdk.folders import files_below
from trace_sdk.images import PHOTO_SUFFIXES
from trace_sdk.pictures import save_png

# What tools append to the stem of a photo, or a photo to that of its scene.
_SEMANTIC_ENDS = ("_gtFine_labelIds", "_gtFine_labelTrainIds", "_gtCoarse_labelIds", "_labelIds", "_labelTrainIds")
_PHOTO_END = "_leftImg8bit"


@click.command()
@click.option("--semantic", required=True, type=click.Path(path_type=Path), help="Folder of semantic PNGs.")
@click.option("--images", required=True, type=click.Path(path_type=Path), help="Folder of their photos.")
@results_option
@click.option(
    "--labels",
    required=True,
    metavar="NAME|FILE",
    help="voc, coco-stuff, coco-stuff-maps, cityscapes, cityscapes-train, or a .json list of {id, name, isthing}.",
)
@click.option("--threshold", type=click.FloatRange(0, 1), help="Of edges that separate.  [default: the engine's own]")
@click.option("--min-area", type=click.IntRange(min=0), help="Smaller things, in pixels, are void.")
@click.option("--plot", is_flag=True, help="Also write the segments in colour over each photo, as a JPEG.")
@click.option("--skip-bad", is_flag=True, help="Leave out pictures that cannot be used, list them, go on.")
@engine_options
def command(
    semantic: Path,
    images: Path,
    out: Path,
    labels: str,
    threshold: float | None,
    min_area: int | None,
    plot: bool,
    skip_bad: bool,
    engine: str | None,
    device: str,
    size: int | None,
) -> None:
    """Turn semantic label pictures into panoptic ones.

    Things are split into instances by the edges of the photo, stuff of one class is one segment, what is void stays
    void. A semantic picture belongs to the photo of the same stem (Cityscapes' endings are known), in sub-folders,
    too. Writes OUT/panoptic.json, a COCO panoptic data set, and OUT/panoptic/STEM.png.

    \b
    Values of the pictures (--labels):
      voc                0 background to 20, 255 void; as a palette, grey or VOC's colours
      coco-stuff         COCO ids 1 to 182; 0 and 255 void
      coco-stuff-maps    COCO ids less 1, as in the stuffthingmaps; 255 void
      cityscapes         ids 0 to 33 (*_labelIds.png); cityscapes-train: 0 to 18 (*_labelTrainIds.png)
      my.json            a list of {"id": pixel value, "name": ..., "isthing": 0 or 1}

    \b
    Examples:
      trace-sdk panoptic --semantic dhr/ --images JPEGImages/ --labels voc -o out/
      trace-sdk panoptic --semantic pred/ --images leftImg8bit/val/ --labels cityscapes-train -o out/ --plot

    What is done is kept in OUT/.panoptic; a run that was cut goes on there.

    \b
    Exit code:
      0    done (with --skip-bad: what could be used; the rest is listed on stderr)
      1    a picture, a photo, the engine or the output failed (see stderr)
      2    wrong usage
      130  interrupted; run it again to go on
    """
    from trace_sdk import __version__
    from trace_sdk.detector import EdgeDetector
    from trace_sdk.instances.label_sets import read_label_set
    from trace_sdk.instances.panoptic import panoptic_content, read_semantic

    on_bad = BadEntries(skip_bad)
    start = time.perf_counter()
    known = read_label_set(labels)
    pairs: list[tuple[Path, Path]] = []
    for picture, found_photo in _pairs(semantic, images):
        if found_photo is not None:
            pairs.append((picture, found_photo))
        else:
            on_bad(DatasetError(f"{picture} has no photo of the same stem. Put it into the folder of --images."))
    detector = EdgeDetector(engine, device=device, size=size)
    made_with = {
        "description": "Panoptic segments from semantics and edges, made by trace-sdk",
        "version": __version__,
        **engine_facts(detector, threshold),
        "min_area": min_area,
        "labels": known.name,
        "categories": sorted((value, one.id, one.thing) for value, one in known.values.items()),
    }
    parts = Parts(out / ".panoptic", made_with)
    numbers = _image_ids([photo for _, photo in pairs])
    done: list[dict[str, Any]] = []
    looked = 0
    try:
        with progress("panoptic", total=len(pairs)) as advance:
            for (picture, photo), number in zip(pairs, numbers, strict=True):
                png, coloured = out / "panoptic" / f"{photo.stem}.png", out / "plots" / f"{photo.stem}.jpg"
                wanted = [png, coloured] if plot else [png]
                try:
                    facts = json.dumps([number, photo.name]).encode()
                    key = parts.key(read_photo(photo), read_photo(picture), facts)
                    part = parts.get(key) if all(file.is_file() for file in wanted) else None
                    if part is None:
                        values = read_semantic(picture, known)
                        edges = detector.run(photo)
                        height, width = edges.probability.shape
                        if values.shape != (height, width):
                            raise DatasetError(
                                f"{picture} is {values.shape[1]}x{values.shape[0]}, its photo {photo} is "
                                f"{width}x{height}. Write labels as large as the photo."
                            )
                        found = edges.panoptic(values, known, threshold=threshold, min_area=min_area)
                        save_png(found.to_png(), png)
                        if plot:
                            save_jpeg(found.plot(), coloured)
                        image = {"id": number, "file_name": photo.name, "width": width, "height": height}
                        part = {"image": image, "annotation": found.to_coco(number, png.name)}
                        parts.put(key, part)
                    done.append(part)
                except (InputError, DatasetError) as error:
                    on_bad(error)
                looked += 1
                advance(note=photo.name)
    except KeyboardInterrupt:
        errors.print(f"{looked} of {len(pairs)} pictures done and kept.")
        raise
    info = {key: value for key, value in made_with.items() if key != "categories"}
    content = panoptic_content([part["image"] for part in done], [part["annotation"] for part in done], known, info)
    write_text(out / "panoptic.json", json.dumps(content))
    things = {category.id for category in known.values.values() if category.thing}
    segments = [segment for part in done for segment in part["annotation"]["segments_info"]]
    count = sum(segment["category_id"] in things for segment in segments)
    output.print(
        f"{len(done)} pictures → {out / 'panoptic.json'}: {count} things, {len(segments) - count} stuff segments"
        f"{f', {on_bad.count} bad left out' if on_bad.count else ''}; total {time.perf_counter() - start:.1f} s",
        markup=False,
        soft_wrap=True,
    )


def _pairs(semantic: Path, images: Path) -> Iterator[tuple[Path, Path | None]]:
    """Each semantic picture and its photo, if it is there, in the order of names."""
    for folder, what in ((semantic, "semantic PNGs"), (images, "photos")):
        if not folder.is_dir():
            raise DatasetError(f"{folder} is not a folder. Give the folder of the {what}.")
    photos: dict[str, Path] = {}
    for file in sorted(files_below(images)):
        if file.suffix.lower() in PHOTO_SUFFIXES and file.is_file():
            stem = file.stem.removesuffix(_PHOTO_END)
            if stem in photos:
                raise DatasetError(f"{photos[stem]} and {file} have one stem. Give photos names of their own.")
            photos[stem] = file
    pictures = sorted(file for file in files_below(semantic) if file.suffix == ".png" and file.is_file())
    if not pictures:
        raise DatasetError(f"{semantic} has no .png. Give the folder of the semantic pictures.")
    seen: set[str] = set()
    for picture in pictures:
        stem = picture.stem
        for end in _SEMANTIC_ENDS:
            stem = stem.removesuffix(end)
        if stem in seen:
            raise DatasetError(f"{picture}: another picture has the same stem {stem}. Give one a photo.")
        seen.add(stem)
        yield picture, photos.get(stem)


def _image_ids(photos: list[Path]) -> list[int]:
    """The number that ends each name, as in COCO, if every name has one of its own; else 1, 2, …"""
    ends = [photo.stem.rpartition("_")[2] for photo in photos]
    if all(end.isdecimal() for end in ends) and len({int(end) for end in ends}) == len(ends):
        return [int(end) for end in ends]
    return list(range(1, len(photos) + 1))
