"""What every family must do, on a tiny model of each that was saved and opened as a user's would be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from trace_sdk.backbones.registry import families, open_backbone
from trace_sdk.backbones.tap import SelfAttention, attention_map
from trace_sdk.errors import ArgumentError
from trace_sdk.teacher.boundary import MeanBoundary
from trace_sdk.teacher.teacher import Teacher, TeacherSettings

HEIGHT, WIDTH = 96, 128


@pytest.fixture(scope="session")
def images() -> Tensor:
    return torch.rand(2, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1)) * 2 - 1


@torch.inference_mode()
def attend(backbone: Any, x_t: Tensor, t: float | Tensor) -> list[SelfAttention]:
    seen: list[SelfAttention] = []
    backbone(x_t, t, seen.append)
    return seen


def test_every_family_has_a_tiny_model(tiny_names: list[str]) -> None:
    """A new file in families/ must come with an entry in conftest.TINY."""
    assert {name.partition(" ")[0] for name in tiny_names} == set(families())


def test_family_is_chosen_from_the_folder(model: Any) -> None:
    assert model.backbone.family == model.name.partition(" ")[0]


def test_number_grids_and_heads_of_the_blocks(model: Any, images: Tensor) -> None:
    seen = attend(model.backbone, model.backbone.encode(images), 0.3)
    assert [attention.block for attention in seen] == list(range(model.backbone.self_attention_blocks))
    assert [attention.grid for attention in seen] == model.tiny.grids
    assert max(model.tiny.grids) == model.backbone.token_grid((HEIGHT, WIDTH))
    assert sum(attention.query.shape[1] for attention in seen) == model.backbone.total_heads == model.tiny.heads


def test_rows_are_over_the_image_alone_and_sum_to_one(model: Any, images: Tensor) -> None:
    for attention in attend(model.backbone, model.backbone.encode(images), 0.3):
        tokens = attention.grid[0] * attention.grid[1]
        assert attention.query.shape[-2] == attention.key.shape[-2] == tokens
        rows = attention_map(attention.query, attention.key, attention.scale)
        torch.testing.assert_close(rows.sum(-1), torch.ones(rows.shape[:-1]))
        assert rows.std() > 1e-4  # an attention of equal weights would show nothing


def test_answer_is_bit_identical_with_and_without_the_tap(model: Any, images: Tensor) -> None:
    x_t = model.backbone.encode(images)
    with torch.inference_mode():
        plain = model.backbone(x_t, 0.3)
        assert torch.equal(plain, model.backbone(x_t, 0.3, lambda attention: None))
    assert plain.shape == x_t.shape and plain.isfinite().all() and plain.std() > 0


def test_noising_starts_at_the_latent_itself_and_ends_in_noise(model: Any, images: Tensor) -> None:
    clean = model.backbone.encode(images)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(2))
    noising = model.backbone.noising
    assert torch.equal(noising.add_noise(clean, noise, 0.0), clean)
    assert torch.equal(noising.add_noise(clean, noise, torch.zeros(2)), clean)
    late = noising.add_noise(clean, noise, 1.0)
    assert torch.nn.functional.cosine_similarity(late.flatten(), noise.flatten(), 0) > 0.95


def test_the_answer_splits_x_t_into_image_and_noise(model: Any, images: Tensor) -> None:
    """(X̂_0, ε̂) of any answer noise to X_t again."""
    clean = model.backbone.encode(images)
    for t in (0.2, torch.tensor([0.4, 0.7])):
        x_t = model.backbone.noising.add_noise(clean, torch.ones_like(clean), t)
        prediction = torch.randn_like(clean)
        again = model.backbone.noising.add_noise(*model.backbone.noising.split(x_t, prediction, t), t)
        torch.testing.assert_close(again, x_t, atol=1e-4, rtol=1e-4)


def test_encoding_is_what_the_vae_says_and_deterministic(model: Any, images: Tensor) -> None:
    backbone = model.backbone
    with torch.inference_mode():
        clean = backbone.encode(images)
    cells = (HEIGHT // backbone.latent_side, WIDTH // backbone.latent_side)
    assert clean.shape[-2:] == cells and clean.dtype == torch.float32
    assert torch.equal(clean, backbone.encode(images))


def most_changed_token(backbone: Any, images: Tensor, changed: Tensor) -> tuple[int, int]:
    """The token of the first finest block whose query a change of the image moves most."""
    grid = backbone.token_grid(images.shape[-2:])
    with torch.inference_mode():
        before, after = (
            next(a for a in attend(backbone, backbone.encode(x), 0.0) if a.grid == grid) for x in (images, changed)
        )
    moved = (after.query - before.query).norm(dim=-1).sum(1)[0]
    return divmod(int(moved.argmax()), grid[1])


def test_tokens_lie_over_the_image_shifted_and_mirrored(model: Any) -> None:
    """A spot in the image moves the token over it; shifted or mirrored with the image, another one."""
    side = model.backbone.token_side
    rows, columns = HEIGHT // side, WIDTH // side
    generator = torch.Generator().manual_seed(3)
    image = torch.rand(1, 3, HEIGHT, WIDTH, generator=generator) / 4
    patch = torch.rand(side, side, generator=generator) * 2 - 1
    reach = max(1, 8 // side)  # in tokens: the VAE and the convolutions before the first attention see 8 px around
    for row, column in ((rows // 3, columns // 4), (rows // 3 + 3, columns // 4 + 5)):
        spot = image.clone()
        spot[..., row * side : (row + 1) * side, column * side : (column + 1) * side] = patch
        found = most_changed_token(model.backbone, image, spot)
        mirrored = most_changed_token(model.backbone, image.flip(-1), spot.flip(-1))
        assert max(abs(found[0] - row), abs(found[1] - column)) <= reach, (found, row, column)
        assert max(abs(mirrored[0] - row), abs(mirrored[1] - (columns - 1 - column))) <= reach, (mirrored, row, column)


def test_batch_equals_single(model: Any, images: Tensor) -> None:
    times = torch.tensor([0.1, 0.6])
    with torch.inference_mode():
        clean = model.backbone.encode(images)
        together = model.backbone(clean, times)
        alone = torch.cat([model.backbone(clean[i : i + 1], float(times[i])) for i in range(2)])
        torch.testing.assert_close(clean, torch.cat([model.backbone.encode(images[i : i + 1]) for i in range(2)]))
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


def test_sizes_off_the_grid_are_refused(model: Any) -> None:
    step, least = model.backbone.multiple_of, model.backbone.min_size
    for size in ((least, least + step // 2), (least - step, least)):
        with pytest.raises(ArgumentError, match=f"multiples of {step} from {least}"):
            model.backbone.encode(torch.zeros(1, 3, *size))
    if model.backbone.most_tokens:
        with pytest.raises(ArgumentError, match="learnt positions up to"):
            most = model.backbone.most_tokens * model.backbone.token_side
            model.backbone(model.backbone.encode(torch.zeros(1, 3, least, most + 8 * step)), 0.3)
        with pytest.raises(ArgumentError, match="learnt positions up to"):
            Teacher(model.backbone, TeacherSettings(size=most + 8 * step))
        # Windows of it were refused, too, with the advice to read it in windows.
        tiled = Teacher(model.backbone, TeacherSettings(size=most + 8 * step, tile=most, timesteps=(0.3,)))
        wide = np.random.default_rng(0).integers(0, 255, (least // 2, (most + 8 * step) // 2, 3), np.uint8)
        assert tiled.annotate(wide).abdiv.shape[1] == (most + 8 * step) // model.backbone.token_side


def test_kept_queries_and_a_running_map_give_the_same_abdiv(open_tiny: Any, images: Tensor) -> None:
    """Blocks on several grids once were kept in part and averaged in part, and then neither was whole."""
    backbone = open_tiny("sd").backbone
    seen = attend(backbone, backbone.encode(images), 0.3)
    answers = []
    for keeps in (True, False, None):
        boundary = MeanBoundary((24, 32), range(len(seen)), 4)
        boundary._keeps = keeps
        for attention in seen:
            boundary.add(attention)
        answers.append(boundary.abdiv())
    for answer in answers[1:]:
        torch.testing.assert_close(answer, answers[0], rtol=2e-3, atol=1e-5)


@pytest.fixture(scope="session")
def photo() -> Any:
    photo = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    photo[20:50, 30:60] //= 4
    return photo


def test_the_teacher_labels_with_it_the_same_each_time(model: Any, photo: Any) -> None:
    settings = TeacherSettings(size=64, stride=300, window=(0.2, 0.7), iep_rows=16)
    first, again = (Teacher(model.backbone, settings).annotate(photo) for _ in range(2))
    np.testing.assert_array_equal(first.abdiv, again.abdiv)
    assert first.emergence == again.emergence and min(first.emergence.kl) > 0
    assert first.abdiv.shape == first.labels.shape and (first.labels == 1).any()
    fixed = {"size": 64, "timesteps": (0.5,)}
    seeds = [Teacher(model.backbone, TeacherSettings(**fixed, seed=seed)).annotate(photo).abdiv for seed in (0, 1)]
    assert not np.array_equal(*seeds)


@pytest.mark.parametrize("form", ["per-head", "log-per-head"])
def test_heads_own_divergences_over_all_grids(model: Any, images: Tensor, form: str) -> None:
    """They ended in an error of torch's for every UNet, whose blocks lie on several grids."""
    teacher = Teacher(model.backbone, TeacherSettings(size=128, timesteps=(0.3,), form=form))
    [found] = teacher.annotate_batch([images[:1]])
    with torch.inference_mode():
        clean = model.backbone.encode(images[:1])
        [(_, x_t)] = teacher.trajectory(clean, teacher.noise_like(clean), (0.3,))
        seen = attend(model.backbone, x_t, 0.3)
    expected = []
    for attention in seen:
        scores = attention.query.double()[0] @ attention.key.double()[0].mT * attention.scale
        rows = scores.log_softmax(-1).unflatten(1, attention.grid)
        padded = torch.cat([rows[:, :1], rows, rows[:, -1:]], 1)
        padded = torch.cat([padded[:, :, :1], padded, padded[:, :, -1:]], 2)
        maps = []
        for p, q in ((padded[:, 2:, 1:-1], padded[:, :-2, 1:-1]), (padded[:, 1:-1, 2:], padded[:, 1:-1, :-2])):
            ahead, behind = ((a.exp() * (a - b)).sum(-1) for a, b in ((p, q), (q, p)))
            maps.append((ahead + behind).log1p() / 2 if form == "log-per-head" else ahead)
        divergence = sum(maps).mean(0)
        grown = torch.nn.functional.interpolate(divergence[None, None], found.abdiv.shape, mode="bilinear")
        expected.append(grown[0, 0])
    np.testing.assert_allclose(found.abdiv, torch.stack(expected).mean(0).numpy(), rtol=2e-3, atol=1e-4)


