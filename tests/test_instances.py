from __future__ import annotations

import io
import sys
from typing import Any

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools import mask as codec
from pycocotools.coco import COCO

from trace_sdk.edge_map import EdgeMap
from trace_sdk.errors import ArgumentError, MissingExtraError
from trace_sdk.instances.coco import decode_mask, encode_mask
from trace_sdk.instances.hierarchy import enlarge

Ids = np.ndarray[Any, np.dtype[np.int64]]


def edge_map(probability: Any, **info: Any) -> EdgeMap:
    values = np.asarray(probability, np.float32)
    rng = np.random.default_rng(0)
    return EdgeMap(values, rng.integers(0, 256, (*values.shape, 3), np.uint8), 0.5, info)


def voronoi(height: int, width: int, count: int, seed: int = 0) -> Ids:
    rng = np.random.default_rng(seed)
    y, x = np.indices((height, width))
    points = rng.uniform(0, 1, (count, 2)) * (height, width)
    return np.argmin([(y - b) ** 2 + (x - a) ** 2 for b, a in points], axis=0)


def walls(ids: Ids, strength: float = 1.0) -> Any:
    """Edges of that probability on the pixels whose right or lower neighbour has another id."""
    edges = np.zeros(ids.shape, np.float32)
    edges[:, :-1][ids[:, :-1] != ids[:, 1:]] = strength
    edges[:-1][ids[:-1] != ids[1:]] = strength
    return edges


def overlap(ids: Ids, labels: Any) -> list[float]:
    """Best IoU of each region of `ids` with a label."""
    best = []
    for number in np.unique(ids):
        own = ids == number
        label = np.bincount(labels[own]).argmax()
        best.append(np.count_nonzero(own & (labels == label)) / np.count_nonzero(own | (labels == label)))
    return best


def room(*, door: int = 0, wall: float = 1.0, doorstep: float = 0.0) -> Any:
    """40 × 60, a wall at column 30 with a door of so many pixels, an edge of probability `doorstep`."""
    edges = np.zeros((40, 60), np.float32)
    edges[:, 30] = wall
    edges[40 - door :, 30] = doorstep
    return edges


def test_regions_between_walls_are_the_instances() -> None:
    ids = voronoi(120, 160, 12)
    found = edge_map(walls(ids)).instances()
    assert found.labels.dtype == np.int32 and found.labels.shape == (120, 160) and len(found) == 12
    assert sorted(np.unique(found.labels)) == list(range(1, 13))
    assert min(overlap(ids, found.labels)) > 0.85
    # Boundary pixels went to one of their two sides: off the walls and beside them nothing is wrong.
    for number in range(12):
        inside = (ids == number) & (walls(ids) == 0)
        assert len(np.unique(found.labels[inside])) == 1


def test_largest_first_and_every_form_agrees() -> None:
    found = edge_map(walls(voronoi(90, 70, 9, seed=3))).instances()
    assert (np.diff(found.areas) <= 0).all() and found.areas.sum() == 90 * 70
    for number, (mask, rle, box) in enumerate(zip(found.masks, found.rle, found.boxes, strict=True), 1):
        assert (mask == (found.labels == number)).all()
        assert (decode_mask(rle, 90, 70) == mask).all()
        x, y, width, height = codec.toBbox(rle)
        assert box.tolist() == [x, y, x + width, y + height]
        assert mask.sum() == found.areas[number - 1]


def test_threshold_goes_from_fine_to_coarse() -> None:
    edges = np.zeros((40, 90), np.float32)
    edges[:, 30], edges[:, 60] = 0.3, 0.7
    map_ = edge_map(edges)
    assert [len(map_.instances(t)) for t in (0.2, 0.3, 0.35, 0.5, 0.69, 0.8, 1)] == [3, 3, 2, 2, 2, 1, 1]
    left = map_.instances(0.5).labels
    assert left[0, 0] == left[0, 45] != left[0, 75]


def test_the_engines_threshold_is_the_default() -> None:
    edges = EdgeMap(room(wall=0.6), np.zeros((40, 60, 3), np.uint8), threshold=0.7)
    assert len(edges.instances()) == 1 and len(edges.instances(0.6)) == 2
    assert edges.instances().info["threshold"] == 0.7


@pytest.mark.parametrize(
    ("door", "doorstep", "count"),
    [
        (0, 0.0, 2),
        (8, 0.1, 2),  # (32 · 1 + 8 · .1) / 40 = .82
        (30, 0.1, 1),  # (10 · 1 + 30 · .1) / 40 = .325
        (8, 0.0, 1),  # nothing at all in the door: one connected component
    ],
)
def test_a_border_with_a_weak_stretch_counts_by_its_mean(door: int, doorstep: float, count: int) -> None:
    assert len(edge_map(room(door=door, doorstep=doorstep)).instances(0.5)) == count


