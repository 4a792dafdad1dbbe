"""A library that carries machine code for one GPU alone, on a made-up ELF file."""

from __future__ import annotations

import io
import runpy
import struct
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks/gpu/pack_onnxruntime.py"


def entry(kind: int, architecture: int, payload: bytes) -> bytes:
    head = struct.pack("<HHIQI", kind, 0, 64, len(payload), len(payload)).ljust(28, b"\0")
    return (head + struct.pack("<I", architecture)).ljust(64, b"\0") + payload


def library(*entries: bytes) -> bytes:
    """An ELF file with two sections: .nv_fatbin, which holds a container of the entries, and the sections' names."""
    body = b"".join(entries)
    container = struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body
    names = b"\0.nv_fatbin\0.shstrtab\0"
    code_at, names_at = 64, 64 + len(container)
    table_at = names_at + len(names)
    head = bytearray(b"\x7fELF".ljust(64, b"\0"))
    struct.pack_into("<Q", head, 0x28, table_at)
    struct.pack_into("<HHH", head, 0x3A, 64, 2, 1)
    table = b"".join(
        struct.pack("<IIQQQQ", name, 1, 0, 0, where, size).ljust(64, b"\0")
        for name, where, size in ((1, code_at, len(container)), (12, names_at, len(names)))
    )
    return bytes(head) + container + names + table


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["pack_onnxruntime.py", *map(str, arguments)])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def wheel(tmp_path: Path, code: bytes) -> Path:
    file = tmp_path / "ort.whl"
    with zipfile.ZipFile(file, "w") as content:
        content.writestr("onnxruntime/capi/libonnxruntime_providers_cuda.so", code)
        content.writestr("onnxruntime/capi/libonnxruntime_providers_tensorrt.so", b"not wanted")
        content.writestr("onnxruntime/__init__.py", b"x = 1\n")
    return file


def test_one_architecture_s_code_stays_and_nothing_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = entry(2, 80, b"A" * 40), entry(2, 90, b"B" * 24), entry(1, 90, b"ptx" * 8)
    code = library(*entries)
    run(monkeypatch, wheel(tmp_path, code), tmp_path / "out")
    packed = b"".join(file.read_bytes() for file in sorted((tmp_path / "out").iterdir()))
    with tarfile.open(fileobj=io.BytesIO(packed), mode="r:xz") as tar:
        assert tar.getnames() == ["onnxruntime/capi/libonnxruntime_providers_cuda.so", "onnxruntime/__init__.py"]
        stripped = tar.extractfile(tar.getnames()[0])
        assert stripped and stripped.read() == code.replace(b"A" * 40, bytes(40)).replace(b"ptx" * 8, bytes(24))


def test_a_gpu_that_the_library_has_no_code_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=r"has code for \[80\], not for 100"):
        run(monkeypatch, wheel(tmp_path, library(entry(2, 80, b"A" * 8))), tmp_path / "out", "--capability", 100)
    assert not (tmp_path / "out").exists()


def test_entries_of_an_unknown_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = bytearray(entry(2, 90, b"B" * 24))
    struct.pack_into("<I", short, 4, 8)
    with pytest.raises(SystemExit, match="not of the form"):
        run(monkeypatch, wheel(tmp_path, library(bytes(short))), tmp_path / "out")