def test_inversion_keeps_the_image_and_goes_its_own_way(model: Any, photo: Any) -> None:
    """From X_0, without a random number unless the network answers X_0; other than noising with a random ε."""
    teacher = Teacher(model.backbone, TeacherSettings(size=64, trajectory="inversion"))
    with torch.inference_mode():
        clean = model.backbone.encode(teacher.prepare(photo))
        one, two = (teacher.trajectory(clean, torch.full_like(clean, x), (0.0, 0.05)) for x in (0.0, 1.0))
    assert torch.equal(one[0][1], clean)
    assert torch.equal(one[1][1], two[1][1]) and not torch.equal(one[1][1], clean) and one[1][1].isfinite().all()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_close(model: Any, images: Tensor, precision: str) -> None:
    half = open_backbone(model.folder, precision=precision)
    clean = model.backbone.encode(images[:1])
    assert torch.equal(half.encode(images[:1]), clean)  # the VAE stays in fp32
    with torch.inference_mode():
        exact, rounded = model.backbone(clean, 0.4).flatten(), half(clean, 0.4).flatten()
    assert half.dtype != torch.float32 and rounded.dtype == torch.float32
    assert torch.corrcoef(torch.stack([exact, rounded]))[0, 1] > 0.95 and not torch.equal(exact, rounded)
    with pytest.raises(ArgumentError, match="precision"):
        Teacher(half, TeacherSettings(size=96))


def test_identity_changes_with_the_weights(model: Any, tmp_path: Path) -> None:
    assert model.backbone.identity == open_backbone(model.folder).identity
    model.tiny.save(tmp_path / "other")
    for file in (tmp_path / "other" / model.backbone.part).glob("*.safetensors"):
        content = bytearray(file.read_bytes())
        content[-3] ^= 1
        file.write_bytes(bytes(content))
    assert open_backbone(tmp_path / "other").identity != model.backbone.identity
