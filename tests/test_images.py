"""Pictures that are accepted, and the RGB they must give."""

from __future__ import annotations

import io
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL.PngImagePlugin import PngInfo

from trace_sdk.errors import ImageError
from trace_sdk.images import read_image, upright_size

PHOTO = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)
GREY = PHOTO[:, :, 0]
HEIC = Path(__file__).parent / "pictures" / "turned.heic"


def encoded(picture: PIL.Image.Image, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


def as_rgb(grey: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.repeat(grey[:, :, None], 3, axis=2)


def test_every_kind_of_object_gives_the_same_picture(tmp_path: Path) -> None:
    import torch

    data = encoded(PIL.Image.fromarray(PHOTO))
    path = tmp_path / "photo.jpg"  # a PNG under another name
    path.write_bytes(data)
    tensor = torch.from_numpy(PHOTO).permute(2, 0, 1)
    with path.open("rb") as file:
        kinds: list[Any] = [
            path, str(path), data, bytearray(data), memoryview(data), io.BytesIO(data), file,
            PIL.Image.open(path), PIL.Image.fromarray(PHOTO), PHOTO, np.asfortranarray(PHOTO), PHOTO[::-1][::-1],
            PHOTO / 255, (PHOTO / 255).astype(np.float32), PHOTO.astype(np.uint16) * 257,
            PHOTO.astype(">u2") * 257, np.dstack([PHOTO, np.full_like(GREY, 255)]),
            tensor, tensor.double() / 255, (tensor.float() / 255).requires_grad_(), torch.nn.Parameter(tensor / 255),
        ]  # fmt: skip
        for kind in kinds:
            image = read_image(kind)
            np.testing.assert_array_equal(image.rgb, PHOTO)
            assert image.rgb.dtype == np.uint8
            assert image.rgb.flags.c_contiguous and not image.rgb.flags.writeable


def test_the_callers_array_is_not_shared() -> None:
    array = PHOTO.copy()
    image = read_image(array)
    array[:] = 0
    assert array.flags.writeable
    np.testing.assert_array_equal(image.rgb, PHOTO)


@pytest.mark.parametrize(
    "array",
    [
        GREY, GREY[:, :, None], GREY / 255, GREY.astype(np.uint16) << 8, np.float32(GREY) / 255,
        GREY.astype(np.uint16) << 8 | 255, np.asmatrix(GREY),
    ],
)  # fmt: skip
def test_grey_arrays(array: NDArray[Any]) -> None:
    np.testing.assert_array_equal(read_image(array).rgb, as_rgb(GREY))


def test_half_precision_and_bool() -> None:
    import torch

    half = read_image((GREY / 255).astype(np.float16)).rgb
    assert np.abs(half.astype(int) - as_rgb(GREY)).max() <= 1
    bfloat = read_image(torch.from_numpy(GREY / 255).bfloat16()).rgb
    assert np.abs(bfloat.astype(int) - as_rgb(GREY)).max() <= 1
    mask = GREY > 100
    np.testing.assert_array_equal(read_image(mask).rgb, as_rgb(np.where(mask, 255, 0).astype(np.uint8)))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_gives_the_upright_picture(orientation: int, form: str) -> None:
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :16] = 255
    upright[16:, 32:, 0] = 255
    rows, columns = {
        1: (1, 1), 2: (1, -1), 3: (-1, -1), 4: (-1, 1), 5: (1, 1), 6: (1, -1), 7: (-1, -1), 8: (-1, 1)
    }[orientation]  # fmt: skip
    # What a camera stores for each value, by the definition of row 0 and column 0 in the EXIF standard.
    stored = upright[::rows, ::columns]
    if orientation >= 5:
        stored = stored.transpose(1, 0, 2)
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    lossless: dict[str, dict[str, Any]] = {
        "JPEG": {"quality": 100, "subsampling": 0},
        "WEBP": {"lossless": True},
    }
    data = encoded(PIL.Image.fromarray(np.ascontiguousarray(stored)), form, exif=exif, **lossless.get(form, {}))
    for image in (data, PIL.Image.open(io.BytesIO(data))):
        rgb = read_image(image).rgb
        assert rgb.shape == upright.shape
        assert np.abs(rgb.astype(int) - upright).max() <= 40


def test_sixteen_bits_keep_256_levels() -> None:
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16)
    expected = as_rgb(levels.astype(np.uint8))
    stored = levels << 8 | 127
    pictures = [
        PIL.Image.fromarray(stored),
        PIL.Image.fromarray(stored.astype(np.int32)),
        PIL.Image.frombytes("I;16B", (16, 16), stored.astype(">u2").tobytes()),
        PIL.Image.fromarray((levels / 255).astype(np.float32)),
    ]
    assert [picture.mode for picture in pictures] == ["I;16", "I", "I;16B", "F"]
    for picture in pictures:
        np.testing.assert_array_equal(read_image(picture).rgb, expected)
    np.testing.assert_array_equal(read_image(encoded(pictures[0])).rgb, expected)
    np.testing.assert_array_equal(read_image(encoded(pictures[0], "TIFF")).rgb, expected)


def test_sixteen_bit_colour_keeps_256_levels() -> None:
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16) << 8 | 200
    pixels = np.dstack([levels, levels[::-1], levels.T]).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    expected = (pixels >> 8).astype(np.uint8)
    np.testing.assert_array_equal(read_image(png(16, 16, depth=16, colour=2, rows=rows)).rgb, expected)


