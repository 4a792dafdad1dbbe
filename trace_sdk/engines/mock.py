"""An engine without a network, so that an app's tests need neither weights nor onnxruntime."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from trace_sdk import __version__
from trace_sdk.buckets import is_whole
from trace_sdk.engines.answers import checked
from trace_sdk.engines.manifest import Manifest
from trace_sdk.errors import ArgumentError

# RGB pictures uint8 [B, H, W, 3] → edge probability float [B, H, W] in [0, 1].
Answer = Callable[[NDArray[np.uint8]], NDArray[np.floating]]


def steps(batch: NDArray[np.uint8]) -> NDArray[np.float32]:
    """By how much a pixel differs from the one to its left or above: 1 from black to white."""
    values = batch.astype(np.float32) / 255
    answer = np.zeros(batch.shape[:3], np.float32)
    answer[:, :, 1:] = np.abs(np.diff(values, axis=2)).max(-1)
    answer[:, 1:] = np.maximum(answer[:, 1:], np.abs(np.diff(values, axis=1)).max(-1))
    return answer


class MockEngine:
    """What `EdgeDetector(MockEngine())` asks instead of a network; everything else is the real thing.

    Args:
        answer: RGB pictures uint8 [B, H, W, 3] → edge probability float [B, H, W] in [0, 1]; it may raise what an app
            is to cope with. Called as the network would be: with pictures of `size`, tiles of large ones.
        size: longest side that it is shown, pixels.
        threshold: of every `EdgeMap`, in (0, 1).

    Raises:
        ArgumentError: `size` or `threshold` is out of range.
    """

    engine_reason = device_reason = "asked for"
    device, provider, threads = "cpu", "none", 1
    memory, cuda_graphs, infer_photos = "host", 0, None

    def __init__(self, answer: Answer = steps, *, size: int = 512, threshold: float = 0.5) -> None:
        if not is_whole(size) or size < 1 or not 0 < threshold < 1:
            raise ArgumentError(f"size={size!r} must be a whole number of pixels, threshold={threshold!r} in (0, 1).")
        self._answer = answer
        self.sha256 = hashlib.sha256(b"mock").hexdigest()
        self.manifest = Manifest(
            name="mock",
            trace_sdk_version=__version__,
            backbone="none",
            backbone_sha256=self.sha256,
            decoder="none",
            multiple_of=1,
            min_size=1,
            max_size=max(size, 1024),
            default_size=size,
            threshold=threshold,
            precision="fp32",
            opset=0,
            producers={},
            quality={},
            parity={},
            licence="Apache-2.0",
            created="",
            commit="",
        )

    def infer(self, batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 [B, H, W, 3] → float32 [B, H, W] in [0, 1]; see `Engine.infer`."""
        return checked(np.asarray(self._answer(batch)), batch, "MockEngine", self.device)
