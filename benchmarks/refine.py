"""Masks refined with our edges and with Canny's: mask AP before and after as one JSON, and pictures of failures.

    .venv/bin/python benchmarks/refine.py DATASET --first 1 --step 2 -o benchmarks/results/refine.json
    .venv/bin/python benchmarks/refine.py DATASET --engine my.onnx --backbone recipes/trace-small/weights/backbone -o …

DATASET is a COCO folder (instances.json, images/) or one of id maps (NAME.png, NAME.ids.png). Its own masks are damaged
by a fixed seed, in four ways: neighbours merged, instances split, holes, loose borders; each kind alone, all four mixed
(each mask one kind), and none: what refinement costs where nothing was wrong. Beside them stand the masks of segmenters
without annotations (segmenters.py); normalised cuts on our attention need --backbone and torch. Each kind of edges
refines the same masks. OUT.failures/ has the instances that refinement with our edges harmed most: photo, edges, best
mask before, best mask after. Constants of the propagation were chosen with
trace-nano on photos 0, 2, 4, … of coco_val and of the scenes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import binary_dilation, distance_transform_edt
from segmenters import AttentionCut, felzenszwalb, slic_merged

from trace_sdk import EdgeDetector, EdgeMap, __version__
from trace_sdk.atomic import write_text
from trace_sdk.evaluation.baselines import canny
from trace_sdk.evaluation.datasets import open_dataset
from trace_sdk.evaluation.instances import score_masks
from trace_sdk.instances.coco import decode_mask, encode_mask
from trace_sdk.instances.painting import paint_masks
from trace_sdk.machine import commit, hardware, versions
from trace_sdk.pictures import save_png

Mask = NDArray[np.bool_]
CANNY_THRESHOLDS = (0.92,)  # of its best ODS on these photos (quality-trace-small.json)


def merged(masks: list[Mask], rng: np.random.Generator) -> list[Mask]:
    """Each mask with the neighbour that it touches most (within 3 px), if it has one; each in one pair at most."""
    free = list(range(len(masks)))
    out = []
    while free:
        here = free.pop(0)
        around = binary_dilation(masks[here], iterations=3)
        touching = {other: int(np.count_nonzero(around & masks[other])) for other in free}
        other = max(touching, key=lambda index: touching[index], default=None)
        if other is not None and touching[other] > 0:
            free.remove(other)
            out.append(masks[here] | masks[other])
        else:
            out.append(masks[here])
    return out


def split(masks: list[Mask], rng: np.random.Generator) -> list[Mask]:
    """Each mask in two, by a line of random direction through its centre of mass."""
    out = []
    for mask in masks:
        y, x = np.nonzero(mask)
        angle = rng.uniform(0, np.pi)
        side = (y - y.mean()) * np.sin(angle) + (x - x.mean()) * np.cos(angle) > 0
        for half in (side, ~side):
            part = np.zeros_like(mask)
            part[y[half], x[half]] = True
            if part.any():
                out.append(part)
    return out


def holes(masks: list[Mask], rng: np.random.Generator) -> list[Mask]:
    """Three round holes in each, together about a fifth of its area."""
    out = []
    for mask in masks:
        y, x = np.nonzero(mask)
        grid_y, grid_x = np.indices(mask.shape)
        damaged = mask.copy()
        for _ in range(3):
            centre = rng.integers(len(y))
            damaged &= np.hypot(grid_y - y[centre], grid_x - x[centre]) > np.sqrt(len(y) / 15 / np.pi)
        out.append(damaged if damaged.any() else mask)
    return out


def loose(masks: list[Mask], rng: np.random.Generator) -> list[Mask]:
    """The outline moved by up to 15 % of the mask's radius, inwards and outwards in turns along it."""
    out = []
    for mask in masks:
        y, x = np.nonzero(mask)
        reach = 0.15 * np.sqrt(len(y) / np.pi)
        signed = distance_transform_edt(~mask) - distance_transform_edt(mask)
        grid_y, grid_x = np.indices(mask.shape)
        wave = np.sin(4 * np.arctan2(grid_y - y.mean(), grid_x - x.mean()) + rng.uniform(0, 2 * np.pi))
        damaged = signed < reach * wave
        out.append(damaged if damaged.any() else mask)
    return out


def mixed(masks: list[Mask], rng: np.random.Generator) -> list[Mask]:
    """Each mask suffers one of the four."""
    damages = (merged, split, holes, loose)
    kinds = rng.integers(len(damages), size=len(masks))
    out = []
    for kind, damage in enumerate(damages):
        out += damage([mask for mask, own in zip(masks, kinds, strict=True) if own == kind], rng)
    return out


def untouched(masks: list[Mask], rng: np.random.Generator) -> list[Mask]:
    return masks


