"""What a student in torch becomes on a GPU, as far as a CPU can tell; tests/gpu has the rest."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from trace_sdk.backbones.families.sd import StableDiffusion
from trace_sdk.engines import torch_gpu
from trace_sdk.export.graph import EngineGraph, without_python
from trace_sdk.student.model import Student


@pytest.fixture(scope="module")
def latent_student(new_latent_backbone: Callable[[], StableDiffusion]) -> Student:
    torch.manual_seed(0)
    student = Student(new_latent_backbone()).eval()
    torch.nn.init.normal_(student.decoder.residual.weight)
    with torch.no_grad():
        for value in student.parameters():
            value.copy_(value.half().float())  # as a student's folder holds it
    return student


def picture(height: int, width: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, height, width, 3), np.uint8))


@pytest.mark.parametrize("share", [True, False])
def test_the_program_without_python_answers_the_same(latent_student: Student, share: bool) -> None:
    graph = EngineGraph(latent_student, half_weights=False, share_softmax=share)
    image = picture(128, 256)
    program = without_python(graph, image)
    with torch.no_grad():
        torch.testing.assert_close(program(image), graph(image), atol=1e-6, rtol=0)
    compiled = torch.compile(program, backend="eager", fullgraph=True)  # raises where it is not one piece
    with torch.no_grad():
        torch.testing.assert_close(compiled(image), program(image))


@pytest.mark.parametrize("last", [False, True])
def test_normalisation_by_our_kernel_answers_the_same(latent_student: Student, last: bool) -> None:
    pytest.importorskip("triton", reason="Triton has no package for this system")
    graph = EngineGraph(copy.deepcopy(latent_student), half_weights=False, share_softmax=False)
    image = picture(128, 128)
    with torch.no_grad():
        expected = graph(image)
    if last:
        torch_gpu.channels_last(graph)
    fused = torch_gpu.fuse_normalisation(without_python(graph, image))
    assert isinstance(fused, torch.fx.GraphModule)
    called = [str(node.target) for node in fused.graph.nodes]
    assert "trace_sdk.group_norm.default" in called and "aten.group_norm.default" not in called
    with torch.no_grad():
        torch.testing.assert_close(fused(image), expected, atol=1e-5, rtol=0)


def test_what_bears_16_bits_gets_them(latent_student: Student, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = EngineGraph(copy.deepcopy(latent_student), half_weights=False, share_softmax=False)
    before, image = copy.deepcopy(graph.state_dict()), picture(128, 128)
    with torch.no_grad():
        exact = graph(image)
    assert torch_gpu.lower(graph) == ("fp16", "")
    assert graph.student.backbone.dtype == torch.float16
    assert graph.student.decoder.residual.weight.dtype == torch.float32
    with torch.no_grad():
        lowered = graph(image)
    assert 0 < (lowered - exact).abs().mean() < torch_gpu.LIMIT

    graph = EngineGraph(copy.deepcopy(latent_student), half_weights=False, share_softmax=False)
    monkeypatch.setattr(torch_gpu, "LIMIT", 0.0)
    precision, word = torch_gpu.lower(graph)
    assert precision == "fp32" and "too much" in word
    for name, value in graph.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} came back changed"


def test_an_overflow_stays_in_float32(latent_student: Student) -> None:
    student = copy.deepcopy(latent_student)
    with torch.no_grad():
        for layer in student.backbone.vae.encoder.modules():
            if isinstance(layer, torch.nn.GroupNorm):
                layer.weight.mul_(60000)
    graph = EngineGraph(student, half_weights=False, share_softmax=False)
    assert torch_gpu.lower(graph) == ("fp16", "denoiser alone in fp16")
    assert next(graph.student.backbone.vae.parameters()).dtype == torch.float32


def test_a_backbone_without_latents_stays_in_float32(student: Student) -> None:
    graph = EngineGraph(student, half_weights=False)
    assert torch_gpu.lower(graph) == ("fp32", "")


def test_known_shapes_get_programs_of_their_own(
    student: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a made-up capture, since there is no GPU: what is asked of it, when, and how often."""
    from trace_sdk.engines.torch import TorchEngine

    captured: list[tuple[int, ...]] = []

    class MadeUp:
        def __init__(self, program: torch.nn.Module, image: torch.Tensor) -> None:
            captured.append(tuple(image.shape))
            self._program = program

        def __call__(self, image: torch.Tensor) -> torch.Tensor:
            return self._program(image)

    monkeypatch.setattr("trace_sdk.engines.torch.Captured", MadeUp)
    student.save(tmp_path / "mine", {})
    engine = TorchEngine(tmp_path / "mine", device="cpu", compiled=False, shapes=lambda manifest: [(96, 128)])
    batch = np.concatenate([picture(96, 128).numpy(), 255 - picture(96, 128).numpy()])
    plain = engine.infer(batch)
    assert not captured and engine.cuda_graphs == 0  # a CPU captures nothing
    engine._known = frozenset({(96, 128)})
    for _ in range(2):
        np.testing.assert_allclose(engine.infer(batch), plain, atol=1e-5)
    engine.infer(picture(96, 96).numpy())
    assert captured == [(1, 96, 128, 3)] and engine.cuda_graphs == 1

    class Refuses:
        def __init__(self, program: torch.nn.Module, image: torch.Tensor) -> None:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    engine._programs.clear()
    monkeypatch.setattr("trace_sdk.engines.torch.Captured", Refuses)
    np.testing.assert_allclose(engine.infer(batch), plain, atol=1e-5)
    assert engine.cuda_graphs == 0 and "128x96 without a CUDA graph (operation not permitted" in engine.device_reason
