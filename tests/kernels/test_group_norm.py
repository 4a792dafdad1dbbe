"""Group normalisation against numpy in float64."""

import numpy as np
import pytest
import torch

from trace_sdk.errors import ArgumentError
from trace_sdk.kernels import group_norm

LIMITS = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def expected(x: torch.Tensor, groups: int, affine: torch.Tensor | None, silu: bool) -> np.ndarray:
    values = x.cpu().double().numpy()
    grouped = values.reshape(len(values), groups, -1)
    centred = grouped - grouped.mean(-1, keepdims=True)
    answer = (centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)).reshape(values.shape)
    if affine is not None:
        weight, bias = affine.cpu().double().numpy().reshape(2, 1, -1, *(1,) * (values.ndim - 2))
        answer = answer * weight + bias
    return answer / (1 + np.exp(-answer)) if silu else answer


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "groups"),
    [((2, 8, 5, 7), 4), ((1, 6, 300, 9), 3), ((1, 4, 700, 200), 1), ((2, 32, 8, 8), 32), ((1, 8, 37), 2)],
)
def test_against_the_formula(device: str, shape: tuple[int, ...], groups: int, dtype: torch.dtype, silu: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=generator) * 3 + 20).to(dtype).to(device)  # far from 0: differences must be taken
    affine = torch.randn(2, shape[1], generator=generator).to(dtype).to(device)
    for given in (affine, None):
        got = group_norm(x, groups, *(given if given is not None else (None, None)), silu=silu)
        want = expected(x, groups, given, silu)
        assert got.dtype == dtype and got.is_contiguous()
        np.testing.assert_allclose(got.cpu().double().numpy(), want, atol=LIMITS[dtype] * np.abs(want).max(), rtol=0)


@pytest.mark.parametrize(("shape", "groups"), [((2, 8, 6, 5), 4), ((1, 30, 70, 40), 3), ((1, 4, 1, 1), 2)])
def test_channels_last_stays_so_and_other_strides_are_copied(device: str, shape: tuple[int, ...], groups: int) -> None:
    x = torch.randn(shape, device=device)
    last = x.to(memory_format=torch.channels_last)
    answer = group_norm(last, groups, silu=True)
    assert answer.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(answer, group_norm(x, groups, silu=True), rtol=0, atol=2e-6)
    assert torch.equal(group_norm(last, groups, silu=True), answer)  # the same bits twice
    gaps = torch.stack([x, x], -1)[..., 0]
    torch.testing.assert_close(group_norm(gaps, groups, silu=True), answer, rtol=0, atol=2e-6)


def test_groups_must_divide_the_channels() -> None:
    with pytest.raises(ArgumentError, match="multiple of groups=3"):
        group_norm(torch.zeros(1, 8, 4, 4), 3)
