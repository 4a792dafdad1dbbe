"""Files, paths, objects and tensors that are no pictures: a defined message, quickly."""

from __future__ import annotations

import errno
import io
import os
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from numpy.typing import NDArray

from trace_sdk import EdgeDetector, TraceError
from trace_sdk.errors import DatasetError, ImageError
from trace_sdk.images import MAX_PIXELS, read_image
from trace_sdk.pretraining.cutouts import open_cutout
from trace_sdk.pretraining.photos import open_photo

PHOTO = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)


def encoded(form: str, picture: PIL.Image.Image | None = None, **options: Any) -> bytes:
    file = io.BytesIO()
    (picture or PIL.Image.fromarray(PHOTO)).save(file, form, **options)
    return file.getvalue()


def cut(form: str, share: float) -> bytes:
    data = encoded(form)
    return data[: int(len(data) * share)]


def frames(form: str, count: int = 3) -> bytes:
    pictures = [PIL.Image.fromarray(np.full((8, 8, 3), 60 * i, np.uint8)) for i in range(count)]
    return encoded(form, pictures[0], save_all=True, append_images=pictures[1:])


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, *more: bytes, rows: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + body


def bmp(width: int, height: int) -> bytes:
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + head


def gif(width: int, height: int) -> bytes:
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0, 0, 0) + b";"


def wrong_checksum() -> bytes:
    data = bytearray(encoded("PNG"))
    data[data.index(b"IDAT") + 20] ^= 0xFF
    return bytes(data)


BOMB = 50_000
# name of the file, its content, a part of the message
FILES: list[tuple[str, bytes, str]] = [
    ("empty.jpg", b"", "empty (0 bytes)"),
    ("empty.png", b"", "empty (0 bytes)"),
    ("one-byte.png", b"\x89", "damaged from its first bytes"),
    ("text.jpg", b"this is not a photo, just words\n", "is text"),
    ("short-text.jpg", b"hi", "is text"),
    ("page.jpg", b"<!DOCTYPE html><html>404</html>", "web page"),
    ("page2.png", b"\n  <html><body>", "web page"),
    ("drawing.png", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
    ("drawing2.png", b"<?xml version='1.0'?><svg/>", "SVG"),
    ("paper.jpg", b"%PDF-1.7\n\x00\x01", "PDF"),
    ("archive.jpg", b"PK\x03\x04" + bytes(60), "zip archive"),
    ("phone.jpg", b"\0\0\0\x18ftypheic" + bytes(50), "damaged or incomplete"),
    ("movie.png", b"\0\0\0\x18ftypmp42" + bytes(50), "video"),
    ("array.png", b"\x93NUMPY\x01\0" + bytes(60), "numpy.load"),
    ("zeros.jpg", bytes(5000), "is not a picture"),
    ("noise.jpg", np.random.default_rng(1).bytes(5000), "is not a picture"),
    ("icon.png", encoded("ICO"), "Readable formats: JPEG"),
    ("old.png", encoded("PPM"), "Readable formats: JPEG"),
    ("document.png", encoded("PDF"), "PDF"),
    ("magic.jpg", b"\xff\xd8\xff", "Readable formats"),
    ("magic.png", b"\x89PNG\r\n\x1a\n", "Readable formats"),
    ("magic.webp", b"RIFF\x10\0\0\0WEBPVP8 ", "damaged or incomplete"),
    ("magic.gif", b"GIF89a", "Readable formats"),
    ("magic.tif", b"II*\0", "Readable formats"),
    ("magic.bmp", b"BM", "Readable formats"),
    ("half.jpg", cut("JPEG", 0.5), "damaged or incomplete"),
    ("most.jpg", cut("JPEG", 0.9), "damaged or incomplete"),
    ("half.png", cut("PNG", 0.5), "damaged or incomplete"),
    ("most.png", cut("PNG", 0.9), "damaged or incomplete"),
    ("half.webp", cut("WEBP", 0.5), ": "),
    ("half.bmp", cut("BMP", 0.5), "damaged or incomplete"),
    ("half.tif", cut("TIFF", 0.5), ": "),
    ("half.gif", cut("GIF", 0.5), "damaged or incomplete"),
    ("checksum.png", wrong_checksum(), "damaged or incomplete"),
    ("no-pixels.png", png(8, 8), "damaged or incomplete"),
    ("zero-wide.png", png(0, 8), ": "),
    ("zero-high.png", png(8, 0), ": "),
    ("zero.gif", gif(0, 0), ": "),
    ("empty.gif", gif(8, 8), ": "),
    ("bomb.png", png(BOMB, BOMB), "Scale it down"),
    ("bomb2.png", png(10_000, 8_001), "10000x8001 has more than 80,000,000 pixels"),
    ("bomb3.png", png(9_000, 11_000), "80,000,000 pixels"),
    ("bomb.bmp", bmp(BOMB, BOMB), "Scale it down"),
    ("bomb.gif", gif(65535, 65535), ": "),
    ("strip.png", png(MAX_PIXELS + 1, 1), "Scale it down"),
    ("text-bomb.png", png(8, 8, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(80_000_000)))), ": "),
    ("animated.gif", frames("GIF"), "3 frames"),
    ("animated.webp", frames("WEBP", 4), "4 frames"),
    ("animated.png", frames("PNG", 2), "2 frames"),
    ("pages.tif", frames("TIFF"), "3 frames"),
]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("name", "data", "message"), FILES, ids=[str(case[0]) for case in FILES])
def test_a_bad_file(name: str, data: bytes, message: str, tmp_path: Path, detector: EdgeDetector) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    for image in (path, data, io.BytesIO(data)):
        with pytest.raises(ImageError) as caught:
            detector.run(image)
        assert message in str(caught.value)
    with pytest.raises(ImageError, match=re.escape(str(path))):
        read_image(path)


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_a_bomb_where_warnings_are_errors(detector: EdgeDetector) -> None:
    with pytest.raises(ImageError, match="80,000,000 pixels"):
        detector.run(png(9_000, 11_000))


def pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def link(path: Path, target: Path) -> Path:
    path.symlink_to(target)
    return path


PATHS: list[tuple[str, Callable[[Path], Any], str]] = [
    ("missing", lambda tmp: tmp / "missing.jpg", "no such file. Check the spelling"),
    ("missing text", lambda tmp: str(tmp / "missing.jpg"), "no such file"),
    ("address", lambda tmp: "https://example.org/a.jpg", "Download it first"),
    ("folder", lambda tmp: tmp, "is a folder"),
    ("empty name", lambda tmp: "", "is not the name of a picture"),
    ("null in the name", lambda tmp: "a\0b.jpg", "not a possible file name"),
    ("long name", lambda tmp: "a" * 5000 + ".jpg", "too long"),
    ("/dev/null", lambda tmp: "/dev/null", "not a regular file"),
    ("/dev/zero", lambda tmp: Path("/dev/zero"), "not a regular file"),
    ("pipe", lambda tmp: pipe(tmp / "pipe"), "not a regular file"),
    ("loop", lambda tmp: link(tmp / "loop", tmp / "loop"), "symbolic links"),
    ("dangling link", lambda tmp: link(tmp / "d.jpg", tmp / "gone"), "no such file"),
    ("file as folder", lambda tmp: (tmp / "f").write_bytes(b"") * 0 or tmp / "f" / "a.jpg", "Not a directory"),
]


@pytest.mark.parametrize(("name", "make", "message"), PATHS, ids=[str(case[0]) for case in PATHS])
def test_a_bad_path(
    name: str, make: Callable[[Path], Any], message: str, tmp_path: Path, detector: EdgeDetector
) -> None:
    with pytest.raises(ImageError) as caught:
        detector.run(make(tmp_path))
    assert message in str(caught.value)


