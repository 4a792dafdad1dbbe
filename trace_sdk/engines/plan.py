"""TensorRT engine files: a plan, the manifest of the engine it was built of, and what it was built for; sealed."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trace_sdk.engines.manifest import Manifest, seal, verify_seal
from trace_sdk.errors import EngineError

MAGIC = b"trace-sdk plan 1\n"
ANY_GPU = "any"


@dataclass(frozen=True)
class Built:
    """Where a plan came from and where it runs.

    Attributes:
        runtime: "tensorrt-rtx" or "tensorrt".
        runtime_version: of that package; a plan runs on no other.
        gpu: name and compute capability of the GPU it was built on; ANY_GPU for TensorRT-RTX, which builds for the RTX
            GPUs that it knows and finishes the work on the GPU it meets.
        precision: of the ONNX file's weights and arithmetic, which TensorRT keeps.
        profile: shapes of `image`, [batch, height, width, 3]: smallest, best, largest.
        onnx_sha256: of the engine file that it was built of.
    """

    runtime: str
    runtime_version: str
    gpu: str
    precision: str
    profile: dict[str, list[int]]
    onnx_sha256: str


def is_plan(file: Path) -> bool:
    """Whether a file is one of these, whatever its name; not one that cannot be read: opening it says why."""
    try:
        with file.open("rb") as stream:
            return stream.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def pack(manifest: Manifest, built: Built, plan: bytes) -> bytes:
    """Bytes of an engine file."""
    head = json.dumps({**manifest.metadata(), "built": asdict(built)}).encode()
    return seal(MAGIC + head + b"\n" + plan)


def unpack(data: bytes, source: str) -> tuple[Manifest, Built, bytes, str]:
    """Manifest, what it was built for, plan, and the file's sha256.

    Raises:
        EngineError: not whole, or not one of ours.
    """
    sha256 = verify_seal(data, source)
    head, _, plan = data.removeprefix(MAGIC).partition(b"\n")
    try:
        record: dict[str, Any] = json.loads(head)
        built = Built(**record["built"])
    except (ValueError, KeyError, TypeError) as error:
        raise EngineError(f"{source}: says nothing readable about what it was built for ({error!r}).") from error
    return Manifest.from_metadata(record, source), built, plan, sha256
