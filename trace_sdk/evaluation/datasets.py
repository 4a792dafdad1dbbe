"""Photos with human boundaries, read from the four layouts in which such sets come.

COCO instances    FOLDER/instances.json, FOLDER/images/*          instance edges (Lin et al., ECCV 2014)
COCO panoptic     FOLDER/panoptic.json, panoptic/*.png, images/*  edges of all segments (Kirillov et al., CVPR 2019)
BSDS500           FOLDER/groundTruth/**/*.mat, FOLDER/images/**/* contours (Arbelaez et al., TPAMI 2011)
instance ids      FOLDER/NAME.png, FOLDER/NAME.ids.png            composed scenes; all instances are of one class
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trace_sdk.errors import DatasetError
from trace_sdk.evaluation.touching import Touching, borders, find_touching
from trace_sdk.folders import files_below

_PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_IDS = ".ids.png"


@dataclass(frozen=True, eq=False)
class Sample:
    """One photo and what people marked in it.

    name: file stem of the photo. rgb: uint8 [H, W, 3]. boundaries: one bool [H, W] for each annotator, at
    least one, lines one pixel wide. touching: contacts of instances of one class; None where nobody told instances.
    """

    name: str
    rgb: NDArray[np.uint8]
    boundaries: tuple[NDArray[np.bool_], ...]
    touching: Touching | None = None


@dataclass(frozen=True, eq=False)
class Dataset:
    """Samples in a fixed order, each read from disk when it is asked for.

    name: of the folder. path: the folder. kind: "coco", "panoptic", "bsds" or "ids". names: of the samples.
    """

    name: str
    path: Path
    kind: str
    names: tuple[str, ...]
    read: Callable[[str], Sample]

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[Sample]:
        return map(self.read, self.names)

    def first(self, limit: int | None) -> Dataset:
        """The same set cut to its first `limit` samples; None: all."""
        return Dataset(self.name, self.path, self.kind, self.names[:limit], self.read)


def open_dataset(path: str | Path) -> Dataset:
    """Open a folder in one of the four layouts above, told by what lies in it.

    Samples are read lazily; a malformed file raises DatasetError when its sample is read.

    Raises:
        DatasetError: not a folder, none of the layouts, empty, or an instances.json or panoptic.json that is malformed.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise DatasetError(f"{folder} is not a folder. Give the folder of a data set.")
    if (folder / "instances.json").is_file():
        return _open_coco(folder)
    if (folder / "panoptic.json").is_file():
        return _open_panoptic(folder)
    if (folder / "groundTruth").is_dir():
        return _open_bsds(folder)
    if any(folder.glob(f"*{_IDS}")):
        return _open_ids(folder)
    raise DatasetError(
        f"{folder} holds no data set that is known here: neither instances.json or panoptic.json and images/, nor "
        "groundTruth/*.mat and images/, nor pairs NAME.png and NAME.ids.png."
    )


