"""What a student in torch becomes on a GPU, as far as a CPU can tell; tests/gpu has the rest."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from trace_sdk import EdgeDetector
from trace_sdk.backbones.families.sd import StableDiffusion
from trace_sdk.engines import torch_gpu
from trace_sdk.engines.torch import TorchEngine
from trace_sdk.errors import EngineError, OutOfMemoryError
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


@pytest.fixture
def scaling_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines on a CPU scale photos themselves, as those on a GPU do."""
    monkeypatch.setattr(TorchEngine, "infer_photos", property(lambda engine: engine._infer_photos))


@pytest.fixture
def folder(student: Student, tmp_path: Path) -> Path:
    student.save(tmp_path / "mine", {})
    return tmp_path / "mine"


def photo(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    cells = np.random.default_rng(seed).integers(0, 256, (-(-height // 9), -(-width // 9), 3), np.uint8)
    return np.kron(cells, np.ones((9, 9, 1), np.uint8))[:height, :width]


# Several sizes that become one shape for the network, one that becomes another, one without scaling, one tiled.
PHOTOS = [(100, 130), (150, 196), (77, 101), (40, 130), (73, 96), (33, 21)]


@pytest.mark.parametrize(("size", "buckets"), [(96, None), (96, [64, 96]), (160, [64, 96])])
def test_photos_that_the_engine_scales_have_the_answers_of_those_scaled_before(
    folder: Path, size: int, buckets: list[int] | None, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    pictures = [photo(*shape, seed=seed) for seed, shape in enumerate(PHOTOS)]
    expected = EdgeDetector(folder, device="cpu", size=size, buckets=buckets).run_batch(pictures)
    request.getfixturevalue("scaling_on_a_cpu")
    detector = EdgeDetector(folder, device="cpu", size=size, buckets=buckets)
    detector.warmup()
    scaled_before: list[tuple[int, ...]] = []
    pillows = "trace_sdk.detector.fit"
    fit = EdgeDetector._prepare.__globals__["fit"]
    monkeypatch.setattr(pillows, lambda rgb, *rule: scaled_before.append(rgb.shape) or fit(rgb, *rule))
    answers = [
        detector.run_batch(pictures),
        list(detector.stream(pictures, batch=3)),
        list(map(detector.run, pictures)),
    ]
    with ThreadPoolExecutor(8) as pool:
        answers.append(list(pool.map(detector.run, pictures)))
    for edges in answers:
        for found, wanted in zip(edges, expected, strict=True):
            np.testing.assert_array_equal(found.probability, wanted.probability)
            assert found.probability.flags.c_contiguous
            for name in ("input_size", "network_size", "padded_size", "tiles"):
                assert found.info[name] == wanted.info[name], name
            assert list(found.info["timings"]) == list(wanted.info["timings"])
    assert bool(scaled_before) == (size == 160), "tiled photos alone are scaled before"


def test_photos_of_one_network_shape_go_together(
    folder: Path, scaling_on_a_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, which runs whole batches; a batch too large for it is halved once, and keeps nothing."""
    detector = EdgeDetector(folder, device="cpu", size=96)
    pictures = [photo(*shape) for shape in PHOTOS[:3]]
    expected = [detector.run(picture).probability for picture in pictures]
    prepared = [detector._prepare(picture) for picture in pictures]
    engine: Any = detector._engine
    engine.device = "cuda:0"
    sizes: list[int] = []
    held: list[weakref.ref[torch.Tensor]] = []
    graph, rooms = engine._graph, [3]

    def limited(pixels: torch.Tensor) -> torch.Tensor:
        assert not any(other() is not None for other in held), "what failed is still there"
        held.append(weakref.ref(pixels))
        sizes.append(len(pixels))
        if sizes[-1] > rooms[-1]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        answer: torch.Tensor = graph(pixels)
        return answer

    monkeypatch.setattr(engine, "_graph", limited)
    gc.disable()
    try:
        for room in (3, 2):
            rooms.append(room)
            for edges, wanted in zip(detector._answer(prepared), expected, strict=True):
                np.testing.assert_allclose(edges.probability, wanted, atol=1e-5)
        assert sizes == [3, 3, 2, 1]
        rooms.append(0)
        with pytest.raises(OutOfMemoryError, match=r"smaller batch \(here 3, half.*size \(here 96x80 pixels"):
            detector._answer(prepared)
    finally:
        gc.enable()


@pytest.mark.parametrize("wrong", [float("nan"), 1.5, -0.2])
def test_wrong_answers_are_errors_before_they_are_scaled_back(
    folder: Path, scaling_on_a_cpu: None, wrong: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = EdgeDetector(folder, device="cpu", size=96)
    engine: Any = detector._engine
    graph = engine._graph

    def broken(pixels: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = graph(pixels).clone()
        answer[0, 3, 3] = wrong
        return answer

    monkeypatch.setattr(engine, "_graph", broken)
    with pytest.raises(EngineError, match="answered values from"):
        detector.run(photo(100, 130))
