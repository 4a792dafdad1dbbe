"""A tiny real engine for every test that needs one: the gradient of the grey picture, as an ONNX graph."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

if not torch.cuda.is_available() and find_spec("triton"):
    # Triton reads this once, when it is first imported, which diffusers does below; see tests/kernels/conftest.py.
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language  # noqa: F401

    del os.environ["TRITON_INTERPRET"]

from trace_sdk import EdgeDetector
from trace_sdk.backbones.families.sd import StableDiffusion
from trace_sdk.backbones.pixel import PixelBackbone
from trace_sdk.engines.manifest import Manifest, seal

TINY = Manifest(
    name="tiny",
    trace_sdk_version="0.1.0",
    backbone="none",
    backbone_sha256="0" * 64,
    decoder="gradient",
    multiple_of=8,
    min_size=16,
    max_size=1024,
    default_size=128,
    threshold=0.4,
    precision="fp32",
    opset=18,
    producers={"onnx": "test"},
    quality={"ODS": 0.5},
    parity={"max_abs_diff": 0.0},
    licence="Apache-2.0",
    created="2026-01-01T00:00:00Z",
    commit="0" * 40,
)

MakeEngine = Callable[..., bytes]
Photo = Callable[..., "NDArray[np.uint8]"]
KilledAt = Callable[[int], AbstractContextManager[Callable[[int, object], None]]]


@pytest.fixture(scope="session")
def make_engine() -> MakeEngine:
    """`make_engine(gain=…, **changes of the manifest) -> bytes` of a sealed engine; gain NaN answers NaN."""

    def make(gain: float = 1.0, **changes: Any) -> bytes:
        model = tiny_graph(gain)
        for key, value in Manifest(**{**vars(TINY), **changes}).metadata().items():
            model.metadata_props.add(key=key, value=value)
        return seal(model.SerializeToString())

    return make


@pytest.fixture(scope="session")
def tiny_engine(make_engine: MakeEngine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path of a sealed engine: multiples of 8, 16 to 1024 px, 128 by default."""
    path = tmp_path_factory.mktemp("engine") / "tiny.onnx"
    path.write_bytes(make_engine())
    return path


@pytest.fixture(scope="session")
def detector(tiny_engine: Path) -> EdgeDetector:
    """With the tiny engine."""
    return EdgeDetector(tiny_engine)


def tiny_graph(gain: float) -> Any:
    """Sobel magnitude of the grey picture, clipped to [0, 1]; borders replicated."""
    from onnx import TensorProto, helper, numpy_helper

    sobel = np.array([[1, 0, -1], [2, 0, -2], [1, 0, -1]], np.float32) / 4 / 255
    grey = np.array([0.299, 0.587, 0.114], np.float32)
    kernels = np.stack([sobel, sobel.T])[:, None] * grey[None, :, None, None]
    constants = {
        "kernels": kernels.astype(np.float32),
        "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64),
        "axis": np.array([1], np.int64),
        "gain": np.array(gain, np.float32),
        "low": np.array(0, np.float32),
        "high": np.array(1, np.float32),
    }
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["float"], ["nchw"], perm=[0, 3, 1, 2]),
        helper.make_node("Pad", ["nchw", "pads"], ["padded"], mode="edge"),
        helper.make_node("Conv", ["padded", "kernels"], ["gradient"]),
        helper.make_node("ReduceL2", ["gradient", "axis"], ["magnitude"], keepdims=0),
        helper.make_node("Clip", ["magnitude", "low", "high"], ["clipped"]),
        helper.make_node("Mul", ["clipped", "gain"], ["edge_probability"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", "height", "width", 3])],
        [helper.make_tensor_value_info("edge_probability", TensorProto.FLOAT, ["batch", "height", "width"])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


@pytest.fixture(scope="session")
def tiny_backbone() -> PixelBackbone:
    """A real pixel backbone, two blocks of two heads, with weights random enough for varied attention."""
    torch.manual_seed(0)
    backbone = PixelBackbone.create(num_single_layers=2, num_attention_heads=2)
    with torch.no_grad():
        for block in backbone.denoiser.single_transformer_blocks:
            block.norm.linear.weight.normal_(std=0.05)
            block.norm.linear.bias.normal_(std=0.3)
            block.attn.norm_q.weight.fill_(2.0)
    return backbone.eval()


@pytest.fixture(scope="session")
def new_latent_backbone() -> Callable[[], StableDiffusion]:
    """Makes a latent backbone with a UNet of real stages, 32 channels wide, its weights from torch's current seed."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    def make() -> StableDiffusion:
        unet = UNet2DConditionModel(
            sample_size=16, cross_attention_dim=8, block_out_channels=(32, 32), norm_num_groups=4, layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=2,
        )  # fmt: skip
        down = ("DownEncoderBlock2D",) * 4
        vae = AutoencoderKL(block_out_channels=(8,) * 4, norm_num_groups=2, down_block_types=down)
        scheduler = {"_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012}
        prompt = StableDiffusion.zero_prompt(dict(unet.config))
        return StableDiffusion(unet, vae, {**scheduler, "beta_schedule": "scaled_linear"}, prompt, "")

    return make


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of four small photos with shapes on noise, one in a sub-folder."""
    from PIL import Image, ImageDraw

    folder = tmp_path_factory.mktemp("photos")
    (folder / "more").mkdir()
    rng = np.random.default_rng(0)
    for number, name in enumerate(("a.png", "b.jpg", "c.webp", "more/a.png")):
        image = Image.fromarray(rng.integers(90, 120, (96, 120, 3), np.uint8))
        ImageDraw.Draw(image).ellipse((10 + 9 * number, 20, 60 + 9 * number, 80), fill=(200, 40 * number, 30))
        image.save(folder / name)
    return folder


@pytest.fixture(scope="session")
def photo() -> Photo:
    """`photo(height, width, seed)`: a smooth picture of many colours."""

    def make(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
        from PIL import Image

        rough = np.random.default_rng(seed).integers(0, 256, (max(2, height // 8), max(2, width // 8), 3), np.uint8)
        return np.asarray(Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC))

    return make


@pytest.fixture(scope="session")
def chromium() -> str:
    """The browser's program."""
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    return found


@pytest.fixture
def browser(chromium: str) -> Iterator[Any]:
    """Headless Chromium, as playwright has it."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as api:
        opened = api.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


class _Killed(Exception):
    """Stands for a kill."""


@pytest.fixture(scope="session")
def killed_at() -> KilledAt:
    """`with killed_at(5) as report:` a training that is given `report` ends there in its fifth step."""

    @contextmanager
    def run(step: int) -> Iterator[Callable[[int, object], None]]:
        def report(now: int, _: object) -> None:
            if now == step:
                raise _Killed

        with pytest.raises(_Killed):
            yield report

    return run
