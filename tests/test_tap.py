"""The tap sees what the model computes and changes nothing."""

import pytest
import torch
import torch.nn.functional as F

from trace_sdk.backbones.pixel import PixelBackbone
from trace_sdk.backbones.tap import SelfAttention, SelfAttentionTap, attention_map
from trace_sdk.errors import ArgumentError, CheckpointError


def test_model_output_is_bit_identical_with_and_without_the_tap(tiny_backbone: PixelBackbone) -> None:
    images = torch.rand(2, 3, 64, 80) * 2 - 1
    seen: list[SelfAttention] = []
    with torch.inference_mode():
        assert torch.equal(tiny_backbone(images, 0.3), tiny_backbone(images, 0.3, seen.append))
    assert [attention.block for attention in seen] == list(range(tiny_backbone.self_attention_blocks))
    assert all(attention.grid == (8, 10) for attention in seen)
    assert seen[0].query.shape == (2, tiny_backbone.heads, 80, 64)


def test_text_token_is_left_out_and_rows_sum_to_one(tiny_backbone: PixelBackbone) -> None:
    seen: list[SelfAttention] = []
    with torch.inference_mode():
        tiny_backbone(torch.rand(1, 3, 64, 64), 0.5, seen.append)
    for attention in seen:
        rows = attention_map(attention.query, attention.key, attention.scale)
        assert rows.shape[-2:] == (64, 64)
        torch.testing.assert_close(rows.sum(-1), torch.ones(rows.shape[:-1]))


def test_tap_reads_the_real_query_and_key() -> None:
    query, key, value = torch.randn(3, 1, 2, 9, 8).unbind(0)
    seen: list[SelfAttention] = []
    with SelfAttentionTap(seen.append, lambda q, k: (slice(1, None), (2, 4)) if q == k else None):
        joint = F.scaled_dot_product_attention(query, key, value, scale=0.5)
        F.scaled_dot_product_attention(query, key[:, :, :5], value[:, :, :5])  # cross-attention: not ours
    assert len(seen) == 1
    assert torch.equal(seen[0].query, query[:, :, 1:])
    assert torch.equal(seen[0].key, key[:, :, 1:])
    assert seen[0].scale == 0.5
    torch.testing.assert_close(joint, attention_map(query, key, 0.5) @ value)


def test_shared_softmax_gives_the_same_answer_and_mean_key(tiny_backbone: PixelBackbone) -> None:
    images = torch.rand(2, 3, 64, 72) * 2 - 1
    apart: list[SelfAttention] = []
    shared: list[SelfAttention] = []
    with torch.inference_mode():
        plain = tiny_backbone(images, 0.0, apart.append)
        torch.testing.assert_close(tiny_backbone(images, 0.0, shared.append, share_softmax=True), plain)
    for one, two in zip(apart, shared, strict=True):
        expected = attention_map(one.query, one.key, one.scale) @ one.key
        assert one.mean_key is None and two.mean_key is not None
        torch.testing.assert_close(two.mean_key, expected, atol=1e-5, rtol=1e-4)


def test_noise_at_t_zero_is_the_image_itself(tiny_backbone: PixelBackbone) -> None:
    images, noise = torch.rand(2, 1, 3, 64, 64).unbind(0)
    assert torch.equal(tiny_backbone.noising.add_noise(images, noise, 0.0), images)
    assert torch.equal(tiny_backbone.noising.add_noise(images, noise, 1.0), noise)


def test_batch_equals_single(tiny_backbone: PixelBackbone) -> None:
    images = torch.rand(3, 3, 64, 72)
    with torch.inference_mode():
        together = tiny_backbone(images, torch.tensor([0.1, 0.4, 0.9]))
        alone = torch.cat([tiny_backbone(images[i : i + 1], t) for i, t in enumerate((0.1, 0.4, 0.9))])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_tokens_follow_the_image_when_it_is_mirrored(tiny_backbone: PixelBackbone) -> None:
    """Row-major grid, pixel (y, x) in token (y/8, x/8): a change in one patch changes that token's query most."""
    images = torch.zeros(1, 3, 64, 96)
    changed = images.clone()
    changed[..., 16:24, 40:48] = 1.0
    before: list[SelfAttention] = []
    after: list[SelfAttention] = []
    with torch.inference_mode():
        tiny_backbone(images, 0.0, before.append)
        tiny_backbone(changed, 0.0, after.append)
    moved = (after[0].query - before[0].query).norm(dim=-1).sum(1).view(8, 12)
    assert divmod(int(moved.argmax()), 12) == (2, 5)


@pytest.mark.parametrize("size", [(60, 64), (56, 64), (64, 65)])
def test_sizes_off_the_grid_are_refused(tiny_backbone: PixelBackbone, size: tuple[int, int]) -> None:
    with pytest.raises(ArgumentError, match="multiples of 8 from 64"):
        tiny_backbone(torch.zeros(1, 3, *size), 0.0)


def test_save_and_load_give_the_same_answers(tiny_backbone: PixelBackbone, tmp_path) -> None:
    tiny_backbone.save(tmp_path / "b")
    again = PixelBackbone.load(tmp_path / "b")
    images = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(again(images, 0.2), tiny_backbone(images, 0.2), atol=2e-2, rtol=2e-2)


def test_pickled_weights_are_refused_by_content(tiny_backbone: PixelBackbone, tmp_path) -> None:
    tiny_backbone.save(tmp_path)
    torch.save({"a": torch.zeros(1)}, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError, match="pickle"):
        PixelBackbone.load(tmp_path)


@pytest.mark.parametrize("damage", ["no config", "text config", "foreign config", "cut weights", "no weights"])
def test_damaged_backbone_folders(tiny_backbone: PixelBackbone, tmp_path, damage: str) -> None:
    tiny_backbone.save(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    if damage == "no config":
        (tmp_path / "config.json").unlink()
    elif damage == "text config":
        (tmp_path / "config.json").write_text("hello")
    elif damage == "foreign config":
        (tmp_path / "config.json").write_text('{"_class_name": "UNet2DConditionModel", "in_channels": 4}')
    elif damage == "cut weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    else:
        weights.unlink()
    with pytest.raises(CheckpointError, match=tmp_path.name):
        PixelBackbone.load(tmp_path)
