"""Plans: built for real by TensorRT-RTX, which needs no GPU for it; read, refused and cached. Running: tests/gpu."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from trace_sdk import EdgeDetector
from trace_sdk.cli import main
from trace_sdk.engines import read_engine, tensorrt
from trace_sdk.engines.manifest import Manifest
from trace_sdk.engines.plan import ANY_GPU, Built, pack, unpack
from trace_sdk.engines.tensorrt import check_built
from trace_sdk.errors import ArgumentError, DeviceError, EngineError, MissingExtraError
from trace_sdk.export.any_size import take_any_size
from trace_sdk.export.tensorrt import build, build_once

MakeEngine = Callable[..., bytes]
BUILT = Built("tensorrt", "10.9.0", "NVIDIA H100 (9.0)", "fp16", {"max": [8, 768, 768, 3]}, "ab" * 32)


def installed() -> bool:
    try:
        return bool(tensorrt.load_package("tensorrt-rtx"))
    except MissingExtraError:
        return False


needs_rtx = pytest.mark.skipif(not installed(), reason="needs TensorRT-RTX: pip install 'trace-sdk[tensorrt-rtx]'")


@pytest.fixture(scope="module")
def manifest(make_engine: MakeEngine) -> Manifest:
    import onnx as package

    props = package.load_from_string(make_engine()).metadata_props
    return Manifest.from_metadata({entry.key: entry.value for entry in props}, "tiny")


def test_a_file_says_what_it_was_built_for(manifest: Manifest) -> None:
    data = pack(manifest, BUILT, b"\n\0plan\n")
    assert unpack(data, "e.engine")[:3] == (manifest, BUILT, b"\n\0plan\n")
    for place in range(0, len(data), 7):
        with pytest.raises(EngineError):
            unpack(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :], "e.engine")
    with pytest.raises(EngineError):
        unpack(data[:-1], "e.engine")


@pytest.mark.parametrize(
    ("version", "gpu", "message"),
    [
        ("10.9.0", "NVIDIA H100 (9.0)", None),
        ("10.9.0", "", None),
        ("10.9.1", "NVIDIA H100 (9.0)", "built for tensorrt 10.9.0 .*fp16.*here is 10.9.1"),
        ("10.9.0", "NVIDIA L4 (8.9)", r"built for NVIDIA H100 \(9.0\).*here is NVIDIA L4"),
    ],
)
def test_a_mismatch_says_so_and_how_to_build_again(version: str, gpu: str, message: str | None) -> None:
    if message is None:
        check_built(BUILT, version, gpu, "e.engine")
        return
    with pytest.raises(EngineError, match=message) as raised:
        check_built(BUILT, version, gpu, "e.engine")
    assert "trace-sdk export ENGINE.onnx -o e.engine --runtime tensorrt" in str(raised.value)


def test_plans_for_any_gpu_are_not_refused_for_theirs() -> None:
    check_built(dataclasses.replace(BUILT, gpu=ANY_GPU), "10.9.0", "NVIDIA L4 (8.9)", "e.engine")


def test_opening_a_plan_without_its_runtime(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "e.engine"
    file.write_bytes(pack(manifest, BUILT, b"plan"))
    monkeypatch.setitem(tensorrt.PACKAGES, "tensorrt", (("no_such_module",), "pip install tensorrt"))
    with pytest.raises(MissingExtraError, match="pip install tensorrt"):
        EdgeDetector(file)
    with pytest.raises(DeviceError, match="NVIDIA GPUs only"):
        EdgeDetector(file, device="cpu")
    with pytest.raises(ArgumentError, match="cannot be run by onnxruntime"):
        EdgeDetector(file, runtime="onnxruntime")
    with pytest.raises(ArgumentError, match="'cuda:x'"):
        EdgeDetector(file, device="cuda:x")
    monkeypatch.setattr(tensorrt, "load_package", lambda runtime: SimpleNamespace(__version__="11.0"))
    with pytest.raises(EngineError, match=r"here is 11\.0\. Build it again"):
        EdgeDetector(file)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(EngineError, match="corrupt"):
        EdgeDetector(file)


def test_building_without_the_package(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tensorrt.PACKAGES, "tensorrt-rtx", (("no_such_module",), "pip install x"))
    with pytest.raises(MissingExtraError, match="pip install x"):
        build(make_engine(), "e.onnx", "tensorrt-rtx")
    with pytest.raises(ArgumentError, match="tensorrt-rtx, tensorrt"):
        build(make_engine(), "e.onnx", "openvino")
    with pytest.raises(ArgumentError, match="max_batch=0"):
        build(make_engine(), "e.onnx", "tensorrt-rtx", max_batch=0)


@needs_rtx
def test_a_plan_is_built_without_a_gpu(tiny_engine: Path, tmp_path: Path) -> None:
    out = tmp_path / "tiny.engine"
    done = CliRunner().invoke(main, ["export", f"{tiny_engine}", "-o", f"{out}", "--runtime", "tensorrt-rtx"])
    assert done.exit_code == 0, done.output
    manifest, built, plan, sha256 = unpack(out.read_bytes(), "tiny.engine")
    assert manifest.name == "tiny" and len(plan) > 10_000 and len(sha256) == 64
    assert built.runtime_version == tensorrt.load_package("tensorrt-rtx").__version__ and built.gpu == ANY_GPU
    assert built.profile == {"min": [1, 16, 16, 3], "opt": [1, 128, 128, 3], "max": [8, 1024, 1024, 3]}
    assert built.onnx_sha256 == EdgeDetector(tiny_engine).info["engine_sha256"]
    said = CliRunner().invoke(main, ["info", f"{out}", "--json"])
    assert said.exit_code == 0 and json.loads(said.output)["built"] == dataclasses.asdict(built)


@needs_rtx
def test_bytes_that_move_before_they_are_cast(tiny_engine: Path) -> None:
    """The exporter writes a transpose of uint8, which TensorRT does not have."""
    import onnx as package

    from trace_sdk.engines.manifest import seal

    model = package.load(tiny_engine)
    cast, transpose = model.graph.node[0], model.graph.node[1]
    assert (cast.op_type, transpose.op_type) == ("Cast", "Transpose")
    transpose.input[0], transpose.output[0], cast.input[0], cast.output[0] = "image", "float", "float", "nchw"
    nodes = [transpose, cast, *model.graph.node[2:]]
    model.graph.ClearField("node")
    model.graph.node.extend(nodes)
    said = Manifest.from_metadata({entry.key: entry.value for entry in model.metadata_props}, "tiny").metadata()
    del model.metadata_props[:]
    for key, value in said.items():
        model.metadata_props.add(key=key, value=value)
    assert len(build(seal(model.SerializeToString()), "moved.onnx", "tensorrt-rtx")) > 10_000


@needs_rtx
def test_a_graph_that_it_cannot_parse(tiny_engine: Path) -> None:
    import onnx as package

    from trace_sdk.engines.manifest import seal

    model = package.load(tiny_engine)
    model.graph.node[3].op_type = "NoSuchOperator"
    said = Manifest.from_metadata({entry.key: entry.value for entry in model.metadata_props}, "tiny").metadata()
    del model.metadata_props[:]
    for key, value in said.items():
        model.metadata_props.add(key=key, value=value)
    with pytest.raises(EngineError, match=r"strange.onnx: .* cannot parse its graph"):
        build(seal(model.SerializeToString()), "strange.onnx", "tensorrt-rtx")
    with pytest.raises(EngineError, match="Give the engine that it was made of"):
        build(take_any_size(tiny_engine.read_bytes(), "tiny"), "any.onnx", "tensorrt-rtx")


@needs_rtx
def test_the_cache_is_used_and_damage_is_built_again(
    make_engine: MakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACE_CACHE", f"{tmp_path}/cache")
    engine = make_engine()
    first, why = build_once(engine, "tiny.onnx", "tensorrt-rtx")
    assert why == "built"
    (file,) = (tmp_path / "cache").iterdir()
    assert build_once(engine, "tiny.onnx", "tensorrt-rtx") == (first, "from the cache")
    file.write_bytes(first[:-100])
    again, why = build_once(engine, "tiny.onnx", "tensorrt-rtx")
    assert why.startswith("built again (") and "corrupt" in why
    manifest, built, plan, _ = unpack(again, "e")
    assert file.read_bytes() == again
    file.write_bytes(pack(manifest, dataclasses.replace(built, runtime_version="1.0"), plan))
    assert "here is" in build_once(engine, "tiny.onnx", "tensorrt-rtx")[1]

    def killed(*_: object) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr("trace_sdk.export.tensorrt.pack", killed)
    with pytest.raises(KeyboardInterrupt):
        build_once(make_engine(gain=0.5), "other.onnx", "tensorrt-rtx")
    assert list((tmp_path / "cache").iterdir()) == [file]


@pytest.mark.parametrize(
    ("device", "error", "message"),
    [
        ("cuda:x", ArgumentError, "device='cuda:x' is not known"),
        ("gpu:0", ArgumentError, "device='gpu:0' is not known"),
        ("cpu", DeviceError, "runs on NVIDIA GPUs only"),
    ],
)
def test_a_device_that_cannot_be_is_refused_before_anything_is_built(
    device: str, error: type[Exception], message: str, tiny_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trace_sdk.export.tensorrt.build", lambda *_, **__: 1 / 0)
    with pytest.raises(error, match=message):
        EdgeDetector(tiny_engine, runtime="tensorrt-rtx", device=device)


def test_without_the_onnx_package_it_says_what_needs_it(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trace_sdk.export.any_size.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"^Building for tensorrt-rtx needs the onnx package"):
        build(make_engine(), "e.onnx", "tensorrt-rtx")


def test_unknown_runtimes(tiny_engine: Path) -> None:
    with pytest.raises(ArgumentError, match="not one of auto, onnxruntime"):
        EdgeDetector(tiny_engine, runtime="tvm")
    with pytest.raises(ArgumentError, match=r"cannot be run by torch"):
        EdgeDetector(tiny_engine, runtime="torch")
    assert read_engine(tiny_engine)[1] == str(tiny_engine)
