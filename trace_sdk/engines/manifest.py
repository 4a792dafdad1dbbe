"""What an engine file says about itself, and the seal that shows the file is whole."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

from trace_sdk.errors import EngineError

FORMAT_VERSION = 1
PADDED, ANY_SIZE = "padded", "any size"
ANSWER_TYPES = ("float32", "float16", "uint8")
_MARKER = b"trace-sha256:"
_PLACEHOLDER = b"0" * 64
_NEWER = {"format_version", "input", "output", "data"}  # fields that not every engine has
_SEAL = re.compile(re.escape(_MARKER) + rb"([0-9a-f]{64})")


@dataclass(frozen=True)
class Manifest:
    """Everything about an engine that is not weights.

    Attributes:
        name: the engine's name, such as "trace-small".
        trace_sdk_version: version of trace-sdk that exported it.
        backbone: family of the denoiser, such as "pixel".
        backbone_sha256: sha256 of the backbone's weights, hexadecimal.
        decoder: name and form of the edge decoder.
        multiple_of: height and width of the network's input are multiples of it, pixels.
        min_size: shortest side that the graph takes, pixels; a multiple of `multiple_of`.
        max_size: longest side in one piece, pixels, a multiple of `multiple_of`; beyond it, tiles.
        default_size: longest side that the network sees unless told otherwise, pixels.
        threshold: calibrated probability from which a pixel counts as edge, in (0, 1).
        precision: of the weights, such as "fp16".
        opset: ONNX operator set.
        producers: package → version of what made the file.
        quality: figures measured for this engine.
        parity: differences from torch, measured at export: largest; for int8 mean.
        licence: SPDX name of the licence of the weights.
        created: ISO 8601 date and time, UTC.
        commit: git commit that exported it.
        format_version: of this record.
        input: "padded": whoever calls the graph scales and pads as the sizes above say. "any size": the graph does, to
            `default_size`, and answers at the photo's own size; `multiple_of`, `min_size` and `max_size` are then those
            of the network inside.
        output: dtype of the answers, "float32" or "float16" in [0, 1], or "uint8", 255 times that.
        data: of weights that one file cannot hold: name of the file beside it that has them, bytes, sha256; else empty.
    """

    name: str
    trace_sdk_version: str
    backbone: str
    backbone_sha256: str
    decoder: str
    multiple_of: int
    min_size: int
    max_size: int
    default_size: int
    threshold: float
    precision: str
    opset: int
    producers: dict[str, str]
    quality: dict[str, Any]
    parity: dict[str, Any]
    licence: str
    created: str
    commit: str
    format_version: int = FORMAT_VERSION
    input: str = PADDED
    output: str = "float32"
    data: dict[str, Any] = field(default_factory=dict)

    def metadata(self) -> dict[str, str]:
        """The ONNX metadata_props of this engine; the sha256 is filled in by `seal`."""
        return {
            "trace_sdk": json.dumps(asdict(self), sort_keys=True),
            "sha256": (_MARKER + _PLACEHOLDER).decode(),
        }

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], path: str | Path) -> Manifest:
        """Read the record back; `path` is for messages.

        Raises:
            EngineError: the record is missing, incomplete, out of range or of a newer format.
        """
        if "trace_sdk" not in metadata:
            raise EngineError(_foreign(path))
        try:
            record = json.loads(metadata["trace_sdk"])
            version = record["format_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise EngineError(f"{path}: its manifest cannot be read ({error!r}). Export it again.") from error
        if version != FORMAT_VERSION:
            raise EngineError(
                f"{path}: is of engine format {version}, this trace-sdk reads {FORMAT_VERSION}. "
                "Update trace-sdk (pip install -U trace-sdk) or export the engine again."
            )
        _check_fields(record, path)
        manifest = cls(**record)
        manifest._check_ranges(path)
        return manifest

    def _check_ranges(self, path: str | Path) -> None:
        sizes_fit = 1 <= self.min_size <= self.default_size <= self.max_size and self.multiple_of >= 1
        if not sizes_fit or self.min_size % self.multiple_of or self.max_size % self.multiple_of:
            raise EngineError(
                f"{path}: its sizes contradict each other (smallest {self.min_size}, default "
                f"{self.default_size}, largest {self.max_size}, multiples of {self.multiple_of}). "
                "Export it again."
            )
        if self.input not in (PADDED, ANY_SIZE) or self.output not in ANSWER_TYPES:
            raise EngineError(
                f"{path}: input={self.input!r} or output={self.output!r} is not known to this trace-sdk. Update it "
                "(pip install -U trace-sdk), or export the engine again."
            )
        if not 0 < self.threshold < 1:
            raise EngineError(f"{path}: threshold={self.threshold} is not between 0 and 1. Export it again.")


def seal(model: bytes) -> bytes:
    """Put the sha256 of an exported model into its own metadata.

    The sum is taken over the whole file with the 64 digits as zeros. The length does not change.

    Raises:
        EngineError: the model does not hold `Manifest.metadata()` exactly once.
    """
    start = _digits(model, "the exported model")
    blank = model[:start] + _PLACEHOLDER + model[start + 64 :]
    return blank[:start] + hashlib.sha256(blank).hexdigest().encode() + blank[start + 64 :]


def verify_seal(model: bytes, path: str | Path) -> str:
    """Check that an engine file is whole and return its sha256 (hexadecimal); `path` is for messages.

    Raises:
        EngineError: not an engine of trace-sdk, or not the bytes that were exported.
    """
    start = _digits(model, path)
    said = model[start : start + 64].decode()
    digest = hashlib.sha256(memoryview(model)[:start])
    digest.update(_PLACEHOLDER)
    digest.update(memoryview(model)[start + 64 :])
    if said != digest.hexdigest():
        raise EngineError(
            f"{path}: is corrupt, its content is not what was exported (sha256 differs). "
            "Download it again, or export it again with `trace-sdk export`."
        )
    return said


def verify_data(manifest: Manifest, path: str | Path) -> Path | None:
    """Check the weights that lie beside an engine file; the folder they are in, or None where all are inside.

    Raises:
        EngineError: the file is missing, cut short, or not the one that was exported; names it and says what to do.
    """
    if not manifest.data:
        return None
    try:
        name, size, sha256 = str(manifest.data["file"]), manifest.data["bytes"], manifest.data["sha256"]
    except KeyError as error:
        raise EngineError(f"{path}: its manifest says too little of its weights. Export it again.") from error
    file = Path(path).with_name(Path(name).name)
    again = f"Copy it again from where {Path(path).name} came from, or export the student again."
    if not file.is_file():
        raise EngineError(f"{file} is missing: {Path(path).name} keeps its weights there. {again}")
    if file.stat().st_size != size:
        raise EngineError(
            f"{file} has {file.stat().st_size:,} bytes instead of {size:,}: cut short or of another engine. {again}"
        )
    with file.open("rb") as stream:
        if hashlib.file_digest(stream, "sha256").hexdigest() != sha256:
            raise EngineError(f"{file} does not hold the weights of {Path(path).name} (sha256 differs). {again}")
    return file.parent


def check_one_file(manifest: Manifest, path: str | Path, what: str) -> None:
    """Raise EngineError if weights lie beside an engine file, where `what` needs them inside."""
    if manifest.data:
        raise EngineError(
            f"{path}: {what} needs an engine in one file, and its weights lie beside it in {manifest.data['file']}. "
            "Use it as it is, with onnxruntime."
        )


def _digits(model: bytes, path: str | Path) -> int:
    places = [match.start(1) for match in _SEAL.finditer(model)]
    if not places:
        raise EngineError(_foreign(path))
    if len(places) > 1:
        raise EngineError(f"{path}: holds {len(places)} seals instead of one. Export it again.")
    return places[0]


def _foreign(path: str | Path) -> str:
    return (
        f"{path}: is not a trace-sdk engine, or is cut short. Download it again, or make one with `trace-sdk export`."
    )


def _check_fields(record: dict[str, Any], path: str | Path) -> None:
    kinds = {"str": str, "int": int, "float": (int, float), "dict": dict}
    hints = get_type_hints(Manifest)
    expected = {field.name: getattr(hints[field.name], "__name__", "dict") for field in fields(Manifest)}
    absent = _NEWER - record.keys()
    wrong = sorted((expected.keys() ^ record.keys()) - absent) or sorted(
        name
        for name, kind in expected.items()
        if name not in absent and (not isinstance(record[name], kinds[kind]) or isinstance(record[name], bool))  # type: ignore[arg-type]
    )
    if wrong:
        raise EngineError(f"{path}: its manifest is wrong at {', '.join(wrong)}. Export it again.")
