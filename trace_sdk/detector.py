"""From a picture to its instance edges: scale, pad, run the engine (in tiles if large), scale back."""

from __future__ import annotations

import io
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from typing import Any

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from trace_sdk.buckets import bucket_length, bucket_shapes, checked_buckets, is_whole
from trace_sdk.edge_map import EdgeMap
from trace_sdk.engines import Engine, open_engine
from trace_sdk.engines.manifest import ANY_SIZE, Manifest
from trace_sdk.errors import ArgumentError
from trace_sdk.images import Image, ImageInput, read_image
from trace_sdk.machine import usable_cpus
from trace_sdk.network_input import fit, scaled_shape, unfit
from trace_sdk.tiling import Window, blend, tiles

SIZES = (16, 8192)  # longest side that the network may be asked to see, pixels
MOST_THREADS = 1024  # all of them are started, and spin
BATCH = 8  # images that run_batch gives to the engine at once


@dataclass(frozen=True, eq=False)
class _Prepared:
    """A picture ready for the engine.

    `pixels` is uint8 [h, w, 3], scaled and padded, or the picture itself where the engine does that; `scaled` and
    `padded` are (height, width) that the network sees, without and with padding; timings in ms.
    """

    image: Image
    pixels: NDArray[np.uint8]
    scaled: tuple[int, int]
    padded: tuple[int, int]
    timings: dict[str, float]


