"""Too little memory, and half precision that overflows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trace_sdk.backbones.pixel import PixelBackbone
from trace_sdk.backbones.registry import open_backbone
from trace_sdk.errors import ArgumentError, OutOfMemoryError
from trace_sdk.teacher.teacher import Teacher, TeacherSettings


def test_too_little_memory_for_the_weights(open_tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(torch.nn.Module, "to", full)
    with pytest.raises(OutOfMemoryError, match=r"--precision bf16, or --offload"):
        open_backbone(open_tiny("sd3").folder)


def test_too_little_memory_for_an_image(open_tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Says what to lower, and the next image is annotated."""
    teacher = Teacher(open_tiny("sd3").backbone, TeacherSettings(size=64, timesteps=(0.2,)))
    photo = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    with monkeypatch.context() as patch:
        patch.setattr(teacher, "_abdiv_at", lambda *args: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA full")))
        with pytest.raises(OutOfMemoryError, match=r"CUDA full \(sd3 at 64 px\)\. Lower --batch or --size"):
            teacher.annotate(photo)
    assert teacher.annotate(photo).labels.shape == (8, 8)


@pytest.mark.parametrize("name", ["sd3", "pixel"])
def test_images_that_overflow_in_fp16_are_read_in_fp32(
    open_tiny: Any, tiny_backbone: PixelBackbone, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """One of a batch of two: it gets the label of fp32, the other keeps fp16's, and the weights are as before."""
    if name == "pixel":
        tiny_backbone.save(tmp_path)
    folder = tmp_path if name == "pixel" else open_tiny(name).folder
    half, exact = open_backbone(folder, precision="fp16"), open_backbone(folder)
    settings = {"size": 64, "timesteps": (0.2,)}
    teacher = Teacher(half, TeacherSettings(**settings, precision="fp16"))
    rng = np.random.default_rng(0)
    prepared = [teacher.prepare(rng.integers(0, 255, (64, 64, 3), np.uint8)) for _ in range(2)]
    before = teacher.annotate_batch(prepared)
    assert not [record for record in caplog.records if "overflows" in record.message]
    caplog.clear()
    weights = {key: value.clone() for key, value in half.state_dict().items()}
    divergence = teacher._abdiv_at

    def overflow(x_t: torch.Tensor, t: float) -> torch.Tensor:
        found = divergence(x_t, t)
        if half.dtype == torch.float16 or torch.is_autocast_enabled("cpu"):
            found[1, 0, 0] = torch.inf
        return found

    teacher._abdiv_at = overflow
    for _ in range(2):
        first, second = teacher.annotate_batch(prepared)
        np.testing.assert_array_equal(first.abdiv, before[0].abdiv)
        (expected,) = Teacher(exact, TeacherSettings(**settings)).annotate_batch(prepared[1:])
        np.testing.assert_allclose(second.abdiv, expected.abdiv, rtol=0.05 if name == "sd3" else 1e-4, atol=1e-3)
        assert not np.array_equal(second.abdiv, before[1].abdiv)
    assert all(torch.equal(value, weights[key]) for key, value in half.state_dict().items())
    assert [record.message.partition(":")[0] for record in caplog.records] == [f"{half.family} overflows in fp16"]
    teacher._abdiv_at = lambda x_t, t: divergence(x_t, t) * torch.nan
    with pytest.raises(ArgumentError, match="not finite, in fp32 either"):
        teacher.annotate_batch(prepared)
    if name == "sd3":
        offloaded = Teacher(open_backbone(folder, precision="fp16", offload=True), teacher.settings)
        offloaded._abdiv_at = teacher._abdiv_at
        with pytest.raises(ArgumentError, match="Take --precision bf16, or fp32"):
            offloaded.annotate_batch(prepared)
