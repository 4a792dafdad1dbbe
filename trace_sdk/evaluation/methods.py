"""What can be evaluated: a baseline, an engine, or a folder of edge maps that somebody else made."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trace_sdk.detector import EdgeDetector
from trace_sdk.errors import ArgumentError, DatasetError
from trace_sdk.evaluation import baselines
from trace_sdk.evaluation.datasets import Dataset, Sample


class Method(Protocol):
    """Anything that answers a sample with a soft edge map."""

    @property
    def name(self) -> str:
        """The row's name in the table."""

    @property
    def timed(self) -> bool:
        """Whether the time of `edges` says something about the method."""

    def fingerprint(self, dataset: Dataset, sample: Sample) -> str:
        """Changes whenever the answer to this sample may change; the photo itself is hashed by the caller."""

    def edges(self, dataset: Dataset, sample: Sample) -> NDArray[np.float32]:
        """float32 [H, W] in [0, 1], as large as `sample.rgb`."""


@dataclass(frozen=True)
class Function:
    """A function of the photo, uint8 [H, W, 3] → float32 [H, W]; raise `version` when it changes."""

    name: str
    function: Callable[[NDArray[np.uint8]], NDArray[np.float32]]
    version: str = "1"
    timed: bool = True

    def fingerprint(self, dataset: Dataset, sample: Sample) -> str:
        return f"function {self.name} {self.version}"

    def edges(self, dataset: Dataset, sample: Sample) -> NDArray[np.float32]:
        return self.function(sample.rgb)


BASELINES: tuple[Function, ...] = (
    Function("canny", baselines.canny),
    Function("lab-gradient", baselines.lab_gradient),
)


class EngineMethod:
    """An engine of trace-sdk: a bundled name or the path of a file.

    Args:
        engine: as for EdgeDetector. size: longest side that the network sees, None for the engine's default.

    Raises:
        EngineError: missing, corrupt or foreign engine.
    """

    timed = True

    def __init__(self, engine: str | Path, *, device: str = "auto", size: int | None = None) -> None:
        self.name = str(engine) if size is None else f"{engine} @{size}"
        self._detector = EdgeDetector(engine, device=device, size=size)

    def fingerprint(self, dataset: Dataset, sample: Sample) -> str:
        info = self._detector.info
        return f"engine {info['engine_sha256']} size {info['size']} provider {info['provider']}"

    def edges(self, dataset: Dataset, sample: Sample) -> NDArray[np.float32]:
        return self._detector.run(sample.rgb).probability


@dataclass(frozen=True)
class EdgeFolder:
    """Edge maps made elsewhere, FOLDER/DATASET/STEM.png or FOLDER/STEM.png, see `edge_file` and `read_edges`.

    Raises:
        DatasetError: the folder is missing.
    """

    name: str
    folder: Path
    timed: bool = False

    def __post_init__(self) -> None:
        if not self.folder.is_dir():
            raise DatasetError(f"{self.folder} is not a folder. Give the folder with the edge maps of {self.name}.")

    def check(self, dataset: Dataset) -> None:
        """Raises DatasetError, at once rather than hours later, when a sample has no edge map."""
        for name in dataset.names:
            self._find(dataset, name)

    def fingerprint(self, dataset: Dataset, sample: Sample) -> str:
        file = self._find(dataset, sample.name)
        return f"edges {file.suffix} {hashlib.sha256(file.read_bytes()).hexdigest()}"

    def edges(self, dataset: Dataset, sample: Sample) -> NDArray[np.float32]:
        file = self._find(dataset, sample.name)
        edges = read_edges(file)
        if edges.shape != sample.rgb.shape[:2]:
            raise DatasetError(
                f"{file} is {list(edges.shape)}, its photo is {list(sample.rgb.shape[:2])}. "
                "Write edge maps as large as the photo."
            )
        return edges

    def _find(self, dataset: Dataset, name: str) -> Path:
        for folder in (self.folder / dataset.name, self.folder):
            if (file := edge_file(folder, name)) is not None:
                return file
        raise DatasetError(
            f"{self.folder / name}.png is missing: {self.name} needs an edge map (.png, .npy or .tif) for each "
            f"image of {dataset.name}, in the folder or in its sub-folder {dataset.name}/."
        )


def not_measured() -> dict[str, str]:
    """Methods that belong in every table but cannot be run here, each with its reason."""
    return {"structured forests": "not measured (OpenCV's model is in no package; give maps of it by --edges)"}


def check_names(methods: Sequence[Method]) -> None:
    """Raises ArgumentError when two rows of the table would have the same name."""
    names = [method.name for method in methods]
    for name in names:
        if names.count(name) > 1:
            raise ArgumentError(f"Two methods are called {name!r}. Give each --edges and --engine its own name.")


def edge_file(folder: Path, stem: str) -> Path | None:
    """FOLDER/STEM.npy, .png or .tif, or as `trace-sdk detect` names them STEM.edges.npy …; None if there is none."""
    suffixes = (".npy", ".png", ".tif", ".edges.npy", ".edges.png", ".edges.tif")
    return next((file for suffix in suffixes if (file := folder / f"{stem}{suffix}").is_file()), None)


def read_edges(file: Path) -> NDArray[np.float32]:
    """An edge map made elsewhere: grey .png or .tif, whole numbers up to white, or float .npy or .tif in [0, 1].

    Returns:
        float32 [H, W].

    Raises:
        DatasetError: unreadable, of another kind, or out of range.
    """
    try:
        if file.suffix == ".npy":
            edges = np.load(file, allow_pickle=False)
        else:
            with Image.open(file) as image:
                # Numbers of a palette are no grey values.
                edges = np.asarray(image.convert("L") if image.mode in ("1", "P") else image)
    # Decoders raise errors of many kinds on damaged files.
    except Exception as error:
        raise DatasetError(f"{file} cannot be read ({type(error).__name__}). Write it again.") from error
    if edges.dtype.kind in "iu" and edges.ndim == 2 and file.suffix != ".npy":
        edges = edges.astype(np.float32) / (255 if edges.dtype == np.uint8 else 65535)
    if edges.ndim != 2 or edges.dtype.kind != "f":
        raise DatasetError(f"{file} is {edges.dtype} {list(edges.shape)}; write grey PNG or a float array [H, W].")
    if edges.size == 0:
        raise DatasetError(f"{file} is empty, {list(edges.shape)}. Write it again.")
    if not (np.isfinite(edges).all() and edges.min() >= 0 and edges.max() <= 1):
        raise DatasetError(f"{file} has values that are not in [0, 1]. Scale it, and remove NaN.")
    return np.asarray(edges, np.float32)
