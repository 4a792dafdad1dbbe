from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from numpy.typing import NDArray

from trace_sdk import EdgeDetector, EdgeMap
from trace_sdk.errors import ArgumentError, OutputError
from trace_sdk.thinning import _blur

Float = NDArray[np.float32]


def edge_map(probability: NDArray[np.floating]) -> EdgeMap:
    values = probability.astype(np.float32)
    return EdgeMap(values, np.full((*values.shape, 3), 100, np.uint8), 0.5, {"engine": "tiny"})


def ridge(degrees: float, sigma: float = 1.5, shift: float = 0.0, size: int = 81) -> Float:
    y, x = np.mgrid[:size, :size] - size // 2
    across = x * np.sin(np.deg2rad(degrees)) - y * np.cos(np.deg2rad(degrees)) + shift
    values: Float = np.exp(-(across**2) / (2 * sigma**2)).astype(np.float32)
    return values


def polyline(*points: tuple[int, int], size: int = 50, sigma: float = 1.2) -> Float:
    y, x = np.mgrid[:size, :size]
    pixels = np.stack([y, x], -1).astype(float)
    distance = np.full((size, size), np.inf)
    for start, end in zip(np.array(points[:-1]), np.array(points[1:]), strict=True):
        along = np.clip((pixels - start) @ (end - start) / ((end - start) @ (end - start)), 0, 1)
        distance = np.minimum(distance, np.linalg.norm(pixels - (start + along[..., None] * (end - start)), axis=-1))
    return np.exp(-(distance**2) / (2 * sigma**2)).astype(np.float32)


@pytest.mark.parametrize("sigma", [0.8, 1.5, 3.0])
@pytest.mark.parametrize("degrees", range(0, 180, 15))
def test_a_straight_ridge_thins_to_one_pixel(degrees: int, sigma: float) -> None:
    kept = edge_map(ridge(degrees, sigma, shift=0.2)).thin()[8:-8, 8:-8] > 0.3
    flat = abs(np.cos(np.deg2rad(degrees))) >= abs(np.sin(np.deg2rad(degrees))) - 1e-9
    lines = kept if flat else kept.T
    assert set(lines.sum(axis=0)) == {1}
    assert np.abs(np.diff(lines.argmax(axis=0))).max() <= 1


@pytest.mark.parametrize("width", range(1, 10))
def test_a_plateau_thins_to_its_middle(width: int) -> None:
    probability = np.zeros((40, 40))
    probability[12 : 12 + width] = 1
    rows = [np.flatnonzero(column) for column in edge_map(probability).thin().T]
    assert all(len(row) == 1 and abs(row[0] - (12 + (width - 1) / 2)) <= 0.5 for row in rows)


def test_corners_stay_connected() -> None:
    from scipy.ndimage import label

    for points in [((10, 10), (10, 40), (40, 40)), ((40, 5), (10, 25), (40, 45))]:
        thin = edge_map(polyline(*points)).thin()
        assert label(thin > 0.5, np.ones((3, 3)))[1] == 1


def test_thin_keeps_values_and_says_nothing_where_there_is_nothing() -> None:
    probability = np.random.default_rng(0).random((33, 47)).astype(np.float32)
    thin = edge_map(probability).thin()
    assert thin.dtype == np.float32 and thin.shape == (33, 47)
    assert np.all((thin == 0) | (thin == probability))
    for value in (0.0, 0.5, 1.0):
        assert not edge_map(np.full((20, 30), value)).thin().any()


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (2, 2), (3, 5)])
def test_thin_takes_any_shape(shape: tuple[int, int]) -> None:
    assert edge_map(np.random.default_rng(0).random(shape)).thin().shape == shape


def test_an_enlarged_map_thins_to_one_line() -> None:
    small = PIL.Image.fromarray(ridge(30, 1.0, size=64))
    large = np.clip(np.asarray(small.resize((512, 512), PIL.Image.Resampling.BILINEAR)), 0, 1)
    edges = EdgeMap(large, np.zeros((512, 512, 3), np.uint8), 0.5, {"network_size": (64, 64)})
    per_column = (edges.thin() > 0.3)[:, 64:-64].sum(axis=0)
    assert np.mean(per_column == 1) > 0.98


@pytest.mark.parametrize("sigma", [2.5, 3.9, 11.7, 40.0])
def test_a_wide_blur_is_a_gaussian_and_leaves_what_is_flat(sigma: float) -> None:
    """It took 14 s for a photo of 12 megapixels, by convolution."""
    from scipy.ndimage import gaussian_filter

    values = np.random.default_rng(0).random((150, 90)).astype(np.float32)
    values[40:60] = 1
    assert np.abs(_blur(values, sigma) - gaussian_filter(values, sigma, mode="nearest", truncate=5)).max() < 0.02
    flat = np.full((70, 50), np.float32(0.3))
    assert (_blur(flat, sigma) == _blur(flat, sigma)[0, 0]).all()


def test_an_enlarged_flat_map_has_no_ridge() -> None:
    for value in (0.3, 1.0):
        flat = np.full((120, 90), np.float32(value))
        assert not EdgeMap(flat, np.zeros((120, 90, 3), np.uint8), info={"network_size": (9, 12)}).thin().any()