DAMAGES: tuple[Callable[[list[Mask], np.random.Generator], list[Mask]], ...] = (
    merged,
    split,
    holes,
    loose,
    mixed,
    untouched,
)


@dataclass(frozen=True, eq=False)
class Photo:
    """One photo with its true masks. crowds: annotations that count for neither side."""

    id: int
    name: str
    rgb: NDArray[np.uint8]
    masks: list[Mask]
    crowds: list[dict[str, Any]]


def read_photos(dataset: Path, first: int, limit: int | None, step: int = 1) -> Iterator[Photo]:
    """The photos of a COCO folder by name, or those of id maps: every `step`-th from `first`, at most `limit`."""
    if not (dataset / "instances.json").is_file():
        for number, sample in enumerate(open_dataset(dataset), start=1):
            place, rest = divmod(number - 1 - first, step)
            if place >= 0 and rest == 0 and (limit is None or place < limit):
                ids = np.asarray(Image.open(dataset / f"{sample.name}.ids.png"))
                yield Photo(number, sample.name, sample.rgb, [ids == i for i in np.unique(ids[ids > 0])], [])
        return
    truth = json.loads((dataset / "instances.json").read_bytes())
    images = sorted(truth["images"], key=lambda image: image["file_name"])[first::step][:limit]
    for image in images:
        own = [a for a in truth["annotations"] if a["image_id"] == image["id"]]
        decoded = [decode_mask(a["segmentation"], image["height"], image["width"]) for a in own if not a["iscrowd"]]
        rgb = np.asarray(Image.open(dataset / "images" / image["file_name"]).convert("RGB"))
        crowds = [a for a in own if a["iscrowd"]]
        yield Photo(image["id"], Path(image["file_name"]).stem, rgb, [mask for mask in decoded if mask.any()], crowds)


def edge_maps(photo: Photo, detectors: Sequence[EdgeDetector]) -> dict[str, EdgeMap]:
    """Edge maps of the photo; "true" are the borders of the undamaged masks: what perfect edges would give."""
    made = {str(detector.info["engine"]): detector.run(photo.rgb) for detector in detectors}
    ids = np.zeros(photo.rgb.shape[:2], np.int32)
    for number, mask in enumerate(sorted(photo.masks, key=np.count_nonzero, reverse=True), start=1):
        ids[mask] = number
    borders = np.zeros(ids.shape, np.float32)
    borders[:, :-1] += ids[:, :-1] != ids[:, 1:]
    borders[:-1] += ids[:-1] != ids[1:]
    edges = canny(photo.rgb)
    for threshold in CANNY_THRESHOLDS:
        made[f"canny at {threshold}"] = EdgeMap(edges, photo.rgb, threshold)
        # Its map says 1 where a network says 0.6, and the rules take probabilities at their word.
        made[f"canny halved at {threshold}"] = EdgeMap(edges / 2, photo.rgb, threshold / 2)
    return made | {"true": EdgeMap(np.minimum(borders, 1), photo.rgb)}


def results(image: int, masks: list[dict[str, Any]], scores: list[float]) -> list[dict[str, Any]]:
    return [{"image_id": image, "segmentation": mask, "score": s} for mask, s in zip(masks, scores, strict=True)]


def best(true: Mask, masks: NDArray[np.bool_]) -> tuple[float, Mask]:
    """The mask with the highest IoU with a true one, and that IoU; an empty one where there is none."""
    if not len(masks):
        return 0.0, np.zeros_like(true)
    common = (masks & true).sum(axis=(1, 2))
    iou = common / (masks | true).sum(axis=(1, 2))
    return float(iou.max()), masks[int(iou.argmax())]


@dataclass(frozen=True, eq=False)
class Failure:
    """An instance that refinement harmed: best IoU before and after, and the picture of it."""

    source: str
    photo: str
    before: float
    after: float
    picture: Image.Image


def failures(source: str, photo: Photo, edges: EdgeMap, before: list[Mask], after: NDArray[np.bool_]) -> list[Failure]:
    """The instance of a photo that lost most, if one lost a tenth of IoU."""
    given = np.stack(before)
    compared = [(best(true, given), best(true, after), true) for true in photo.masks]
    (had, mask), (has, refined), true = max(compared, key=lambda one: one[0][0] - one[1][0])
    if had - has < 0.1:
        return []
    return [Failure(source, photo.name, had, has, drawn(photo.rgb, edges, true, mask, refined))]


