"""`trace-sdk refine`: masks of other methods in, masks that agree with the edges out."""

from __future__ import annotations

import json
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trace_sdk.atomic import write_text
from trace_sdk.cli.console import BadEntries, errors, output, progress
from trace_sdk.cli.options import engine_options
from trace_sdk.cli.parts import Parts, engine_facts
from trace_sdk.cli.photos import read_photo
from trace_sdk.errors import ArgumentError, DatasetError, InputError, TraceError
from trace_sdk.pool import job_pool

if TYPE_CHECKING:
    from trace_sdk.edge_map import EdgeMap
    from trace_sdk.instances.predictions import PredictedImage


@dataclass(frozen=True)
class EdgeFile:
    """Edges of a photo, made elsewhere; read in the process that refines."""

    file: Path
    photo: Path
    threshold: float

    def read(self) -> EdgeMap:
        """Raises DatasetError if the edges cannot be read or are not as large as the photo, and ImageError."""
        import numpy as np

        from trace_sdk.edge_map import EdgeMap
        from trace_sdk.evaluation.methods import read_edges
        from trace_sdk.images import upright_size

        edges = read_edges(self.file)
        width, height = upright_size(read_photo(self.photo), str(self.photo))
        if edges.shape != (height, width):
            raise DatasetError(f"{self.file} is {list(edges.shape)}, its photo is {[height, width]}. Write both alike.")
        # Refinement looks at the edges only, and decoding a photo takes time.
        return EdgeMap(edges, np.broadcast_to(np.uint8(0), (height, width, 3)), self.threshold)


@dataclass
class Answer:
    """Results of one image, what was wrong with it, and the seconds that its edge file and refinement took."""

    results: list[dict[str, Any]] = field(default_factory=list)
    wrong: list[TraceError] = field(default_factory=list)
    edge_seconds: float = 0.0
    refine_seconds: float = 0.0


