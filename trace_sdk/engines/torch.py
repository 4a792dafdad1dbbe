"""Student folders, in torch: the same answers as the engine that `trace-sdk export` makes of them."""

from __future__ import annotations

import hashlib
import os
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trace_sdk import __version__
from trace_sdk.engines import InferPhotos
from trace_sdk.engines.answers import Answer, Batch, check_range, checked, halved_once, joined
from trace_sdk.engines.manifest import Manifest
from trace_sdk.engines.torch_gpu import Captured, channels_last, fuse_normalisation, lower
from trace_sdk.engines.torch_scaling import Scaling
from trace_sdk.errors import EngineError, MissingExtraError
from trace_sdk.machine import usable_cpus
from trace_sdk.network_input import scaled_shape


class TorchEngine:
    """One student on one device. Safe to call from many threads: answers are made one after another.

    On a CPU the images of a batch run one by one, so that each gets the answer that it gets alone; so they do in the
    shapes that are known beforehand on a GPU, each of which is a CUDA graph of its own. A GPU also scales the photos.
    """

    engine_reason = "asked for"

    def __init__(
        self,
        folder: Path,
        device: str = "auto",
        threads: int | None = None,
        *,
        compiled: bool,
        shapes: Callable[[Manifest], Collection[tuple[int, int]]] = lambda manifest: (),
    ) -> None:
        """Args: `folder` of a student, the rest as in `open_engine`; `compiled` with torch.compile.

        `threads` holds for all of torch in this process; None: torch's own number, which knows no container's limit,
        but no more than the cores that this process may use.
        """
        if find_spec("torch") is None or find_spec("diffusers") is None:
            raise MissingExtraError(
                f'{folder} is a student, which runs in torch. Run: pip install "trace-sdk[train]", or make an engine '
                f"that needs none: trace-sdk export {folder} -o engine.onnx"
            )
        import torch

        from trace_sdk.backbones.device import torch_device
        from trace_sdk.export.graph import EngineGraph
        from trace_sdk.student.folder import open_student

        student = open_student(folder)
        there = torch.cuda.is_available()
        target = torch_device(("cuda" if there else "cpu") if device == "auto" else device)
        self.device = "cpu" if target.type == "cpu" else f"cuda:{target.index or 0}"
        self.device_reason = (
            "asked for" if device != "auto" else "auto: CUDA works" if there else "auto: this torch sees no GPU"
        )
        self.provider = f"torch {torch.__version__}{' compiled' if compiled else ''}"
        self.threads = threads or min(torch.get_num_threads(), usable_cpus())
        torch.set_num_threads(self.threads)
        self._source, self._torch, self._target = str(folder), torch, target
        on_cpu = self.device == "cpu"
        self._plain = EngineGraph(student.to(target), half_weights=False, share_softmax=on_cpu).to(target)
        precision, word = ("fp32", "") if on_cpu else lower(self._plain)
        self.device_reason += f"; {word}" if word else ""
        self._compiled = compiled
        self._graph = torch.compile(self._plain, dynamic=True) if compiled else self._plain
        self.memory = "host" if on_cpu else "device, and pageable on the host"
        self._scaling = Scaling(target)
        self._one_at_a_time = threading.Lock()
        # Each thread has a current GPU of its own.
        self._on_device = nullcontext if on_cpu else partial(torch.cuda.device, target)
        self._programs: dict[tuple[int, int], Callable[[Any], Any]] = {}
        weights = sorted(folder.rglob("*.safetensors"))
        self.sha256 = hashlib.sha256(
            b"".join(hashlib.sha256(file.read_bytes()).digest() for file in weights)
        ).hexdigest()
        self.manifest = Manifest(
            name=folder.resolve().name,
            trace_sdk_version=__version__,
            backbone=student.family,
            backbone_sha256=hashlib.sha256((weights[0]).read_bytes()).hexdigest(),
            decoder=student.decoder_name,
            multiple_of=student.multiple_of,
            min_size=student.min_size,
            max_size=student.max_size,
            default_size=student.default_size,
            threshold=student.threshold,
            precision=precision,
            opset=0,
            producers={"torch": torch.__version__},
            quality={},
            parity={},
            licence="",
            created=datetime.fromtimestamp(os.path.getmtime(weights[0]), UTC).strftime("%Y-%m-%d"),  # noqa: PTH204
            commit="",
        )
        known = shapes(self.manifest)
        self._known = frozenset(() if on_cpu else known)
        if self._known and not compiled:  # torch.compile lays them out by itself
            channels_last(self._plain)

    @property
    def cuda_graphs(self) -> int:
        """CUDA graphs captured so far."""
        return sum(isinstance(program, Captured) for program in self._programs.values())

    @property
    def infer_photos(self) -> InferPhotos | None:
        """Photos of any size → their edges at that size, scaled on the GPU; see `Engine.infer_photos`."""
        return None if self.device == "cpu" else self._infer_photos

    def infer(self, batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 [B, H, W, 3] → float32 [B, H, W] in [0, 1]; see `Engine.infer`."""
        return checked(joined(self._in_turn(self._run, batch, batch.shape[1:3])), batch, self._source, self.device)

    def _infer_photos(
        self, photos: Sequence[NDArray[np.uint8]], size: int, padded: Callable[[int], int]
    ) -> list[NDArray[np.float32]]:
        height, width = scaled_shape(photos[0].shape[0], photos[0].shape[1], size)
        run = partial(self._run_photos, size=size, padded=padded)
        answers = self._in_turn(run, [*photos], (padded(height), padded(width)))
        return [edges for answer in answers for edges in answer]

    def _in_turn(self, run: Callable[[Batch], Answer], batch: Batch, shape: tuple[int, ...]) -> list[Answer]:
        """What `run` answers to a batch of which the network sees `shape`: at once, or to one picture after another."""
        one_by_one = self.device == "cpu" or shape in self._known
        with self._one_at_a_time:
            parts = [batch[i : i + 1] for i in range(len(batch))] if one_by_one else [batch]
            return [answer for part in parts for answer in halved_once(run, part, shape, self._source, self.device)]

    def _run(self, batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        with self._computing(batch.shape):
            pixels = self._torch.from_numpy(np.ascontiguousarray(batch)).to(self._target)
            answer: NDArray[np.float32] = self._network(pixels).cpu().numpy()
        return answer

    def _run_photos(
        self, photos: list[NDArray[np.uint8]], size: int, padded: Callable[[int], int]
    ) -> list[NDArray[np.float32]]:
        with self._computing((len(photos), *photos[0].shape)):
            fitted = [self._scaling.fit(photo, size, padded) for photo in photos]
            answers = self._network(self._torch.stack([pixels for pixels, _, _ in fitted]))
            bounds = self._torch.stack(answers.aminmax())
            edges = [
                self._scaling.unfit(answer.clamp(0, 1), height, width, photo.shape).cpu().numpy()
                for answer, (_, height, width), photo in zip(answers, fitted, photos, strict=True)
            ]
            low, high = bounds.tolist()
        check_range(low, high, self._source, self.device)
        return edges

    @contextmanager
    def _computing(self, shape: tuple[int, ...]) -> Iterator[None]:
        try:
            with self._torch.no_grad(), self._on_device(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a photo's array is read-only, and nothing writes to it
                yield
        except RuntimeError as error:  # torch's own errors, out of memory among them
            raise EngineError(
                f"{self._source}: failed on {self.device} with input {shape} ({str(error).splitlines()[0]}). "
                "Try a smaller size, or another device."
            ) from error

    def _network(self, pixels: Any) -> Any:
        """On the device: uint8 [B, H, W, 3] → float32 [B, H, W], overwritten by the next answer to a known shape."""
        known = tuple(pixels.shape[1:3]) in self._known
        return (self._known_shape(pixels) if known else self._graph)(pixels).float()

    def _known_shape(self, pixels: Any) -> Callable[[Any], Any]:
        """What answers a known shape: made when it is first met, as a CUDA graph where the model allows it."""
        height, width = pixels.shape[1:3]
        if (height, width) not in self._programs:
            from trace_sdk.export.graph import without_python

            image = pixels.clone()
            plain = self._plain if self._plain.student.no_graph else without_python(self._plain, image)
            program: Callable[[Any], Any]
            program = self._torch.compile(plain, dynamic=False) if self._compiled else fuse_normalisation(plain)
            program(image)  # what it cannot do at all is no matter of the capture
            try:
                self._programs[height, width] = Captured(program, image)
            except self._torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self._programs[height, width] = program
                self.device_reason += f"; {width}x{height} without a CUDA graph ({str(error).splitlines()[0]})"
        return self._programs[height, width]
