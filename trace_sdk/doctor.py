"""What works on this machine and what is missing: each provider of onnxruntime with one node, engines, extras.

    echo CPUExecutionProvider | python -m trace_sdk.doctor

tries one provider and answers in JSON; each gets a process of its own, since one that does not suit the machine may
end it.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

from trace_sdk.engines import BUNDLED
from trace_sdk.errors import TraceError

PATIENCE = 120  # seconds for one provider; TensorRT loads gigabytes
_RUNTIMES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino", "onnxruntime-qnn")
_REMOTE = "AzureExecutionProvider"  # asks a server
WHAT_EXTRAS_ADD = {
    "train": "pretrain, label, distill, export: torch, diffusers, onnx",
    "kernels": "the teacher's Triton kernels on an NVIDIA GPU",
    "instances": "instances, refine, panoptic, prompts, gallery",
    "evaluate": "evaluate, and Canny in benchmark",
    "video": "detect on videos",
    "heic": "photos of iPhones",
    "serve": "serve",
    "ray": "label on a Ray cluster",
    "tensorrt-rtx": "TensorRT-RTX engines, and pinned memory on GPUs",
}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: `kind` "provider", "engine" or "extra"; `detail`: how it went, or what to do."""

    kind: str
    name: str
    works: bool
    detail: str


def examine() -> Iterator[Finding]:
    """Look at everything, the slow ones last to come. Never raises for what it finds."""
    yield from _two_runtimes()
    yield from _providers()
    yield from map(_engine, BUNDLED)
    yield from _extras()


def _providers() -> Iterator[Finding]:
    import onnxruntime

    from trace_sdk.engines.providers import CUDA

    for provider in onnxruntime.get_available_providers():
        if provider != _REMOTE:
            yield _tried(provider)
    if CUDA not in onnxruntime.get_available_providers():
        swap = 'pip uninstall -y onnxruntime && pip install "onnxruntime-gpu[cuda,cudnn]"'
        yield Finding("provider", CUDA, False, f"not in this onnxruntime; with an NVIDIA GPU: {swap}")


def _two_runtimes() -> Iterator[Finding]:
    """All wheels of onnxruntime write to one folder: with two of them a GPU may be left out without a word."""
    there = [name for name in _RUNTIMES if _installed(name)]
    if len(there) > 1:
        swap = f"pip uninstall -y {' '.join(there)}, then pip install the one that is wanted"
        yield Finding("provider", " and ".join(there), False, f"installed over each other: {swap}")


def _tried(provider: str) -> Finding:
    try:
        done = subprocess.run(
            [sys.executable, "-m", "trace_sdk.doctor"],
            input=provider, capture_output=True, text=True, errors="replace", timeout=PATIENCE, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Finding("provider", provider, False, f"did not answer in {PATIENCE} s")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        return Finding("provider", provider, False, f"its process ended with code {done.returncode} ({last})")
    outcome = json.loads(done.stdout.splitlines()[-1])
    return Finding("provider", provider, outcome["works"], outcome["detail"])


def _engine(name: str) -> Finding:
    from trace_sdk.detector import EdgeDetector

    try:
        start = time.perf_counter()
        detector = EdgeDetector(name)
        detector.warmup()
        info = detector.info
        seconds = time.perf_counter() - start
        detail = f"opened and answered in {seconds:.1f} s on {info['device']} ({info['device_reason']})"
        return Finding("engine", name, True, detail)
    except TraceError as error:
        return Finding("engine", name, False, str(error))


def _extras() -> Iterator[Finding]:
    for extra, adds in WHAT_EXTRAS_ADD.items():
        missing = sorted(name for name in packages_of(extra) if not _installed(name))
        detail = f'pip install "trace-sdk[{extra}]" (lacks {", ".join(missing)})' if missing else "installed"
        yield Finding("extra", extra, not missing, f"{adds}: {detail}")


def packages_of(extra: str) -> set[str]:
    """Names of the packages that `trace-sdk[extra]` asks for, those of the extras it contains included."""
    found: set[str] = set()
    for line in importlib.metadata.requires("trace-sdk") or ():
        requirement, _, marker = line.partition(";")
        if re.search(rf"extra\s*==\s*['\"]{re.escape(extra)}['\"]", marker) is None:
            continue
        name, inner = re.match(r"([\w.-]+)(?:\[([\w,.-]+)\])?", requirement.strip()).groups()  # type: ignore[union-attr]
        if name.replace("_", "-").lower() == "trace-sdk":
            found |= {package for part in (inner or "").split(",") for package in packages_of(part)}
        else:
            found.add(name)
    return found


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def one_node_model() -> bytes:
    """y = −x on two float32 numbers, as a serialised ONNX ModelProto, without the onnx package."""
    dimension = _message((1, 2))
    tensor = _message((1, 1), (2, _message((1, dimension))))  # float32, its shape
    kind = _message((1, tensor))
    node = _message((1, b"x"), (2, b"y"), (3, b"one"), (4, b"Neg"))
    ends = [(number, _message((1, name), (2, kind))) for number, name in ((11, b"x"), (12, b"y"))]
    graph = _message((1, node), (2, b"one"), *ends)
    return _message((1, 8), (7, graph), (8, _message((2, 13))))


def _message(*fields: tuple[int, int | bytes]) -> bytes:
    """Protobuf of small numbers and short contents, each below 128."""
    parts = []
    for number, value in fields:
        if isinstance(value, int):
            parts.append(bytes([number << 3, value]))
        else:
            parts.append(bytes([number << 3 | 2, len(value)]) + value)
    return b"".join(parts)


def main() -> None:
    """Try the provider named on stdin; its outcome goes to stdout."""
    provider = sys.stdin.readline().strip()
    import numpy as np
    import onnxruntime

    from trace_sdk.engines.providers import load_libraries

    load_libraries()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    works, detail = False, ""
    try:
        session = onnxruntime.InferenceSession(one_node_model(), options, providers=[provider], enable_fallback=False)
        start = time.perf_counter()
        (answer,) = session.run(None, {"x": np.array([1, -2], np.float32)})
        milliseconds = (time.perf_counter() - start) * 1e3
        if session.get_providers()[0] != provider:
            detail = "did not start: check the driver (nvidia-smi) and the libraries it needs"
        elif answer.tolist() != [-1, 2]:
            detail = f"answered {answer.tolist()} to −[1, −2]"
        else:
            works, detail = True, f"ran one node in {milliseconds:.1f} ms"
    except Exception as error:  # onnxruntime's exceptions share no base class
        detail = (str(error).splitlines() or [type(error).__name__])[0]
    print(json.dumps({"works": works, "detail": detail}))


if __name__ == "__main__":
    main()
