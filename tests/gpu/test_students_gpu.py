"""Students in torch on a GPU answer as on a CPU, with and without CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from numpy.typing import NDArray

from trace_sdk import EdgeDetector
from trace_sdk.backbones.families.sd import StableDiffusion
from trace_sdk.backbones.pixel import PixelBackbone
from trace_sdk.engines.torch_scaling import Scaling
from trace_sdk.network_input import fit, padded_length, unfit
from trace_sdk.student.model import Student

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this torch sees no GPU")


@pytest.fixture(params=["pixel", "sd"])
def folder(
    request: pytest.FixtureRequest,
    tiny_backbone: PixelBackbone,
    new_latent_backbone: Callable[[], StableDiffusion],
    tmp_path: Path,
) -> Path:
    torch.manual_seed(1)
    student = Student(tiny_backbone if request.param == "pixel" else new_latent_backbone()).eval()
    torch.nn.init.normal_(student.decoder.residual.weight)
    student.save(tmp_path / "mine", {})
    return tmp_path / "mine"


def photo(seed: int) -> NDArray[np.uint8]:
    cells = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), np.uint8)
    return np.kron(cells, np.ones((12, 12, 1), np.uint8))


@pytest.mark.parametrize("buckets", [None, [128]])
def test_the_gpu_answers_as_the_cpu_does(folder: Path, buckets: list[int] | None) -> None:
    on_cpu = EdgeDetector(folder, device="cpu", size=128, buckets=buckets)
    on_gpu = EdgeDetector(folder, device="cuda", size=128, buckets=buckets)
    on_gpu.warmup()
    for edges, seed in zip(on_gpu.run_batch([photo(seed) for seed in range(3)]), range(3), strict=True):
        difference = np.abs(edges.probability - on_cpu.run(photo(seed)).probability)
        assert difference.mean() < 2e-3 and difference.max() < 5e-2
    info = on_gpu.info
    assert info["device"] == "cuda:0" and info["cuda_graphs"] == (1 if buckets else 0), info["device_reason"]
    assert info["precision"] == ("fp16" if on_gpu.manifest.backbone == "sd" else "fp32"), info["device_reason"]


@pytest.mark.parametrize("buckets", [None, [128]])
def test_photos_scaled_on_the_gpu_have_the_cpus_answers(folder: Path, buckets: list[int] | None) -> None:
    on_cpu = EdgeDetector(folder, device="cpu", size=128, buckets=buckets)
    on_gpu = EdgeDetector(folder, device="cuda", size=128, buckets=buckets)
    on_gpu.warmup()
    rough = PIL.Image.fromarray(photo(0))
    pictures = [np.asarray(rough.resize(size)) for size in ((300, 225), (200, 150), (60, 45), (90, 211), (128, 128))]
    for edges, picture in zip(on_gpu.run_batch(pictures), pictures, strict=True):
        expected = on_cpu.run(picture)
        difference = np.abs(edges.probability - expected.probability)
        assert difference.mean() < 2e-3 and difference.max() < 5e-2
        for name in ("network_size", "padded_size", "tiles"):
            assert edges.info[name] == expected.info[name]


def test_a_gpu_scales_as_pillow_does() -> None:
    on_gpu, rng = Scaling(torch.device("cuda")), np.random.default_rng(0)
    for height, width in [(96, 128), (300, 225), (500, 60), (45, 60), (1, 7), (3000, 4000)]:
        rgb = rng.integers(0, 256, (height, width, 3), np.uint8)
        expected, *sides = fit(rgb, 128, lambda side: padded_length(side, 8, 16))
        pixels, *found = on_gpu.fit(rgb, 128, lambda side: padded_length(side, 8, 16))
        assert found == sides
        np.testing.assert_array_equal(pixels.cpu().numpy(), expected)
        answer = rng.random(expected.shape[:2], np.float32)
        edges = on_gpu.unfit(torch.from_numpy(answer).cuda(), *sides, rgb.shape).cpu().numpy()
        np.testing.assert_allclose(edges, unfit(answer, *sides, rgb.shape), atol=1e-6)


def test_captured_answers_from_many_threads_are_the_serial_ones(folder: Path) -> None:
    detector = EdgeDetector(folder, device="cuda", size=128, buckets=[128])
    serial = [detector.run(photo(seed)).probability for seed in range(4)]
    with ThreadPoolExecutor(16) as pool:
        for number, edges in enumerate(pool.map(lambda n: detector.run(photo(n % 4)), range(32))):
            np.testing.assert_array_equal(edges.probability, serial[number % 4])