@click.command()
@click.option("--masks", required=True, type=click.Path(path_type=Path), help="COCO results or data set with masks.")
@click.option("--images", required=True, type=click.Path(path_type=Path), help="Folder of their photos.")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The refined masks, a JSON file.")
@click.option(
    "--annotations",
    type=click.Path(path_type=Path),
    help="A COCO data set that names the images (and categories) of a list of results.  [default: image 790 is "
    "the photo whose name ends in that number]",
)
@click.option(
    "--threshold",
    type=click.FloatRange(0, 1),
    help="How strong an edge must be to separate, on average.  [default: the engine's own]",
)
@click.option("--skip-bad", is_flag=True, help="Leave out entries and photos that cannot be used, list them, go on.")
@click.option(
    "--edges",
    "folder",
    type=click.Path(path_type=Path),
    help="Edge maps made elsewhere in place of an engine: DIR/STEM.png (grey), .npy or .tif, or as `trace-sdk detect` "
    "names them, in the photos' sub-folders or all in one; needs --threshold.",
)
@click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Processes that refine.")
@engine_options
def command(
    masks: Path,
    images: Path,
    out: Path,
    annotations: Path | None,
    threshold: float | None,
    skip_bad: bool,
    folder: Path | None,
    workers: int,
    engine: str | None,
    device: str,
    size: int | None,
) -> None:
    """Make masks of other methods agree with the edges of their photos.

    Holes and gaps that no edge surrounds are closed, outlines moved to stronger edges nearby, neighbours in one mask
    split and masks of one thing joined where the edges are clear (the more easily the more a photo's masks come in
    pieces, or are loose); what they don't speak against stays as it was
    (Background-Guided Propagation). MASKS is what CutLER, U2Seg (lists of results), MaskCut or ProMerge (data
    sets) wrote: compressed RLE, plain run lengths or polygons. OUT has the same form, with compressed RLE.

    \b
    Examples:
      trace-sdk refine --masks pred.json --images val2017/ -o refined.json
      trace-sdk refine --masks pred.json --images val/ --annotations val.json -o refined.json --skip-bad
      trace-sdk refine --masks pred.json --images val2017/ --edges hed/ --threshold 0.5 -o refined-hed.json

    \b
    Scores: a refined mask has the score of the mask it came from (1 where there is none) times the IoU with it; of
    merged masks the highest; times the chance that it is not part of a thing with its neighbour. Masks are only merged
    within their category. Crowd regions stay as they are. A mask that may be two touching things is given three times:
    whole, times the chance that it is one, and as both sides, each times the (low) chance of two and its share of the
    mask. So masks of OUT may overlap, and there are a quarter to a half more.

    What is done is kept in OUT.parts/; a run that was cut goes on there. The folder may be deleted afterwards.
    Results can only be as good as the edges: measure on a few annotated photos first (docs/instances.md).

    \b
    Exit code:
      0    done (with --skip-bad: what could be used; the rest is listed on stderr)
      1    an entry, a photo, the engine or the output failed (see stderr)
      2    wrong usage
      130  interrupted; run it again to go on
    """
    from trace_sdk import __version__
    from trace_sdk.instances.predictions import read_predictions

    if out.resolve() in {file.resolve() for file in (masks, annotations) if file is not None}:
        raise ArgumentError(f"{out} is read here. Give the refined masks a file of their own (-o).")
    on_bad = BadEntries(skip_bad)
    start = time.perf_counter()
    predictions = read_predictions(masks, images, annotations, on_bad)
    if not predictions.images:
        raise DatasetError(f"{masks} has no mask of a photo in {images}. Give the folder of its photos.")
    find: Callable[[Path], Path] | None = None
    edges_of: Callable[[Path], EdgeMap | EdgeFile]
    if folder is None:
        from trace_sdk.detector import EdgeDetector

        detector = EdgeDetector(engine, device=device, size=size)
        edges_of, made_with = detector.run, engine_facts(detector, threshold)
    elif threshold is None or engine is not None or size is not None:
        raise ArgumentError("--edges takes the place of --engine and --size, and needs a --threshold of its own.")
    else:
        find = _finder(folder, images, [image.photo for image in predictions.images])
        edges_of, made_with = partial(_edge_file, find, threshold), {"edges": folder.name, "threshold": threshold}
    parts = Parts(out.with_name(f"{out.name}.parts"), {"version": __version__, **made_with})
    refined: list[dict[str, Any]] = []
    edge_seconds = refine_seconds = 0.0
    given = fresh = known = done = 0
    try:
        with progress("refine", total=len(predictions.images)) as advance, job_pool(_job, workers) as submit:
            waiting: deque[tuple[PredictedImage, str, Future[Answer] | None, Any]] = deque()

            def collect() -> None:
                nonlocal edge_seconds, refine_seconds, fresh, done
                image, key, future, part = waiting.popleft()
                if future is not None:
                    answer = future.result()
                    for error in answer.wrong:
                        on_bad(error)
                    edge_seconds += answer.edge_seconds
                    refine_seconds += answer.refine_seconds
                    part = answer.results
                    fresh += bool(part)
                    # What was bad is to be listed again by the next run.
                    if not answer.wrong:
                        parts.put(key, part)
                refined.extend(part or [])
                done += 1
                advance(note=image.photo.name)

            for image in predictions.images:
                given += len(image.entries)
                key, part, future = "", None, None
                try:
                    facts = json.dumps([image.id, image.size, image.entries]).encode()
                    own = b"" if find is None else read_photo(find(image.photo))
                    key = parts.key(read_photo(image.photo), facts, own)
                    part = parts.get(key)
                    known += part is not None
                    if part is None and image.entries:
                        began = time.perf_counter()
                        edges = edges_of(image.photo)
                        edge_seconds += time.perf_counter() - began
                        future = submit(edges, image, masks, threshold)
                except (InputError, DatasetError) as error:
                    on_bad(error)
                waiting.append((image, key, future, part))
                while len(waiting) > (2 * workers if workers > 1 else 0):
                    collect()
            while waiting:
                collect()
    except KeyboardInterrupt:
        errors.print(f"{done} of {len(predictions.images)} images done and kept.")
        raise
    result: Any = refined
    if predictions.content is not None:
        numbered = [{"id": number, "iscrowd": 0, **entry} for number, entry in enumerate(refined, start=1)]
        described = predictions.content.get("info")
        info = {
            **(described if isinstance(described, dict) else {}),
            "trace_sdk": {"version": __version__, **made_with},
        }
        result = {**predictions.content, "info": info, "annotations": numbered}
    write_text(out, json.dumps(result))
    speed = ""
    if fresh:
        each = refine_seconds / fresh / workers
        speed = (
            f"; edges {edge_seconds / fresh * 1e3:.0f} ms, refinement {refine_seconds / fresh * 1e3:.0f} ms an image "
            f"in {workers} process{'es' if workers > 1 else ''} "
            f"(overhead {each * fresh / max(edge_seconds, 1e-9):.0%}, {1 / max(each, 1e-9):.1f} images/s "
            "beyond the edges)"
        )
    kept = f", {known} done already" if known else ""
    trouble = f", {on_bad.count} bad left out" if on_bad.count else ""
    output.print(
        f"{given} masks in {done} images → {len(refined)} in {out}{kept}{trouble}; "
        f"total {time.perf_counter() - start:.1f} s{speed}",
        markup=False,
        soft_wrap=True,
    )