class EdgeDetector:
    """Instance edges of pictures. Safe to call from many threads: answers are bit for bit the serial ones."""

    def __init__(
        self,
        engine: str | os.PathLike[str] | Engine | None = None,
        *,
        device: str = "auto",
        size: int | None = None,
        buckets: Sequence[int] | None = None,
        threads: int | None = None,
        runtime: str = "auto",
    ) -> None:
        """Open an engine.

        Args:
            engine: path of an `.onnx` or `.engine` file, a student folder (runs in torch), a bundled name, or None:
                "trace-nano" on a CPU, "trace-small" on a GPU; `.info` says why. Or an `Engine` that is open, such as
                `MockEngine` for tests, which has its own device, threads and runtime.
            device: "cpu", "cuda", "cuda:N", or "auto" (CUDA where it works, else CPU; see `.info`).
            size: longest side that the network sees, pixels, 16 … 8192; None: the engine's default.
                Above the engine's `max_size` the picture is cut into overlapping tiles.
                An engine that scales inside its graph has one size.
            buckets: the only lengths, pixels, that a side of the network's input may have: pictures are padded up
                to the next one, and tiled above the largest. A runtime that prepares itself for each new shape
                then meets a known few; `warmup` runs them all. The padding is cut off again, but a network whose
                attention spans the picture sees it: docs/deployment.md tells how much that changes. None: any
                multiple of the engine's own.
            threads: CPU threads that work on one picture; None: the cores that this process may use, by its
                affinity and its control group.
            runtime: "auto" by what the engine is; of an `.onnx`, "onnxruntime", "onnxruntime-tensorrt" (its TensorRT
                provider), or "tensorrt" and "tensorrt-rtx", which build an engine for this machine once and keep it;
                of a student, "torch" or "torch.compile".

        Raises:
            EngineError: missing, corrupt, pickled or foreign engine.
            DeviceError: the device is not there.
            MissingExtraError: the runtime is not installed; says the line that does it.
            ArgumentError: `engine` is none of these, or another argument is out of range.
        """
        if size is not None and (not is_whole(size) or not SIZES[0] <= size <= SIZES[1]):
            raise ArgumentError(f"size={size!r} must be a whole number of pixels, {SIZES[0]} to {SIZES[1]}.")
        if threads is not None and (not is_whole(threads) or not 1 <= threads <= MOST_THREADS):
            raise ArgumentError(f"threads={threads!r} must be a whole number, 1 to {MOST_THREADS}.")
        self._engine: Engine
        if engine is None or isinstance(engine, (str, os.PathLike)):
            self._engine = open_engine(engine, device, threads, runtime, partial(self._known_shapes, size, buckets))
            return
        if not isinstance(engine, Engine):
            raise ArgumentError(f"engine is {type(engine).__name__}. Give a path, a bundled name, an Engine or None.")
        if (device, threads, runtime) != ("auto", None, "auto"):
            raise ArgumentError("An engine that is open has its device, threads and runtime: leave them out.")
        self._engine = engine
        self._known_shapes(size, buckets, engine.manifest)

    def _known_shapes(
        self, size: int | None, buckets: Sequence[int] | None, manifest: Manifest
    ) -> list[tuple[int, int]]:
        """Settle how pictures go into an engine that is about to be loaded; the shapes that it will meet, if known."""
        self._manifest, self._scales_itself = manifest, manifest.input == ANY_SIZE
        if self._scales_itself and (buckets is not None or size not in (None, manifest.default_size)):
            raise ArgumentError(
                f"{manifest.name} scales photos to {manifest.default_size} px inside its graph, so "
                "size and buckets cannot be chosen. Use the engine that it was made of, or export another."
            )
        self.size = size or manifest.default_size
        self.buckets = checked_buckets(buckets, manifest) if buckets is not None else ()
        return self.bucket_shapes()

    @property
    def manifest(self) -> Manifest:
        """What the engine says about itself."""
        return self._manifest

    @property
    def info(self) -> dict[str, Any]:
        """Engine, engine_reason, engine_sha256, device, device_reason, provider, threads, memory, cuda_graphs (captured
        so far), precision, size, buckets, threshold.
        """
        return {
            "engine": self._manifest.name,
            "engine_reason": self._engine.engine_reason,
            "engine_sha256": self._engine.sha256,
            "device": self._engine.device,
            "device_reason": self._engine.device_reason,
            "provider": self._engine.provider,
            "threads": self._engine.threads,
            "memory": self._engine.memory,
            "cuda_graphs": self._engine.cuda_graphs,
            "precision": self._manifest.precision,
            "size": self.size,
            "buckets": self.buckets,
            "threshold": self._manifest.threshold,
        }

    def run(self, image: ImageInput) -> EdgeMap:
        """Edges of one picture; see `trace_sdk.images.read_image` for what a picture may be.

        Raises:
            ImageError: the picture cannot be read.
            EngineError: the network failed.
        """
        return self._answer([self._prepare(image)])[0]

    __call__ = run

    def run_batch(self, images: Iterable[ImageInput]) -> list[EdgeMap]:
        """Edges of several pictures, in order.

        Up to 8 neighbours of one shape go through the engine together. On a CPU each answer is bit for bit that
        of `run`; on a GPU it is equal to 1e-5.

        Raises:
            ImageError: one of them cannot be read; the message names it.
            EngineError: the network failed.
        """
        return list(self.stream(images, batch=BATCH))

    def stream(self, images: Iterable[ImageInput], batch: int = 1, prefetch: int = 4) -> Iterator[EdgeMap]:
        """Edges of any number of pictures, in order, while the next ones are decoded in threads.

        Args:
            images: taken from as needed, in the caller's thread. One array or tensor of them has four axes.
            batch: the most pictures that go through the engine together. Those that were decoded while the engine
                was busy go; none waits for another.
            prefetch: pictures decoded ahead; at least `batch`.

        An error is raised where its picture's answer would have come, and ends the stream. A stream that is
        left early stops its threads when it is closed or collected.

        Raises:
            ArgumentError: `batch` or `prefetch` is below 1 or not whole, or `images` is one picture.
        """
        for name, value in {"batch": batch, "prefetch": prefetch}.items():
            if not is_whole(value) or value < 1:
                raise ArgumentError(f"{name}={value!r} must be a whole number of at least 1.")
        single = (str, bytes, bytearray, memoryview, os.PathLike, io.IOBase, PIL.Image.Image)
        # The rows of one array, or the channels of one tensor, would each pass for a grey picture.
        if isinstance(images, single) or not isinstance(images, Iterable) or getattr(images, "ndim", 0) in (2, 3):
            kind = type(images).__name__
            raise ArgumentError(f"Expected several images, got one {kind}. Use run, or pass a list.")
        return self._stream(images, batch, prefetch)

    def warmup(self) -> None:
        """Run the network on an empty square, or on each shape of `buckets`, so that no first answer is slow."""
        for height, width in self.bucket_shapes():
            self._engine.infer(np.zeros((1, height, width, 3), np.uint8))
        if not self.buckets or self._engine.infer_photos is not None:
            self.run(np.zeros((self.size + 1, self.size + 1), np.uint8))  # a pixel more, so that scaling is warm, too

    def bucket_shapes(self) -> list[tuple[int, int]]:
        """(height, width) of every input that the network can get with `buckets` and `size`; empty without."""
        return bucket_shapes(self.size, self._manifest, self.buckets)

    def _stream(self, images: Iterable[ImageInput], batch: int, prefetch: int) -> Iterator[EdgeMap]:
        pool = ThreadPoolExecutor(min(prefetch, usable_cpus()), thread_name_prefix="trace-decode")
        try:
            coming = self._submitted(images, pool)
            waiting = deque(islice(coming, max(prefetch, batch)))
            while waiting:
                ready: list[_Prepared] = []
                failure: BaseException | None = None
                while waiting and len(ready) < batch and failure is None and (not ready or waiting[0].done()):
                    future = waiting.popleft()
                    waiting.extend(islice(coming, 1))
                    failure = future.exception()
                    if failure is None:
                        ready.append(future.result())
                yield from self._answer(ready)
                if failure is not None:
                    raise failure
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _submitted(self, images: Iterable[ImageInput], pool: ThreadPoolExecutor) -> Iterator[Future[_Prepared]]:
        try:
            for index, image in enumerate(images):
                yield pool.submit(self._prepare, image, f"image {index}")
        # An error of the caller's own iterable also waits for its turn.
        except Exception as error:
            failed: Future[_Prepared] = Future()
            failed.set_exception(error)
            yield failed

    def _prepare(self, image: ImageInput, source: str | None = None) -> _Prepared:
        start = time.perf_counter()
        picture = read_image(image, source)
        decoded = time.perf_counter()
        scaled = scaled_shape(picture.rgb.shape[0], picture.rgb.shape[1], self.size)
        padded = self._padded(scaled[0]), self._padded(scaled[1])
        as_it_is = self._scales_itself or (self._engine.infer_photos is not None and self._in_one_piece(padded))
        pixels = picture.rgb if as_it_is else fit(picture.rgb, self.size, self._padded)[0]
        resized = time.perf_counter()
        timings = {"decode": (decoded - start) * 1e3, "resize": (resized - decoded) * 1e3}
        return _Prepared(picture, pixels, scaled, padded, timings)

    def _padded(self, length: int) -> int:
        return bucket_length(length, self._manifest, self.buckets)

    def _answer(self, prepared: list[_Prepared]) -> list[EdgeMap]:
        """One map each; pictures of which the engine sees one shape go through it together."""
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for index, item in enumerate(prepared):
            by_shape.setdefault(item.pixels.shape if self._scales_itself else item.padded, []).append(index)
        answers: dict[int, EdgeMap] = {}
        for shape, indices in by_shape.items():
            start = time.perf_counter()
            probabilities, pieces = self._infer([prepared[index].pixels for index in indices], shape)
            network = (time.perf_counter() - start) * 1e3 / len(indices)
            for index, probability in zip(indices, probabilities, strict=True):
                answers[index] = self._finish(prepared[index], probability, network, pieces)
        return [answers[index] for index in range(len(prepared))]

    @property
    def _tile(self) -> int:
        return (self.buckets or (self._manifest.max_size,))[-1]

    def _in_one_piece(self, shape: tuple[int, ...]) -> bool:
        return max(shape[:2]) <= self._tile

    def _infer(
        self, pictures: list[NDArray[np.uint8]], shape: tuple[int, ...]
    ) -> tuple[Iterable[NDArray[np.float32]], int]:
        """The `pixels` of pictures that become `shape` → float32 each, and in how many pieces each was run.

        Answers to pictures as they are have their size, others the padded one.
        """
        whole = self._scales_itself or self._in_one_piece(shape)
        if whole and self._engine.infer_photos is not None:
            return self._engine.infer_photos(pictures, self.size, self._padded), 1
        batch = np.stack(pictures)
        if whole:
            return self._engine.infer(batch), 1
        height, width = shape
        tile, step = self._tile, self._manifest.multiple_of
        overlap = min(max(tile // 4 // step * step, step), tile - step)
        windows = tiles(height, width, tile, overlap, step)

        def pieces(pixels: NDArray[np.uint8]) -> Iterator[tuple[Window, NDArray[np.float32]]]:
            for window in windows:
                yield window, self._engine.infer(pixels[window.slices][None])[0]

        return np.stack([blend(pieces(pixels), height, width, overlap) for pixels in batch]), len(windows)

    def _finish(self, prepared: _Prepared, probability: NDArray[np.float32], network: float, pieces: int) -> EdgeMap:
        start = time.perf_counter()
        height, width = prepared.image.rgb.shape[:2]
        if prepared.pixels is not prepared.image.rgb:
            probability = unfit(probability, *prepared.scaled, (height, width))
        timings = {**prepared.timings, "network": network, "resize_back": (time.perf_counter() - start) * 1e3}
        info = {
            **self.info,
            "source": prepared.image.source,
            "input_size": (width, height),
            "network_size": prepared.scaled[::-1],
            "padded_size": prepared.padded[::-1],
            "tiles": pieces,
            "timings": {**timings, "total": sum(timings.values())},
        }
        return EdgeMap(probability, prepared.image.rgb, self._manifest.threshold, info)


def detect(
    image: ImageInput,
    engine: str | os.PathLike[str] | Engine | None = None,
    *,
    device: str = "auto",
    size: int | None = None,
    buckets: Sequence[int] | None = None,
    threads: int | None = None,
    runtime: str = "auto",
) -> EdgeMap:
    """Edges of one picture: `EdgeDetector(…).run(image)` in a line, with its arguments and errors.

    The last two detectors stay open, so that only the first call with the same arguments opens an engine; a file that
    is replaced meanwhile is not read again.
    """
    lengths = tuple(buckets) if isinstance(buckets, Iterable) else buckets
    detector = _opened(engine, device=device, size=size, buckets=lengths, threads=threads, runtime=runtime)
    return detector.run(image)


_opened: Callable[..., EdgeDetector] = lru_cache(maxsize=2)(EdgeDetector)
