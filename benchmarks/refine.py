"""Damaged masks, refined with our edges and with Canny's: mask AP before and after, as one JSON.

    .venv/bin/python benchmarks/refine.py DATASET -o benchmarks/results/refine.json

DATASET is a COCO folder (instances.json, images/). Its own masks are damaged by a fixed seed, in four ways: neighbours
merged, instances split, holes, loose borders. Each method refines the same masks, once with each kind of damage alone
and once with all four mixed (each mask one kind), and once undamaged: what refinement costs where nothing was wrong.
Constants of the propagation were chosen on the first 16 photos; --first 16 leaves them out.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation, distance_transform_edt

from trace_sdk import EdgeDetector, EdgeMap, __version__
from trace_sdk.atomic import write_text
from trace_sdk.evaluation.baselines import canny
from trace_sdk.evaluation.instances import score_masks
from trace_sdk.instances.coco import decode_mask, encode_mask

Mask = NDArray[np.bool_]
CANNY_THRESHOLDS = (0.92,)  # of its best ODS on these photos (quality-trace-small.json)
OUR_THRESHOLD = 0.7  # beside the engine's own: only its strongest edges


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


def methods(photo: Path, masks: list[Mask], detector: EdgeDetector) -> dict[str, EdgeMap]:
    """Edge maps of the photo; "true" are the borders of the undamaged masks: what perfect edges would give."""
    ours = detector.run(photo)
    edges = canny(ours.rgb)
    ids = np.zeros(edges.shape, np.int32)
    for number, mask in enumerate(sorted(masks, key=np.count_nonzero, reverse=True), start=1):
        ids[mask] = number
    borders = np.zeros(ids.shape, np.float32)
    borders[:, :-1] += ids[:, :-1] != ids[:, 1:]
    borders[:-1] += ids[:-1] != ids[1:]
    made = {"trace-small": ours, f"trace-small at {OUR_THRESHOLD}": replace(ours, threshold=OUR_THRESHOLD)}
    made |= {f"canny at {threshold}": EdgeMap(edges, ours.rgb, threshold) for threshold in CANNY_THRESHOLDS}
    return made | {"true": EdgeMap(np.minimum(borders, 1), ours.rgb)}


def results(image: int, masks: list[dict[str, Any]], scores: list[float]) -> list[dict[str, Any]]:
    return [{"image_id": image, "segmentation": mask, "score": s} for mask, s in zip(masks, scores, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--first", type=int, default=0, help="Leave out this many images at the start.")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    truth = json.loads((arguments.dataset / "instances.json").read_bytes())
    images = sorted(truth["images"], key=lambda image: image["file_name"])[arguments.first :][: arguments.limit]
    ids = {image["id"] for image in images}
    annotations = [a for a in truth["annotations"] if a["image_id"] in ids]
    detector = EdgeDetector()
    collected: dict[str, dict[str, list[dict[str, Any]]]] = {damage.__name__: {} for damage in DAMAGES}
    seconds: list[float] = []
    for image in images:
        own = [a for a in annotations if a["image_id"] == image["id"] and not a.get("iscrowd", 0)]
        decoded = [decode_mask(a["segmentation"], image["height"], image["width"]) for a in own]
        masks = [mask for mask in decoded if mask.any()]
        edges = methods(arguments.dataset / "images" / image["file_name"], masks, detector)
        for damage in DAMAGES:
            rng = np.random.default_rng([arguments.seed, image["id"]])
            damaged = damage(masks, rng)
            into = collected[damage.__name__]
            # Without scores of a real method, larger masks first.
            scores = [float(mask.mean()) ** 0.5 for mask in damaged]
            into.setdefault("before", []).extend(results(image["id"], [encode_mask(m) for m in damaged], scores))
            for name, edge_map in edges.items():
                start = time.process_time()
                refined = edge_map.refine(np.stack(damaged), scores)
                if name == "trace-small":
                    seconds.append(time.process_time() - start)
                into.setdefault(name, []).extend(results(image["id"], refined.rle, refined.scores.tolist()))
        print(image["file_name"], flush=True)
    chosen = {"images": images, "annotations": annotations}
    scored = {
        damage: {name: asdict(score_masks(chosen, found)) for name, found in by.items()}
        for damage, by in collected.items()
    }
    content = {
        "command": "benchmarks/refine.py",
        "trace_sdk": __version__,
        "dataset": arguments.dataset.resolve().name,
        "images": len(images),
        "first": arguments.first,
        "seed": arguments.seed,
        "engine": detector.info,
        "refine_cpu_s_median": float(np.median(seconds)),
        "machine": "one shared core; CPU time of refine, the hierarchy of each photo in its first call",
        "scores": scored,
    }
    write_text(arguments.out, json.dumps(content, indent=2) + "\n")
    for damage, by in scored.items():
        for name, figures in by.items():
            print(f"{damage:10} {name:18}", *(f"{key} {value:.3f}" for key, value in figures.items()))


if __name__ == "__main__":
    main()
