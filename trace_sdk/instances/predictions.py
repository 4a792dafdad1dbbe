"""Masks that other methods wrote, as COCO results or as a COCO data set, checked entry by entry.

CutLER and U2Seg write results through detectron2: a list of {image_id, category_id, segmentation, score, bbox}.
MaskCut, and ProMerge after it, write a data set: {images, annotations, categories}. Masks come as compressed RLE, as
plain run lengths, or as polygons.
"""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trace_sdk.errors import DatasetError
from trace_sdk.images import PHOTO_SUFFIXES
from trace_sdk.instances.coco import UNREADABLE, decode_mask

if TYPE_CHECKING:
    from trace_sdk.edge_map import EdgeMap
    from trace_sdk.instances.propagation import RefinedMasks

_LARGEST = sys.float_info.max  # whole numbers of JSON may be larger
_BEYOND = 1.0  # how far polygons may reach over the rim, pixels: tools round differently

OnBad = Callable[[DatasetError], None]


@dataclass(frozen=True, eq=False)
class PredictedImage:
    """One image and its entries, (place in the file, entry), crowd regions among them."""

    id: int | str
    photo: Path
    size: tuple[int, int] | None  # (width, height) as the file says
    entries: list[tuple[int, dict[str, Any]]]


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a file of masks holds.

    Attributes:
        file: where it came from.
        images: those that have entries or are listed, in the order of the file.
        content: the data set without its annotations, or None if the file is a list of results.
    """

    file: Path
    images: list[PredictedImage]
    content: dict[str, Any] | None


def read_predictions(
    file: Path,
    folder: Path,
    annotations: Path | None,
    on_bad: OnBad,
    *,
    class_agnostic: bool = False,
    by_name: bool = False,
) -> Predictions:
    """Read a file of masks and find the photos they belong to.

    A photo is found by the `file_name` of its image, in the file itself or in `annotations` (any COCO data set of
    the same images); without either by its name's number: image 790 is FOLDER/000000000790.jpg.

    Args:
        file: COCO results or data set.
        folder: of the photos.
        annotations: data set that names images, and categories.
        on_bad: called with each bad entry or image, which is left out; it may raise.
        class_agnostic: any category will do, listed or not.
        by_name: a data set numbers its images as it likes: they are those of `annotations` with the same file names,
            and others are left out. Where it shares no file name with them, numbers count.

    Raises:
        DatasetError: the file is none of the two, or a folder or file is missing; and what `on_bad` raises.
    """
    if not folder.is_dir():
        raise DatasetError(f"{folder} is not a folder. Give the folder of the photos.")
    loaded = _load(file)
    content = None
    if isinstance(loaded, dict):
        content = {key: value for key, value in loaded.items() if key != "annotations"}
        loaded = loaded.get("annotations")
    if not isinstance(loaded, list):
        raise DatasetError(f"{file} is neither a list of COCO results nor a COCO data set. Give one of them.")
    named = content if annotations is None else _load(annotations)
    source = file if annotations is None else annotations
    if named is not None and not isinstance(named, dict):
        raise DatasetError(f"{source} is not a COCO data set. Give one with images.")
    listed = _listed(named, source, on_bad)
    if by_name and content is not None and listed is not None:
        loaded = _renumbered(loaded, content, listed)
    categories: set[Any] = set()
    if not class_agnostic:
        known = (named or {}).get("categories") or []
        categories = {c["id"] for c in known if isinstance(c, dict) and _is_id(c.get("id"))}
    grouped = _grouped(loaded, file, listed, categories, on_bad)
    by_number = {} if listed is not None else _photos_by_number(folder)

    images = []
    for image_id in listed if listed is not None else grouped:
        facts = listed[image_id] if listed is not None else {}
        photo = folder / str(facts["file_name"]) if facts else by_number.get(_number(image_id))
        if photo is None or not photo.is_file():
            wanted = photo or folder / f"{image_id:0>12}.jpg"
            if grouped[image_id]:
                on_bad(DatasetError(f"{file}: image {image_id} has no photo {wanted}. Put it there (--images)."))
            continue
        size = (facts["width"], facts["height"]) if {"width", "height"} <= facts.keys() else None
        images.append(PredictedImage(image_id, photo, size, grouped[image_id]))
    return Predictions(file, images, content)


def decode_entries(
    image: PredictedImage, height: int, width: int, file: Path, on_bad: OnBad
) -> list[tuple[dict[str, Any], NDArray[np.bool_]]]:
    """The entries of an image with their masks, bool [height, width]; bad ones go to `on_bad` and are left out."""
    if image.size is not None and image.size != (width, height):
        on_bad(
            DatasetError(
                f"{file}: image {image.id} is {image.size[0]}x{image.size[1]} there, {image.photo} is "
                f"{width}x{height}. Use the photos that the masks were made for."
            )
        )
        return []
    decoded = []
    for place, entry in image.entries:
        where = f"{file}: entry {place} (image {image.id})"
        shape = entry.get("segmentation")
        try:
            mask = decode_mask(shape, height, width)
            if isinstance(shape, list) and _reaches_out(shape, height, width):
                raise ValueError(f"it reaches outside the image, which is {width}x{height}")
            if not mask.any():
                raise ValueError("it is empty")
        except UNREADABLE as error:
            reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            on_bad(DatasetError(f"{where} has no usable mask: {reason}. Correct or remove it."))
        else:
            decoded.append((entry, mask))
    return decoded


def _load(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except OSError as error:
        raise DatasetError(f"{file}: {error.strerror}. Check the name.") from error
    except ValueError as error:
        raise DatasetError(f"{file} is not JSON ({error}). Write it again.") from error


def _listed(named: dict[str, Any] | None, source: Path, on_bad: OnBad) -> dict[Any, dict[str, Any]] | None:
    """Images of a data set by id; None where there is no data set."""
    if named is None:
        return None
    images = named.get("images")
    if not isinstance(images, list):
        raise DatasetError(f"{source} lists no images. Give a COCO data set, or a list of results.")
    listed: dict[Any, dict[str, Any]] = {}
    for place, image in enumerate(images):
        if not isinstance(image, dict) or not _is_id(image.get("id")) or not isinstance(image.get("file_name"), str):
            on_bad(DatasetError(f"{source}: image {place} of the list has no id or no file_name. Correct it."))
        elif image["id"] in listed:
            on_bad(DatasetError(f"{source}: image id {image['id']} is there twice. Give each image its own."))
        else:
            listed[image["id"]] = image
    return listed


def _renumbered(entries: list[Any], own: dict[str, Any], listed: dict[Any, dict[str, Any]]) -> list[Any]:
    """Entries with the image ids of `listed`, by file name, where `own` names its images."""
    ids = {Path(image["file_name"]).name: listed_id for listed_id, image in listed.items()}
    images = [image for image in own.get("images") or [] if isinstance(image, dict) and _is_id(image.get("id"))]
    known = {image["id"]: ids.get(Path(str(image.get("file_name"))).name) for image in images}
    if not any(listed_id is not None for listed_id in known.values()):
        return entries
    renumbered = []
    for entry in entries:
        image_id = entry.get("image_id") if isinstance(entry, dict) else None
        if not _is_id(image_id) or image_id not in known:
            renumbered.append(entry)
        elif known[image_id] is not None:
            renumbered.append({**entry, "image_id": known[image_id]})
    return renumbered


def refine_entries(
    edges: EdgeMap, decoded: Sequence[tuple[dict[str, Any], NDArray[np.bool_]]], threshold: float | None
) -> Iterator[tuple[list[int], RefinedMasks]]:
    """The masks of each category refined, with their places in `decoded`; crowd regions stay as they are.

    Args:
        decoded: see `decode_entries`. threshold: of the edges that separate, None for the engine's own.
    """
    by_category: dict[Any, list[int]] = {}
    for place, (entry, _) in enumerate(decoded):
        if not entry.get("iscrowd"):
            by_category.setdefault(entry.get("category_id"), []).append(place)
    for places in by_category.values():
        masks, scores = zip(
            *((decoded[place][1], decoded[place][0].get("score", 1.0)) for place in places), strict=True
        )
        yield places, edges.refine(np.stack(masks), scores, threshold=threshold)


def _grouped(
    entries: list[Any], file: Path, listed: dict[Any, dict[str, Any]] | None, categories: set[Any], on_bad: OnBad
) -> defaultdict[Any, list[tuple[int, dict[str, Any]]]]:
    """Entries by image, those left out whose fields are wrong."""
    ids = Counter(entry["id"] for entry in entries if isinstance(entry, dict) and _is_id(entry.get("id")))
    seen: set[Any] = set()
    grouped: defaultdict[Any, list[tuple[int, dict[str, Any]]]] = defaultdict(list)
    for place, entry in enumerate(entries):
        if reason := _wrong(entry, listed, categories):
            on_bad(DatasetError(f"{file}: entry {place} {reason}. Correct or remove it."))
        elif ids.get(entry.get("id"), 0) > 1 and entry["id"] in seen:
            on_bad(DatasetError(f"{file}: entry {place} repeats id {entry['id']}. Give each its own id."))
        else:
            seen.add(entry.get("id"))
            grouped[entry["image_id"]].append((place, entry))
    return grouped


def _wrong(entry: Any, listed: dict[Any, dict[str, Any]] | None, categories: set[Any]) -> str:
    if not isinstance(entry, dict):
        return f"is {'null' if entry is None else type(entry).__name__}, not an object"
    if not _is_id(entry.get("image_id")):
        return f"has image_id {entry.get('image_id')!r}"
    if listed is not None and entry["image_id"] not in listed:
        return f"belongs to image {entry['image_id']}, which is not listed"
    score = entry.get("score", 1.0)
    if isinstance(score, bool) or not isinstance(score, (int, float)) or not 0 <= score <= _LARGEST:
        return f"has score {score!r}, not a finite number of 0 or more"
    if isinstance(entry.get("id"), (list, dict)):
        return f"has id {entry['id']!r:.40}"
    category = entry.get("category_id")
    if not (category is None or _is_id(category)) or (categories and category not in categories):
        return f"has category {category!r}, which is not listed"
    return ""


def _is_id(value: Any) -> bool:
    return isinstance(value, (int, str)) and not isinstance(value, bool)


def _number(image_id: Any) -> int | None:
    return int(image_id) if str(image_id).isdecimal() else None


def _photos_by_number(folder: Path) -> dict[int | None, Path]:
    """Photos by the number that ends their name, as COCO_val2014_000000000790.jpg."""
    found: dict[int | None, Path] = {}
    for photo in sorted(folder.iterdir()):
        number = photo.stem.rpartition("_")[2]
        if photo.suffix.lower() in PHOTO_SUFFIXES and number.isdecimal():
            found.setdefault(int(number), photo)
    return found


def _reaches_out(polygons: list[list[float]], height: int, width: int) -> bool:
    values = [np.asarray(polygon, np.float64).reshape(-1, 2) for polygon in polygons]
    points = np.concatenate(values)
    return bool((points < -_BEYOND).any() or (points > (width + _BEYOND, height + _BEYOND)).any())
