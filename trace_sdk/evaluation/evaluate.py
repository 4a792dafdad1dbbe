"""One method over one data set: edge maps, matching in processes, a cache that lets a cut run go on."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trace_sdk.atomic import write_text
from trace_sdk.errors import ArgumentError, DatasetError
from trace_sdk.evaluation.datasets import Dataset, Sample
from trace_sdk.evaluation.edges import (
    MAX_DIST,
    THRESHOLDS,
    EdgeCounts,
    EdgeScores,
    check_edge_map,
    count_edges,
    score_edges,
)
from trace_sdk.evaluation.methods import EdgeFolder, Method
from trace_sdk.evaluation.touching import Touching
from trace_sdk.pool import job_pool
from trace_sdk.thinning import thin_ridges

_PROTOCOL = "2"  # part of every cache key; raise it when the counting changes

Result = tuple[EdgeCounts, float | None]


def evaluate(
    dataset: Dataset,
    method: Method,
    *,
    thresholds: int = THRESHOLDS,
    max_dist: float = MAX_DIST,
    workers: int = 1,
    cache: str | Path | None = None,
    on_image: Callable[[str], None] = lambda name: None,
) -> EdgeScores:
    """Score one method on one data set; every method goes through the same thinning and matching::

        from trace_sdk.evaluation import datasets, evaluate, methods
        scores = evaluate.evaluate(datasets.open_dataset("coco_val/"), methods.BASELINES[0])

    Args:
        dataset: samples with rgb uint8 [H, W, 3] and boundaries bool [H, W], see `open_dataset`.
        method: answers each sample with float32 [H, W] in [0, 1].
        thresholds: how many, see `edges.threshold_values`.
        max_dist: tolerance of the matching as a share of the image diagonal.
        workers: processes for the matching; with 1 it runs in this one. The method itself always runs in this
            process, one image at a time; its time is measured while the matching runs beside it.
        cache: folder with one small JSON file for each image done, named by the hash of everything it depends
        on. on_image: called with the name of each image when it is done.

    Returns:
        The scores of the whole set.

    Raises:
        DatasetError: a sample or an edge map is missing or malformed.
        ArgumentError: an argument is out of range, or the method's answer has a wrong shape or range.
        OutputError: the cache cannot be written.
    """
    if workers < 1:
        raise ArgumentError(f"workers is {workers}; give at least 1.")
    if isinstance(method, EdgeFolder):
        method.check(dataset)
    with job_pool(_count, workers) as submit:
        waiting: deque[tuple[str, Future[Result]]] = deque()
        results: list[Result] = []

        def collect() -> None:
            name, future = waiting.popleft()
            results.append(future.result())
            on_image(name)

        for sample in dataset:
            file = _cache_file(cache, dataset, sample, method, thresholds, max_dist)
            if (known := _load(file)) is not None:
                future: Future[Result] = Future()
                future.set_result(known)
            else:
                edges, seconds = _run(dataset, sample, method)
                future = submit(edges, sample.boundaries, sample.touching, thresholds, max_dist, seconds, file)
            waiting.append((sample.name, future))
            while len(waiting) > 2 * workers:
                collect()
        while waiting:
            collect()
    times = [seconds for _, seconds in results if seconds is not None]
    return score_edges([counts for counts, _ in results], max_dist, statistics.median(times) if times else None)


def annotator_agreement(
    dataset: Dataset, *, max_dist: float = MAX_DIST, on_image: Callable[[str], None] = lambda name: None
) -> float | None:
    """How well people agree: F-measure of each annotator against all others of the image, in [0, 1].

    Counts are added up over annotators and images; None where no image has two annotators. This is the
    upper bound that the benchmark draws as "human" (Arbelaez et al., TPAMI 2011, figure 1).
    `on_image` is called with the name of each image when it is done.
    """
    counts = []
    for sample in dataset:
        for i, own in enumerate(sample.boundaries):
            if others := sample.boundaries[:i] + sample.boundaries[i + 1 :]:
                counts.append(count_edges(own.astype(np.float32), others, thresholds=1, max_dist=max_dist))
        on_image(sample.name)
    return score_edges(counts, max_dist).ods if counts else None


def _run(dataset: Dataset, sample: Sample, method: Method) -> tuple[NDArray[np.float32], float | None]:
    start = time.perf_counter()
    edges = method.edges(dataset, sample)
    seconds = time.perf_counter() - start
    if edges.shape != sample.rgb.shape[:2]:
        raise ArgumentError(
            f"{method.name} gave an edge map {list(edges.shape)} for {sample.name}, which is "
            f"{list(sample.rgb.shape[:2])}; edge maps must be as large as the photo."
        )
    check_edge_map(edges)
    return edges, seconds if method.timed else None


def _count(
    edges: NDArray[np.float32],
    boundaries: tuple[NDArray[np.bool_], ...],
    touching: Touching | None,
    thresholds: int,
    max_dist: float,
    seconds: float | None,
    file: Path | None,
) -> Result:
    ridges = thin_ridges(edges)
    counts = count_edges(ridges, boundaries, thresholds=thresholds, max_dist=max_dist, touching=touching)
    if file is not None:
        columns = {name: values.tolist() for name, values in asdict(counts).items()}
        write_text(file, json.dumps({"seconds": seconds, "counts": columns}))
    return counts, seconds


def _cache_file(
    cache: str | Path | None,
    dataset: Dataset,
    sample: Sample,
    method: Method,
    thresholds: int,
    max_dist: float,
) -> Path | None:
    if cache is None:
        return None
    digest = hashlib.sha256()
    facts = [_PROTOCOL, method.fingerprint(dataset, sample), thresholds, max_dist, sample.rgb.shape]
    digest.update(json.dumps(facts).encode())
    digest.update(sample.rgb.tobytes())
    for boundary in sample.boundaries:
        digest.update(np.packbits(boundary).tobytes())
    if sample.touching is not None:
        digest.update(np.packbits(sample.touching.line).tobytes() + np.packbits(sample.touching.judged).tobytes())
    return Path(cache) / dataset.name / f"{sample.name}-{digest.hexdigest()[:24]}.json"


def _load(file: Path | None) -> Result | None:
    if file is None or not file.is_file():
        return None
    try:
        stored = json.loads(file.read_bytes())
        seconds = stored["seconds"]
        counts = EdgeCounts(**{f.name: np.array(stored["counts"][f.name], np.int64) for f in fields(EdgeCounts)})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DatasetError(f"{file} is not a cached result. Delete it and run again.") from error
    return counts, seconds
