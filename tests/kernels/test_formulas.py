"""Every kernel against an independent float64 computation in numpy, peaky attention and odd sizes included."""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from trace_sdk.backbones.tap import SelfAttention
from trace_sdk.kernels import (
    abdiv,
    abdiv_from_qk,
    abdiv_reference,
    head_mean_attention,
    head_mean_attention_reference,
    image_log_sum_exp,
    log_sum_exp,
    per_head_divergence,
    per_head_divergence_reference,
    row_kl_reference,
    temporal_kl,
    upsample_attention,
    upsample_attention_reference,
)
from trace_sdk.kernels import divergence as divergence_module

SMOOTH, PEAKY, VERY_PEAKY = 1.2, 3.6, 12.0


def attention(
    std: float,
    grid: tuple[int, int],
    heads: int = 3,
    width: int = 16,
    seed: int = 0,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> SelfAttention:
    """Random Q and K whose scores have about this standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.randn(2, batch, heads, grid[0] * grid[1], width, generator=generator).unbind(0)
    query, key = ((x * math.sqrt(std)).to(dtype).to(device) for x in (query, key))
    return SelfAttention(0, query, key, grid, width**-0.5)


def numbers(x: Tensor) -> np.ndarray:
    return x.detach().cpu().double().numpy()


def softmax64(a: SelfAttention) -> np.ndarray:
    """Per-head maps in float64: [B, heads, N, N]."""
    scores = numbers(a.query) @ numbers(a.key).swapaxes(-1, -2) * a.scale
    exponent = np.exp(scores - scores.max(-1, keepdims=True))
    return exponent / exponent.sum(-1, keepdims=True)


def kl64(p: np.ndarray, q: np.ndarray) -> float:
    return float(sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True) if a > 0))


def abdiv64(maps: np.ndarray, grid: tuple[int, int], eight: bool) -> np.ndarray:
    """ABDiv of one N×N map by the formula, token by token."""
    height, width = grid
    result = np.zeros(grid)
    directions = [(1, 0), (0, 1)] + ([(1, 1), (1, -1)] if eight else [])
    for i in range(height):
        for j in range(width):
            for di, dj in directions:
                ahead = (min(max(i + di, 0), height - 1), min(max(j + dj, 0), width - 1))
                behind = (min(max(i - di, 0), height - 1), min(max(j - dj, 0), width - 1))
                result[i, j] += kl64(maps[ahead[0] * width + ahead[1]], maps[behind[0] * width + behind[1]])
    return result


def mean_map(a: SelfAttention) -> Tensor:
    return head_mean_attention(a.query, a.key, scale=a.scale)


@pytest.mark.parametrize("std", [SMOOTH, PEAKY, VERY_PEAKY])
@pytest.mark.parametrize("width", [16, 24, 40, 72, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_head_mean_is_the_log2_of_the_mean_probability(device: str, std: float, width: int, dtype: torch.dtype) -> None:
    a = attention(std, (7, 9), width=width, batch=2, dtype=dtype, device=device)
    expected = np.log2(softmax64(a).mean(1))
    got = head_mean_attention(a.query, a.key, torch.empty(2, 63, 63, device=device), accumulate=False)
    np.testing.assert_allclose(numbers(got), expected, atol=2e-4)
    stored = mean_map(a)
    assert stored.dtype == (torch.float32 if dtype == torch.float32 else torch.float16)
    np.testing.assert_allclose(numbers(stored), expected, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (63, 100), (145, 111), (128, 129), (257, 3)])
def test_sizes_that_no_tile_divides(device: str, queries: int, keys: int) -> None:
    query, key = torch.randn(1, 2, queries, 32, device=device), torch.randn(1, 2, keys, 32, device=device)
    expected = head_mean_attention_reference(query.double(), key.double(), 0.3)
    torch.testing.assert_close(head_mean_attention(query, key, scale=0.3).double(), expected, atol=1e-4, rtol=0)


def test_strided_inputs_are_read_in_place(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads between tokens and width as models hold them, text tokens on either side, an output inside a larger map."""
    joint = torch.randn(2, 5 + 30 + 4, 3, 40, device=device)
    query, key = joint.transpose(1, 2)[:, :, 5:35], (joint * 1.5).transpose(1, 2)[:, :, 5:35]
    expected = head_mean_attention_reference(query.double(), key.double(), 40**-0.5)
    out = torch.full((2, 32, 50), 7.0, device=device)
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda *_, **__: pytest.fail("a copy was made"))
    head_mean_attention(query, key, out[:, 1:31, 10:40], accumulate=False)
    torch.testing.assert_close(out[:, 1:31, 10:40].double(), expected, atol=1e-4, rtol=0)
    assert (out[:, [0, 31]] == 7).all() and (out[:, :, :10] == 7).all() and (out[:, :, 40:] == 7).all()