def test_maps_of_others_are_checked_and_left_alone() -> None:
    """A float64 map made `instances` run for ever, and the caller's array read-only."""
    values, rgb = np.random.default_rng(0).random((40, 60)), np.zeros((40, 60, 3), np.uint8)
    edges = EdgeMap(values, rgb)
    assert edges.probability.dtype == np.float32 and len(edges.instances())
    own = values.astype(np.float32)
    EdgeMap(own, rgb)
    own[0, 0] = rgb[0, 0, 0] = 1
    nan = np.where(values > 0.9, np.nan, values)
    for wrong in (values * 255, (values * 255).astype(np.uint8), values[None], nan, values[:0], -values):
        with pytest.raises(ArgumentError, match=r"expected float \[H, W\] with values in \[0, 1\]"):
            EdgeMap(wrong, rgb)
    for picture in (rgb[:-1], rgb[..., 0], rgb.astype(np.float32)):
        with pytest.raises(ArgumentError, match=r"expected uint8 \[40, 60, 3\]"):
            EdgeMap(values, picture)


def test_binary() -> None:
    edges = edge_map(np.array([[0.2, 0.5, 0.8]]))
    assert edges.binary().tolist() == [[False, True, True]]
    assert edges.binary(0.8).tolist() == [[False, False, True]]
    assert edges.binary(0).all() and edges.binary(0).dtype == np.bool_
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(ArgumentError, match=r"must be in \[0, 1\]"):
            edges.binary(wrong)


def test_overlay_draws_the_ridges() -> None:
    probability = np.zeros((9, 20))
    probability[:, 3:6] = [0.4, 0.9, 0.4]  # an edge whose ridge is column 4
    probability[:, 14] = 0.2  # below half the threshold
    edges = edge_map(probability)
    drawn = np.asarray(edges.overlay())
    assert (drawn[:, 4] == [255, 32, 96]).all()
    untouched = np.delete(drawn, 4, axis=1)
    assert (untouched == 100).all()
    other = np.asarray(edges.overlay(np.zeros((9, 20, 3), np.uint8)))
    assert other[0, 0].tolist() == [0, 0, 0]
    with pytest.raises(ArgumentError, match="2x2, the edges are 20x9"):
        edges.overlay(np.zeros((2, 2), np.uint8))


def test_overlay_of_a_large_picture_has_a_wider_pen() -> None:
    probability = np.zeros((30, 1600))
    probability[:, 700:703] = [0.5, 0.9, 0.5]
    drawn = np.asarray(edge_map(probability).overlay())
    assert (drawn[15, :, 0] == 255).sum() == 5


@pytest.mark.parametrize(
    ("name", "bits", "tolerance"),
    [("a.png", 8, 0.5 / 255), ("a.PNG", 16, 0.5 / 65535), ("a.npy", 8, 0), ("a.tif", 8, 0), ("a.tiff", 8, 0)],
)
def test_saved_values_come_back(tmp_path: Path, name: str, bits: int, tolerance: float) -> None:
    edges = edge_map(np.random.default_rng(1).random((13, 17)))
    path = edges.save(tmp_path / "new" / name, bits=bits)
    assert path == tmp_path / "new" / name
    values = np.load(path) if path.suffix == ".npy" else np.asarray(PIL.Image.open(path))
    scale = {np.dtype(np.uint8): 255, np.dtype(np.uint16): 65535}.get(values.dtype, 1)
    np.testing.assert_allclose(values / scale, edges.probability, atol=tolerance + 1e-7)


def test_provenance_is_in_png_and_tiff(tiny_engine: Path, tmp_path: Path) -> None:
    edges = EdgeDetector(tiny_engine).run(np.zeros((30, 40), np.uint8))
    png = json.loads(PIL.Image.open(edges.save(tmp_path / "a.png")).info["trace_sdk"])
    tif = json.loads(PIL.Image.open(edges.save(tmp_path / "a.tif")).getexif()[270])
    assert png == tif
    assert png["engine"] == "tiny" and len(png["engine_sha256"]) == 64
    assert png["input_size"] == [40, 30] and png["network_size"] == [128, 96]


def test_json_has_the_instances(tmp_path: Path) -> None:
    probability = np.zeros((20, 40), np.float32)
    probability[:, 20] = 0.9
    edges = edge_map(probability)
    saved = json.loads(edges.save(tmp_path / "new" / "a.json").read_text())
    assert saved == edges.instances().to_coco() and len(saved["annotations"]) == 2
    with pytest.raises(ArgumentError, match="bits=16"):
        edges.save(tmp_path / "a.json", bits=16)


def test_wrong_outputs_are_refused(tmp_path: Path) -> None:
    edges = edge_map(np.zeros((3, 3)))
    for name in ("a.jpg", "a", "a.onnx"):
        with pytest.raises(OutputError, match=r"\.png, \.npy, \.tif"):
            edges.save(tmp_path / name)
    for name, bits in (("a.npy", 16), ("a.png", 12)):
        with pytest.raises(ArgumentError, match=f"bits={bits}"):
            edges.save(tmp_path / name, bits=bits)
    assert not list(tmp_path.iterdir())


def test_it_is_an_array_and_a_picture() -> None:
    edges = edge_map(np.eye(3))
    assert np.asarray(edges).dtype == np.float32 and np.asarray(edges, np.float64).dtype == np.float64
    assert np.array(edges).flags.writeable and not edges.probability.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        edges.probability[0, 0] = 1
    assert edges._repr_png_().startswith(b"\x89PNG")
    assert repr(edges) == "EdgeMap(3x3, engine='tiny', threshold=0.5)"