def drawn(rgb: NDArray[np.uint8], edges: EdgeMap, true: Mask, before: Mask, after: Mask) -> Image.Image:
    """Photo with the true mask, edges, mask before and after, cut around all three masks, 240 px high."""
    y, x = np.nonzero(true | before | after)
    box = (max(0, x.min() - 15), max(0, y.min() - 15), x.max() + 16, y.max() + 16)
    grey = Image.fromarray(np.rint(edges.probability * 255).astype(np.uint8)).convert("RGB")
    painted = [paint_masks(rgb, mask[None]) for mask in (true, before, after)]
    panels = [picture.crop(box) for picture in (painted[0], grey, painted[1], painted[2])]
    width = max(1, round(panels[0].width * 240 / panels[0].height))
    sheet = Image.new("RGB", (4 * width + 15, 240), "white")
    for place, panel in enumerate(panels):
        sheet.paste(panel.resize((width, 240)), (place * (width + 5), 0))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--engine", action="append", help="A bundled name or a file, repeatable; without: the default.")
    parser.add_argument("--backbone", type=Path, help="Folder of a pixel backbone: adds normalised cuts.")
    parser.add_argument("--first", type=int, default=0, help="Leave out this many images at the start.")
    parser.add_argument("--step", type=int, default=1, help="And then take every so many.")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--failures", type=int, default=8, help="How many pictures.")
    arguments = parser.parse_args()
    detectors = [EdgeDetector(engine) for engine in arguments.engine or [None]]
    ours = str(detectors[0].info["engine"])
    segmenters = [felzenszwalb, slic_merged, *([AttentionCut(arguments.backbone)] if arguments.backbone else [])]
    collected: dict[str, dict[str, list[dict[str, Any]]]] = {}
    seconds: list[float] = []
    harmed: list[Failure] = []
    truth: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": []}
    for photo in read_photos(arguments.dataset, arguments.first, arguments.limit, arguments.step):
        height, width = photo.rgb.shape[:2]
        truth["images"].append({"id": photo.id, "file_name": photo.name, "height": height, "width": width})
        for mask in photo.masks:
            runs, area = encode_mask(mask), int(mask.sum())
            number = len(truth["annotations"]) + 1
            entry = {"id": number, "image_id": photo.id, "segmentation": runs, "area": area, "bbox": [0, 0, 1, 1]}
            truth["annotations"].append(entry)
        for crowd in photo.crowds:
            truth["annotations"].append({**crowd, "id": len(truth["annotations"]) + 1})
        sources: dict[str, list[Mask]] = {
            damage.__name__: damage(photo.masks, np.random.default_rng([arguments.seed, photo.id]))
            for damage in DAMAGES
            if photo.masks
        }
        sources |= {segmenter.__name__: segmenter(photo.rgb) for segmenter in segmenters}
        edges = edge_maps(photo, detectors)
        for source, given in sources.items():
            into = collected.setdefault(source, {"before": [], **{name: [] for name in edges}})
            if not given:
                continue
            # Without scores of a real method, larger masks first.
            scores = [float(mask.mean()) ** 0.5 for mask in given]
            into["before"].extend(results(photo.id, [encode_mask(m) for m in given], scores))
            for name, edge_map in edges.items():
                start = time.process_time()
                refined = edge_map.refine(np.stack(given), scores)
                if name == ours:
                    seconds.append(time.process_time() - start)
                    if photo.masks:
                        harmed += failures(source, photo, edge_map, given, refined.masks)
                into[name].extend(results(photo.id, refined.rle, refined.scores.tolist()))
        harmed = sorted(harmed, key=lambda one: one.after - one.before)[: arguments.failures]
        print(photo.name, flush=True)
    scored = {
        source: {name: asdict(score_masks(truth, found)) for name, found in by.items()}
        for source, by in collected.items()
    }
    pictures = arguments.out.with_suffix(".failures")
    listed = []
    for number, failure in enumerate(harmed, start=1):
        file = pictures / f"{number}-{failure.source}-{failure.photo}.png"
        save_png(failure.picture, file)
        entry = {"source": failure.source, "photo": failure.photo, "before": failure.before, "after": failure.after}
        listed.append({**entry, "picture": f"{pictures.name}/{file.name}"})
    content = {
        "command": " ".join(["benchmarks/refine.py", *sys.argv[1:]]),
        "trace_sdk": __version__,
        "commit": commit(),
        "hardware": hardware(),
        "versions": versions(["numpy", "scipy", "scikit-image", "onnxruntime", "pycocotools"]),
        "dataset": arguments.dataset.resolve().name,
        "images": len(truth["images"]),
        "first": arguments.first,
        "step": arguments.step,
        "seed": arguments.seed,
        "engines": [detector.info for detector in detectors],
        "refine_cpu_s_median": float(np.median(seconds)),
        "machine": "CPU time of refine; the hierarchy of each photo in its first call, see refine-speed.json",
        "scores": scored,
        "failures": listed,
    }
    write_text(arguments.out, json.dumps(content, indent=2) + "\n")
    for source, by in scored.items():
        for name, figures in by.items():
            print(f"{source:14} {name:20}", *(f"{key} {value:.3f}" for key, value in figures.items()))


if __name__ == "__main__":
    main()