@pytest.mark.parametrize("width", [21, 40])
def test_what_the_copy_engine_cannot_read_is_copied(device: str, width: int) -> None:
    """Rows that begin between multiples of 16 bytes, gaps inside of rows, and one row that stands for all."""
    whole = torch.randn(1, 2, 30, 2 * width + 1, device=device)
    query, key = whole[..., 1 : width + 1], whole[..., : 2 * width : 2]
    for keys in (key, key[:, :1].expand(1, 2, 30, width)):
        expected = head_mean_attention_reference(query.double(), keys.double(), width**-0.5)
        torch.testing.assert_close(head_mean_attention(query, keys).double(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_blocks_add_up_as_probabilities(device: str, dtype: torch.dtype) -> None:
    blocks = [attention(PEAKY, (5, 6), seed=seed, dtype=dtype, device=device) for seed in range(4)]
    out = None
    for block in blocks:
        out = head_mean_attention(block.query, block.key, out, weight=1 / 4)
    expected = np.mean([softmax64(block).mean(1) for block in blocks], axis=0)
    np.testing.assert_allclose(
        numbers(out), np.log2(expected), rtol=2e-3 if dtype == torch.float16 else 1e-5, atol=1e-3
    )


def test_forty_blocks_in_half_precision_keep_the_divergence(device: str) -> None:
    """A running float16 map is rounded at every block; ABDiv of it stays within 1 % of the exact one."""
    blocks = [attention(PEAKY, (6, 8), heads=2, seed=seed, dtype=torch.float16, device=device) for seed in range(40)]
    out = None
    for block in blocks:
        out = head_mean_attention(block.query, block.key, out, weight=1 / 40)
    exact = np.mean([softmax64(block).mean(1) for block in blocks], axis=0)
    got, expected = numbers(abdiv(out, (6, 8)))[0], abdiv64(exact[0], (6, 8), False)
    assert np.abs(got - expected).max() <= 0.01 * expected.mean()


def test_a_known_log_sum_exp_is_used_and_changes_nothing(device: str) -> None:
    a = attention(PEAKY, (6, 7), device=device)
    lse = log_sum_exp(a.query, a.key)
    expected = np.log(np.exp(numbers(a.query) @ numbers(a.key).swapaxes(-1, -2) * a.scale).sum(-1))
    np.testing.assert_allclose(numbers(lse), expected, atol=1e-5)
    torch.testing.assert_close(head_mean_attention(a.query, a.key, lse=lse), mean_map(a), atol=1e-4, rtol=0)
    halved = head_mean_attention(a.query, a.key, lse=lse + math.log(2))
    torch.testing.assert_close(halved, mean_map(a) - 1, atol=1e-4, rtol=0)


@pytest.mark.parametrize("text_score", [-3.0, 2.0, 9.0, 30.0])
def test_image_log_sum_exp_without_the_text(device: str, text_score: float) -> None:
    """From text that hardly counts to text that holds all but 1e-9 of the mass."""
    a = attention(SMOOTH, (6, 7), device=device)
    text = torch.randn(1, 3, 5, 16, device=device)
    text[:, :, 0] = a.query[:, :, 11] * (text_score / a.scale / a.query[:, :, 11].square().sum(-1, keepdim=True))
    joint = log_sum_exp(a.query, torch.cat([text, a.key], 2), scale=a.scale)
    got = image_log_sum_exp(joint, a.query, a.key, text, scale=a.scale)
    np.testing.assert_allclose(numbers(got), numbers(log_sum_exp(a.query, a.key)), atol=3e-4)


def test_probabilities_too_small_for_float32_have_a_floor(device: str) -> None:
    query = torch.zeros(1, 1, 2, 16, device=device)
    key = torch.zeros(1, 1, 3, 16, device=device)
    query[..., 0], key[..., 0] = 100, torch.tensor([0.0, 1.0, 100.0], device=device)
    got = head_mean_attention(query, key, scale=1.0)
    assert got[0, 0].tolist() == [-226.0, -226.0, 0.0]
    assert temporal_kl(got, got).item() == 0


@pytest.mark.parametrize("std", [SMOOTH, PEAKY, VERY_PEAKY])
@pytest.mark.parametrize("neighbourhood", [4, 8])
@pytest.mark.parametrize("grid", [(5, 7), (1, 6), (6, 1), (9, 3)])
def test_abdiv_against_the_formula(device: str, std: float, neighbourhood: int, grid: tuple[int, int]) -> None:
    a = attention(std, grid, device=device)
    expected = abdiv64(softmax64(a).mean(1)[0], grid, neighbourhood == 8)
    np.testing.assert_allclose(numbers(abdiv(mean_map(a), grid, neighbourhood))[0], expected, rtol=1e-3, atol=1e-5)
    reference = head_mean_attention_reference(a.query.double(), a.key.double(), a.scale)
    np.testing.assert_allclose(
        numbers(abdiv_reference(reference, grid, neighbourhood))[0], expected, rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize("std", [SMOOTH, PEAKY, VERY_PEAKY])
def test_abdiv_of_a_half_precision_map(device: str, std: float) -> None:
    """What storing log₂ in float16 costs; probabilities in float16 would be wrong by half here."""
    a = attention(std, (8, 9), heads=1, dtype=torch.float16, device=device)
    expected = abdiv64(softmax64(a).mean(1)[0], (8, 9), False)
    got = numbers(abdiv(mean_map(a), (8, 9)))[0]
    assert np.abs(got - expected).max() <= 4e-3 * expected.mean()


@pytest.mark.parametrize(("rows_at_once", "neighbourhood"), [(1, 4), (2, 8), (3, 4), (5, 4)])
def test_strips_give_what_the_whole_map_gives(
    device: str, rows_at_once: int, neighbourhood: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of two grids, two images, strips that do and don't divide the height."""
    fine = [attention(PEAKY, (5, 4), seed=seed, batch=2, device=device) for seed in range(2)]
    coarse = attention(PEAKY, (3, 2), seed=9, batch=2, device=device)
    monkeypatch.setitem(divergence_module.STRIP, torch.device(device).type, rows_at_once * 2 * 4 * 20)
    got = abdiv_from_qk([fine[0], coarse, fine[1]], (5, 4), neighbourhood)
    up = upsample_attention_reference(torch.from_numpy(np.log2(softmax64(coarse).mean(1))), (3, 2), (5, 4)).exp2()
    mean = (softmax64(fine[0]).mean(1) + softmax64(fine[1]).mean(1) + up.numpy()) / 3
    for image in range(2):
        expected = abdiv64(mean[image], (5, 4), neighbourhood == 8)
        np.testing.assert_allclose(numbers(got)[image], expected, rtol=1e-3, atol=1e-4)


def test_strips_never_hold_the_map(monkeypatch: pytest.MonkeyPatch) -> None:
    a = attention(SMOOTH, (32, 32))
    largest = 0
    original = divergence_module._abdiv_strip_op

    def watch(strip: Tensor, *rest: object) -> Tensor:
        nonlocal largest
        largest = max(largest, strip.numel())
        return original(strip, *rest)

    monkeypatch.setattr(divergence_module, "_abdiv_strip_op", watch)
    monkeypatch.setitem(divergence_module.STRIP, "cpu", 4 * 32 * 1024)
    abdiv_from_qk([a])
    assert largest == 6 * 32 * 1024  # four image rows and their two neighbours, of 32


@pytest.mark.parametrize(("grid", "finest"), [((2, 3), (4, 6)), ((3, 2), (7, 5)), ((2, 2), (2, 2)), ((1, 2), (2, 9))])
def test_upsampling_against_its_definition(device: str, grid: tuple[int, int], finest: tuple[int, int]) -> None:
    a = attention(PEAKY, grid, batch=2, device=device)
    expected = numbers(upsample_attention_reference(mean_map(a).cpu().double(), grid, finest))
    np.testing.assert_allclose(numbers(upsample_attention(mean_map(a), grid, finest)), expected, atol=3e-4)
    rows = torch.tensor([finest[0] * finest[1] - 1, 0, 1], device=device)
    got = upsample_attention(mean_map(a), grid, finest, rows=rows)
    np.testing.assert_allclose(numbers(got), expected[:, rows.cpu()], atol=3e-4)


def test_upsampled_maps_stay_distributions_and_keep_their_place(device: str) -> None:
    column = torch.full((1, 12, 12), -226.0, device=device)
    column[:, :, 7] = 0  # all attention on coarse token (2, 1)
    fine = upsample_attention(column, (4, 3), (8, 6), rows=torch.tensor([0, 20], device=device)).exp2()
    torch.testing.assert_close(fine.sum(-1), torch.ones(1, 2, device=device))
    placed = fine[0, 0].view(8, 6)
    assert placed[4:6, 2:4].sum() > 0.5 and divmod(int(placed.argmax()), 6)[0] in (4, 5)


@pytest.mark.parametrize("std", [SMOOTH, PEAKY, VERY_PEAKY])
@pytest.mark.parametrize("rows", [slice(None), slice(3, 40, 7)])
def test_temporal_kl_is_the_mean_over_rows(device: str, std: float, rows: slice) -> None:
    a, b = attention(std, (6, 7), device=device), attention(std, (6, 7), seed=1, device=device)
    p, q = softmax64(a).mean(1)[0][rows], softmax64(b).mean(1)[0][rows]
    expected = np.mean([kl64(*pair) for pair in zip(p, q, strict=True)])
    got = temporal_kl(mean_map(a)[:, rows], mean_map(b)[:, rows])
    np.testing.assert_allclose(got.item(), expected, rtol=1e-4)


def test_kl_direction_is_previous_against_current(device: str) -> None:
    previous = torch.tensor([[[0.9, 0.1]]], device=device).log2()
    current = torch.tensor([[[0.5, 0.5]]], device=device).log2()
    expected = 0.9 * math.log(1.8) + 0.1 * math.log(0.2)
    assert temporal_kl(previous, current).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("std", [SMOOTH, PEAKY, VERY_PEAKY])
@pytest.mark.parametrize("width", [16, 40, 72])
def test_per_head_forms_against_the_formula(device: str, std: float, width: int) -> None:
    a = attention(std, (4, 6), width=width, device=device)
    maps = softmax64(a)[0]
    height, across = a.grid
    both = np.zeros((2, 6, height, across))  # one-way and symmetric; vertical then horizontal, by head
    for head in range(3):
        for axis, (di, dj) in enumerate([(1, 0), (0, 1)]):
            for i in range(height):
                for j in range(across):
                    p = maps[head, min(i + di, height - 1) * across + min(j + dj, across - 1)]
                    q = maps[head, max(i - di, 0) * across + max(j - dj, 0)]
                    both[:, axis * 3 + head, i, j] = kl64(p, q), kl64(p, q) + kl64(q, p)
    for symmetric in (False, True):
        for form in (per_head_divergence, per_head_divergence_reference):
            got = numbers(form(a, symmetric=symmetric))[0]
            np.testing.assert_allclose(got, both[int(symmetric)], rtol=2e-3, atol=2e-4 * std)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_per_head_forms_in_half_precision(device: str, dtype: torch.dtype) -> None:
    a = attention(PEAKY, (6, 7), width=40, dtype=dtype, device=device)
    exact = SelfAttention(0, a.query.double().cpu(), a.key.double().cpu(), a.grid, a.scale)
    expected = per_head_divergence_reference(exact, symmetric=True)
    error = per_head_divergence(a, symmetric=True).double().cpu() - expected
    assert error.abs().max() <= (0.02 if dtype == torch.float16 else 0.1) * expected.mean()


def test_per_head_form_is_never_below_the_averaged_form(device: str) -> None:
    a = attention(PEAKY, (6, 6), device=device)
    per_head = per_head_divergence(a, symmetric=False).sum(1) / 3
    assert (per_head >= abdiv(mean_map(a), a.grid) - 1e-4).all()


def test_constant_attention_has_no_divergence(device: str) -> None:
    uniform = torch.full((1, 30, 30), -math.log2(30), device=device)
    assert abdiv(uniform, (5, 6), 8).abs().max() == 0
    same_row = torch.randn(1, 1, 30, device=device).log_softmax(-1).expand(1, 30, 30) / math.log(2)
    assert abdiv(same_row, (5, 6)).abs().max() == 0


def test_two_regions_have_their_edge_between_them(device: str) -> None:
    """Left half attends to the left, right half to the right: ABDiv peaks on the two columns at the seam."""
    side = torch.arange(8).repeat(6) < 4
    rows = torch.where(side[:, None] == side[None], 0.0, -6.0).log_softmax(-1)[None].to(device) / math.log(2)
    edges = abdiv(rows, (6, 8))[0]
    assert (edges[:, [3, 4]] > 1).all()
    assert edges[:, [0, 1, 2, 5, 6, 7]].abs().max() < 1e-5


def test_mirrored_attention_gives_mirrored_edges(device: str) -> None:
    """The symmetric form mirrors exactly; the one-way KL becomes the KL of the pair the other way round."""
    a = attention(PEAKY, (5, 6), device=device)
    flipped = (x.unflatten(2, a.grid).flip(3).flatten(2, 3) for x in (a.query, a.key))
    mirrored = SelfAttention(0, *flipped, a.grid, a.scale)
    symmetric = per_head_divergence(a, symmetric=True).flip(-1)
    torch.testing.assert_close(per_head_divergence(mirrored, symmetric=True), symmetric, atol=2e-4, rtol=1e-3)
    other_way = abdiv64(softmax64(mirrored).mean(1)[0], a.grid, False)
    np.testing.assert_allclose(numbers(abdiv(mean_map(mirrored), a.grid))[0], other_way, rtol=1e-3, atol=1e-5)


@given(st.integers(0, 1000), st.sampled_from([SMOOTH, PEAKY, VERY_PEAKY]))
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_kl_is_never_negative(device: str, seed: int, std: float) -> None:
    rows = mean_map(attention(std, (4, 4), seed=seed, device=device))
    assert temporal_kl(rows, rows.flip(1)).item() >= -1e-5
    assert temporal_kl(rows, rows).item() == 0
    assert (row_kl_reference(rows, rows.flip(1)) >= -1e-5).all()


@pytest.mark.parametrize("order", [[3, 2, 1, 0], [1, 0, 3, 2]])
def test_permuting_heads_changes_nothing(device: str, order: list[int]) -> None:
    a = attention(PEAKY, (3, 4), heads=4, device=device)
    b = SelfAttention(0, a.query[:, order], a.key[:, order], a.grid, a.scale)
    torch.testing.assert_close(abdiv(mean_map(a), a.grid), abdiv(mean_map(b), b.grid), atol=1e-4, rtol=1e-4)
    shuffled = per_head_divergence(b, symmetric=True)
    torch.testing.assert_close(per_head_divergence(a, symmetric=True)[:, order], shuffled[:, :4], atol=1e-4, rtol=1e-4)
