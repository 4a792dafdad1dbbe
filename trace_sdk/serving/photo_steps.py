"""What a Triton Inference Server's Python backend runs before and after the engine, so that clients send files.

The server looks for the class in a model.py, which `trace_sdk.serving.photo_models` writes as one import.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import triton_python_backend_utils as backend  # the server puts it there
from numpy.typing import NDArray

from trace_sdk.errors import ImageError
from trace_sdk.images import read_image
from trace_sdk.machine import usable_cpus
from trace_sdk.network_input import fit, unfit


class Decode:
    """`photo`, the bytes of a file, [batch, 1] → `image` uint8 [batch, height, width, 3], upright RGB.

    With buckets the image is scaled and padded to them, and there is `placement` int32 [batch, 4]: its height and width
    without padding, then those of the photo. What is no photo is refused, with the reason; requests beside it are not.
    """

    def initialize(self, args: dict[str, str]) -> None:
        parameters = json.loads(args["model_config"])["parameters"]
        self._size = int(parameters["size"]["string_value"])
        self._buckets = [int(side) for side in parameters["buckets"]["string_value"].split(",") if side]
        self._pool = ThreadPoolExecutor(usable_cpus())

    def execute(self, requests: list[Any]) -> list[Any]:
        # Nothing of the server's own is touched in the threads.
        files = [_input(request, "photo").ravel().tolist() for request in requests]
        return [_response(answer) for answer in self._pool.map(self._decoded, files)]

    def finalize(self) -> None:
        self._pool.shutdown()

    def _decoded(self, files: list[bytes]) -> dict[str, NDArray[Any]] | ImageError:
        try:
            return self._arrays([read_image(file, f"photo {at}").rgb for at, file in enumerate(files)])
        except ImageError as error:
            return error

    def _arrays(self, photos: list[NDArray[np.uint8]]) -> dict[str, NDArray[Any]]:
        if len({photo.shape for photo in photos}) > 1:
            sizes = ", ".join(f"{photo.shape[1]}x{photo.shape[0]}" for photo in photos)
            raise ImageError(f"The photos of a request have several sizes: {sizes}. Send each in a request of its own.")
        if not self._buckets:
            return {"image": np.stack(photos)}
        fitted = [fit(photo, self._size, self._bucket) for photo in photos]
        placement = [(*shape, *photo.shape[:2]) for (_, *shape), photo in zip(fitted, photos, strict=True)]
        return {"image": np.stack([image for image, *_ in fitted]), "placement": np.array(placement, np.int32)}

    def _bucket(self, length: int) -> int:
        return next(side for side in self._buckets if side >= length)


class Restore:
    """`padded` float32 [batch, h, w], the engine's answer, and `placement` → `edge_probability` at the photo's size."""

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        answers = zip(_input(request, "padded"), _input(request, "placement").tolist(), strict=True)
        edges = [unfit(padded, h, w, (height, width)) for padded, (h, w, height, width) in answers]
        return _response({"edge_probability": np.stack(edges)})


def _input(request: Any, name: str) -> NDArray[Any]:
    array: NDArray[Any] = backend.get_input_tensor_by_name(request, name).as_numpy()
    return array


def _response(answer: dict[str, NDArray[Any]] | ImageError) -> Any:
    if isinstance(answer, ImageError):
        return backend.InferenceResponse(error=backend.TritonError(str(answer), backend.TritonError.INVALID_ARG))
    return backend.InferenceResponse([backend.Tensor(name, array) for name, array in answer.items()])