def test_an_open_line_separates_nothing() -> None:
    edges = np.zeros((60, 60), np.float32)
    edges[30, 10:40] = 1
    assert len(edge_map(edges).instances(0.9)) == 1


@settings(max_examples=25, deadline=None)
@given(arrays(np.float32, (24, 31), elements=st.floats(0, 1, width=32)), st.floats(0, 1), st.floats(0, 1))
def test_partitions_are_nested(probability: Any, a: float, b: float) -> None:
    map_ = edge_map(probability)
    fine, coarse = (map_.instances(t, min_area=0).labels for t in sorted((a, b)))
    pairs = np.unique(np.stack([fine.ravel(), coarse.ravel()]), axis=1)
    assert pairs.shape[1] == fine.max()
    heights = map_.hierarchy.heights
    assert (np.diff(heights) >= 0).all() and len(heights) == len(map_.hierarchy.areas) - 1


@settings(max_examples=25, deadline=None)
@given(arrays(np.float32, (23, 18), elements=st.floats(0, 1, width=32)), st.integers(0, 500))
def test_no_region_is_under_the_least_area(probability: Any, least: int) -> None:
    found = edge_map(probability).instances(0.3, min_area=least)
    assert found.areas.min() >= min(least, 23 * 18)
    assert ((found.scores >= 0) & (found.scores <= 1)).all()


def test_a_speck_joins_behind_its_weakest_border() -> None:
    edges = room(wall=1.0)
    edges[10:21, 10], edges[10:21, 20], edges[10, 10:21], edges[20, 10:21] = 0.8, 0.8, 0.8, 0.8
    assert len(edge_map(edges).instances(0.5)) == 3
    found = edge_map(edges).instances(0.5, min_area=200)
    assert len(found) == 2 and found.labels[15, 15] == found.labels[2, 2] != found.labels[2, 50]
    assert found.scores.tolist() == [1.0, 1.0]  # the speck's outline is not held against the room


def test_scores() -> None:
    edges = np.zeros((60, 90), np.float32)
    edges[:, 30], edges[:, 60] = 0.3, 0.7
    fine, coarse = edge_map(edges).instances(0.2), edge_map(edges).instances(0.5)
    by_place = {x: fine.scores[fine.labels[5, x] - 1] for x in (10, 45, 80)}
    assert by_place == pytest.approx({10: 0.3, 45: 0.5, 80: 0.7}, abs=0.01)
    # Outline .7, the removed border inside .3.
    assert coarse.scores[coarse.labels[5, 10] - 1] == pytest.approx(0.4, abs=0.01)
    assert edge_map(np.zeros((9, 9))).instances().scores.tolist() == [0]


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (50, 1), (2, 2), (63, 100)])
@pytest.mark.parametrize("value", [0.0, 0.6, 1.0])
def test_flat_maps_are_one_instance(shape: tuple[int, int], value: float) -> None:
    found = edge_map(np.full(shape, value)).instances()
    assert (found.labels == 1).all() and found.boxes.tolist() == [[0, 0, shape[1], shape[0]]]
    assert (decode_mask(found.rle[0], *shape)).all()


def test_large_pictures_are_read_at_working_size() -> None:
    ids = voronoi(1100, 1600, 8)
    found = edge_map(walls(ids)).instances()
    assert found.labels.shape == (1100, 1600) and len(found) == 8
    assert min(overlap(ids, found.labels)) > 0.97
    small = edge_map(walls(voronoi(200, 300, 5)), network_size=(75, 50)).hierarchy
    assert small.pieces.shape == (50, 75)


