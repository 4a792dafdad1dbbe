"""What runs inside a process of its own: one method, either from cold or warm; JSON in, JSON out.

    echo '{"engine": "trace-small", "device": "cpu", "photos": ["a.jpg"], "cold": true}' \\
        | python -m trace_sdk.benchmarking.worker

`trace_sdk.benchmarking.measure` starts it; nothing here is imported before its clock runs but the standard library.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

WARMUP = 3
LEAST_RUNS = 5
Timings = dict[str, float]  # ms by stage


def main() -> None:
    """Read a task from stdin, measure, write the outcome to stdout."""
    start = time.perf_counter()
    task = json.load(sys.stdin)
    from trace_sdk.errors import TraceError

    try:
        outcome = _cold(task, start) if task["cold"] else _warm(task)
    except TraceError as error:
        outcome = {"error": str(error)}
    json.dump(outcome, sys.stdout)


def _cold(task: dict[str, Any], start: float) -> dict[str, float]:
    """Seconds: imports, opening, first answer; and the time of day at which it came."""
    if "engine" in task:
        import trace_sdk.detector  # noqa: F401
    imported = time.perf_counter()
    one, _, _ = _opened(task)
    opened = time.perf_counter()
    one(task["photos"][0])
    answered = time.perf_counter()
    return {
        "imports": imported - start,
        "open": opened - imported,
        "first_answer": answered - opened,
        "answered_at": time.time(),
    }


def _warm(task: dict[str, Any]) -> dict[str, Any]:
    """Latency of single answers, bytes in → edges out, then throughput by batch; memory after each."""
    from pathlib import Path

    from trace_sdk.machine import peak_memory

    one, many, info = _opened(task)
    photos = [Path(photo).read_bytes() for photo in task["photos"]]
    for number in range(WARMUP):
        one(photos[number % len(photos)])
    milliseconds, stages = [], []
    began = time.perf_counter()
    for number in range(task["runs"]):
        if number >= LEAST_RUNS and time.perf_counter() - began > task["seconds"]:
            break
        start = time.perf_counter()
        timings = one(photos[number % len(photos)])
        milliseconds.append((time.perf_counter() - start) * 1e3)
        stages.append(timings)
    outcome: dict[str, Any] = {
        "info": info(),
        "milliseconds": milliseconds,
        "stages": {name: [timings[name] for timings in stages] for name in stages[0]},
        "peak_memory": {"single": peak_memory()},
        "images_per_second": {},
    }
    if many is None:
        return outcome
    for batch in task["batches"]:
        images = [photos[number % len(photos)] for number in range(max(2 * batch, 8))]
        start = time.perf_counter()
        count = len([1 for _ in many(images, batch)])
        outcome["images_per_second"][str(batch)] = count / (time.perf_counter() - start)
        outcome["peak_memory"][str(batch)] = peak_memory()
    return outcome


_Opened = tuple[
    Callable[[Any], Timings], Callable[[Iterable[bytes], int], Iterator[Any]] | None, Callable[[], dict[str, Any]]
]


def _opened(task: dict[str, Any]) -> _Opened:
    """One answer, a stream of them (None: it has no batches), and what is known about it."""
    if "baseline" in task:
        made = BASELINES[task["baseline"]]
        edges, about = made(task["file"]) if "file" in task else made()

        def baseline(photo: Any) -> Timings:
            from trace_sdk.images import read_image

            start = time.perf_counter()
            rgb = read_image(photo).rgb
            decoded = time.perf_counter()
            edges(rgb)
            return {"decode": (decoded - start) * 1e3, "network": (time.perf_counter() - decoded) * 1e3}

        return baseline, None, lambda: about

    from trace_sdk.detector import EdgeDetector

    detector = EdgeDetector(task["engine"], device=task["device"], size=task["size"], runtime=task["runtime"])
    last: dict[str, Any] = {}

    def engine(photo: Any) -> Timings:
        last.update(detector.run(photo).info)
        timings: Timings = {name: value for name, value in last["timings"].items() if name != "total"}
        return timings

    sizes = ("input_size", "network_size", "padded_size", "tiles")
    return engine, detector.stream, lambda: {**detector.info, **{name: last[name] for name in sizes}}


def _skimage_canny() -> tuple[Callable[[Any], Any], dict[str, Any]]:
    from trace_sdk.evaluation.baselines import CANNY_SETTINGS, canny

    return canny, {"device": "cpu", "threads": 1, "what": f"{CANNY_SETTINGS} pairs of thresholds, full size"}


def _opencv_canny() -> tuple[Callable[[Any], Any], dict[str, Any]]:
    import cv2

    from trace_sdk.machine import usable_cpus

    cv2.setNumThreads(usable_cpus())

    def edges(rgb: Any) -> Any:
        return cv2.Canny(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY), 100, 200)

    return edges, {"device": "cpu", "threads": cv2.getNumThreads(), "what": "one pair of thresholds, full size"}


def _structured_forests(file: str) -> tuple[Callable[[Any], Any], dict[str, Any]]:
    """Dollár and Zitnick, ICCV 2013, as OpenCV's contributed modules have it; `file` is its trained model."""
    import cv2

    from trace_sdk.errors import ArgumentError, MissingExtraError

    if not hasattr(cv2, "ximgproc"):
        raise MissingExtraError("this OpenCV has no ximgproc. Run: pip install opencv-contrib-python-headless")
    try:
        detector = cv2.ximgproc.createStructuredEdgeDetection(file)
    except cv2.error as error:
        raise ArgumentError(f"{file}: OpenCV cannot read it ({error.err}).") from error
    return lambda rgb: detector.detectEdges(rgb.astype("float32") / 255), {"device": "cpu", "what": "full size"}


def _teacher(backbone: str) -> tuple[Callable[[Any], Any], dict[str, Any]]:
    import torch

    from trace_sdk.backbones.registry import open_backbone
    from trace_sdk.teacher.teacher import Teacher

    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher = Teacher(open_backbone(backbone, device=device))
    return teacher.annotate, {"device": device, "threads": torch.get_num_threads(), "what": "IEP and ABDiv"}


BASELINES: dict[str, Callable[..., tuple[Callable[[Any], Any], dict[str, Any]]]] = {
    "Canny (scikit-image)": _skimage_canny,
    "Canny (OpenCV)": _opencv_canny,
    "structured forests": _structured_forests,
    "teacher": _teacher,
}


if __name__ == "__main__":
    main()
