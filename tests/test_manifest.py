from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from trace_sdk.engines import BUNDLED, open_engine
from trace_sdk.engines.manifest import Manifest, seal, verify_seal
from trace_sdk.errors import EngineError

MakeEngine = Callable[..., bytes]


def manifest_of(model: bytes) -> Manifest:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return Manifest.from_metadata(session.get_modelmeta().custom_metadata_map, "engine")


def test_everything_comes_back_from_the_file(make_engine: MakeEngine) -> None:
    changes = {"name": "café", "quality": {"ODS": 0.61, "sets": {"bsds": [1, 2]}}, "threshold": 0.37}
    said = asdict(manifest_of(make_engine(**changes)))
    assert {key: said[key] for key in changes} == changes
    assert said["format_version"] == 1


def test_seal_is_the_sha256_with_zeros_in_its_place(make_engine: MakeEngine) -> None:
    model = make_engine()
    digest = verify_seal(model, "engine")
    assert model.count(digest.encode()) == 1
    assert hashlib.sha256(model.replace(digest.encode(), b"0" * 64)).hexdigest() == digest
    assert seal(model) == model


def test_every_flipped_byte_is_noticed(make_engine: MakeEngine) -> None:
    model = make_engine()
    for place in range(0, len(model), 7):
        broken = model[:place] + bytes([model[place] ^ 1]) + model[place + 1 :]
        with pytest.raises(EngineError):
            verify_seal(broken, "engine")


def test_seal_needs_its_place_exactly_once() -> None:
    with pytest.raises(EngineError, match="not a trace-sdk engine"):
        seal(b"no metadata here")
    place = b"trace-sha256:" + b"0" * 64
    with pytest.raises(EngineError, match="2 seals"):
        seal(place + place)


def record(**changes: Any) -> dict[str, str]:
    values: dict[str, Any] = {
        field.name: {"str": "x", "int": 8, "float": 0.5}.get(str(field.type), {}) for field in fields(Manifest)
    }
    known = {"format_version": 1, "input": "padded", "output": "uint8"}
    return {"trace_sdk": json.dumps({**values, **known, **changes})}


def test_the_record_of_these_tests_is_valid() -> None:
    assert Manifest.from_metadata(record(), "engine").multiple_of == 8


def test_engines_from_before_input_and_output_were_said() -> None:
    old = json.loads(record()["trace_sdk"])
    del old["input"], old["output"]
    manifest = Manifest.from_metadata({"trace_sdk": json.dumps(old)}, "engine")
    assert (manifest.input, manifest.output) == ("padded", "float32")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "is not a trace-sdk engine"),
        ({"trace_sdk": "{"}, "cannot be read"),
        ({"trace_sdk": "[]"}, "cannot be read"),
        ({"trace_sdk": "{}"}, "cannot be read"),
        (record(format_version=2), "Update trace-sdk"),
        (record(extra=1), "wrong at extra"),
        (record(name=3), "wrong at name"),
        (record(multiple_of="8"), "wrong at multiple_of"),
        (record(opset=True), "wrong at opset"),
        (record(quality=[]), "wrong at quality"),
        (record(threshold=1.5), "threshold"),
        (record(multiple_of=0), "sizes contradict"),
        (record(min_size=12), "sizes contradict"),
        (record(default_size=4096), "sizes contradict"),
        (record(input="video"), "'video'.*not known"),
        (record(output="int4"), "'int4'.*not known"),
    ],
)
def test_a_wrong_record_is_refused(metadata: dict[str, str], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        Manifest.from_metadata(metadata, "engine")


def test_a_bundled_name_must_hold_that_engine(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / f"{BUNDLED[0]}.onnx").write_bytes(make_engine(name="another"))
    monkeypatch.setattr("trace_sdk.engines.files", lambda package: tmp_path)
    with pytest.raises(EngineError, match="holds another"):
        open_engine(BUNDLED[0])
    (tmp_path / f"{BUNDLED[0]}.onnx").write_bytes(make_engine(name=BUNDLED[0]))
    assert open_engine(None, "cpu").manifest.name == BUNDLED[0]
    (tmp_path / f"{BUNDLED[0]}.onnx").unlink()
    with pytest.raises(EngineError, match="not in this installation"):
        open_engine(None)
