from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from trace_sdk import EdgeDetector
from trace_sdk.engines import read_engine
from trace_sdk.export.any_size import take_any_size

EXAMPLE = Path(__file__).parents[1] / "examples/node"
# Elsewhere than beside the example: TRACE_NODE_MODULES=/path/to/node_modules.
MODULES = Path(os.environ.get("TRACE_NODE_MODULES", EXAMPLE / "node_modules"))


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
@pytest.mark.skipif(not (MODULES / "onnxruntime-node").is_dir(), reason="needs npm install in examples/node")
@pytest.mark.parametrize(("name", "shape"), [("tiny", (64, 96)), ("tiny", (175, 301)), ("trace-nano", (175, 301))])
def test_node_answers_like_python(tiny_engine: Path, tmp_path: Path, name: str, shape: tuple[int, int]) -> None:
    engine = tiny_engine if name == "tiny" else name
    (tmp_path / "engine.onnx").write_bytes(take_any_size(*read_engine(engine), output="uint8"))
    (tmp_path / "detect.js").write_bytes((EXAMPLE / "detect.js").read_bytes())
    (tmp_path / "package.json").write_bytes((EXAMPLE / "package.json").read_bytes())
    (tmp_path / "node_modules").symlink_to(MODULES.absolute())
    rough = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    PIL.Image.fromarray(rough).resize(shape[::-1]).save(tmp_path / "photo.png")
    command = ["node", "detect.js", "engine.onnx", "photo.png", "edges.png"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=120)
    seen = np.asarray(PIL.Image.open(tmp_path / "edges.png").convert("L")) / 255
    expected = EdgeDetector(engine, device="cpu").run(tmp_path / "photo.png").probability
    assert np.abs(seen - expected).max() <= 0.5 / 255 + 1e-3, "but for rounding to 8 bits"
