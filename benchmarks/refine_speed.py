"""How long refinement takes, beside the detection of the edges, as one JSON.

    .venv/bin/python benchmarks/refine_speed.py COCO_FOLDER -o benchmarks/results/refine-speed.json

1. Propagation of 10 and of 50 elliptic masks (radii 14 to 30 px, fixed seed) on photos cut to 512 × 512, with the edges
   of the first engine; the hierarchy of the photo, made once for all calls, apart.
2. `trace-sdk refine --edges DIR --workers N` on the data set's masks with holes: the whole command, then what of it
   belongs to the images: the command on all of them less the command on one a process, as starting takes the same.
3. Detection of the same photos by each engine, and what refinement adds to it.

CPU time counts all threads and processes of a step, the best of three; wall time beside it says how much other work the
machine had.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from refine import Photo, holes, read_photos

from trace_sdk import EdgeDetector, EdgeMap, __version__
from trace_sdk.atomic import write_text
from trace_sdk.instances.coco import encode_mask
from trace_sdk.machine import commit, hardware, versions

SIDE = 512
RADII = (14, 30)  # pixels
COUNTS = (10, 50)
REPEATS = 3


def measured(action: Callable[[], Any]) -> dict[str, float]:
    """Seconds of CPU and wall time, children that ended included."""
    began, cpu = time.perf_counter(), _cpu()
    action()
    return {"cpu_s": _cpu() - cpu, "wall_s": time.perf_counter() - began}


def _cpu() -> float:
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime


def ellipses(count: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """bool [count, SIDE, SIDE], none empty."""
    y, x = np.indices((SIDE, SIDE))
    masks = []
    for _ in range(count):
        (top, left), (tall, wide) = rng.uniform(0, SIDE, 2), rng.uniform(*RADII, 2)
        masks.append(((y - top) / tall) ** 2 + ((x - left) / wide) ** 2 < 1)
    return np.stack(masks)


def propagation(photos: list[Photo], detector: EdgeDetector) -> dict[str, Any]:
    """Milliseconds of CPU and wall time: medians over photos of the best of REPEATS."""
    rng = np.random.default_rng(0)
    hierarchy: list[dict[str, float]] = []
    calls: dict[int, list[dict[str, float]]] = {count: [] for count in COUNTS}
    for photo in photos:
        height, width = photo.rgb.shape[:2]
        # Reflected at the right and below where the photo is smaller.
        tall = np.pad(photo.rgb, ((0, max(0, SIDE - height)), (0, max(0, SIDE - width)), (0, 0)), mode="reflect")
        edges = detector.run(np.ascontiguousarray(tall[:SIDE, :SIDE]))
        hierarchy.append(measured(lambda edges=edges: edges.hierarchy))  # type: ignore[misc]
        for count in COUNTS:
            masks = ellipses(count, rng)
            runs = [measured(lambda edges=edges, masks=masks: edges.refine(masks)) for _ in range(REPEATS)]  # type: ignore[misc]
            calls[count].append(min(runs, key=lambda run: run["cpu_s"]))
    return {
        "photos": len(photos),
        "hierarchy": _median(hierarchy),
        **{f"{count} masks": _median(runs) for count, runs in calls.items()},
    }


def _median(runs: list[dict[str, float]]) -> dict[str, float]:
    return {
        f"{kind}_ms": round(float(np.median([run[f"{kind}_s"] for run in runs])) * 1e3, 1) for kind in ("cpu", "wall")
    }


def command(dataset: Path, photos: list[Photo], maps: list[EdgeMap], workers: int) -> dict[str, Any]:
    """The command line on masks with holes of `photos`; names come from the data set."""
    names = {
        image["id"]: image["file_name"] for image in json.loads((dataset / "instances.json").read_bytes())["images"]
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "edges").mkdir()
        entries: list[dict[str, Any]] = []
        for photo, edges in zip(photos, maps, strict=True):
            edges.save(folder / "edges" / f"{Path(names[photo.id]).stem}.png")
            damaged = holes(photo.masks, np.random.default_rng([0, photo.id]))
            entries += [
                {"image_id": photo.id, "category_id": 1, "segmentation": encode_mask(mask), "score": 1.0}
                for mask in damaged
            ]
        few = {photo.id for photo in photos[:workers]}  # so that every process starts
        (folder / "few.json").write_text(json.dumps([e for e in entries if e["image_id"] in few]))
        (folder / "all.json").write_text(json.dumps(entries))

        def refine(masks: str) -> None:
            images = dataset.resolve() / "images"
            options = ["--images", images, "--edges", "edges", "--threshold", str(maps[0].threshold)]
            call = [Path(sys.executable).with_name("trace-sdk"), "refine", "--masks", masks, "-o", f"out-{masks}"]
            subprocess.run([*call, *options, "--workers", str(workers)], cwd=folder, check=True, capture_output=True)

        start, whole = measured(lambda: refine("few.json")), measured(lambda: refine("all.json"))
    images = len(photos)
    each = (whole["cpu_s"] - start["cpu_s"]) / (images - workers)
    return {
        "workers": workers,
        "images": images,
        "masks": len(entries),
        "start": {key: round(value, 2) for key, value in start.items()},
        "whole": {key: round(value, 2) for key, value in whole.items()},
        "an_image_cpu_s": round(each, 4),
        "images_per_cpu_s": round(1 / each, 1),
    }


def detection(photos: list[Photo], detector: EdgeDetector) -> tuple[dict[str, float], list[EdgeMap]]:
    """Seconds a photo, and the edges."""
    maps = [detector.run(photo.rgb) for photo in photos]
    return _a_photo([lambda photo=photo: detector.run(photo.rgb) for photo in photos]), maps  # type: ignore[misc]


def in_memory(photos: list[Photo], maps: list[EdgeMap]) -> dict[str, float]:
    """Seconds a photo of `EdgeMap.refine`, hierarchy included, of masks with holes."""

    def refined(edges: EdgeMap, masks: NDArray[np.bool_]) -> None:
        EdgeMap(edges.probability, edges.rgb, edges.threshold, edges.info).refine(masks)

    given = [np.stack(holes(photo.masks, np.random.default_rng([0, photo.id]))) for photo in photos]
    return _a_photo([partial(refined, edges, masks) for edges, masks in zip(maps, given, strict=True)])


def _a_photo(actions: list[Callable[[], Any]]) -> dict[str, float]:
    """Mean over actions of the best of REPEATS."""
    best = [min((measured(action) for _ in range(REPEATS)), key=lambda run: run["cpu_s"]) for action in actions]
    return {key: round(float(np.mean([run[key] for run in best])), 4) for key in best[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path, help="A COCO folder: instances.json, images/.")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--engine", action="append", help="Repeatable; without: trace-nano and trace-small.")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--limit", type=int, help="Photos of steps 2 and 3.")
    arguments = parser.parse_args()
    photos = [photo for photo in read_photos(arguments.dataset, 0, arguments.limit) if photo.masks]
    detectors = [EdgeDetector(engine) for engine in arguments.engine or ["trace-nano", "trace-small"]]
    first = str(detectors[0].info["engine"])
    content: dict[str, Any] = {
        "command": " ".join(["benchmarks/refine_speed.py", *sys.argv[1:]]),
        "trace_sdk": __version__,
        "commit": commit(),
        "hardware": hardware(),
        "versions": versions(["numpy", "scipy", "scikit-image", "onnxruntime"]),
        "cores_of_the_process": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 1),
        "dataset": arguments.dataset.resolve().name,
        "propagation_512px": {"engine": first, **propagation(photos[:8], detectors[0])},
        "engines": {},
    }
    for detector in detectors:
        own, maps = detection(photos, detector)
        refined = in_memory(photos, maps)
        content["engines"][str(detector.info["engine"])] = {
            "detect_a_photo": own,
            "refine_a_photo": refined,
            "share_of_cpu": round(refined["cpu_s"] / (own["cpu_s"] + refined["cpu_s"]), 3),
        }
        if str(detector.info["engine"]) == first:
            content["command_line"] = command(arguments.dataset, photos, maps, arguments.workers)
    write_text(arguments.out, json.dumps(content, indent=2) + "\n")
    print(json.dumps(content, indent=2))


if __name__ == "__main__":
    main()