def test_transparency_is_composited_on_white() -> None:
    alpha = np.array([[0, 128, 255]], np.uint8)
    colour = np.full((1, 3, 3), 100, np.uint8)
    expected = [255, 177, 100]
    rgba = np.dstack([colour, alpha])
    la = PIL.Image.merge("LA", [PIL.Image.fromarray(colour[:, :, 0]), PIL.Image.fromarray(alpha)])
    for image in (rgba, rgba / 255, PIL.Image.fromarray(rgba), la, encoded(la), encoded(PIL.Image.fromarray(rgba))):
        assert np.abs(read_image(image).rgb[0, :, 0].astype(int) - expected).max() <= 1
    premultiplied = PIL.Image.fromarray(rgba).convert("RGBa")
    assert np.abs(read_image(premultiplied).rgb[0, :, 0].astype(int) - expected).max() <= 2


@pytest.mark.parametrize(("mode", "clear"), [("P", 1), ("L", 90), ("RGB", (90, 90, 90)), ("1", 255), ("I;16", 90 << 8)])
def test_a_transparent_colour_is_white(mode: str, clear: Any) -> None:
    if mode == "P":
        picture = PIL.Image.fromarray(np.array([[0, 1]], np.uint8))
        picture.putpalette([10, 10, 10, 90, 90, 90])
        dark = 10
    elif mode == "1":
        picture = PIL.Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1")
        dark = 0
    elif mode == "I;16":
        picture = PIL.Image.fromarray(np.array([[10 << 8, 90 << 8]], np.uint16))
        dark = 10
    else:
        picture = PIL.Image.fromarray(np.array([[10, 90]], np.uint8)).convert(mode)
        dark = 10
    rgb = read_image(encoded(picture, transparency=clear)).rgb
    assert rgb[0].tolist() == [[dark] * 3, [255] * 3]


@pytest.mark.parametrize("mode", ["1", "L", "P", "PA", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "HSV", "RGBX"])
def test_modes_of_pillow(mode: str) -> None:
    white = PIL.Image.new("RGB", (6, 4), "white")
    picture = white.convert("P").convert("PA") if mode == "PA" else white.convert(mode)
    rgb = read_image(picture).rgb
    assert rgb.shape == (4, 6, 3) and rgb.min() >= 253


def test_cmyk_jpeg_is_not_inverted() -> None:
    red = PIL.Image.new("RGB", (16, 16), (200, 20, 30))
    rgb = read_image(encoded(red.convert("CMYK"), "JPEG", quality=95)).rgb
    assert np.abs(rgb.astype(int) - [200, 20, 30]).max() <= 6


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF"])
def test_formats_and_odd_sizes(form: str) -> None:
    for size in [(1, 1), (1, 500), (500, 1), (63, 111)]:
        assert read_image(encoded(PIL.Image.new("RGB", size, "teal"), form)).rgb.shape == (size[1], size[0], 3)


def test_a_phones_heic_is_read_upright_and_pillow_stays_as_it_was() -> None:
    pytest.importorskip("pi_heif", reason="the extra heic is not installed")
    # A picture of 96×64 stored on its side with an `irot` box, as iPhones do.
    upright = np.zeros((64, 96, 3), np.uint8)
    upright[:32, :32] = 255
    upright[32:, 64:, 0] = 255
    data = HEIC.read_bytes()
    for image in (HEIC, data, io.BytesIO(data)):
        assert np.abs(read_image(image).rgb.astype(int) - upright).max() <= 2
    assert upright_size(data, "turned.heic") == (96, 64)
    with pytest.raises(ImageError, match="damaged or incomplete"):
        read_image(data[:-50])
    with pytest.raises(PIL.UnidentifiedImageError):
        PIL.Image.open(HEIC)


def test_a_heic_without_its_package_names_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pi_heif", None)
    with pytest.raises(ImageError, match=r'turned\.heic: is a HEIC photo\. Run: pip install "trace-sdk\[heic\]"'):
        read_image(HEIC)
    with pytest.raises(ImageError, match=r"phone: is a HEIC photo\."):
        upright_size(HEIC.read_bytes(), "phone")


def test_the_photo_of_a_phones_mpo_is_taken() -> None:
    main, second = PIL.Image.new("RGB", (16, 8), "red"), PIL.Image.new("RGB", (16, 8), "blue")
    data = encoded(main, "MPO", save_all=True, append_images=[second])
    assert read_image(data).rgb[0, 0, 0] > 240


def test_text_and_profiles_do_not_matter() -> None:
    text = PngInfo()
    text.add_text("comment", "x" * 1000, zip=True)
    data = encoded(PIL.Image.fromarray(PHOTO), pnginfo=text, icc_profile=b"no profile at all")
    np.testing.assert_array_equal(read_image(data).rgb, PHOTO)


def test_the_name_in_messages() -> None:
    with pytest.raises(ImageError, match=r"^image 7: "):
        read_image(np.zeros(3), "image 7")
    with pytest.raises(ImageError, match=r"^array: "):
        read_image(np.zeros(3))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_files_are_read_or_refused(data: st.DataObject) -> None:
    form = data.draw(st.sampled_from(["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"]))
    file = bytearray(encoded(PIL.Image.fromarray(PHOTO), form))
    for _ in range(data.draw(st.integers(1, 4))):
        file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert read_image(bytes(file)).rgb.ndim == 3
    except ImageError as error:
        assert str(error).startswith("bytes: ")


def png(width: int, height: int, depth: int = 8, colour: int = 2, rows: bytes = b"") -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body
