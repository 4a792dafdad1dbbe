"""Labels on a Ray cluster: the teacher as a stateful `map_batches` stage that fills the same label folder::

    import ray
    from trace_sdk.labelling.ray import RayLabeller, image_rows

    result = ray.data.from_items(image_rows("photos/")).map_batches(
        RayLabeller,
        fn_constructor_kwargs={"backbone": "/shared/backbone", "labels": "/shared/labels", "device": "cuda"},
        batch_size=16,
        num_gpus=1,
        concurrency=4,
    )
    print(result.groupby("state").count().to_pandas())

Ray decides who does what, so no claims are made here. An image that has its label is not done again.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trace_sdk.backbones.registry import open_backbone
from trace_sdk.errors import MissingExtraError, TraceError
from trace_sdk.labelling.images import NamedImage, Where, find_images
from trace_sdk.labelling.label import Ready, alike, annotate, load
from trace_sdk.labelling.states import PENDING, failure, label_file, record_failure, state
from trace_sdk.teacher.labels import claim_folder, save_label
from trace_sdk.teacher.teacher import Teacher, TeacherSettings


def image_rows(where: Where | Iterable[Where]) -> list[dict[str, Any]]:
    """What `find_images` finds, as rows for `ray.data.from_items`: name, file, and place in a tar (0, −1 without).

    Raises:
        DatasetError: see `find_images`.
        MissingExtraError: ray is not installed.
    """
    if find_spec("ray") is None:
        raise MissingExtraError('Ray is not installed. Run: pip install "trace-sdk[ray]".')
    return [
        {"name": image.name, "file": str(image.file.absolute()), "start": start, "length": length}
        for image in find_images(where)
        for start, length in [image.span or (0, -1)]
    ]


class RayLabeller:
    """Rows of `image_rows` → the same images' name, state ("done" or "failed") and reason.

    Args:
        backbone: as `open_backbone` takes it: a folder that every worker sees, or a hub id. A latent model's denoiser
            has the weights that the settings' precision says.
        labels: folder that every worker can write to; the same files as of `trace-sdk label`.
        device: of each worker; with `num_gpus`, Ray shows a worker only its own GPU as "cuda".

    Raises:
        ArgumentError: `labels` holds labels made in another way.
    """

    def __init__(
        self, backbone: str, labels: str, settings: TeacherSettings | None = None, device: str = "cpu"
    ) -> None:
        settings = settings or TeacherSettings()
        opened = open_backbone(backbone, device=device, precision=settings.precision)
        self._teacher, self._labels = Teacher(opened, settings), Path(labels)
        claim_folder(self._labels, settings, opened.identity)

    def __call__(self, rows: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        names = [str(name) for name in rows["name"]]
        places = zip(rows["file"], rows["start"], rows["length"], strict=True)
        ready: list[Ready] = []
        for name, (file, start, length) in zip(names, places, strict=True):
            if state(self._labels, name) == PENDING:
                image = NamedImage(name, Path(str(file)), (int(start), int(length)) if length >= 0 else None)
                try:
                    ready.append(load(self._teacher, image))
                except TraceError as error:
                    record_failure(self._labels, name, str(error))
        for group in alike(ready, len(names)):
            for done, annotation in zip(group, annotate(self._teacher, group), strict=True):
                save_label(label_file(self._labels, done.name), annotation)
        return {
            "name": np.array(names),
            "state": np.array([state(self._labels, name) for name in names]),
            "reason": np.array([failure(self._labels, name) for name in names]),
        }
