"""Engine files that are none, or not whole, or not ours: a defined message, quickly."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from trace_sdk import EdgeDetector
from trace_sdk.cli import main
from trace_sdk.engines import open_engine
from trace_sdk.engines.manifest import seal, verify_seal
from trace_sdk.errors import EngineError

MakeEngine = Callable[..., bytes]


def flipped(model: bytes) -> bytes:
    place = len(model) // 2
    return model[:place] + bytes([model[place] ^ 255]) + model[place + 1 :]


def foreign() -> bytes:
    from onnx import TensorProto, helper

    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", ends[:1], ends[1:])
    return bytes(helper.make_model(graph, ir_version=8).SerializeToString())


def checkpoint() -> bytes:
    import torch

    file = io.BytesIO()
    torch.save({"weight": torch.zeros(3)}, file)
    return file.getvalue()


def safetensors() -> bytes:
    from safetensors.numpy import save

    return save({"weight": np.zeros(3, np.float32)})


def other_graph(model: bytes) -> bytes:
    """Our manifest and a valid seal on somebody else's graph."""
    import onnx

    ours, theirs = onnx.load_from_string(model), onnx.load_from_string(foreign())
    theirs.metadata_props.extend(ours.metadata_props)
    digits = next(entry for entry in theirs.metadata_props if entry.key == "sha256")
    digits.value = "trace-sha256:" + "0" * 64
    return seal(theirs.SerializeToString())


def swapped(model: bytes) -> bytes:
    """One engine's manifest in another engine's file, with a seal that was right before."""
    return model.replace(b'\\"name\\": \\"tiny\\"', b'\\"name\\": \\"tyni\\"').replace(b'"tiny"', b'"tyni"')


# name of the file, content made from a good engine, a part of the message
ENGINES: list[tuple[str, Callable[[bytes], bytes], str]] = [
    ("empty.onnx", lambda model: b"", "empty (0 bytes)"),
    ("half.onnx", lambda model: model[: len(model) // 2], "cut short"),
    ("cut.onnx", lambda model: model[:-1], "cut short"),
    ("longer.onnx", lambda model: model + b"\0", "is corrupt"),
    ("flipped.onnx", flipped, "is corrupt"),
    ("unsealed.onnx", lambda model: model.replace(model[-64:], b"0" * 64), "is corrupt"),
    ("swapped.onnx", swapped, "is corrupt"),
    ("twice.onnx", lambda model: model + model, "2 seals"),
    ("foreign.onnx", lambda model: foreign(), "trace-sdk export"),
    ("other-graph.onnx", other_graph, "other inputs and outputs"),
    ("text.onnx", lambda model: b"hello", "is not a trace-sdk engine"),
    ("page.onnx", lambda model: b"<html>404</html>", "is not a trace-sdk engine"),
    ("pointer.onnx", lambda model: b"version https://git-lfs.github.com/spec/v1\n", "not a trace-sdk engine"),
    ("zeros.onnx", lambda model: bytes(10_000), "is not a trace-sdk engine"),
    ("pickle.onnx", lambda model: pickle.dumps({"a": 1}), "can run any code"),
    ("pickle2.onnx", lambda model: pickle.dumps({"a": 1}, protocol=2), "can run any code"),
    ("pickle0.onnx", lambda model: pickle.dumps({"a": 1}, protocol=0), "is not a trace-sdk engine"),
    ("torch.onnx", lambda model: checkpoint(), "can run any code"),
    ("weights.onnx", lambda model: safetensors(), "without a graph"),
    ("weights.safetensors", lambda model: safetensors(), "trace-sdk export"),
    *[(f"good{suffix}", lambda model: model, "pickled") for suffix in (".pt", ".pth", ".ckpt", ".bin", ".pkl")],
]


@pytest.mark.parametrize(("name", "change", "message"), ENGINES, ids=[str(case[0]) for case in ENGINES])
def test_a_bad_engine(
    name: str, change: Callable[[bytes], bytes], message: str, tiny_engine: Path, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(change(tiny_engine.read_bytes()))
    with pytest.raises(EngineError) as caught:
        EdgeDetector(path)
    assert message in str(caught.value) and str(path) in str(caught.value)


ENGINE_NAMES: list[tuple[Any, str]] = [
    ("missing.onnx", "no such engine file"),
    ("some/where", "no such engine file"),
    ("trace-smal", "Did you mean 'trace-small'?"),
    ("TRACE-SMALL", "Bundled engines: trace-nano, trace-small"),
    ("sobel", "No engine is called 'sobel'"),
    ("", "is a folder"),
    (".", "trace-sdk export"),
    ("/dev/null", "not a regular file"),
    (300 * "x" + ".onnx", "File name too long. Check its name and permissions"),
]


@pytest.mark.parametrize(("name", "message"), ENGINE_NAMES, ids=[str(case[0]) for case in ENGINE_NAMES])
def test_a_bad_engine_name(name: Any, message: str) -> None:
    with pytest.raises(EngineError) as caught:
        open_engine(name)
    assert message in str(caught.value)


def test_a_student_is_no_engine_yet(tmp_path: Path) -> None:
    (tmp_path / "student.json").touch()
    for arguments in (["info"], ["deploy", "triton", str(tmp_path / "models"), "--engine"]):
        result = CliRunner().invoke(main, [*arguments, str(tmp_path)])
        assert result.exit_code == 1 and f"not an engine yet. Run: trace-sdk export {tmp_path} -o" in result.stderr


def test_two_engines_with_swapped_content_do_not_pass_for_each_other(make_engine: MakeEngine) -> None:
    first, second = make_engine(name="first!"), make_engine(name="second")
    assert first != second and len(first) == len(second)
    middle = first.index(b"trace-sha256:")
    for mixed in (first[:middle] + second[middle:], second[:middle] + first[middle:]):
        with pytest.raises(EngineError, match="corrupt"):
            verify_seal(mixed, "mixed")
