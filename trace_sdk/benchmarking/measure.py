"""How long answers take and what they cost: engines on every device found, beside baselines.

Each method runs in processes of its own, so that its cold start and its memory are its own. Rounds go over all
methods in turn, so that what the machine does beside it shows as a difference between rounds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from trace_sdk.benchmarking.report import SECONDS, Report, Row
from trace_sdk.detector import EdgeDetector
from trace_sdk.engines.plan import is_plan
from trace_sdk.engines.providers import CUDA, TENSORRT
from trace_sdk.engines.tensorrt import PACKAGES
from trace_sdk.errors import ArgumentError, EngineError
from trace_sdk.images import read_image
from trace_sdk.machine import gpus

COLD_STARTS = 5
BATCHES = (1, 2, 4, 8)
DRAWN_SIZE = (768, 512)

# What each baseline imports, and the line that installs it.
_NEEDS = {
    "Canny (scikit-image)": ("skimage", "pip install 'trace-sdk[evaluate]'"),
    "Canny (OpenCV)": ("cv2", "pip install opencv-python-headless"),
}
FORESTS, TEACHER = "structured forests", "teacher"
# Baselines that need a file each, and how to name it.
_ASKED_FOR = {
    FORESTS: "--structured-forests MODEL.yml.gz, and pip install opencv-contrib-python-headless",
    TEACHER: "--teacher BACKBONE, and pip install 'trace-sdk[train]'",
}


def benchmark(
    engines: Sequence[str | os.PathLike[str]],
    photos: Sequence[str | os.PathLike[str]] = (),
    *,
    size: int | None = None,
    runs: int = 40,
    rounds: int = 3,
    batches: Sequence[int] = BATCHES,
    files: Mapping[str, str | os.PathLike[str]] | None = None,
    on_step: Callable[[str], None] = lambda name: None,
) -> Report:
    """Measure engines on each device found here, and the baselines that are installed.

    Args:
        engines: bundled names or paths; a student's folder runs in torch.
        photos: files, taken in turn; none: one drawn JPEG of 768x512.
        size: longest side that the networks see, pixels; None: each engine's default.
        runs: single answers in a round, after 3 that don't count; a slow method gets fewer, what fits 20 s.
        rounds: how often all of it is repeated.
        batches: sizes for the throughput of `EdgeDetector.stream`.
        files: of the baselines that need one, FORESTS (OpenCV's model) and TEACHER (a backbone's folder or hub id).
        on_step: told the method's name after each of `steps(...)`.

    Raises:
        EngineError, ImageError: an engine or a photo is no good; found out before anything is timed.
        ArgumentError: no engine, the same one twice, or a number below 1.
    """
    _check(engines, runs, rounds, batches)
    for photo in photos:
        read_image(photo)
    with _files(photos) as pictures:
        changes, known = _answers_checked(engines, pictures[0], size)
        tasks: dict[str, dict[str, Any]] = {}
        for engine, label in _labels(known).items():
            for device, runtime in ways(engine):
                shown = device if runtime in ("auto", "torch") else f"{device} ({runtime})"
                tasks[f"{label} on {shown}"] = {"engine": engine, "device": device, "runtime": runtime, "size": size}
        tasks |= {name: {"baseline": name} for name in installed_baselines()}
        tasks |= {name: {"baseline": name, "file": os.fspath(file)} for name, file in (files or {}).items()}
        missing = {name: f"not installed: {line}" for name, (module, line) in _NEEDS.items() if not find_spec(module)}
        report = Report(runs=runs, rounds=rounds, photos=len(pictures), missing=missing)
        report.missing |= {name: how for name, how in _ASKED_FOR.items() if name not in (files or {})}
        outcomes: dict[str, list[dict[str, Any]]] = {name: [] for name in tasks}
        cold: dict[str, list[dict[str, float]]] = {name: [] for name in tasks}
        for _ in range(COLD_STARTS):
            for name, task in tasks.items():
                if name not in report.missing:
                    _keep(cold[name], report, name, _cold_start(task, pictures))
                on_step(name)
        for _ in range(rounds):
            for name, task in tasks.items():
                if name not in report.missing:
                    warm = {"cold": False, "runs": runs, "seconds": SECONDS, "batches": list(batches)}
                    _keep(outcomes[name], report, name, _in_a_process({**task, **warm, "photos": pictures}))
                on_step(name)
    for name, task in tasks.items():
        if name not in report.missing:
            given = task.get("engine", "")
            report.rows.append(Row(name, known.get(given), cold[name], outcomes[name], changes.get(given)))
    report.finish()
    return report


def steps(engines: Sequence[str | os.PathLike[str]], rounds: int, files: int = 0) -> int:
    """How often `benchmark` calls `on_step`."""
    methods = sum(len(ways(engine)) for engine in engines) + len(installed_baselines()) + files
    return methods * (COLD_STARTS + rounds)


def ways(engine: str | os.PathLike[str]) -> list[tuple[str, str]]:
    """(device, runtime) of every way to run an engine that is installed here.

    Packages say what they could; what then does not start is reported as not measured.
    """
    if is_plan(Path(engine)):
        return [("cuda", "auto")]
    if Path(engine).is_dir():
        return [("auto", "torch")]
    import onnxruntime

    available = onnxruntime.get_available_providers()
    found = [("cpu", "auto")]
    if CUDA in available:
        found.append(("cuda", "auto"))
    if TENSORRT in available:
        found.append(("cuda", "onnxruntime-tensorrt"))
    if gpus():
        found += [("cuda", name) for name, (modules, _) in PACKAGES.items() if any(map(find_spec, modules))]
    return found


def installed_baselines() -> list[str]:
    """Names of the baselines that can run here."""
    return [name for name, (module, _) in _NEEDS.items() if find_spec(module)]


def _check(engines: Sequence[object], runs: int, rounds: int, batches: Sequence[int]) -> None:
    if not engines or len(set(map(str, engines))) < len(engines):
        raise ArgumentError("Give at least one engine, and each only once.")
    for name, values in {"runs": [runs], "rounds": [rounds], "batches": batches}.items():
        if not values or min(values) < 1:
            raise ArgumentError(f"{name} must be at least 1; got {', '.join(map(str, values)) or 'none'}.")


def _answers_checked(
    engines: Sequence[str | os.PathLike[str]], photo: str, size: int | None
) -> tuple[dict[str, float], dict[str, dict[str, Any]]]:
    """Each engine → mean difference of its probability from the first one's, and its info. Speed comes after."""
    changes, known, first = {}, {}, None
    for engine in engines:
        edges = EdgeDetector(engine, device=ways(engine)[0][0], size=size).run(photo)
        first = edges if first is None else first
        changes[os.fspath(engine)] = float(np.abs(edges.probability - first.probability).mean())
        known[os.fspath(engine)] = edges.info
    return changes, known


