"""The teacher end to end on a tiny real backbone: determinism, trajectories, label folders, resume."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from trace_sdk.backbones.pixel import PixelBackbone
from trace_sdk.errors import ArgumentError, DatasetError
from trace_sdk.kernels import abdiv
from trace_sdk.student.model import Student
from trace_sdk.teacher.emergence import TRAJECTORIES
from trace_sdk.teacher.labels import load_label
from trace_sdk.teacher.plot import attention_pca, colour_labels, plot
from trace_sdk.teacher.teacher import Teacher, TeacherSettings

SMALL = TeacherSettings(size=96, stride=250, window=(0.2, 0.8))


@pytest.fixture
def photo(photos: Path) -> np.ndarray:
    return np.asarray(Image.open(photos / "a.png").convert("RGB"))


def test_annotation_has_a_curve_a_timestep_and_labels(tiny_backbone: PixelBackbone, photo: np.ndarray) -> None:
    annotation = Teacher(tiny_backbone, SMALL).annotate(photo)
    assert annotation.abdiv.shape == annotation.labels.shape == (10, 12)  # 96×120 at 96 px: 77×96 → 80×96
    assert annotation.emergence is not None
    assert annotation.emergence.timesteps == (0.25, 0.5, 0.75)
    assert annotation.timesteps == (annotation.emergence.t_star,)
    assert min(annotation.emergence.kl) >= 0
    assert set(np.unique(annotation.labels)) <= {-1, 0, 1} and (annotation.labels == 1).any()


def test_same_seed_same_answer_other_seed_another(tiny_backbone: PixelBackbone, photo: np.ndarray) -> None:
    first, again = (Teacher(tiny_backbone, SMALL).annotate(photo) for _ in range(2))
    np.testing.assert_array_equal(first.abdiv, again.abdiv)
    other = Teacher(tiny_backbone, TeacherSettings(size=96, stride=250, window=(0.2, 0.8), seed=1)).annotate(photo)
    assert not np.array_equal(first.abdiv, other.abdiv)


def test_emergence_matches_an_independent_walk(tiny_backbone: PixelBackbone, photo: np.ndarray) -> None:
    """The KL curve recomputed in float64 from plain per-head maps."""
    teacher = Teacher(tiny_backbone, SMALL)
    images = teacher.prepare(photo)
    noise = teacher.noise_like(images)
    maps = []
    for t in (0.0, 0.25, 0.5, 0.75):
        seen = []
        with torch.inference_mode():
            tiny_backbone((1 - t) * images + t * noise, t, seen.append)
        blocks = [torch.softmax(a.query.double() @ a.key.double().mT * a.scale, -1).mean(1)[0] for a in seen]
        maps.append(torch.stack(blocks).mean(0).numpy())
    expected = [np.mean((p * np.log(p / q)).sum(-1)) for p, q in itertools.pairwise(maps)]
    np.testing.assert_allclose(teacher.annotate(photo).emergence.kl, expected, rtol=1e-3)


def test_a_sample_of_rows_finds_the_same_timestep(tiny_backbone: PixelBackbone, photo: np.ndarray) -> None:
    """Half of the rows move the curve by a few per cent; as many rows as there are tokens change nothing."""
    every, half, all_rows = (
        Teacher(tiny_backbone, dataclasses.replace(SMALL, iep_rows=rows)).annotate(photo) for rows in (None, 60, 120)
    )
    np.testing.assert_allclose(half.emergence.kl, every.emergence.kl, rtol=0.1)
    assert half.emergence.kl != every.emergence.kl and half.timesteps == every.timesteps
    np.testing.assert_array_equal(half.abdiv, every.abdiv)  # the map at t* is read whole
    assert all_rows.emergence == every.emergence
    with pytest.raises(ArgumentError, match="iep_rows must be at least 1"):
        Teacher(tiny_backbone, dataclasses.replace(SMALL, iep_rows=0))


def test_per_head_form_resembles_the_averaged_one(tiny_backbone: PixelBackbone, photo: np.ndarray) -> None:
    fixed = {"size": 96, "timesteps": (0.25,)}
    averaged = Teacher(tiny_backbone, TeacherSettings(**fixed)).annotate(photo).abdiv
    per_head = Teacher(tiny_backbone, TeacherSettings(**fixed, form="per-head")).annotate(photo).abdiv
    assert (per_head >= averaged - 1e-5).all()
    assert np.corrcoef(averaged.ravel(), per_head.ravel())[0, 1] > 0.6


def test_log_per_head_form_is_the_students_features_averaged(tiny_backbone: PixelBackbone, photo: np.ndarray) -> None:
    teacher = Teacher(tiny_backbone, TeacherSettings(size=96, timesteps=(0.0,), form="log-per-head"))
    with torch.inference_mode():
        features = torch.cat(Student(tiny_backbone).eval().features(teacher.prepare(photo))[0], 1)
    np.testing.assert_allclose(teacher.annotate(photo).abdiv, features[0].mean(0), rtol=1e-4)


@pytest.mark.parametrize("form", ["mean", "log-per-head"])
def test_bf16_is_close_to_fp32(tiny_backbone: PixelBackbone, photo: np.ndarray, form: str) -> None:
    exact, fast = (
        Teacher(tiny_backbone, TeacherSettings(size=96, timesteps=(0.2,), form=form, precision=p)).annotate(photo).abdiv
        for p in ("fp32", "bf16")
    )
    assert np.corrcoef(exact.ravel(), fast.ravel())[0, 1] > 0.99
    assert not np.array_equal(exact, fast)


@pytest.mark.parametrize("form", ["mean", "log-per-head"])
def test_blocks_pick_what_is_averaged(tiny_backbone: PixelBackbone, photo: np.ndarray, form: str) -> None:
    fixed = {"size": 96, "timesteps": (0.2,), "form": form}
    first, second, both = (
        Teacher(tiny_backbone, TeacherSettings(**fixed, blocks=blocks)).annotate(photo).abdiv
        for blocks in ((0,), (1,), None)
    )
    assert not np.allclose(first, second)
    if form == "log-per-head":  # the maps are averaged; in the mean form the attention is
        np.testing.assert_allclose((first + second) / 2, both, rtol=1e-4)


def test_several_timesteps_are_averaged_after_scaling(tiny_backbone: PixelBackbone, photo: np.ndarray) -> None:
    one, two = (
        Teacher(tiny_backbone, TeacherSettings(size=96, timesteps=(t,))).annotate(photo).abdiv for t in (0.2, 0.6)
    )
    both = Teacher(tiny_backbone, TeacherSettings(size=96, timesteps=(0.2, 0.6))).annotate(photo)
    np.testing.assert_allclose(both.abdiv, (one / one.mean() + two / two.mean()) / 2, rtol=1e-4)
    assert both.emergence is None


def test_mirror_averages_with_the_mirrored_photo(tiny_backbone: PixelBackbone, photo: np.ndarray) -> None:
    settings = TeacherSettings(size=96, timesteps=(0.0,), mirror=True)  # t = 0: no noise to tell the two apart
    left = Teacher(tiny_backbone, settings).annotate(photo).abdiv
    right = Teacher(tiny_backbone, settings).annotate(np.ascontiguousarray(photo[:, ::-1])).abdiv
    np.testing.assert_allclose(left, right[:, ::-1], rtol=1e-3, atol=1e-5)


def test_windows_are_read_alone_and_joined(tiny_backbone: PixelBackbone, photo: np.ndarray) -> None:
    """A photo of one window is read as it is; of more, each inner part is what its own window says."""
    fixed = {"size": 96, "timesteps": (0.0,), "form": "log-per-head"}  # 80×96 px
    whole = Teacher(tiny_backbone, TeacherSettings(**fixed))
    one = Teacher(tiny_backbone, TeacherSettings(**fixed, tile=96)).annotate(photo).abdiv
    np.testing.assert_allclose(one, whole.annotate(photo).abdiv, rtol=1e-6)
    joined = Teacher(tiny_backbone, TeacherSettings(**fixed, tile=64)).annotate(photo).abdiv  # windows at 0 and 16, 32
    images = whole.prepare(photo)
    corner = images[..., :64, :64]
    alone = whole.divergence(corner, torch.zeros_like(corner), (0.0,))
    assert joined.shape == (10, 12)
    np.testing.assert_allclose(joined[:2, :4], alone[:2, :4], rtol=1e-5)  # tokens of no other window
    assert not np.allclose(joined, one)


@pytest.mark.parametrize("form", ["mean", "log-per-head"])
def test_emergence_in_windows_is_the_mean_of_their_curves(
    tiny_backbone: PixelBackbone, photo: np.ndarray, form: str
) -> None:
    settings = {"size": 128, "stride": 250, "window": (0.2, 0.8), "form": form}
    wide = np.concatenate([photo, photo], axis=1)[: photo.shape[0] // 2 + 4]
    teacher = Teacher(tiny_backbone, TeacherSettings(**settings, tile=64))
    images = teacher.prepare(wide)
    noise = teacher.noise_like(images)
    assert images.shape == (1, 3, 64, 128)
    with torch.inference_mode():
        joined = teacher.emergence(images, noise).kl
        parts = [teacher.emergence(images[..., x : x + 64], noise[..., x : x + 64]).kl for x in (0, 32, 64)]
    np.testing.assert_allclose(joined, np.mean(parts, axis=0), rtol=1e-4)


def test_inversion_starts_at_the_image_and_follows_the_flow(tiny_backbone: PixelBackbone) -> None:
    images, noise = torch.rand(2, 1, 3, 64, 64).unbind(0)
    with torch.inference_mode():
        noised = dict(TRAJECTORIES["noising"](tiny_backbone, images, (0.0, 0.1, 0.3), noise))
        inverted = dict(TRAJECTORIES["inversion"](tiny_backbone, images, (0.0, 0.1, 0.3), noise))
        assert torch.equal(inverted[0.0], images) and torch.equal(noised[0.0], images)
        x, t = tiny_backbone.noising.add_noise(images, noise, 0.025), 0.025
        for _ in range(3):
            x = x + 0.025 * (x - tiny_backbone(x, t)) / t
            t += 0.025
    torch.testing.assert_close(inverted[0.1], x, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(inverted[0.3], noised[0.3])


@pytest.mark.parametrize(
    ("setting", "fragment"),
    [
        ({"size": 32}, "size must be at least 64"),
        ({"tile": 100}, "tile must be a multiple of 8"),
        ({"tile": 56}, "tile must be a multiple of 8"),
        ({"timesteps": (1.2,)}, r"\[0, 1\)"),
        ({"timesteps": ()}, r"\[0, 1\)"),
        ({"window": (0.6, 0.1)}, "Give the lowest t first"),
        ({"window": (0.12, 0.18)}, r"from 0\.1 to 0\.9 lies in the search window"),
        ({"stride": 0}, "stride must be from 1 to 999"),
        ({"trajectory": "sideways"}, "trajectory must be one of"),
        ({"form": "median"}, "form must be one of"),
        ({"blocks": ()}, "at least one block"),
        ({"blocks": (0, 0)}, "each once"),
        ({"blocks": (0, 2)}, r"0 … 1"),
        ({"seed": 2**64}, "seed must be a number of 64 bits"),
        ({"blocks": (-1,)}, r"0 … 1"),
        ({"precision": "fp8"}, "precision must be"),
        ({"neighbourhood": 6}, "neighbourhood must be"),
        ({"neighbourhood": 8, "form": "per-head"}, "neighbourhood must be"),
    ],
)
def test_settings_out_of_range(tiny_backbone: PixelBackbone, setting: dict, fragment: str) -> None:
    with pytest.raises(ArgumentError, match=fragment):
        Teacher(tiny_backbone, TeacherSettings(**setting))


@pytest.mark.parametrize(
    ("dtype", "shape"), [(np.uint8, (8, 8)), (np.uint8, (8, 8, 4)), (np.float32, (8, 8, 3)), (np.uint8, (0, 8, 3))]
)
def test_an_array_that_is_no_rgb_photo(tiny_backbone: PixelBackbone, dtype: type, shape: tuple[int, ...]) -> None:
    with pytest.raises(ArgumentError, match=r"takes uint8 \[H, W, 3\], RGB; got .*read_image"):
        Teacher(tiny_backbone, SMALL).annotate(np.zeros(shape, dtype))


def test_a_batch_of_two_shapes_or_none(tiny_backbone: PixelBackbone, photo: np.ndarray) -> None:
    teacher = Teacher(tiny_backbone, SMALL)
    for images in ([teacher.prepare(photo), teacher.prepare(photo.swapaxes(0, 1))], []):
        with pytest.raises(ArgumentError, match="images of one shape, got"):
            teacher.annotate_batch(images)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"not a label"])
def test_damaged_label_files(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "a.npz"
    file.write_bytes(content)
    with pytest.raises(DatasetError, match=r"a\.npz"):
        load_label(file)


def test_plot_draws_a_picture(tiny_backbone: PixelBackbone, photo: np.ndarray, tmp_path: Path) -> None:
    teacher = Teacher(tiny_backbone, SMALL)
    before = torch.get_rng_state()
    plot(teacher, photo, teacher.annotate(photo), tmp_path / "look.png")
    assert torch.equal(torch.get_rng_state(), before), "a caller's random numbers go on as they would"
    picture = np.asarray(Image.open(tmp_path / "look.png").convert("RGB"))
    assert picture.shape[1] > 800 and picture.std() > 20


def test_plot_of_windows_holds_no_larger_map_than_a_window(
    tiny_backbone: PixelBackbone, photo: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It held attention among all tokens of the enlarged photo: gigabytes at the sizes that windows are for."""
    grids = []

    def seen(log_map: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        grids.append(grid)
        return abdiv(log_map, grid)

    monkeypatch.setattr("trace_sdk.teacher.plot.abdiv", seen)
    teacher = Teacher(tiny_backbone, dataclasses.replace(SMALL, size=192, tile=96))
    plot(teacher, photo, teacher.annotate(photo), tmp_path / "look.png")
    assert set(map(max, grids)) == {96 // 8}


def test_label_colours_and_pca_ranges() -> None:
    colours = colour_labels(np.array([[1, 0, -1]], np.int8))
    assert len({tuple(c) for c in colours[0]}) == 3
    pca = attention_pca(torch.randn(48, 48).log_softmax(-1), (6, 8))
    assert pca.shape == (6, 8, 3) and pca.min() >= 0 and pca.max() <= 1
