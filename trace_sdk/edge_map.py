"""What a detector answers: the probability of an instance edge at every pixel of the input."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import PIL.Image
from numpy.typing import DTypeLike, NDArray
from PIL.PngImagePlugin import PngInfo

from trace_sdk import __version__
from trace_sdk.atomic import write_text, write_whole
from trace_sdk.buckets import is_whole
from trace_sdk.errors import ArgumentError, OutputError, needs_extra
from trace_sdk.images import ImageInput, read_image
from trace_sdk.thinning import thin_ridges

if TYPE_CHECKING:
    from trace_sdk.instances.hierarchy import Hierarchy
    from trace_sdk.instances.label_sets import LabelSet
    from trace_sdk.instances.panoptic import Panoptic
    from trace_sdk.instances.prompts import SamPrompts
    from trace_sdk.instances.propagation import RefinedMasks
    from trace_sdk.instances.result import Instances

OVERLAY_COLOUR = (255, 32, 96)
_SUFFIXES = (".png", ".npy", ".tif", ".tiff", ".json")
PEN = 800  # longest side, in pixels, for each pixel of the pen to either side
SPECK = 3e-4  # share of the picture below which a region is no instance unless asked for
_TIFF_DESCRIPTION = 270


@dataclass(frozen=True, eq=False, repr=False)
class EdgeMap:
    """Edge probabilities at the resolution of the input.

    Attributes:
        probability: float32 [H, W] in [0, 1], read-only.
        rgb: uint8 [H, W, 3], the input as it was decoded, read-only.
        threshold: the engine's calibrated threshold, in (0, 1).
        info: what `EdgeDetector.info` has, source, input_size, network_size and padded_size as (width, height),
            tiles (how many pieces), timings in ms per stage.

    Edges of others become one by `EdgeMap(probability, rgb, threshold)`, float of any precision.

    Raises:
        ArgumentError: `probability` is not float [H, W] in [0, 1], or `rgb` not uint8 of its size.
    """

    probability: NDArray[np.float32]
    rgb: NDArray[np.uint8]
    threshold: float = 0.5
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        given, rgb = np.asarray(self.probability), np.asarray(self.rgb)
        if given.dtype == np.float16:  # is compared twenty times as slowly
            given = given.astype(np.float32)
        if given.dtype.kind != "f" or given.ndim != 2 or not given.size or not 0 <= given.min() <= given.max() <= 1:
            raise ArgumentError(
                f"probability is {given.dtype} {list(given.shape)}; expected float [H, W] with values in [0, 1]."
            )
        if rgb.dtype != np.uint8 or rgb.shape != (*given.shape, 3):
            raise ArgumentError(f"rgb is {rgb.dtype} {list(rgb.shape)}; expected uint8 {[*given.shape, 3]}.")
        # Views, so that the caller's own arrays stay as they are.
        for name, values in (("probability", given.astype(np.float32, copy=False).view()), ("rgb", rgb.view())):
            values.flags.writeable = False
            object.__setattr__(self, name, values)

    def thin(self) -> NDArray[np.float32]:
        """Edges one pixel wide: float32 [H, W], the probability on ridges and 0 elsewhere.

        A pixel stays if, across the edge, both neighbours (interpolated) are lower. The direction comes from
        second derivatives of the smoothed map; inside a plateau its middle wins.
        """
        height, width = self.probability.shape
        seen = max(self.info.get("network_size", (width, height)))
        return thin_ridges(self.probability, magnification=max(1.0, max(height, width) / seen))

    def binary(self, threshold: float | None = None) -> NDArray[np.bool_]:
        """Where the probability is at least `threshold` in [0, 1] (None: the engine's own): bool [H, W].

        Raises:
            ArgumentError: `threshold` outside [0, 1].
        """
        return self.probability >= self._checked(threshold)

    def instances(self, threshold: float | None = None, *, min_area: int | None = None) -> Instances:
        """The picture cut into instances with the edges as separators (paper section 3.5).

        A border between two regions stays if the edge probability along it is `threshold` or more on average.
        The first call finds the nested partitions of all thresholds; each further one only cuts them.

        Args:
            threshold: in [0, 1], from fine (0) to coarse (1); None: the engine's own.
            min_area: pixels; a smaller region joins the neighbour behind its weakest border. None: 3 in 10,000
                of the picture, at least 16.

        Raises:
            ArgumentError: `threshold` or `min_area` is out of range.
            MissingExtraError: the extra `instances` is not installed.
        """
        cut_at, least = self._checked(threshold), self._least(min_area)
        with needs_extra("instances", "Instances need"):
            from trace_sdk.instances.hierarchy import enlarge
            from trace_sdk.instances.result import Instances

            hierarchy = self.hierarchy
        regions, scores = hierarchy.cut(cut_at, least)
        made_with = {**self.info, "threshold": float(cut_at), "min_area": least}
        labels = enlarge((regions + np.int32(1))[hierarchy.pieces], self.probability.shape, hierarchy.step)
        return Instances(labels, scores.astype(np.float32), self.rgb, made_with)

    def refine(
        self, masks: NDArray[Any], scores: Sequence[float] | None = None, *, threshold: float | None = None
    ) -> RefinedMasks:
        """Masks of any source, made to agree with the edges: Background-Guided Propagation (paper section 3.5).

        Holes and gaps that no edge surrounds are closed, outlines move to stronger edges nearby, neighbours in one mask
        are split and masks of one thing joined where the edges are clear. What they don't speak against stays as it
        was. A mask that may be two things is followed by both, with lower scores: results may overlap. The answer
        doesn't depend on the order of the masks.

        Args:
            masks: bool [K, H, W], or integers of which 0 is outside; as large as the input, none of them empty.
            scores: of the masks, K finite numbers of 0 or more (for logits take the sigmoid); None: all 1.
            threshold: of the edges that separate, in [0, 1]; None: the engine's own.

        Raises:
            ArgumentError: masks have another size or dtype, one is empty, `scores` or `threshold` is out of range.
            MissingExtraError: the extra `instances` is not installed.
        """
        given = np.asarray(masks)
        if given.dtype.kind not in "bui" or given.ndim != 3 or given.shape[1:] != self.probability.shape:
            raise ArgumentError(
                f"masks are {given.dtype} {list(given.shape)}; expected bool or integers "
                f"[K, {self.probability.shape[0]}, {self.probability.shape[1]}], as large as the picture."
            )
        inside = given.astype(np.bool_, copy=False)
        if len(empty := np.flatnonzero(~inside.any(axis=(1, 2)))):
            raise ArgumentError(f"Mask {empty[0]} is empty. Leave out masks without a pixel.")
        weights = np.ones(len(inside)) if scores is None else np.asarray(scores, np.float64)
        if weights.shape != (len(inside),) or not np.isfinite(weights).all() or (weights < 0).any():
            raise ArgumentError(
                f"scores are {scores!r}; expected {len(inside)} finite numbers of 0 or more, one a mask."
            )
        cut_at = self._checked(threshold)
        with needs_extra("instances", "Instances need"):
            from trace_sdk.instances.propagation import propagate

            return propagate(self.probability, self.hierarchy, cut_at, self._least(None), inside, weights)

    def panoptic(
        self,
        semantic: NDArray[Any],
        labels: str | LabelSet = "voc",
        *,
        threshold: float | None = None,
        min_area: int | None = None,
    ) -> Panoptic:
        """Semantic labels made panoptic: things split by the edges, stuff merged, the rest void.

        Args:
            semantic: integers [H, W] as large as the input; `trace_sdk.instances.panoptic.read_semantic` reads a PNG.
            labels: what the values mean, see `trace_sdk.instances.label_sets.read_label_set`.
            threshold: of the edges that separate, in [0, 1]; None: the engine's own.
            min_area: pixels; smaller thing components are void. None: 3 in 10,000 of the picture, at least 16.

        Raises:
            ArgumentError: `semantic` has another size, dtype or unknown values, or another argument is out of range.
            DatasetError: a file of labels cannot be read.
            MissingExtraError: the extra `instances` is not installed.
        """
        cut_at, least = self._checked(threshold), self._least(min_area)
        with needs_extra("instances", "Instances need"):
            from trace_sdk.instances.label_sets import read_label_set
            from trace_sdk.instances.panoptic import Panoptic, check_semantic, split_things

            known = read_label_set(labels) if isinstance(labels, str) else labels
            values = check_semantic(semantic, self.probability.shape, known)
            ids, segments = split_things(self.probability, self.hierarchy, cut_at, least, values, known)
        made_with = {**self.info, "threshold": float(cut_at), "min_area": least, "labels": known.name}
        return Panoptic(ids, segments, known, self.rgb, made_with)

    def sam_prompts(
        self,
        threshold: float | None = None,
        *,
        min_area: int | None = None,
        points: int = 1,
        min_score: float = 0.0,
    ) -> SamPrompts:
        """A box and points inside for each instance, in the formats of SAM, SAM 2, ultralytics and transformers.

        Args:
            threshold, min_area: as for `instances`.
            points: of each instance, 1 or more.
            min_score: instances with a lower score, in [0, 1], are left out.

        Raises:
            ArgumentError: an argument is out of range.
            MissingExtraError: the extra `instances` is not installed.
        """
        if not is_whole(points) or points < 1:
            raise ArgumentError(f"points={points!r} must be a whole number of at least 1.")
        if not 0 <= min_score <= 1:
            raise ArgumentError(f"min_score={min_score} must be in [0, 1].")
        found = self.instances(threshold, min_area=min_area)
        from trace_sdk.instances.prompts import make_prompts

        return make_prompts(found, points, min_score)

    @cached_property
    def hierarchy(self) -> Hierarchy:
        """Nested partitions of the picture, for all thresholds; made once, at the first use."""
        from trace_sdk.instances.hierarchy import build_hierarchy

        seen = self.info.get("network_size")
        return build_hierarchy(self.probability, max(seen) if seen else None)

    def _least(self, min_area: int | None) -> int:
        if min_area is None:
            return max(16, round(self.probability.size * SPECK))
        if not is_whole(min_area) or min_area < 0:
            raise ArgumentError(f"min_area={min_area!r} must be a whole number of pixels, 0 or more.")
        return int(min_area)

    def _checked(self, threshold: float | None) -> float:
        if threshold is None:
            return self.threshold
        if not 0 <= threshold <= 1:
            raise ArgumentError(f"threshold={threshold} must be in [0, 1].")
        return threshold

    def overlay(self, image: ImageInput | None = None) -> PIL.Image.Image:
        """The ridges of the edges drawn over the input, or over another `image` of the same size: RGB, W x H.

        Raises:
            ArgumentError: `image` has another size.
            ImageError: `image` cannot be read.
        """
        photo = self.rgb if image is None else read_image(image).rgb
        if photo.shape != (*self.probability.shape, 3):
            raise ArgumentError(
                f"The image is {photo.shape[1]}x{photo.shape[0]}, the edges are "
                f"{self.probability.shape[1]}x{self.probability.shape[0]}. Pass the image they were found in."
            )
        # Ridges, as wide as a pen on the picture; clear at half the threshold, opaque from the threshold on.
        lines = self.thin() / np.float32(self.threshold) * 2 - 1
        opacity = np.rint(np.clip(lines, 0, 1) * 255).astype(np.uint8)
        pen = PIL.Image.fromarray(_thickened(opacity, round(max(lines.shape) / PEN)))
        below = PIL.Image.fromarray(photo)
        return PIL.Image.composite(PIL.Image.new("RGB", below.size, OVERLAY_COLOUR), below, pen)

    def save(self, path: str | os.PathLike[str], *, bits: int = 8) -> Path:
        """Write the probability, whole or not at all, and return the path.

        The suffix decides: `.png` grey with `bits` 8 or 16 (1.0 is white), `.npy` float32, `.tif` float32; `.json` has
        the `instances`, as a COCO data set. All but `.npy` say what made them (`provenance`).

        Raises:
            OutputError: unknown suffix, or the file cannot be written.
            ArgumentError: `bits` is not 8 or 16, or 16 for another format than PNG.
            MissingExtraError: `.json` without the extra `instances`.
        """
        target = Path(path)
        suffix = target.suffix.lower()
        if suffix not in _SUFFIXES:
            allowed = ", ".join(_SUFFIXES)
            raise OutputError(f"{target}: suffix {suffix!r} names no format. Use one of {allowed}.")
        if bits not in (8, 16) or (bits == 16 and suffix != ".png"):
            raise ArgumentError(f"bits={bits} with {suffix}: a .png has 8 or 16, .npy and .tif are float32.")
        if suffix == ".json":
            write_text(target, json.dumps(self.instances().to_coco()))
            return target
        with write_whole(target) as file:
            if suffix == ".png":
                self.write_png(file, bits=bits)
            elif suffix == ".npy":
                np.save(file, self.probability, allow_pickle=False)
            else:
                tags = {_TIFF_DESCRIPTION: json.dumps(self.provenance())}
                picture = PIL.Image.fromarray(self.probability)
                picture.save(file, "TIFF", compression="tiff_deflate", tiffinfo=tags)
        return target

    def provenance(self) -> dict[str, Any]:
        """What made this map, for files: version, engine, engine_sha256, input_size, network_size."""
        kept = ("engine", "engine_sha256", "input_size", "network_size")
        return {"trace_sdk": __version__, **{key: self.info[key] for key in kept if key in self.info}}

    def write_png(self, file: IO[bytes], *, bits: int = 8) -> None:
        """The probability as a grey PNG with `bits` 8 or 16, as `save` writes it, into an open binary file."""
        text = PngInfo()
        text.add_text("Software", f"trace-sdk {__version__}")
        text.add_text("trace_sdk", json.dumps(self.provenance()))
        depth = np.uint8 if bits == 8 else np.uint16
        grey = np.rint(self.probability * np.float32(np.iinfo(depth).max)).astype(depth)
        PIL.Image.fromarray(grey).save(file, "PNG", pnginfo=text)

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.write_png(file)
        return file.getvalue()

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self.probability, dtype=dtype, copy=copy)

    def __repr__(self) -> str:
        height, width = self.probability.shape
        engine = self.info.get("engine")
        return f"EdgeMap({width}x{height}, engine={engine!r}, threshold={self.threshold:.3g})"


def _thickened(lines: NDArray[np.uint8], reach: int) -> NDArray[np.uint8]:
    """The maximum of the square of `reach` pixels to each side, uint8 [H, W]."""
    for axis in (0, 1):
        pad = [(reach, reach) if axis == i else (0, 0) for i in (0, 1)]
        padded, length = np.pad(lines, pad), lines.shape[axis]
        lines = np.zeros_like(lines)
        for i in range(2 * reach + 1):
            np.maximum(lines, padded[i : i + length] if axis == 0 else padded[:, i : i + length], out=lines)
    return lines
