"""What the values of a semantic picture mean: VOC, COCO-Stuff, Cityscapes, or a list of one's own."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trace_sdk.errors import ArgumentError, DatasetError


@dataclass(frozen=True)
class Category:
    """`id` in the panoptic file; `thing`: has instances, as against stuff."""

    id: int
    name: str
    thing: bool

    def to_coco(self) -> dict[str, Any]:
        """An entry of COCO panoptic `categories`."""
        return {"id": self.id, "name": self.name, "supercategory": self.name, "isthing": int(self.thing)}


@dataclass(frozen=True)
class LabelSet:
    """values: pixel value → category. void: values without one; any other value is an error. palette: for colour
    pictures, uint8 [256, 3], the colour of each value."""

    name: str
    values: dict[int, Category]
    void: frozenset[int]
    palette: NDArray[np.uint8] | None = None


_VOC = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant "
    "sheep sofa train tvmonitor"
)
_COCO_THINGS = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,,stop sign,parking meter,"
    "bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,,backpack,umbrella,,,handbag,tie,suitcase,frisbee,"
    "skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,,wine glass,"
    "cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,"
    "potted plant,bed,,dining table,,,toilet,,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,"
    "refrigerator,,book,clock,vase,scissors,teddy bear,hair drier,toothbrush"
)  # ids from 1; COCO never used those without a name
_COCO_STUFF = (
    "banner blanket branch bridge building-other bush cabinet cage cardboard carpet ceiling-other ceiling-tile cloth "
    "clothes clouds counter cupboard curtain desk-stuff dirt door-stuff fence floor-marble floor-other floor-stone "
    "floor-tile floor-wood flower fog food-other fruit furniture-other grass gravel ground-other hill house leaves "
    "light mat metal mirror-stuff moss mountain mud napkin net paper pavement pillow plant-other plastic platform "
    "playingfield railing railroad river road rock roof rug salad sand sea shelf sky-other skyscraper snow "
    "solid-other stairs stone straw structural-other table tent textile-other towel tree vegetable wall-brick "
    "wall-concrete wall-other wall-panel wall-stone wall-tile wall-wood water-other waterdrops window-blind "
    "window-other wood"
)  # ids from 92
_CITYSCAPES = {
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light",
    20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car",
    27: "truck", 28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle",
}  # fmt: skip
_CITYSCAPES_THINGS_FROM = 24


def read_label_set(name_or_file: str) -> LabelSet:
    """A known label set, or a JSON file with COCO panoptic categories.

    * `voc`: values 0 (background, stuff) to 20, 255 is void; colour pictures are read by VOC's palette.
    * `coco-stuff`: COCO's ids, things 1 to 90, stuff 92 to 182; 0 and 255 are void.
    * `coco-stuff-maps`: the same less 1, as the stuffthingmaps have it; 255 is void.
    * `cityscapes`: ids 0 to 33 as in `*_labelIds.png`; the classes that don't count are void.
    * `cityscapes-train`: ids 0 to 18 as in `*_labelTrainIds.png`; 255 is void. Categories are those of `cityscapes`.
    * FILE.json: a list of {"id", "name", "isthing"}, or a data set with `categories`; the pixel value is the id; 0 and
      255 are void unless listed.

    Raises:
        ArgumentError: unknown name. DatasetError: a file that is missing or malformed.
    """
    if name_or_file in _KNOWN:
        return _KNOWN[name_or_file]
    if not name_or_file.endswith(".json"):
        raise ArgumentError(f"labels={name_or_file!r} is unknown. Give one of {', '.join(_KNOWN)}, or a .json file.")
    file = Path(name_or_file)
    try:
        content = json.loads(file.read_bytes())
        listed = content["categories"] if isinstance(content, dict) else content
        categories = [Category(int(one["id"]), str(one["name"]), bool(one["isthing"])) for one in listed]
    except OSError as error:
        raise DatasetError(f"{file}: {error.strerror}. Check the name.") from error
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DatasetError(f"{file} is no list of categories with id, name and isthing ({reason}).") from error
    values = {category.id: category for category in categories}
    if not values or len(values) < len(categories) or min(values) < 0:
        raise DatasetError(f"{file} lists no category, one id twice, or an id below 0. Correct it.")
    return LabelSet(file.stem, values, frozenset({0, 255} - values.keys()))


def voc_palette() -> NDArray[np.uint8]:
    """VOC's colours, uint8 [256, 3]: bits 0, 1, 2 of the value are the top bits of red, green, blue, and so on."""
    value, palette = np.arange(256), np.zeros((256, 3), np.int64)
    for bit in range(8):
        for channel in range(3):
            palette[:, channel] |= ((value >> (3 * bit + channel)) & 1) << (7 - bit)
    return palette.astype(np.uint8)


def _voc() -> LabelSet:
    things = {i: Category(i, name, True) for i, name in enumerate(_VOC.split(), start=1)}
    return LabelSet("voc", {0: Category(0, "background", False), **things}, frozenset({255}), voc_palette())


def _coco_stuff(name: str, shift: int) -> LabelSet:
    categories = [Category(i, thing, True) for i, thing in enumerate(_COCO_THINGS.split(","), start=1) if thing]
    categories += [Category(i, stuff, False) for i, stuff in enumerate(_COCO_STUFF.split(), start=92)]
    void = frozenset({255} if shift else {0, 255})
    return LabelSet(name, {category.id - shift: category for category in categories}, void)


def _cityscapes(name: str) -> LabelSet:
    categories = [Category(i, known, i >= _CITYSCAPES_THINGS_FROM) for i, known in _CITYSCAPES.items()]
    if name == "cityscapes-train":
        return LabelSet(name, dict(enumerate(categories)), frozenset({255}))
    values = {category.id: category for category in categories}
    return LabelSet(name, values, frozenset({*range(34), 255} - values.keys()))


_KNOWN = {
    "voc": _voc(),
    "coco-stuff": _coco_stuff("coco-stuff", 0),
    "coco-stuff-maps": _coco_stuff("coco-stuff-maps", 1),
    "cityscapes": _cityscapes("cityscapes"),
    "cityscapes-train": _cityscapes("cityscapes-train"),
}