@pytest.mark.parametrize(("shape", "seen"), [((20, 4000), 512), ((60, 7000), 100), ((7000, 30), 512), ((512, 768), 16)])
def test_strips_and_small_networks(shape: tuple[int, int], seen: int) -> None:
    """Where a picture is few working pixels high, their side was guessed wrong, and labels had another size."""
    edges = np.zeros(shape, np.float32)
    middle = max(shape) // 2
    np.moveaxis(edges, int(np.argmax(shape)), 0)[middle : middle + max(shape) // seen] = 1
    map_ = EdgeMap(edges, np.zeros((*shape, 3), np.uint8), 0.5, {"network_size": (seen, seen)})
    found = map_.instances()
    assert found.labels.shape == shape and len(found) == 2
    assert np.abs(found.areas / edges.size - 0.5).max() < 0.1
    assert map_.refine(found.masks).shape == shape


def test_enlarged_borders_show_no_blocks() -> None:
    ids = (np.add.outer(np.arange(20), np.arange(20)) > 19).astype(np.int32)
    large = enlarge(ids, (80, 79), 4)
    assert large.shape == (80, 79)
    y, x = np.indices((80, 79)) + 0.5
    distance = (y + x - 82) / np.sqrt(2)  # the border runs through the corners of blocks
    assert (large[distance > 2] == 1).all() and (large[distance < -2] == 0).all()


def test_specks_have_polygons_and_runs_are_those_of_pycocotools() -> None:
    """The polygon of a pixel was a line, and the mask with the last pixel had a run more."""
    edges = np.ones((9, 9), np.float32)
    edges[4, 4] = edges[0, 0] = edges[8, 8] = 0
    for found in (edge_map(edges).instances(0, min_area=0), edge_map(edges[:1, :1]).instances()):
        assert found.rle == [encode_mask(mask) for mask in found.masks]
        assert all(len({tuple(point) for point in ring}) > 2 for rings in found.polygons for ring in rings)


def test_coco_is_read_by_pycocotools(tmp_path: Any) -> None:
    found = edge_map(
        walls(voronoi(50, 60, 5)), source="photos/a.jpg", engine="tiny", engine_sha256="0" * 64
    ).instances()
    data = found.to_coco(image_id=7, first_id=100)
    coco = COCO()
    coco.dataset = data
    coco.createIndex()
    assert coco.loadImgs(7)[0] == {"id": 7, "file_name": "a.jpg", "width": 60, "height": 50}
    for number, annotation in enumerate(coco.loadAnns(coco.getAnnIds(imgIds=7)), 1):
        assert annotation["id"] == 99 + number
        assert (coco.annToMask(annotation) == (found.labels == number)).all()
        assert annotation["area"] == found.areas[number - 1]
    assert data["info"]["engine"] == "tiny" and data["info"]["threshold"] == 0.5 and "version" in data["info"]


def test_polygons_and_labelme() -> None:
    found = edge_map(walls(voronoi(100, 120, 6, seed=1)), source="a.jpg").instances()
    for mask, rings in zip(found.masks, found.polygons, strict=True):
        drawn = decode_mask([ring.ravel().tolist() for ring in rings], 100, 120)
        assert np.count_nonzero(mask & drawn) > 0.96 * np.count_nonzero(mask | drawn)
    shapes = found.to_labelme()["shapes"]
    assert len(shapes) == 6 and {shape["shape_type"] for shape in shapes} == {"polygon"}
    points = np.concatenate([shape["points"] for shape in shapes])
    assert points.min() >= 0 and (points.max(axis=0) <= (120, 100)).all()


def test_a_hole_is_no_ring() -> None:
    edges = np.zeros((60, 60), np.float32)
    edges[20:41, 20], edges[20:41, 40], edges[20, 20:41], edges[40, 20:41] = 1, 1, 1, 1
    found = edge_map(edges).instances()
    assert len(found) == 2 and [len(rings) for rings in found.polygons] == [1, 1]
    assert decode_mask(found.rle[0], 60, 60)[30, 30] == 0


def test_pictures() -> None:
    found = edge_map(walls(voronoi(50, 60, 5))).instances()
    picture = np.asarray(found.plot())
    assert picture.shape == (50, 60, 3)
    white = np.zeros((50, 60, 3), np.uint8)
    colours = np.asarray(found.plot(white))
    inner = {tuple(c) for c in colours.reshape(-1, 3)} - {(255, 255, 255)}
    assert len(inner) == len(found)
    assert PIL.Image.open(io.BytesIO(found._repr_png_())).size == (60, 50)
    with pytest.raises(ArgumentError, match=r"The image is 3x2, the instances are 60x50"):
        found.plot(np.zeros((2, 3, 3), np.uint8))


def test_supervision() -> None:
    supervision = pytest.importorskip("supervision", reason="supervision is not in the dev extra")
    found = edge_map(walls(voronoi(50, 60, 5))).instances()
    detections = found.to_supervision()
    assert isinstance(detections, supervision.Detections) and len(detections) == 5
    assert detections.area.tolist() == found.areas.tolist()


def test_missing_packages_name_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    found = edge_map(room()).instances()
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(MissingExtraError, match="pip install supervision"):
        found.to_supervision()
    for name in [name for name in sys.modules if name.startswith("trace_sdk.instances.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "scipy.ndimage", None)
    with pytest.raises(MissingExtraError, match=r'pip install "trace-sdk\[instances\]"'):
        edge_map(room()).instances()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": 1.5}, "threshold=1.5 must be in"),
        ({"threshold": float("nan")}, "threshold=nan must be in"),
        ({"min_area": -1}, "min_area=-1 must be a whole number"),
        ({"min_area": 2.5}, "min_area=2.5 must be a whole number"),
        ({"min_area": True}, "min_area=True must be a whole number"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        edge_map(room()).instances(**arguments)
