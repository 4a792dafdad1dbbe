"""A student's folder, run in torch without an export."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from trace_sdk import EdgeDetector
from trace_sdk.errors import ArgumentError, DeviceError, EngineError, MissingExtraError
from trace_sdk.student.model import Student


@pytest.mark.parametrize("runtime", ["auto", "torch.compile"])
def test_a_student_runs_in_torch_as_its_engine_does(
    runtime: str, engine: Path, student: Student, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[object] = []
    # The compiler itself would take a minute and a C++ compiler; it is torch's to test.
    monkeypatch.setattr(torch, "compile", lambda model, **_: compiled.append(model) or model)
    rounded = copy.deepcopy(student)
    with torch.no_grad():
        for value in rounded.parameters():
            value.copy_(value.half().float())
    rounded.save(tmp_path / "mine", {})
    in_torch = EdgeDetector(tmp_path / "mine", device="cpu", size=96, runtime=runtime)
    in_onnx = EdgeDetector(engine, device="cpu", size=96)
    for photo in (photos / "a.png", photos / "b.jpg"):
        edges, expected = in_torch.run(photo), in_onnx.run(photo)
        np.testing.assert_allclose(edges.probability, expected.probability, atol=1e-4)
    together = in_torch.run_batch([photos / "a.png", photos / "b.jpg"])
    np.testing.assert_array_equal(together[1].probability, edges.probability)
    info, theirs = in_torch.info, in_onnx.info
    assert info["engine"] == "mine" and info["threshold"] == theirs["threshold"]
    assert bool(compiled) == info["provider"].endswith("compiled") == (runtime == "torch.compile")
    for name in ("multiple_of", "min_size", "max_size", "backbone"):
        assert getattr(in_torch.manifest, name) == getattr(in_onnx.manifest, name), name


def test_torch_takes_no_more_cores_than_a_container_gives(
    student: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student.save(tmp_path / "mine", {})
    monkeypatch.setattr("trace_sdk.engines.torch.usable_cpus", lambda: 2)
    before = torch.get_num_threads()
    try:
        for torchs, given, found in ((3, None, 2), (1, None, 1), (1, 3, 3)):
            torch.set_num_threads(torchs)
            assert EdgeDetector(tmp_path / "mine", device="cpu", threads=given).info["threads"] == found
            assert torch.get_num_threads() == found
    finally:
        torch.set_num_threads(before)


def test_a_student_that_torch_cannot_run(student: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student.save(tmp_path / "mine", {})
    with pytest.raises(ArgumentError, match="onnxruntime cannot run"):
        EdgeDetector(tmp_path / "mine", runtime="onnxruntime")
    with pytest.raises(EngineError, match=r"no student\.json"):
        EdgeDetector(tmp_path)
    if not torch.cuda.is_available():
        with pytest.raises(DeviceError, match="sees no GPU"):
            EdgeDetector(tmp_path / "mine", device="cuda")
    monkeypatch.setattr("trace_sdk.engines.torch.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"trace-sdk\[train\]"):
        EdgeDetector(tmp_path / "mine")