def _finder(folder: Path, images: Path, photos: Sequence[Path]) -> Callable[[Path], Path]:
    """Photo → its edge map in a folder that keeps the sub-folders of `images`, or has none."""
    if not folder.is_dir():
        raise DatasetError(f"{folder} is not a folder. Give the folder of the edge maps.")
    stems = Counter(photo.stem for photo in photos)

    def find(photo: Path) -> Path:
        from trace_sdk.evaluation.methods import edge_file

        own = folder / photo.relative_to(images).parent if photo.is_relative_to(images) else folder
        file = edge_file(own, photo.stem)
        # Photos of one name in two sub-folders must not share a map.
        if file is None and stems[photo.stem] == 1:
            file = edge_file(folder, photo.stem)
        if file is None:
            raise DatasetError(f"{own / photo.stem}.png is missing: --edges needs an edge map of every photo.")
        return file

    return find


def _edge_file(find: Callable[[Path], Path], threshold: float, photo: Path) -> EdgeFile:
    return EdgeFile(find(photo), photo, threshold)


def _job(edges: EdgeMap | EdgeFile, image: PredictedImage, file: Path, threshold: float | None) -> Answer:
    # Loading these takes longer than a photo, and is no part of its time.
    import trace_sdk.instances.propagation  # noqa: F401
    from trace_sdk.instances.predictions import decode_entries

    answer, began = Answer(), time.perf_counter()
    if isinstance(edges, EdgeFile):
        try:
            edges = edges.read()
        except (InputError, DatasetError) as error:
            answer.wrong.append(error)
            return answer
        answer.edge_seconds = time.perf_counter() - began
    height, width = edges.probability.shape
    decoded = decode_entries(image, height, width, file, answer.wrong.append)
    answer.results = _refine(edges, image, decoded, threshold)
    answer.refine_seconds = time.perf_counter() - began - answer.edge_seconds
    return answer


def _refine(
    edges: EdgeMap,
    image: PredictedImage,
    decoded: list[tuple[dict[str, Any], Any]],
    threshold: float | None,
) -> list[dict[str, Any]]:
    """Results of one image, category by category, crowd regions first."""
    from trace_sdk.instances.coco import as_result, encode_mask
    from trace_sdk.instances.predictions import refine_entries

    results = [
        as_result(image.id, entry.get("category_id"), encode_mask(mask), entry.get("score", 1.0), crowd=True)
        for entry, mask in decoded
        if entry.get("iscrowd")
    ]
    for places, found in refine_entries(edges, decoded, threshold):
        category = decoded[places[0]][0].get("category_id")
        results += [
            as_result(image.id, category, rle, score) for rle, score in zip(found.to_coco(), found.scores, strict=True)
        ]
    return results
