"""Devices that are not there and networks that fail are errors, and never the CPU without a word."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from numpy.typing import NDArray

from trace_sdk import EdgeDetector
from trace_sdk.engines import onnx, providers
from trace_sdk.engines.gpu_thread import GpuThread
from trace_sdk.errors import ArgumentError, DeviceError, EngineError, OutOfMemoryError

MakeEngine = Callable[..., bytes]
Photo = Callable[..., NDArray[np.uint8]]


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "CUDA", "", 0, None])
def test_unknown_devices(tiny_engine: Path, device: Any) -> None:
    with pytest.raises(ArgumentError, match="'auto', 'cpu', 'cuda' or 'cuda:N'"):
        EdgeDetector(tiny_engine, device=device)


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_cuda_without_cuda_is_an_error(tiny_engine: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: [onnx.CPU])
    with pytest.raises(DeviceError, match="onnxruntime-gpu"):
        EdgeDetector(tiny_engine, device=device)


def test_cuda_that_does_not_start_is_no_silent_cpu(tiny_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = onnx._session
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: [providers.CUDA, onnx.CPU])
    monkeypatch.setattr(onnx, "_session", lambda *given: plain(*given[:-1], [onnx.CPU]))
    with pytest.raises(DeviceError, match="could not start it"):
        EdgeDetector(tiny_engine, device="cuda")
    assert EdgeDetector(tiny_engine).info["device_reason"] == "auto: CUDA did not start"


@pytest.mark.parametrize("gain", [float("nan"), 20.0, -1.0, float("inf")])
def test_wrong_answers_of_the_network_are_errors(
    make_engine: MakeEngine, tmp_path: Path, gain: float, photo: Photo
) -> None:
    (tmp_path / "e.onnx").write_bytes(make_engine(gain=gain))
    with pytest.raises(EngineError, match="answered values from"):
        EdgeDetector(tmp_path / "e.onnx").run(photo(64, 64))


def test_a_provider_that_fails_is_no_silent_cpu(tiny_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime's Python session would print a line, start again on the CPU and answer."""
    from onnxruntime.capi._pybind_state import EPFail

    engine = onnx.OnnxEngine(tiny_engine.read_bytes(), "tiny")
    monkeypatch.setattr(engine._session, "run_with_iobinding", Mock(side_effect=EPFail("device lost")))
    with pytest.raises(EngineError, match="device lost"):
        engine.infer(np.zeros((1, 16, 16, 3), np.uint8))


def test_a_batch_too_large_for_the_device_is_halved_once(
    tiny_engine: Path, monkeypatch: pytest.MonkeyPatch, photo: Photo
) -> None:
    engine = onnx.OnnxEngine(tiny_engine.read_bytes(), "tiny")
    batch = np.stack([photo(16, 16, seed) for seed in range(6)])
    expected, engine._gpu_thread = engine.infer(batch), GpuThread("tiny")
    sizes: list[int] = []
    room, word = 3, "BFCArena: Failed to allocate memory for requested buffer of size 9"
    whole, held = engine._session.run_with_iobinding, engine._bound._bound

    def run(binding: Any, options: Any) -> None:
        sizes.append(next(reversed(held))[0])
        if sizes[-1] > room:
            raise RuntimeError(word)
        whole(binding, options)

    monkeypatch.setattr(engine._session, "run_with_iobinding", run)
    np.testing.assert_allclose(engine.infer(batch), expected, atol=1e-6)
    assert sizes == [6, 3, 3]
    assert {shape[0] for shape in held} == {1, 3}, "the batch that failed keeps no memory"
    room = 2
    with pytest.raises(
        OutOfMemoryError, match=r"smaller batch \(here 6, half of it was tried\).*size \(here 16x16.*BFCArena"
    ):
        engine.infer(batch)
    assert sizes[3:] == [6, 3], "halved once"
    np.testing.assert_allclose(engine.infer(batch[:2]), expected[:2], atol=1e-6)
    room = 0
    with pytest.raises(OutOfMemoryError, match=r"memory of cpu is too small. Use a smaller size \(here 16x16"):
        engine.infer(batch[:1])
    word = "device lost"
    with pytest.raises(EngineError, match="device lost"):
        engine.infer(batch)
