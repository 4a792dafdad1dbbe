"""Labels for a whole data set: shared by any number of processes, and the same bytes however often it was cut.

The list of images is cut into shards of four batches. A process claims a shard, decodes it while the one before is in
the model, and writes labels while the next batch is. Which images form a batch depends on the list and `batch` alone,
never on what was done before, so that a resumed run repeats the arithmetic of an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trace_sdk.errors import ArgumentError, OutOfMemoryError, TraceError
from trace_sdk.images import read_image
from trace_sdk.labelling.claims import STALE_SECONDS, Claims
from trace_sdk.labelling.images import NamedImage
from trace_sdk.labelling.states import (
    FAILED,
    MANIFEST,
    PENDING,
    forget_failures,
    label_file,
    plot_file,
    record_failure,
    remove_leftovers,
    state,
    write_manifest,
)
from trace_sdk.teacher.labels import CLAIMS, claim_folder, save_label
from trace_sdk.teacher.plot import Words, plot
from trace_sdk.teacher.teacher import Annotation, Teacher

BATCHES_IN_A_SHARD = 4
WAIT_SECONDS = 1.0  # between two looks at what other processes still hold

Report = Callable[[str, str | None], None]
"""Called for each image that gets its state: its name, and the reason if it failed."""


@dataclass
class LabelSummary:
    """What became of the images.

    Attributes:
        done: labelled by this process.
        before: had a label or a failure before.
        elsewhere: got theirs from other processes meanwhile.
        failed: name → reason, of all of them.
        t_star: of the images labelled here, unless timesteps were fixed.
    """

    done: int = 0
    before: int = 0
    elsewhere: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    t_star: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Ready:
    """An image as the teacher takes it; its pixels only where they are to be plotted."""

    name: str
    prepared: Tensor
    rgb: NDArray[np.uint8] | None


def load(teacher: Teacher, image: NamedImage, *, keep_pixels: bool = False) -> Ready:
    """Read and decode an image. Raises ImageError if that cannot be done."""
    rgb = read_image(image.read(), image.name).rgb
    return Ready(image.name, teacher.prepare(rgb), rgb if keep_pixels else None)


def alike(images: Iterable[Ready], batch: int) -> Iterator[list[Ready]]:
    """Images of one shape together, `batch` at a time."""
    by_shape: dict[torch.Size, list[Ready]] = {}
    for image in images:
        by_shape.setdefault(image.prepared.shape, []).append(image)
    for same in by_shape.values():
        for start in range(0, len(same), batch):
            yield same[start : start + batch]


def annotate(teacher: Teacher, group: Sequence[Ready], *, halve: bool = True) -> list[Annotation]:
    """What the teacher says about images of one shape; in two halves where GPU memory does not hold them all.

    Raises:
        OutOfMemoryError: it does not hold a half, either.
    """
    middle = len(group) // 2
    try:
        return teacher.annotate_batch([image.prepared for image in group])
    except OutOfMemoryError:
        if not (halve and middle):
            raise
    return annotate(teacher, group[:middle], halve=False) + annotate(teacher, group[middle:], halve=False)


class LabelJob:
    """The labels of a list of images, to be made in a folder that other processes may be filling, too.

    Args:
        images: see `find_images`; all processes must be given the same.
        labels: the folder. Labels that are there stay; failures stay unless `retry_failed`.
        batch: how many images of one shape go through the model together.
        plots: write a picture beside each label, `.png` in place of `.npz`.
        words: of a prompt, for these pictures.
        stale_seconds: after how long without a sign of life a claim of another machine is taken over.

    Raises:
        ArgumentError: `batch` is below 1, or `labels` holds labels made in another way.
    """

    def __init__(
        self,
        teacher: Teacher,
        images: Sequence[NamedImage],
        labels: Path,
        backbone_sha256: str,
        *,
        batch: int = 1,
        retry_failed: bool = False,
        plots: bool = False,
        words: Words | None = None,
        stale_seconds: float = STALE_SECONDS,
    ) -> None:
        if batch < 1:
            raise ArgumentError(f"batch must be at least 1, got {batch}.")
        self._claim_folder = partial(claim_folder, labels, teacher.settings, backbone_sha256)
        self._claim_folder()
        self._teacher, self._labels, self._batch = teacher, labels, batch
        self._plots, self._words = plots, words
        self._names = [image.name for image in images]
        if retry_failed:
            forget_failures(labels, self._names)
        self._pending = {name for name in self._names if state(labels, name) == PENDING}
        self.before = len(images) - len(self._pending)
        size = BATCHES_IN_A_SHARD * batch
        shards = [images[start : start + size] for start in range(0, len(images), size)]
        self._open = {_key(shard): shard for shard in shards if any(image.name in self._pending for image in shard)}
        self._claims = Claims(labels / CLAIMS, stale_seconds)
        self._stopped, self._one_report = threading.Event(), threading.Lock()
        self._wait = min(WAIT_SECONDS, stale_seconds / 4)

    def run(self, report: Report = lambda name, reason: None) -> LabelSummary:
        """Label what is pending; returns when every image of the list has its state, from whichever process.

        What is reported is on disk. A process that is killed loses the batch in the model and, at most, the one being
        written. A picture that cannot be read fails with its reason, and the others are still done.

        Raises:
            OutOfMemoryError: not enough GPU memory for half a batch.
            OutputError: a label cannot be written.
        """
        self._summary, self._report = LabelSummary(before=self.before), report
        threads = min(8, os.cpu_count() or 1)
        with (
            self._claims,
            ThreadPoolExecutor(1) as loader,
            ThreadPoolExecutor(threads) as decoders,
            ThreadPoolExecutor(1) as writer,
        ):
            try:
                written: Future[None] | None = None
                upcoming = loader.submit(self._next_shard, decoders)
                while shard := upcoming.result():
                    upcoming = loader.submit(self._next_shard, decoders)
                    key, ready = shard
                    for group in alike(ready, self._batch):
                        if not any(image.name in self._pending for image in group):
                            continue
                        annotations = annotate(self._teacher, group)
                        if written:
                            written.result()
                        self._plot(group, annotations)
                        written = writer.submit(self._write, group, annotations)
                    if written:
                        written.result()
                    self._claims.release(key)
                self._finish()
            finally:
                self._stopped.set()
        return self._summary

    def _next_shard(self, decoders: ThreadPoolExecutor) -> tuple[str, list[Ready]] | None:
        """A claimed shard with its images decoded; None when nobody has anything left to do."""
        while self._open:
            for key, shard in list(self._open.items()):
                if not self._left(shard):
                    del self._open[key]
                elif self._claims.take(key):
                    self._claim_folder()  # before the first claim, a run with other settings may have taken it over
                    del self._open[key]
                    # It may have been finished, and given back, just before.
                    if self._left(shard):
                        waiting = [image for image in shard if state(self._labels, image.name) != FAILED]
                        return key, [ready for ready in decoders.map(self._load, waiting) if ready]
                    self._claims.release(key)
            if self._open and self._stopped.wait(self._wait):
                return None
        return None

    def _left(self, shard: Sequence[NamedImage]) -> bool:
        """Whether an image of a shard is pending. Those that others have done are reported on the way."""
        left = False
        for image in shard:
            if image.name in self._pending:
                if state(self._labels, image.name) == PENDING:
                    left = True
                else:
                    self._summary.elsewhere += 1
                    self._settle(image.name)
        return left

    def _load(self, image: NamedImage) -> Ready | None:
        try:
            return load(self._teacher, image, keep_pixels=self._plots)
        except TraceError as error:
            if image.name in self._pending:
                record_failure(self._labels, image.name, str(error))
                self._settle(image.name, str(error))
            return None

    def _plot(self, group: list[Ready], annotations: list[Annotation]) -> None:
        for image, annotation in zip(group, annotations, strict=True):
            if image.rgb is not None and image.name in self._pending:
                plot(self._teacher, image.rgb, annotation, plot_file(self._labels, image.name), self._words)

    def _write(self, group: list[Ready], annotations: list[Annotation]) -> None:
        for image, annotation in zip(group, annotations, strict=True):
            if image.name in self._pending:
                save_label(label_file(self._labels, image.name), annotation)
                self._summary.done += 1
                self._summary.t_star += [annotation.emergence.t_star] if annotation.emergence else []
                self._settle(image.name)

    def _settle(self, name: str, reason: str | None = None) -> None:
        with self._one_report:
            self._pending.discard(name)
            self._report(name, reason)

    def _finish(self) -> None:
        """One process after the other, so that none removes what another is writing."""
        while not self._claims.take(MANIFEST):
            self._stopped.wait(self._wait)
        remove_leftovers(self._labels, self._names)
        self._summary.failed = write_manifest(self._labels, self._names)
        self._claims.release(MANIFEST)


def _key(shard: Sequence[NamedImage]) -> str:
    """Processes that were given another list have other shards; at worst an image is then labelled twice."""
    return hashlib.sha256("\n".join(image.name for image in shard).encode()).hexdigest()[:32]
