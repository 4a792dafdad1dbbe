"""Scaling inside the graph gives what Python's path gives, at every size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

from trace_sdk import EdgeDetector
from trace_sdk.cli import main
from trace_sdk.engines.manifest import ANY_SIZE
from trace_sdk.errors import ArgumentError, EngineError, MissingExtraError, ParityError
from trace_sdk.export import any_size
from trace_sdk.export.any_size import take_any_size
from trace_sdk.network_input import fit, padded_length

MakeEngine = Callable[..., bytes]
SHAPES = [
    (1, 1), (1, 2), (63, 100), (111, 63), (128, 128), (128, 77), (300, 400), (1, 700), (500, 3), (129, 128),
    (200, 60), (700, 200), (60, 20),  # more than twice as tall as wide: the order of the axes matters
]  # fmt: skip


def noise(height: int, width: int) -> NDArray[np.uint8]:
    """Coloured cells with hard edges: the worst for scaling."""
    cells = np.random.default_rng(height * width).integers(0, 256, (-(-height // 3), -(-width // 3), 3), np.uint8)
    return np.kron(cells, np.ones((3, 3, 1), np.uint8))[:height, :width]


@pytest.fixture(scope="module")
def converted(make_engine: MakeEngine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engine") / "any-size.onnx"
    path.write_bytes(take_any_size(make_engine(), "tiny"))
    return path


@pytest.mark.parametrize("shape", SHAPES)
def test_the_graph_answers_as_python_does(converted: Path, tiny_engine: Path, shape: tuple[int, int]) -> None:
    photo = noise(*shape)
    expected, edges = EdgeDetector(tiny_engine).run(photo), EdgeDetector(converted).run(photo)
    np.testing.assert_allclose(edges.probability, expected.probability, atol=1e-6)
    for name in ("network_size", "padded_size", "input_size", "threshold", "size"):
        assert edges.info[name] == expected.info[name], name
    assert edges.info["tiles"] == 1


@pytest.mark.parametrize("shape", SHAPES)
def test_the_network_sees_the_levels_that_pillow_makes(converted: Path, shape: tuple[int, int]) -> None:
    model = onnx.load(converted)
    seen = onnx.helper.make_tensor_value_info("network/image", onnx.TensorProto.UINT8, [None] * 4)
    model.graph.output.append(seen)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    photo = noise(*shape)
    expected, *_ = fit(photo, 128, lambda side: padded_length(side, 8, 16))
    np.testing.assert_array_equal(session.run(["network/image"], {"image": photo[None]})[0][0], expected)


def test_an_image_pyramid_can_be_converted(tmp_path: Path) -> None:
    path = tmp_path / "any-size.onnx"
    assert CliRunner().invoke(main, ["export", "trace-nano", "-o", f"{path}", "--any-size"]).exit_code == 0
    photo = noise(1100, 400)
    expected, edges = EdgeDetector("trace-nano", device="cpu").run(photo), EdgeDetector(path, device="cpu").run(photo)
    np.testing.assert_allclose(edges.probability, expected.probability, atol=1e-5)


def test_batches(converted: Path) -> None:
    photos = np.stack([noise(50, 70), noise(50, 70)[::-1]])
    (together,) = onnxruntime.InferenceSession(converted, providers=["CPUExecutionProvider"]).run(
        None, {"image": photos}
    )
    alone = [edges.probability for edges in EdgeDetector(converted).run_batch(list(photos))]
    np.testing.assert_allclose(together, alone, atol=1e-6)


@pytest.mark.parametrize(("output", "dtype", "tolerance"), [("uint8", np.uint8, 0.501), ("float16", np.float16, 0.13)])
def test_other_answers(
    output: str, dtype: type, tolerance: float, make_engine: MakeEngine, tiny_engine: Path, tmp_path: Path
) -> None:
    path = tmp_path / "e.onnx"
    path.write_bytes(take_any_size(make_engine(), "tiny", output=output))
    photo = noise(90, 130)
    (raw,) = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"image": photo[None]})
    assert raw.dtype == dtype
    expected, edges = EdgeDetector(tiny_engine).run(photo).probability, EdgeDetector(path).run(photo).probability
    assert edges.dtype == np.float32 and np.abs(edges - expected).max() * 255 < tolerance and expected.max() > 0.3


def test_the_size_is_in_the_graph(converted: Path) -> None:
    for options in ({"size": 256}, {"buckets": [64, 128]}):
        with pytest.raises(ArgumentError, match="scales photos to 128 px inside its graph"):
            EdgeDetector(converted, **options)  # type: ignore[arg-type]
    detector = EdgeDetector(converted, size=128)
    detector.warmup()
    assert detector.manifest.input == ANY_SIZE and detector.manifest.multiple_of == 8


def test_what_cannot_be_converted(converted: Path, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match="any size already"):
        take_any_size(converted.read_bytes(), "e.onnx")
    with pytest.raises(ArgumentError, match="float32, float16, uint8"):
        take_any_size(make_engine(), "e.onnx", output="int8")
    with pytest.raises(EngineError, match=r"^e\.onnx: .* cannot run bf16"):
        take_any_size(make_engine(precision="bf16"), "e.onnx")
    with pytest.raises(EngineError, match="corrupt"):
        take_any_size(make_engine().replace(b"gradient", b"gradienT"), "e.onnx")
    monkeypatch.setattr(any_size, "FIXED_POINT", 6)
    with pytest.raises(ParityError, match="No file was written"):
        take_any_size(make_engine(), "e.onnx")
    monkeypatch.setattr(any_size, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="pip install onnx"):
        take_any_size(make_engine(), "e.onnx")


def test_command(tiny_engine: Path, tmp_path: Path) -> None:
    def export(*options: str) -> tuple[int, str]:
        done = CliRunner().invoke(main, ["export", f"{tiny_engine}", "-o", f"{tmp_path}/out.onnx", *options])
        return done.exit_code, done.output

    code, said = export()
    assert code == 2 and "--any-size or --runtime makes another" in said and not list(tmp_path.iterdir())
    for ignored in (["--any-size", "--precision", "int8"], ["--runtime", "tensorrt-rtx", "--output", "uint8"]):
        code, said = export(*ignored)
        assert code == 2 and f"give {ignored[-2]} when its student is exported" in " ".join(said.split())
    assert not list(tmp_path.iterdir())
    assert export("--any-size", "--output", "uint8") == (0, f"Written: {tmp_path}/out.onnx\n")
    assert EdgeDetector(tmp_path / "out.onnx").manifest.output == "uint8"