def _labels(known: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Engine as it was given → its own name and precision, or as it was given where two say the same."""
    said = {engine: f"{info['engine']} {info['precision']}" for engine, info in known.items()}
    return {engine: label if list(said.values()).count(label) == 1 else engine for engine, label in said.items()}


@contextmanager
def _files(photos: Sequence[str | os.PathLike[str]]) -> Iterator[list[str]]:
    """The photos, or one that is drawn: coloured blobs with grain, a JPEG like a camera's in size and weight."""
    if photos:
        yield [os.fspath(photo) for photo in photos]
        return
    rng = np.random.default_rng(0)
    rough = PIL.Image.fromarray(rng.integers(0, 256, (8, 12, 3), np.uint8))
    drawn = np.asarray(rough.resize(DRAWN_SIZE)) + rng.normal(0, 8, (*DRAWN_SIZE[::-1], 3))
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/drawn.jpg"
        PIL.Image.fromarray(np.clip(drawn, 0, 255).astype(np.uint8)).save(file, quality=90)
        yield [file]


def _cold_start(task: dict[str, Any], files: list[str]) -> dict[str, Any]:
    """Seconds from starting Python to the first answer, and its parts."""
    start = time.time()
    outcome = _in_a_process({**task, "cold": True, "photos": files})
    if "error" not in outcome:
        outcome["total"] = outcome.pop("answered_at") - start
    return outcome


def _in_a_process(task: dict[str, Any]) -> dict[str, Any]:
    """What the worker answers. Raises EngineError if it dies."""
    command = [sys.executable, "-m", "trace_sdk.benchmarking.worker"]
    done = subprocess.run(command, input=json.dumps(task), capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        name = task.get("engine", task.get("baseline"))
        raise EngineError(f"{name}: its process ended with code {done.returncode} ({last}). Is there enough memory?")
    outcome: dict[str, Any] = json.loads(done.stdout)
    return outcome


def _keep(outcomes: list[dict[str, Any]], report: Report, name: str, outcome: dict[str, Any]) -> None:
    if "error" in outcome:
        report.missing[name] = outcome["error"]
    else:
        outcomes.append(outcome)
