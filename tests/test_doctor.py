from __future__ import annotations

import importlib.metadata
import json
import subprocess
from types import SimpleNamespace
from typing import Any

import onnxruntime
import pytest
from click.testing import CliRunner

from trace_sdk import doctor
from trace_sdk.cli import main
from trace_sdk.doctor import WHAT_EXTRAS_ADD, one_node_model, packages_of


def test_the_one_node_is_a_valid_model() -> None:
    import onnx

    model = onnx.load_from_string(one_node_model())
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["Neg"]


def test_every_extra_is_told() -> None:
    extras = set(importlib.metadata.metadata("trace-sdk").get_all("Provides-Extra") or ())
    assert set(WHAT_EXTRAS_ADD) == extras - {"dev"}
    assert {"torch", "diffusers", "onnx"} <= packages_of("train") <= packages_of("ray") and "ray" in packages_of("ray")
    assert packages_of("instances") < packages_of("video") and packages_of("no such extra") == set()


def test_by_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_installed", lambda package: package != "diffusers")
    result = CliRunner().invoke(main, ["doctor", "--json"])
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    found = {(one["kind"], one["name"]): one for one in said["findings"]}
    assert found["provider", "CPUExecutionProvider"]["works"]
    assert "ran one node in" in found["provider", "CPUExecutionProvider"]["detail"]
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        assert "onnxruntime-gpu" in found["provider", "CUDAExecutionProvider"]["detail"]
    assert found["engine", "trace-nano"]["works"] and "answered in" in found["engine", "trace-small"]["detail"]
    assert not found["extra", "train"]["works"] and "lacks diffusers" in found["extra", "train"]["detail"]
    assert 'pip install "trace-sdk[train]"' in found["extra", "train"]["detail"]
    assert found["extra", "instances"]["works"] and said["machine"]["numpy"]


def test_two_wheels_of_onnxruntime_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(doctor._two_runtimes()) == []
    monkeypatch.setattr(doctor, "_installed", lambda package: package in ("onnxruntime", "onnxruntime-gpu"))
    (finding,) = doctor._two_runtimes()
    assert finding.name == "onnxruntime and onnxruntime-gpu" and not finding.works
    assert "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install" in finding.detail
    assert next(doctor.examine()) == finding


def test_what_does_not_work_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def process(*_: Any, **__: Any) -> Any:
        return SimpleNamespace(returncode=-11, stderr="libcudart: no\n", stdout="")

    monkeypatch.setattr(subprocess, "run", process)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", doctor._REMOTE])
    assert list(doctor._providers()) == [
        doctor.Finding("provider", "CUDAExecutionProvider", False, "its process ended with code -11 (libcudart: no)")
    ]
    monkeypatch.setattr(doctor, "BUNDLED", ("missing",))
    result = CliRunner().invoke(main, ["doctor"])
    assert '"trace-sdk[ray]"' in result.output or "Ray cluster: installed" in result.output, "brackets are no markup"
    assert result.exit_code == 1 and "No engine is called 'missing'" in result.output.replace("\n", " ")


def test_a_provider_that_is_not_there() -> None:
    found = doctor._tried("NoSuchProvider")
    assert not found.works and "NoSuchProvider" in found.detail
