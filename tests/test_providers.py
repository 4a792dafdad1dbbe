"""Which provider an engine gets and what it is told; GPUs are made up, see tests/gpu for real ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from trace_sdk import EdgeDetector
from trace_sdk.engines import onnx, providers
from trace_sdk.engines.manifest import Manifest
from trace_sdk.engines.model_proto import read_metadata
from trace_sdk.engines.providers import CPU, CUDA, TENSORRT, FixedSessions, profile, tensorrt_cache, tensorrt_options
from trace_sdk.errors import ArgumentError, DeviceError, EngineError

MakeEngine = Callable[..., bytes]
Providers = list[Any]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Providers]:
    """onnxruntime seems to have everything; each session starts on the CPU, and what it was given is kept here."""
    plain, given = onnx._session, []

    def session(*arguments: Any) -> onnxruntime.InferenceSession:
        given.append(arguments[-1])
        return plain(*arguments[:-1], [CPU])

    monkeypatch.setenv("TRACE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: [TENSORRT, CUDA, CPU])
    monkeypatch.setattr(onnx, "_session", session)
    monkeypatch.setattr(providers, "_tensorrt_version", lambda: "10.14.1")
    monkeypatch.setattr(providers, "gpu_name", lambda number: f"NVIDIA L4/{number} (8.9)")
    return given


@pytest.fixture
def manifest(make_engine: MakeEngine) -> Manifest:
    return Manifest.from_metadata(read_metadata(make_engine(), "tiny"), "tiny")


def test_the_profile_is_that_of_the_known_shapes(manifest: Manifest) -> None:
    assert profile(manifest, []) == {"min": [1, 16, 16, 3], "opt": [1, 128, 128, 3], "max": [8, 1024, 1024, 3]}
    shapes = [(64, 128), (96, 128), (128, 128), (128, 96), (128, 64)]
    assert profile(manifest, shapes) == {"min": [1, 64, 64, 3], "opt": [1, 128, 128, 3], "max": [8, 128, 128, 3]}


def test_tensorrt_keeps_engines_and_timings_where_nothing_else_fits(tmp_path: Path, manifest: Manifest) -> None:
    options = tensorrt_options(1, tmp_path, "ab" * 32, profile(manifest, [(64, 128)]))
    assert options == {
        "device_id": 1,
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(tmp_path),
        "trt_engine_cache_prefix": "ab" * 8,
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": str(tmp_path),
        "trt_profile_min_shapes": "image:1x64x128x3",
        "trt_profile_opt_shapes": "image:1x64x128x3",
        "trt_profile_max_shapes": "image:8x64x128x3",
    }
    assert not any("profile" in name for name in tensorrt_options(0, tmp_path, "ab" * 32, None))


def test_the_cache_is_another_for_each_thing_that_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    said = ("ab" * 32, "fp16", "10.14.1", "NVIDIA L4 (8.9)")
    folders = {tensorrt_cache(*said)}
    for place, other in enumerate(["cd" * 32, "bf16", "10.15", "NVIDIA L4 (9.0)"]):
        folders.add(tensorrt_cache(*said[:place], other, *said[place + 1 :]))
    monkeypatch.setattr("onnxruntime.__version__", "9.9")
    folders.add(tensorrt_cache(*said))
    assert len(folders) == 6 and len({folder.parent for folder in folders}) == 1, "one folder each, no path in a name"
    assert tensorrt_cache(*said[:3], "A/../B").parent == tensorrt_cache(*said).parent


def test_tensorrt_that_does_not_start_is_no_silent_cuda(tiny_engine: Path, started: list[Providers]) -> None:
    with pytest.raises(DeviceError, match=r"could not start it.*onnxruntime-gpu.*TensorRT 10"):
        EdgeDetector(tiny_engine, device="cuda:1", runtime="onnxruntime-tensorrt", buckets=[64, 128])
    (((name, options), (cuda, _), cpu),) = started
    assert (name, cuda, cpu) == (TENSORRT, CUDA, CPU)
    assert options["device_id"] == 1 and options["trt_profile_max_shapes"] == "image:8x128x128x3"
    assert (
        "10.14.1_NVIDIA-L4-1--8.9-" in options["trt_engine_cache_path"]
        and Path(options["trt_engine_cache_path"]).is_dir()
    )


def test_a_graph_that_tensorrt_takes_in_parts_gets_no_profile(
    tiny_engine: Path, started: list[Providers], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = onnx._session

    def refused(*arguments: Any) -> onnxruntime.InferenceSession:
        if "trt_profile_min_shapes" in arguments[-1][0][1]:
            started.append(arguments[-1])
            raise EngineError("Following input(s) has no associated shape profiles provided: /x/y")
        opened = session(*arguments)
        monkeypatch.setattr(opened, "get_providers", lambda: [TENSORRT, CUDA, CPU])
        return opened

    monkeypatch.setattr(onnx, "_session", refused)
    detector = EdgeDetector(tiny_engine, device="cuda", runtime="onnxruntime-tensorrt")
    assert len(started) == 2 and "in parts" in detector.info["device_reason"]
    assert detector.info["provider"] == TENSORRT


def test_what_a_killed_process_left_in_the_cache_is_built_again(
    tiny_engine: Path, started: list[Providers], monkeypatch: pytest.MonkeyPatch
) -> None:
    session, damaged = onnx._session, True

    def picky(*arguments: Any) -> onnxruntime.InferenceSession:
        folder = Path(arguments[-1][0][1]["trt_engine_cache_path"])
        if any(folder.iterdir()):
            raise EngineError("TensorRT EP could not deserialize engine from cache")
        if damaged:
            (folder / "half.engine").write_bytes(b"half")
        opened = session(*arguments)
        monkeypatch.setattr(opened, "get_providers", lambda: [TENSORRT, CUDA, CPU])
        return opened

    monkeypatch.setattr(onnx, "_session", picky)
    opened = [EdgeDetector(tiny_engine, device="cuda", runtime="onnxruntime-tensorrt") for _ in range(2)]
    assert [detector.info["device_reason"] for detector in opened] == [
        "asked for",
        "asked for; built again (TensorRT EP could not deserialize engine from cache)",
    ]


@pytest.mark.parametrize("lacking", ["provider", "libraries", "device"])
def test_onnxruntimes_tensorrt_that_is_not_there(
    lacking: str, tiny_engine: Path, started: list[Providers], monkeypatch: pytest.MonkeyPatch
) -> None:
    if lacking == "provider":
        monkeypatch.setattr("onnxruntime.get_available_providers", lambda: [CUDA, CPU])
    if lacking == "libraries":
        monkeypatch.setattr(providers, "_tensorrt_version", lambda: "")
    with pytest.raises(DeviceError, match=r"onnxruntime-gpu.*TensorRT 10"):
        EdgeDetector(tiny_engine, device="cpu" if lacking == "device" else "auto", runtime="onnxruntime-tensorrt")
    assert not started


def test_known_shapes_ask_for_cuda_graphs(
    tiny_engine: Path, started: list[Providers], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DeviceError, match="could not start it"):
        EdgeDetector(tiny_engine, device="cuda:2", buckets=[64])
    assert started == [[(CUDA, {"device_id": 2, "enable_cuda_graph": "1"}), CPU]]
    started.clear()
    assert EdgeDetector(tiny_engine).info["device"] == "cpu"
    assert started[0] == [(CUDA, {"device_id": 0}), CPU]


@pytest.mark.parametrize("fixed", [False, True])
def test_a_model_that_cannot_be_captured_for_any_shape(
    tiny_engine: Path, started: list[Providers], monkeypatch: pytest.MonkeyPatch, fixed: bool
) -> None:
    """Then it is for one shape; or else it runs without graphs, and says so."""
    session, opened_for = onnx._session, []

    def refused(*arguments: Any, sizes: dict[str, int] | None = None) -> onnxruntime.InferenceSession:
        capture = isinstance(arguments[-1][0], tuple) and "enable_cuda_graph" in arguments[-1][0][1]
        if capture and not (fixed and sizes):
            raise EngineError("This session cannot use the graph capture feature")
        if sizes:
            opened_for.append(sizes)
        opened = session(*arguments)
        monkeypatch.setattr(opened, "get_providers", lambda: [CUDA, CPU])
        return opened

    monkeypatch.setattr(onnx, "_session", refused)
    info = EdgeDetector(tiny_engine, device="cuda", buckets=[64]).info
    assert info["provider"] == CUDA and info["device"] == "cuda:0"
    if fixed:
        assert info["device_reason"] == "asked for, a session for each known shape"
        assert [list(sizes.values()) for sizes in opened_for] == [[1, 64, 64]]
    else:
        assert info["device_reason"].startswith("asked for, without CUDA graphs (This session cannot")


def test_a_session_of_one_shape_takes_no_other(tiny_engine: Path) -> None:
    start = partial(onnx._session, tiny_engine.read_bytes(), "tiny", 1, None)
    general = start([CPU])
    fixed = FixedSessions(lambda providers, *, sizes: start([CPU], sizes=sizes), 0, general)
    picture = np.random.default_rng(0).integers(0, 256, (1, 64, 96, 3), np.uint8)
    session = fixed((64, 96))
    assert session is fixed((64, 96)) and session.get_inputs()[0].shape == [1, 64, 96, 3]
    (answer,), (expected,) = (one.run(None, {"image": picture}) for one in (session, general))
    np.testing.assert_allclose(answer, expected, atol=1e-6)
    with pytest.raises(Exception, match="invalid dimensions"):
        session.run(None, {"image": picture[:, :, :64]})


def test_wrong_buckets_are_refused_before_anything_is_loaded(tiny_engine: Path, started: list[Providers]) -> None:
    with pytest.raises(ArgumentError, match="multiples of 8"):
        EdgeDetector(tiny_engine, device="cuda", runtime="onnxruntime-tensorrt", buckets=[60])
    assert not started