def instance_boundaries(ids: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
    """Boundaries of an instance map, one pixel wide.

    A pixel is boundary where its id differs from that of its right or lower neighbour; then thinned. The
    border of the image is no boundary.

    Args:
        ids: integer [H, W], 0 = background.

    Returns:
        bool [H, W].
    """
    from skimage import morphology

    return np.asarray(morphology.thin(borders(ids)), np.bool_)  # type: ignore[no-untyped-call]


def _open_coco(folder: Path) -> Dataset:
    """Masks are painted from large to small, so the smaller lies on top; crowd regions are left out."""
    file = folder / "instances.json"
    try:
        content = json.loads(file.read_bytes())
        images = {image["id"]: image for image in content["images"]}
        names = {Path(str(image["file_name"])).stem: image for image in images.values()}
        marked: defaultdict[int | str, list[dict[str, Any]]] = defaultdict(list)
        for annotation in content["annotations"]:
            if not annotation.get("iscrowd", 0):
                marked[annotation["image_id"]].append(annotation)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(f"{file} is not a COCO instances file ({_short(error)}). Download it again.") from error
    if len(names) != len(content["images"]):
        raise DatasetError(f"{file} lists two images of one name or id. Give each image its own.")
    if images and marked.keys().isdisjoint(images):
        raise DatasetError(
            f"{file} has no instance in any of its images: no image_id of an annotation is the id of an image. Check "
            "that both are of one set, and both numbers or both text."
        )

    def read(name: str) -> Sample:
        image = names[name]
        rgb = _read_rgb(_listed_photo(folder, image))
        height, width = rgb.shape[:2]
        if (image.get("height", height), image.get("width", width)) != (height, width):
            raise DatasetError(
                f"{file}: image {name} is {image.get('width')}x{image.get('height')} there, its photo "
                f"is {width}x{height} as it is stored. Use the photos the annotations were made for."
            )
        masks = [(annotated_mask(a, height, width, file), a.get("category_id")) for a in marked[image["id"]]]
        masks.sort(key=lambda pair: -int(pair[0].sum()))
        ids = np.zeros((height, width), np.int32)
        for number, (mask, _) in enumerate(masks, start=1):
            ids[mask] = number
        classes = {number: category for number, (_, category) in enumerate(masks, start=1)}
        return Sample(name, rgb, (instance_boundaries(ids),), find_touching(ids, classes))

    return _filled(Dataset(folder.resolve().name, folder, "coco", tuple(sorted(names)), read))


def _open_panoptic(folder: Path) -> Dataset:
    """Borders of all segments, void among them; contacts are those of things, crowds left out."""
    from trace_sdk.evaluation.panoptic import open_panoptic

    content = open_panoptic(folder)
    names = {Path(str(image.get("file_name"))).stem: number for number, image in content.images.items()}
    if len(names) != len(content.images):
        raise DatasetError(f"{content.file} lists two images of one name. Give each image its own.")

    def read(name: str) -> Sample:
        image = content.images[names[name]]
        rgb = _read_rgb(_listed_photo(folder, image))
        segmented = content.read(names[name])
        if segmented.ids.shape != rgb.shape[:2]:
            raise DatasetError(
                f"{content.file}: segments of {name} are {list(segmented.ids.shape)}, its photo is "
                f"{list(rgb.shape[:2])}. Use the photos that they were made for."
            )
        things = {i: c for i, c in segmented.categories.items() if content.things.get(c) and i not in segmented.crowds}
        ids = np.where(np.isin(segmented.ids, list(things)), segmented.ids, 0)
        return Sample(name, rgb, (instance_boundaries(segmented.ids),), find_touching(ids, things))

    return _filled(Dataset(folder.resolve().name, folder, "panoptic", tuple(sorted(names)), read))


def annotated_mask(annotation: dict[str, Any], height: int, width: int, file: Path) -> NDArray[np.bool_]:
    """The mask of an entry of a COCO `file`, bool [height, width]. Raises DatasetError if it cannot be read."""
    from trace_sdk.instances.coco import UNREADABLE, decode_mask

    try:
        return decode_mask(annotation.get("segmentation"), height, width)
    except UNREADABLE as error:
        where = f"{file}: annotation {annotation.get('id')}"
        raise DatasetError(f"{where} has no readable mask ({_short(error)}). Correct or remove it.") from error


def _open_bsds(folder: Path) -> Dataset:
    """The photo of groundTruth/a/b.mat is images/a/b.jpg; without a photo the file is an error."""
    truths, photos = folder / "groundTruth", folder / "images"
    files: dict[str, Path] = {}
    for file in sorted(files_below(truths)):
        if file.suffix == ".mat" and files.setdefault(file.stem, file) != file:
            raise DatasetError(f"{files[file.stem]} and {file} have one name. Give each its own, and its photo.")

    def read(name: str) -> Sample:
        file = files[name]
        rgb = _read_rgb(_find_photo(photos / file.relative_to(truths).parent, name))
        boundaries = _read_bsds_boundaries(file)
        for boundary in boundaries:
            if boundary.shape != rgb.shape[:2]:
                raise DatasetError(
                    f"{file} marks boundaries of size {list(boundary.shape)}, its photo is "
                    f"{list(rgb.shape[:2])}. Use the photo that belongs to it."
                )
        return Sample(name, rgb, boundaries)

    return _filled(Dataset(folder.resolve().name, folder, "bsds", tuple(sorted(files)), read))


def _read_bsds_boundaries(file: Path) -> tuple[NDArray[np.bool_], ...]:
    from scipy.io import loadmat

    try:
        cells = loadmat(file, variable_names=["groundTruth"])["groundTruth"]
        boundaries = tuple(np.asarray(cell["Boundaries"][0, 0]) for cell in cells.ravel())
    # loadmat lets any error of its parsers through: zlib, struct, index, memory and more.
    except Exception as error:
        raise DatasetError(f"{file} is not a BSDS500 ground truth ({_short(error)}). Download it again.") from error
    if not boundaries or any(b.ndim != 2 or b.dtype.kind not in "buif" for b in boundaries):
        raise DatasetError(f"{file} has no boundary maps [H, W] of numbers. Download it again.")
    return tuple(boundary > 0 for boundary in boundaries)


def _open_ids(folder: Path) -> Dataset:
    def read(name: str) -> Sample:
        file = folder / f"{name}{_IDS}"
        rgb = _read_rgb(_find_photo(folder, name))
        ids = _read(file)
        if ids.ndim != 2 or ids.dtype.kind not in "bui":
            raise DatasetError(f"{file} is not a grey PNG of 8 or 16 bit with one id for each pixel. Write it again.")
        if ids.shape != rgb.shape[:2]:
            raise DatasetError(f"{file} is {list(ids.shape)}, its image is {list(rgb.shape[:2])}. Write both alike.")
        whole = ids.astype(np.int64)
        classes = dict.fromkeys(np.unique(whole).tolist(), "instance")
        return Sample(name, rgb, (instance_boundaries(whole),), find_touching(whole, classes))

    names = tuple(sorted(file.name.removesuffix(_IDS) for file in folder.glob(f"*{_IDS}")))
    return _filled(Dataset(folder.resolve().name, folder, "ids", names, read))


def _filled(dataset: Dataset) -> Dataset:
    if not dataset.names:
        raise DatasetError(f"{dataset.path} holds no annotated image. Check that the data set is whole.")
    return dataset


def _find_photo(folder: Path, name: str) -> Path:
    for suffix in _PHOTO_SUFFIXES:
        if (file := folder / f"{name}{suffix}").is_file():
            return file
    raise DatasetError(f"{folder / name}.jpg is missing. Put the photo there, or remove its annotation.")


def _listed_photo(folder: Path, image: dict[str, Any]) -> Path:
    """The photo of an entry of a COCO file: where its name says, or with all the others in one folder."""
    listed = folder / "images" / str(image["file_name"])
    return listed if listed.is_file() else folder / "images" / listed.name


def _read_rgb(file: Path) -> NDArray[np.uint8]:
    # Annotations refer to the pixels as stored, so EXIF orientation is left alone.
    return _read(file, "RGB")


def _read(file: Path, mode: str | None = None) -> NDArray[Any]:
    try:
        with Image.open(file) as image:
            return np.asarray(image.convert(mode) if mode else image)
    # Pillow's decoders raise errors of many kinds on damaged files.
    except Exception as error:
        raise DatasetError(f"{file} cannot be read ({_short(error)}). Put the whole file there.") from error


def stored_size(photo: Path) -> tuple[int, int]:
    """(width, height) as a photo is stored, without its pixels. Raises DatasetError if it cannot be read."""
    try:
        with Image.open(photo) as image:
            return image.size
    # As above.
    except Exception as error:
        raise DatasetError(f"{photo} cannot be read ({_short(error)}). Put the whole file there.") from error


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