def test_permission_denied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jpg").write_bytes(encoded("JPEG"))

    def denied(*args: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(ImageError, match=r"a\.jpg: Permission denied"):
        read_image(tmp_path / "a.jpg")


def closed() -> io.BytesIO:
    file = io.BytesIO(b"x")
    file.close()
    return file


def write_only() -> io.BufferedWriter:
    return io.BufferedWriter(io.BytesIO())


def closed_picture() -> PIL.Image.Image:
    picture = PIL.Image.open(io.BytesIO(encoded("PNG")))
    picture.close()
    return picture


def with_value(value: float, dtype: type = np.float32) -> Any:
    array: NDArray[Any] = np.full((8, 8, 3), 0.5, dtype)
    array[3, 3, 1] = value
    return array


OBJECTS: list[tuple[str, Callable[[], Any], str]] = [
    ("None", lambda: None, "cannot make a picture of NoneType"),
    ("number", lambda: 3, "cannot make a picture of int"),
    ("list of arrays", lambda: [PHOTO, PHOTO], "use run_batch"),
    ("list of lists", lambda: [[1, 2], [3, 4]], "cannot make a picture of list"),
    ("dict", lambda: {"image": PHOTO}, "cannot make a picture of dict"),
    ("class", lambda: np.ndarray, "cannot make a picture of type"),
    ("a path as bytes", lambda: b"photo.jpg", "is text"),
    ("no bytes", lambda: b"", "empty (0 bytes)"),
    ("text file", lambda: io.StringIO("abc"), "mode 'rb'"),
    ("closed file", closed, "cannot be read"),
    ("write-only file", write_only, "cannot be read"),
    ("file at its end", lambda: io.BytesIO(), "empty (0 bytes)"),
    ("closed PIL image", closed_picture, "damaged or incomplete"),
    ("PIL 0x5", lambda: PIL.Image.new("RGB", (0, 5)), "holds no pixels"),
    ("PIL animation", lambda: PIL.Image.open(io.BytesIO(frames("GIF"))), "3 frames"),
    ("PIL cut", lambda: PIL.Image.open(io.BytesIO(cut("JPEG", 0.5))), "damaged or incomplete"),
    ("PIL I over 16 bits", lambda: PIL.Image.fromarray(np.full((4, 4), 70000, np.int32)), "0 to 65535"),
    ("PIL I negative", lambda: PIL.Image.fromarray(np.full((4, 4), -1, np.int32)), "0 to 65535"),
    ("PIL F over 1", lambda: PIL.Image.fromarray(np.full((4, 4), 255, np.float32)), "Divide by 255"),
    ("PIL F NaN", lambda: PIL.Image.fromarray(np.full((4, 4), np.nan, np.float32)), "16 values are NaN"),
    ("NaN", lambda: with_value(np.nan), "1 values are NaN or infinite"),
    ("NaN float64", lambda: with_value(np.nan, np.float64), "NaN or infinite"),
    ("NaN float16", lambda: with_value(np.nan, np.float16), "NaN or infinite"),
    ("all NaN", lambda: np.full((4, 4), np.nan), "16 values"),
    ("inf", lambda: with_value(np.inf), "NaN or infinite"),
    ("minus inf", lambda: with_value(-np.inf), "NaN or infinite"),
    ("negative", lambda: with_value(-0.01), "expected [0, 1]"),
    ("over 1", lambda: with_value(1.001), "numpy.clip"),
    ("floats to 255", lambda: PHOTO.astype(np.float32), "Divide by 255"),
    ("int64", lambda: PHOTO.astype(np.int64), "dtype int64 has no defined range"),
    ("int32", lambda: PHOTO.astype(np.int32), "astype(numpy.uint8)"),
    ("int16", lambda: PHOTO.astype(np.int16), "dtype int16"),
    ("int8", lambda: np.zeros((4, 4), np.int8), "dtype int8"),
    ("uint32", lambda: PHOTO.astype(np.uint32), "dtype uint32"),
    ("uint64", lambda: PHOTO.astype(np.uint64), "dtype uint64"),
    ("float128", lambda: np.zeros((4, 4), np.longdouble), "has no defined range"),
    ("complex", lambda: np.zeros((4, 4), complex), "dtype complex128"),
    ("object", lambda: np.full((4, 4), None), "dtype object"),
    ("text array", lambda: np.full((4, 4), "a"), "dtype <U1"),
    ("dates", lambda: np.zeros((4, 4), "datetime64[s]"), "dtype datetime64"),
    ("records", lambda: np.zeros((4, 4), [("r", "u1"), ("g", "u1")]), "has no defined range"),
    ("masked", lambda: np.ma.masked_greater(PHOTO, 100), "masked array"),
    ("0-d", lambda: np.array(5, np.uint8), "shape () is no picture"),
    ("1-d", lambda: np.zeros(100, np.uint8), "shape (100,) is no picture"),
    ("4-d", lambda: PHOTO[None], "run_batch"),
    ("5-d", lambda: PHOTO[None, None], "is no picture"),
    ("CHW", lambda: PHOTO.transpose(2, 0, 1), "array.transpose(1, 2, 0)"),
    ("1HW", lambda: PHOTO[None, :, :, 0], "array.transpose(1, 2, 0)"),
    ("2 channels", lambda: PHOTO[:, :, :2], "has 2 channels"),
    ("5 channels", lambda: np.zeros((8, 8, 5), np.uint8), "has 5 channels"),
    ("no channels", lambda: np.zeros((8, 8, 0), np.uint8), "holds no pixels"),
    ("no rows", lambda: np.zeros((0, 8, 3), np.uint8), "holds no pixels"),
    ("no columns", lambda: np.zeros((8, 0), np.uint8), "holds no pixels"),
    ("too large", lambda: np.broadcast_to(np.uint8(0), (10_000, 8_001)), "80,000,000 pixels"),
]


@pytest.mark.parametrize(("name", "make", "message"), OBJECTS, ids=[str(case[0]) for case in OBJECTS])
def test_a_bad_object(name: str, make: Callable[[], Any], message: str, detector: EdgeDetector) -> None:
    with pytest.raises(ImageError) as caught:
        detector.run(make())
    assert message in str(caught.value)


TENSORS: list[tuple[str, Callable[[Any], Any], str]] = [
    ("batch", lambda torch: torch.zeros(1, 3, 8, 8), "run_batch"),
    ("HWC", lambda torch: torch.zeros(8, 8, 3), "permute(2, 0, 1)"),
    ("2 channels", lambda torch: torch.zeros(2, 8, 8), "has 2 channels"),
    ("1-d", lambda torch: torch.zeros(8), "is no picture"),
    ("0-d", lambda torch: torch.tensor(1.0), "is no picture"),
    ("no rows", lambda torch: torch.zeros(3, 0, 8), "holds no pixels"),
    ("floats to 255", lambda torch: torch.full((3, 8, 8), 255.0), "Divide by 255"),
    ("normalised", lambda torch: torch.full((3, 8, 8), -1.0), "expected [0, 1]"),
    ("NaN", lambda torch: torch.full((3, 8, 8), torch.nan), "192 values are NaN"),
    ("int64", lambda torch: torch.zeros(3, 8, 8, dtype=torch.int64), "dtype int64"),
    ("complex", lambda torch: torch.zeros(3, 8, 8, dtype=torch.complex64), "dtype complex64"),
    ("float8", lambda torch: torch.zeros(3, 8, 8, dtype=torch.float8_e4m3fn), "cannot be read"),
    ("meta", lambda torch: torch.zeros(3, 8, 8, device="meta"), "meta device"),
    ("sparse", lambda torch: torch.zeros(8, 8).to_sparse(), "to_dense"),
    ("sparse rows", lambda torch: torch.eye(8).to_sparse_csr(), "to_dense"),
    ("size", lambda torch: torch.zeros(1).shape, "cannot make a picture of Size"),
    ("dtype", lambda torch: torch.uint8, "cannot make a picture of dtype"),
]


@pytest.fixture(scope="module")
def torch_loaded() -> Any:
    import torch

    return torch


@pytest.mark.parametrize(("name", "make", "message"), TENSORS, ids=[str(case[0]) for case in TENSORS])
def test_a_bad_tensor(
    name: str, make: Callable[[Any], Any], message: str, torch_loaded: Any, detector: EdgeDetector
) -> None:
    with pytest.raises(ImageError) as caught:
        detector.run(make(torch_loaded))
    assert message in str(caught.value)


def test_every_message_says_what_to_do() -> None:
    for _, make, _ in OBJECTS:
        with pytest.raises(TraceError) as caught:
            read_image(make())
        assert len(str(caught.value).rstrip(".").split(". ")) >= 2, str(caught.value)


@pytest.mark.parametrize("name", ["chunk", "huge", "text", "empty"])
def test_a_training_photo_that_is_none(name: str, tmp_path: Path) -> None:
    png = encoded("PNG")
    data = {
        "chunk": png[:37] + b"\t\x00\x08\xa8" + png[41:],  # Pillow raises SyntaxError
        "huge": b"BM" + struct.pack("<IIIIiiHHIIiiII", 200, 0, 54, 40, 90_000, 90_000, 1, 24, 0, 0, 0, 0, 0, 0),
        "text": b"hello",
        "empty": b"",
    }[name]
    (tmp_path / "photo.png").write_bytes(data)
    for read in (open_photo, open_cutout):
        with pytest.raises(DatasetError, match=r"photo\.png.*Remove it or replace it"):
            read(tmp_path / "photo.png")


def test_a_training_photo_is_upright(tmp_path: Path) -> None:
    sideways = PIL.Image.new("RGB", (64, 48))
    exif = sideways.getexif()
    exif[0x0112] = 6
    sideways.save(tmp_path / "photo.jpg", exif=exif)
    assert open_photo(tmp_path / "photo.jpg").size == (48, 64)
