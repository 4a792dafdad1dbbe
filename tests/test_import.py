from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import trace_sdk

ROOT = Path(__file__).parents[1]


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_import_is_light() -> None:
    code = (
        "import sys, time; before = time.process_time(); import trace_sdk;"
        "print(time.process_time() - before, 'torch' in sys.modules, 'onnxruntime' in sys.modules)"
    )
    seconds, *heavy = min(python(code).split() for _ in range(3))
    assert heavy == ["False", "False"]
    assert float(seconds) <= 0.06


@pytest.mark.parametrize(
    "module", ["detector", "edge_map", "images", "tiling", "engines.onnx", "engines.mock", "cli.detect", "cli.info"]
)
def test_the_runtime_needs_no_torch(module: str) -> None:
    heavy = "('torch', 'scipy', 'onnx', 'cv2', 'diffusers')"
    code = f"import sys, trace_sdk.{module}; print([name for name in {heavy} if name in sys.modules])"
    assert python(code).strip() == "[]"


def test_help_imports_no_command() -> None:
    code = (
        "import sys; from trace_sdk.cli import main; main(['--help'], standalone_mode=False);"
        "print([m for m in sys.modules if m.startswith('trace_sdk.cli.') and m != 'trace_sdk.cli.console'])"
    )
    assert python(code).splitlines()[-1] == "[]"


def test_exported_names_are_pinned() -> None:
    assert trace_sdk.__all__ == ["EdgeDetector", "EdgeMap", "MockEngine", "TraceError", "__version__", "detect"]
    assert dir(trace_sdk) == sorted(trace_sdk.__all__)
    assert all(hasattr(trace_sdk, name) for name in trace_sdk.__all__)
    with pytest.raises(AttributeError, match="no attribute 'missing'"):
        _ = trace_sdk.missing


def test_a_package_named_kernels_is_not_our_folder() -> None:
    spec = find_spec("kernels")
    assert spec is None or ROOT not in Path(spec.origin or "/").parents
